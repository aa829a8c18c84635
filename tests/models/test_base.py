"""What the networks share: the grid of their features, and the way back to the pixels."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.models.base import Grid, pad_to_multiple, scale_up, upsample
from ctt.models.timm_backbone import Stages
from tests.methods.grids import at_pixels


@pytest.mark.parametrize("stride", [1, 2, 4, 7, 8])
def test_upsampled_multiples_of_the_stride_are_stretched(stride: int) -> None:
    logits = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    size = (5 * stride, 6 * stride)
    stretched = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    assert torch.equal(upsample(logits, size, Grid.of_patches(stride)), stretched)


@pytest.mark.parametrize("grid", [Grid(8), Grid.of_patches(8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_place_of_a_pixel_does_not_depend_on_the_size_of_the_image(
    dtype: torch.dtype, grid: Grid
) -> None:
    logits = torch.randn(1, 4, 63, 47).to(dtype)
    whole = upsample(logits, (504, 376), grid)
    assert whole.dtype == torch.float32
    for height, width in ((500, 375), (321, 321), (33, 8), (1, 1)):
        part = logits[:, :, : -(-height // 8), : -(-width // 8)]
        found = upsample(part, (height, width), grid)
        assert found.shape == (1, 4, height, width)
        # pixels beyond the last cell would see the neighbours that the border cuts off
        rows, columns = (
            min(side, 8 * (-(-side // 8) - 1) + int(grid.origin) + 1) for side in (height, width)
        )
        torch.testing.assert_close(found[:, :, :rows, :columns], whole[:, :, :rows, :columns])


@pytest.mark.parametrize("factor", [2, 4])
def test_corners_are_those_of_any_size(factor: int) -> None:
    x = torch.randn(1, 3, 7, 6)
    exact = F.interpolate(
        x, size=(6 * factor + 1, 5 * factor + 1), mode="bilinear", align_corners=True
    )
    found = scale_up(x, (7 * factor, 6 * factor), factor, corners=True)
    assert torch.equal(found[:, :, : 6 * factor + 1, : 5 * factor + 1], exact)
    assert torch.equal(found[:, :, 6 * factor :, 0], x[:, :, 6:, 0].expand(-1, -1, factor))
    assert torch.equal(scale_up(x, (5, 4), factor, corners=True), found[:, :, :5, :4])


def test_scaling_up_compiles_with_its_gradient() -> None:
    """PyTorch's compiler and its gradient of F.pad disagree about channels_last."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)

    def scaled(x: Tensor) -> Tensor:
        return scale_up(2 * x, (8, 5), 2, corners=True)  # a row more, two columns less

    torch._dynamo.reset()
    found = []
    for function in (scaled, torch.compile(scaled)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        found.append((out, leaf.grad))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("size", [(49, 41), (56, 48), (50, 42), (7, 3)])
@pytest.mark.parametrize("grid", [Grid(8), Grid.of_patches(8), Grid.of_patches(7), Grid(1)])
def test_logits_lie_over_their_cells(grid: Grid, size: tuple[int, int]) -> None:
    rows, columns = (-(-side // grid.stride) for side in size)
    logits = torch.randn(1, 3, rows, columns, dtype=torch.float64)
    found = upsample(logits, size, grid)
    torch.testing.assert_close(found, at_pixels(logits, size, grid.stride, grid.origin))


SEEN = [("resnet18", 8), ("resnet18", 16), ("regnety_002", 8), ("mobilenetv2_100", 16)]
SEEN += [("efficientnet_lite0", 8), ("convnext_atto", 32)]


@pytest.mark.parametrize(("name", "stride"), SEEN)
def test_cells_look_where_the_grid_has_them(name: str, stride: int) -> None:
    """The middle of what a cell of each stage sees, weighed by the gradient of the image."""
    torch.manual_seed(0)
    backbone = Stages(name, stride).eval()
    images = torch.randn(4, 3, 193, 193, requires_grad=True)
    for stage, times in zip(backbone(images), backbone.strides, strict=True):
        grid = Grid.of_patches(times) if backbone.patches else Grid(times)
        cell = 96 // times
        seen = stage[:, :, cell, cell].square().sum()
        (slope,) = torch.autograd.grad(seen, images, retain_graph=True)
        weight = slope.square().sum(dim=(0, 1, 3))
        middle = float((weight * torch.arange(193)).sum() / weight.sum())
        assert abs(middle - (grid.origin + times * cell)) < max(0.7, 0.2 * times)


def test_padding_is_below_and_on_the_right() -> None:
    images = torch.rand(2, 3, 33, 64)
    padded = pad_to_multiple(images, 16)
    assert padded.shape == (2, 3, 48, 64)
    assert torch.equal(padded[:, :, :33], images)
    assert (padded[:, :, 33:] == 0).all()
    assert pad_to_multiple(images, 16, 112).shape == (2, 3, 112, 112)


def test_backbones_that_would_leave_the_last_rows_out() -> None:
    backbone = Stages("test_convnext", 8).eval()
    assert backbone.short
    images = torch.randn(1, 3, 33, 50)
    whole = backbone(pad_to_multiple(images, 8))
    for stage, stride, full in zip(backbone(images), backbone.strides, whole, strict=True):
        height, width = -(-33 // stride), -(-50 // stride)
        assert stage.shape[2:] == (height, width)
        assert torch.equal(stage, full[:, :, :height, :width])
