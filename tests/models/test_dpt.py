"""DPT on vision transformers, against a rendering of both that is written from their papers."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ctt import models
from ctt.data.dataset import DatasetInfo
from ctt.errors import UserError
from ctt.inference.export import TOLERANCE, export
from ctt.inference.load import TrainedNetworks
from ctt.inference.predict import predictor
from ctt.methods import losses
from ctt.models import weights
from ctt.models.base import Grid, upsample
from ctt.models.dpt import blocks_of, widths
from ctt.settings import EvalSettings, Settings
from tests.models.tiny import PATCH14, ROTARY

CLASS_TOKEN = "test_vit"  # patches of 16, position embeddings of the class token too
INFO = DatasetInfo("x", ("a", "b", "c"), ((0, 0, 0),) * 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def network_of(backbone: str, **options: Any) -> Any:
    torch.manual_seed(0)
    network: Any = models.build("dpt", 3, backbone=backbone, **options).double().eval()
    for parameter in network.parameters():  # also those that start from 0
        torch.nn.init.normal_(parameter, std=0.15)
    return network


class Rendering:
    """A network's numbers out of its tensors, by loops over what the papers write down."""

    def __init__(self, network: Any) -> None:
        self.w: dict[str, Tensor] = network.state_dict()
        self.network, self.patch = network, network.multiple
        self.heads = network.backbone.blocks[0].attn.num_heads
        self.eps = network.backbone.norm.eps

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.w[f"{name}.weight"].flatten(1).T
        bias = self.w.get(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        middle = x - x.mean(dim=-1, keepdim=True)
        unit = middle / (middle.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        return unit * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def tokens(self, images: Tensor) -> Tensor:
        """Return class token, registers and patches of one image with their positions."""
        p, (_, _, height, width) = self.patch, images.shape
        rows = [
            images[0, :, y : y + p, x : x + p].flatten()
            for y in range(0, height, p)
            for x in range(0, width, p)
        ]
        found = self.linear("backbone.patch_embed.proj", torch.stack(rows))
        places = self.w["backbone.pos_embed"][0]
        registers = self.w.get("backbone.reg_token")
        first = self.w["backbone.cls_token"][0]
        if registers is not None:
            return torch.cat([first, registers[0], found + places])
        return torch.cat([first, found]) + places

    def block(self, i: int, x: Tensor) -> Tensor:
        name, n, dim = f"backbone.blocks.{i}", len(x), x.shape[1]
        q, k, v = (
            self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x))
            .view(n, 3, self.heads, dim // self.heads)
            .unbind(dim=1)
        )
        out = torch.zeros_like(q)
        for h in range(self.heads):
            score = q[:, h] @ k[:, h].T / math.sqrt(dim // self.heads)
            out[:, h] = score.softmax(dim=1) @ v[:, h]
        x = x + self.linear(f"{name}.attn.proj", out.flatten(1)) * self.scale(f"{name}.ls1")
        hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return x + self.linear(f"{name}.mlp.fc2", hidden) * self.scale(f"{name}.ls2")

    def scale(self, name: str) -> Tensor | float:
        return self.w.get(f"{name}.gamma", 1.0)  # type: ignore[arg-type]

    def maps(self, images: Tensor, blocks: tuple[int, ...]) -> list[Tensor]:
        x, found = self.tokens(images), []
        grid = [side // self.patch for side in images.shape[-2:]]
        for i in range(len(self.network.backbone.blocks)):
            x = self.block(i, x)
            if i in blocks:
                patches = self.norm("backbone.norm", x)[-grid[0] * grid[1] :]
                found.append(patches.T.reshape(1, -1, *grid))
        return found

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def blow_up(self, name: str, x: Tensor, times: int) -> Tensor:
        """Return a transposed convolution whose stride is its kernel: a square for each cell."""
        squares = torch.einsum("bchw,cdyx->bdhywx", x, self.w[f"{name}.weight"])
        b, d, h, _, w, _ = squares.shape
        return squares.reshape(b, d, h * times, w * times) + self.w[f"{name}.bias"].view(-1, 1, 1)

    def residual(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.first", x.clamp(min=0))
        return x + self.conv(f"{name}.second", y.clamp(min=0))

    def logits(self, images: Tensor, blocks: tuple[int, ...]) -> Tensor:
        """Return logits of whole patches: with aligned corners from 8 cells a patch."""
        x = [self.conv(f"project.{i}", m) for i, m in enumerate(self.maps(images, blocks))]
        x[0], x[1] = self.blow_up("resize.0", x[0], 4), self.blow_up("resize.1", x[1], 2)
        x[3] = self.conv("resize.3", x[3])[:, :, ::2, ::2]
        x = [self.conv(f"reduce.{i}", m) for i, m in enumerate(x)]
        path = x[3]
        for i, finer in enumerate((x[2], x[1], x[0], None)):
            if i > 0:
                path = path + self.residual(f"fusion.{i}.own", x[3 - i])
            path = self.residual(f"fusion.{i}.both", path)
            size = [2 * n for n in path.shape[-2:]] if finer is None else list(finer.shape[-2:])
            path = self.conv(f"fusion.{i}.out", corners(path, size))
        logits = self.conv("classifier", self.conv("merge.0", path).clamp(min=0))
        return corners(logits, list(images.shape[-2:]))


def corners(x: Tensor, size: list[int]) -> Tensor:
    """Return x at another size, its outermost cells in the corners, between the four around."""
    for axis, n in zip((2, 3), size, strict=True):
        m = x.shape[axis]
        place = torch.arange(n, dtype=x.dtype) * (m - 1) / (n - 1)
        before = place.long().clamp(max=max(0, m - 2))
        share = (place - before).view(-1, *[1] * (3 - axis))
        after = (before + 1).clamp(max=m - 1)
        x = x.index_select(axis, before) * (1 - share) + x.index_select(axis, after) * share
    return x


@pytest.mark.parametrize("size", [(64, 48), (48, 80)])
@pytest.mark.parametrize(
    ("backbone", "blocks"), [(CLASS_TOKEN, (0, 2, 3, 5)), (PATCH14, (0, 1, 2, 3))]
)
def test_every_number_is_that_of_the_papers(
    backbone: str, blocks: tuple[int, ...], size: tuple[int, int]
) -> None:
    patch = 14 if backbone == PATCH14 else 16
    size = (size[0] // 16 * patch, size[1] // 16 * patch)
    network = network_of(backbone, image=size)
    assert tuple(network.taken) == blocks
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = upsample(network(images).logits, size, network.grid)
        expected = Rendering(network).logits(images, blocks)
    assert found.shape == (1, 3, *size)
    assert expected.std() > 0.03
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backbone", [CLASS_TOKEN, PATCH14, ROTARY])
def test_what_the_head_reads_is_what_timm_gives(backbone: str) -> None:
    network = network_of(backbone)
    whole: Any = timm.create_model(backbone, img_size=64 if "16" in backbone else 56).eval()
    if backbone == CLASS_TOKEN:
        whole = timm.create_model(backbone, dynamic_img_size=True).eval()
    found = weights.named(network.state_dict(), whole.state_dict())
    assert {n for n in network.state_dict() if n.startswith("backbone.")} <= found.keys()
    network.float().backbone.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(1, 3, *[4 * network.multiple] * 2)
    tokens = whole.forward_features(images)[:, whole.num_prefix_tokens :]
    torch.testing.assert_close(network.encode(images)[-1].flatten(2).mT, tokens)


def test_blocks_and_widths_are_those_published() -> None:
    for depth, blocks in (
        (12, (2, 5, 8, 11)),
        (24, (4, 11, 17, 23)),
        (40, (9, 19, 29, 39)),
    ):
        assert blocks_of(depth) == blocks
    assert widths(384) == (64, (48, 96, 192, 384))
    assert widths(768) == (128, (96, 192, 384, 768))
    assert widths(1024) == (256, (256, 512, 1024, 1024))
    assert widths(1536) == (384, (1536,) * 4)


@pytest.mark.parametrize(
    ("backbone", "millions"),
    [
        ("vit_small_patch14_dinov2", 24.8),
        ("vit_base_patch14_dinov2", 97.5),
        ("vit_large_patch14_dinov2", 335.6),
    ],
)
def test_parameters_are_as_many_as_published(backbone: str, millions: float) -> None:
    with torch.device("meta"):
        network = models.build("dpt", 21, backbone=backbone)
    dim = network.feature_channels
    unread = 2 * (9 * dim + 1) * dim  # two convolutions that the program makes and does not use
    count = sum(p.numel() for p in network.parameters()) + unread
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("backbone", [CLASS_TOKEN, PATCH14, ROTARY])
def test_images_of_any_size(backbone: str) -> None:
    network = models.build("dpt", 5, backbone=backbone, image=(56, 56))
    for size in ((56, 80), (33, 65)):
        out = network(torch.randn(1, 3, *size))
        cells = [-(-side // network.multiple) * 8 for side in size]
        assert out.features.shape == (1, network.feature_channels, *cells)
        assert upsample(out.logits, size, network.grid).shape == (1, 5, *size)
        label = torch.zeros(1, *size, dtype=torch.int64)
        assert losses.to_grid(label, network.grid).shape == (1, *cells)
        network.zero_grad()
        out.logits.sum().backward()
        assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("grid", [Grid(14, cells=8), Grid(16, cells=8)])
def test_labels_of_cells_are_those_under_them(grid: Grid) -> None:
    """A map of places, read at the cells and spread again, is itself."""
    for length in (grid.stride * 3, grid.stride * 3 - 5):
        place = torch.arange(length)
        found = grid.pixels(length, place.device)
        cells = 24 * [0]
        for r in range(24):
            cells[r] = min(round(r * (3 * grid.stride - 1) / 23), length - 1)
        assert found.tolist() == cells


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("grid", [Grid(14, cells=8), Grid(16, cells=8), Grid.of_patches(7)])
def test_cells_of_a_coarser_grid_are_the_nearest(grid: Grid, every: int) -> None:
    coarse = Grid(14, cells=8).every(every)
    assert coarse == Grid(2 if every == 1 else 7)
    size, places = (112, 224), []
    for side in size:
        count = -(-side // grid.stride) * max(1, grid.cells)
        step = (side - 1) / (count - 1) if grid.cells else grid.stride
        places.append(torch.arange(count) * step + grid.origin)
    rows, columns = torch.meshgrid(*places, indexing="ij")
    small = [-(-side // coarse.stride) for side in size]
    found = losses.coarsen(torch.stack([rows, columns])[None], grid, coarse, small)
    assert found.shape == (1, 2, *small)
    for axis in (0, 1):
        wanted = torch.arange(small[axis]) * coarse.stride
        off = (found[0, axis].movedim(axis, 0) - wanted[:, None]).abs()
        if grid.origin == 0:  # else the outermost pixels are before the first cell
            assert off.max() <= (grid.distance + 0.01) / 2


def test_position_embeddings_are_resized_once(tmp_path: Path) -> None:
    """Loaded for the crop they are what timm interpolates for every image of its size."""
    crop = (48, 80)
    source = timm.create_model(CLASS_TOKEN)
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    network: Any = models.build("dpt", 3, backbone=CLASS_TOKEN, image=crop).eval()
    told = weights.start_from(network, str(tmp_path / "net.safetensors"))
    assert "backbone.pos_embed is interpolated from 101 positions to 16" in told
    whole = timm.create_model(CLASS_TOKEN, dynamic_img_size=True).eval()
    whole.load_state_dict(source.state_dict())
    images = torch.randn(1, 3, *crop)
    tokens = whole.forward_features(images)[:, 1:]
    torch.testing.assert_close(network.encode(images)[-1].flatten(2).mT, tokens)
    rebuilt = models.build(num_classes=3, **network.options)
    rebuilt.load_state_dict(network.state_dict())


def test_images_fit_by_padding_or_by_resizing() -> None:
    network = network_of(PATCH14).float()
    images = torch.randint(0, 256, (1, 3, 50, 61), dtype=torch.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (INFO.mean, INFO.std))
    normal = (images / 255 - mean) / std
    with torch.no_grad():
        padded = F.pad(normal, (0, 9, 0, 6))
        logits = corners(network(padded).logits, [56, 70])[:, :, :50, :61]
        found = predictor(network, INFO, EvalSettings())(images)
        torch.testing.assert_close(found, logits.softmax(dim=1))
        stretched = corners(normal, [56, 56])
        logits = corners(corners(network(stretched).logits, [56, 56]), [50, 61])
        found = predictor(network, INFO, EvalSettings(fit="resize"))(images)
        torch.testing.assert_close(found, logits.softmax(dim=1))


def test_what_is_no_transformer_is_refused() -> None:
    with pytest.raises(UserError, match=r"resnet18 cannot serve this `model\.name`"):
        models.build("dpt", 5, backbone="resnet18")
    with pytest.raises(UserError, match="the network small has no stochastic depth"):
        models.build("small", 5, drop_path=0.1)
    with pytest.raises(UserError, match="the network dpt has a stride of its own"):
        models.build("dpt", 5, output_stride=8)


@pytest.mark.parametrize(
    ("name", "backbone"), [("dpt", CLASS_TOKEN), ("vit", CLASS_TOKEN), ("deeplabv2", "resnet18")]
)
def test_stochastic_depth_falls_to_the_first_block(name: str, backbone: str) -> None:
    network = models.build(name, 5, 8, backbone=backbone, drop_path=0.4)
    rates = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
    assert rates
    assert rates == sorted(rates)
    assert max(rates) == pytest.approx(0.4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "backbone"),
    [
        *product(("onnx", "torch-export"), (CLASS_TOKEN, PATCH14)),
        ("onnx", ROTARY),  # torch.export makes its rotary embedding one of a size
    ],
)
def test_graphs_of_open_sizes_compute_the_same(tmp_path: Path, backbone: str, form: Any) -> None:
    network = models.build("dpt", 3, 8, backbone=backbone, image=(112, 112)).eval()
    trained = TrainedNetworks({"network": network}, INFO, Settings(), "here", "")
    assert export(trained, tmp_path / "file", form).difference <= TOLERANCE
