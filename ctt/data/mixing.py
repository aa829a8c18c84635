"""Mixing of images: which pixels of an image are kept, the rest come from its neighbour."""

from collections.abc import Callable

import torch
from torch import Tensor

from ctt.data.views import gaussian_blur


def classmix_mask(label: Tensor, draw: Tensor, fewer: bool = False) -> Tensor:
    """Keep the pixels of half of the classes that an image shows (Olsson et al., ClassMix, 2021).

    Args:
        label: (B, H, W) int64; pixels outside 0..C-1 are not kept.
        draw: (B, C) uniform random numbers; the lowest of the classes shown are kept.
        fewer: of an odd number of classes keep the smaller half, as the authors' program does.

    Returns:
        (B, H, W) bool.
    """
    classes = torch.arange(draw.shape[1], device=label.device)
    member = label[:, None] == classes[:, None, None]  # (B, C, H, W)
    present = member.flatten(2).any(dim=2)  # (B, C)
    place = draw.masked_fill(~present, 2).argsort(dim=1).argsort(dim=1)
    kept = present & (place < (present.sum(dim=1, keepdim=True) + (not fewer)) // 2)  # (B, C)
    return (member & kept[:, :, None, None]).any(dim=1)


def cutmix_mask(size: tuple[int, int], draw: Tensor) -> Tensor:
    """Keep all but a random box of a quarter to a half of the area (French et al., 2020).

    Args:
        size: H and W.
        draw: (4, B) uniform random numbers.

    Returns:
        (B, H, W) bool.
    """
    share, aspect, top, left = draw
    area = 0.25 + 0.25 * share
    box_height = (area * torch.exp2(2 * aspect - 1)).sqrt().clamp(max=1)  # of 1
    box_width = (area / box_height).clamp(max=1)
    return outside(size, box_height, box_width, top * (1 - box_height), left * (1 - box_width))


def outside(
    size: tuple[int, int], box_height: Tensor, box_width: Tensor, top: Tensor, left: Tensor
) -> Tensor:
    """Return where an image is not in its box: (B, H, W) bool.

    Args:
        size: H and W.
        box_height, box_width, top, left: (B,), as shares of H and W.
    """
    (height, width), device = size, top.device
    y = ((torch.arange(height, device=device) + 0.5) / height)[:, None]
    x = (torch.arange(width, device=device) + 0.5) / width
    in_rows = (y >= top[:, None, None]) & (y < (top + box_height)[:, None, None])
    in_columns = (x >= left[:, None, None]) & (x < (left + box_width)[:, None, None])
    keep: Tensor = ~(in_rows & in_columns)
    return keep


def half_area_mask(size: tuple[int, int], draw: Tensor) -> Tensor:
    """Keep all but a box of half the area, as the program of French et al. (2020) draws it.

    Args:
        size: H and W.
        draw: (3, B) uniform random numbers.

    Returns:
        (B, H, W) bool.
    """
    shape, top, left = draw
    box_height = torch.exp2(-shape)
    box_width = 0.5 / box_height
    return outside(size, box_height, box_width, top * (1 - box_height), left * (1 - box_width))


def half_width_mask(size: tuple[int, int], draw: Tensor) -> Tensor:
    """Keep all but a box of half the area whose width is uniform in 1/2..1, as the programs of
    ClassMix and U2PL draw it.

    Args:
        size: H and W.
        draw: (3, B) uniform random numbers.

    Returns:
        (B, H, W) bool.
    """
    shape, top, left = draw
    box_width = 0.5 + 0.5 * shape
    box_height = 0.5 / box_width
    return outside(size, box_height, box_width, top * (1 - box_height), left * (1 - box_width))


def small_box_mask(size: tuple[int, int], draw: Tensor) -> Tensor:
    """Keep half of the images whole, and of the others all but a box of 2 to 40 % of the area.

    The programs of UniMatch draw shape and place of a box until it lies in the image. Here the
    first of `TRIES` boxes that does is taken; that none does is seldom, and the image is then kept.

    Args:
        size: H and W.
        draw: (1 + 4 * TRIES, B) uniform random numbers.

    Returns:
        (B, H, W) bool.
    """
    height, width = size
    share, aspect, top, left = draw[1:].view(4, TRIES, -1)
    area = 0.02 + 0.38 * share  # of 1
    ratio = 0.3 + (1 / 0.3 - 0.3) * aspect  # of height to width, in pixels
    box_width = (area * height / (ratio * width)).sqrt()
    box_height = area / box_width
    fits = (top + box_height <= 1) & (left + box_width <= 1)  # (TRIES, B)
    first = fits.int().argmax(dim=0, keepdim=True)
    chosen = [x.gather(0, first)[0] for x in (box_height, box_width, top, left)]
    whole = (draw[0] < 0.5) | ~fits.any(dim=0)
    keep: Tensor = outside(size, *chosen) | whole[:, None, None]
    return keep


def cow_mask(draw: Tensor, width: Tensor) -> Tensor:
    """Keep half of the pixels, in blobs of a random size (French et al., CowMask, 2020).

    Args:
        draw: (B, H, W) uniform random numbers.
        width: (B,) such numbers, for the size.

    Returns:
        (B, H, W) bool.
    """
    normal = torch.special.ndtri(draw.clamp(1e-6, 1 - 1e-6))
    sigma = 8 * torch.exp2(2 * width)  # 8 to 32 pixels, uniform in its logarithm
    blobs = gaussian_blur(normal[:, None], sigma, 3 * 32)[:, 0]
    values = blobs.flatten(1)
    # not by median, which has no deterministic algorithm on CUDA
    middle = values.sort(dim=1).values[:, (values.shape[1] - 1) // 2]
    keep: Tensor = blobs > middle[:, None, None]
    return keep


def cutout_mask(size: tuple[int, int], draw: Tensor) -> Tensor:
    """Keep all but a box whose share of the area is uniform in 0..1 (French et al., 2020).

    Args:
        size: H and W.
        draw: (4, B) uniform random numbers.

    Returns:
        (B, H, W) bool.
    """
    area, shape, top, left = draw
    box_height = area**shape  # area..1, so that the width is at most 1
    box_width = area / box_height
    return outside(size, box_height, box_width, top * (1 - box_height), left * (1 - box_width))


TRIES = 16  # boxes, of which a third to a half lie in the image

BOXES: dict[str, tuple[Callable[[tuple[int, int], Tensor], Tensor], int]] = {
    "cutmix": (cutmix_mask, 4),
    "half-area": (half_area_mask, 3),
    "half-width": (half_width_mask, 3),
    "small-box": (small_box_mask, 1 + 4 * TRIES),
}
"""Masks of boxes by the name of the rule, and how many numbers an image takes."""


def mix(values: Tensor, other: Tensor, keep: Tensor) -> Tensor:
    """Return `values` (B, H, W) or (B, C, H, W) where `keep` (B, H, W), else those of `other`."""
    return torch.where(keep if values.dim() == 3 else keep[:, None], values, other)
