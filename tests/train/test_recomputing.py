"""Gradient checkpointing: the same gradients and statistics out of less memory."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctt import methods, models
from ctt.data.digits import INFO
from ctt.errors import UserError
from ctt.methods.base import Setup
from ctt.settings import Settings, update, validate
from ctt.train.memory import ACTIVATIONS, estimate
from ctt.train.recomputing import recompute_blocks
from tests.train.steps import make, run

AGAIN = {"train": {"gradient_checkpointing": True}}
NETWORKS = [
    ("small", "", 0.0),
    ("deeplabv3plus", "resnet18", 0.3),  # and dropout in the head
    ("deeplabv2", "mobilenetv2_050", 0.0),  # batch norms of timm with an activation in them
    ("vit", "test_vit", 0.3),
    ("dpt", "test_vit", 0.3),
]


def of_a_step(network: nn.Module) -> dict[str, Tensor]:
    """Return gradients and buffers after one backward pass with random numbers in it."""
    torch.manual_seed(5)
    images = torch.randn(2, 3, 65, 65)
    network(images).logits.square().sum().backward()
    found = {f"gradient {name}": p.grad for name, p in network.named_parameters()}
    return {**found, **dict(network.named_buffers())}  # type: ignore[dict-item]


@pytest.mark.parametrize(("name", "backbone", "rate"), NETWORKS)
def test_gradients_and_statistics_are_equal_bit_by_bit(
    name: str, backbone: str, rate: float
) -> None:
    torch.manual_seed(0)
    plain = models.build(name, 5, 16, 8, backbone, drop_path=rate).train()
    again = copy.deepcopy(plain)
    recompute_blocks([again])
    copied = copy.deepcopy(again)  # as teachers and rounds do
    expected = of_a_step(plain)
    for network in (again, copied):
        found = of_a_step(network)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
    norms = [m for m in again.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(int(m.num_batches_tracked or 0) == 1 and m.momentum == 0.1 for m in norms)


def test_steps_of_a_run_are_equal_in_mixed_precision_too(tiny: Settings) -> None:
    for amp in ("off", "bf16"):
        settings = update(tiny, {"train": {"amp": amp}}, "test")
        plain, again = make(settings), make(update(settings, AGAIN, "test"))
        for one, other in zip(run(plain, 4, 3), run(again, 4, 3), strict=True):
            assert {k: float(v) for k, v in one.items()} == {k: float(v) for k, v in other.items()}
        state = again.method.state_dict()
        assert all(torch.equal(state[n], x) for n, x in plain.method.state_dict().items())


def peak(body: Any) -> int:
    """Return the bytes that are held at most while a function runs, beyond those before it."""
    gc.collect()  # what an earlier call left in cycles would be freed, and count, in this one
    with torch.profiler.profile(profile_memory=True) as profile:
        body()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("name", "backbone"), [("vit", "test_vit2"), ("deeplabv2", "mobilenetv2_050")]
)
def test_memory_falls(name: str, backbone: str) -> None:
    def body(network: nn.Module) -> int:
        images = torch.randn(2, 3, 160, 160)
        network.train()
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
        return peak(lambda: network(images).logits.sum().backward())

    plain = models.build(name, 5, 16, backbone=backbone)
    again = copy.deepcopy(plain)
    recompute_blocks([again])
    assert body(again) < 0.6 * body(plain)


def test_the_estimate_falls_with_it(tiny: Settings) -> None:
    model = {"name": "vit", "backbone": ["test_vit2"], "features": 16}
    size = {"batch_size": 4, "crop": [96, 96]}
    off = {"hc": 0, "lc": 0, "confidence_weight": "none"}
    tiny = update(tiny, {"model": model, "data": size, "loss": off}, "test")
    images = torch.zeros(4, 3, 96, 96, dtype=torch.uint8)
    label, padding = (torch.zeros(4, 96, 96, dtype=torch.uint8) for _ in range(2))
    found = []
    for change in ({}, AGAIN):
        settings = update(tiny, change, "test")
        about = methods.get(settings.method)
        method = about.load()(Setup(settings, INFO, 1, 6))
        parts = estimate(settings, method, INFO, about)
        found.append(parts[ACTIVATIONS])
        engine = make(settings, 1)
        measured = peak(lambda e=engine: e((images, label), (images, padding)))
        assert parts[ACTIVATIONS] + parts["gradients"] == pytest.approx(measured, rel=0.2)
    assert found[1] < 0.6 * found[0]


def test_what_cannot_be_computed_again_is_told(tiny: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="repeats no blocks"):
        recompute_blocks([nn.Linear(1, 1)])
    for other in ({"compile": "blocks"}, {"cuda_graph": True}):
        settings = update(tiny, {"train": {"gradient_checkpointing": True, **other}}, "test")
        with pytest.raises(UserError, match="excludes"):
            validate(settings)
