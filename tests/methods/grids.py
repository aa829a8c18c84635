"""Where cells lie in an image, written out: the reading that tests hold the program's against."""

from typing import Any

import torch
from torch import Tensor


def first_cell(network: Any) -> float:
    """Return the pixel around which the first cell of a network looks."""
    return (network.stride - 1) / 2 if network.patches else 0.0


def at_cells(values: Tensor, stride: int, first: float = 0) -> Tensor:
    """Return values (B, H, W) of the pixels on which cells lie; a half pixel counts down."""
    rows, columns = (
        [min(int(first) + r * stride, side - 1) for r in range(-(-side // stride))]
        for side in values.shape[1:]
    )
    return values[:, rows][:, :, columns]


def at_pixels(maps: Tensor, size: tuple[int, ...], stride: int, first: float = 0) -> Tensor:
    """Return maps (B, D, h, w) at every pixel, between the four cells around it: (B, D, *size)."""
    for axis, side in zip((2, 3), size[-2:], strict=True):
        place = (torch.arange(side, dtype=maps.dtype) - first) / stride
        place = place.clamp(0, maps.shape[axis] - 1)
        before = place.long()
        after = (before + 1).clamp(max=maps.shape[axis] - 1)
        share = (place - before).view(-1, *[1] * (3 - axis))
        below, above = (maps.index_select(axis, i) for i in (before, after))
        maps = below * (1 - share) + above * share
    return maps
