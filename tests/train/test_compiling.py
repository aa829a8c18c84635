from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ctt import models
from ctt.errors import UserError
from ctt.settings import Settings, update
from ctt.train.compiling import compile_networks, repeated_blocks, uncompiled
from ctt.train.loop import train
from tests.train.steps import make, student


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


class Tower(nn.Module):
    """Three blocks of one kind and two of another, each between layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Sequential(Block(4), Block(4), Block(4))
        self.widen = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 1))
        self.wide = nn.ModuleList([Block(6), Block(6)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(self.narrow(x))
        for block in self.wide:
            x = block(x)
        return x


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that torch.compile was given."""
    graphs: list[str] = []

    def note(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    return graphs


@pytest.mark.parametrize(
    ("name", "backbone", "classes"),
    [
        ("deeplabv2", "resnet18", {"BasicBlock": 8}),
        ("deeplabv3plus", "resnet50", {"Bottleneck": 16}),
        ("deeplabv3plus", "tf_efficientnet_lite0", {"InvertedResidual": 14}),
        ("vit", "vit_tiny_patch16_224", {"Block": 12}),
        ("small", "", {"Residual": 6}),
    ],
)
def test_blocks_of_the_networks(name: str, backbone: str, classes: dict[str, int]) -> None:
    network = models.build(name, num_classes=3, features=16, width=8, backbone=backbone)
    found = [type(block).__name__ for block in repeated_blocks(network)]
    assert {kind: found.count(kind) for kind in found} == classes


def test_each_kind_of_block_is_compiled_once(compiled: list[str]) -> None:
    networks = [Tower(), Tower()]
    compile_networks([*networks], "blocks")
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    for network in networks:
        network(x)
    assert len(compiled) == 2  # of width 4, of width 6


def test_networks_without_blocks_are_compiled_whole(compiled: list[str]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    compile_networks([network], "blocks")
    network(torch.randn(1, 3, 4, 4))
    assert len(compiled) == 1


def test_many_kinds_are_all_compiled(compiled: list[str]) -> None:
    blocks = [nn.Sequential(Block(width), Block(width)) for width in range(1, 21)]
    network = nn.ModuleList(blocks)
    compile_networks([network], "blocks")
    for width, pair in enumerate(blocks, 1):
        pair(torch.randn(1, width, 4, 4, requires_grad=True))
    assert len(compiled) == 20


@pytest.mark.parametrize("how", ["network", "blocks"])
def test_other_sizes_run_as_written(compiled: list[str], how: str) -> None:
    network = Tower()
    compile_networks([network], how)
    network(torch.randn(1, 4, 8, 8))
    before = len(compiled)
    with uncompiled(how):
        x = torch.randn(1, 4, 6, 5)
        assert torch.equal(network(x), network(x))
    assert len(compiled) == before
    network(torch.randn(1, 4, 8, 8))
    assert len(compiled) == before
    network(torch.randn(1, 4, 7, 8))
    assert len(compiled) > before


@pytest.mark.parametrize("how", ["off", "network", "blocks"])
def test_halves_of_a_network_are_compiled_as_the_network_is(
    compiled: list[str], tiny: Settings, how: str
) -> None:
    step = make(update(tiny, {"train": {"compile": how}}, "test"), 1).step
    step.whole = False
    network = student(tiny)
    images = torch.rand(2, 3, 24, 24)
    stages = step.encode(network, images)
    assert len(compiled) == (how == "network")
    out = step.decode(network, stages)
    assert len(compiled) == 2 * (how == "network")
    assert torch.equal(out.logits, step.forward(network, images).logits)


def test_a_network_keeps_the_names_of_its_weights(compiled: list[str]) -> None:
    network = Tower()
    names = list(network.state_dict())
    compile_networks([network], "blocks")
    assert list(network.state_dict()) == names


def test_missing_compiler_is_named(tiny: Settings, tmp_path: Path) -> None:
    from torch._inductor import config

    torch._dynamo.reset()
    settings = update(tiny, {"train": {"compile": "network", "device": "cpu"}}, "test")
    missing = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with (
        config.patch(missing),
        pytest.raises(UserError, match=r"found no compiler .* Install one"),
    ):
        train(settings, out=tmp_path / "run")
