"""Mixing of images: which pixels of an image are kept, the rest come from its neighbour."""

import torch
from torch import Tensor


def classmix_mask(label: Tensor, draw: Tensor) -> Tensor:
    """Keep the pixels of half of the classes that an image shows (Olsson et al., ClassMix, 2021).

    Args:
        label: (B, H, W) int64; pixels outside 0..C-1 are not kept.
        draw: (B, C) uniform random numbers; the lowest of the classes shown are kept.

    Returns:
        (B, H, W) bool.
    """
    classes = torch.arange(draw.shape[1], device=label.device)
    member = label[:, None] == classes[:, None, None]  # (B, C, H, W)
    present = member.flatten(2).any(dim=2)  # (B, C)
    place = draw.masked_fill(~present, 2).argsort(dim=1).argsort(dim=1)
    kept = present & (place < (present.sum(dim=1, keepdim=True) + 1) // 2)  # (B, C)
    return (member & kept[:, :, None, None]).any(dim=1)


def cutmix_mask(size: tuple[int, int], draw: Tensor) -> Tensor:
    """Keep all but a random box of a quarter to a half of the area (French et al., 2020).

    Args:
        size: H and W. draw: (4, B) uniform random numbers.

    Returns:
        (B, H, W) bool.
    """
    (height, width), device = size, draw.device
    share, aspect, top, left = draw
    area = 0.25 + 0.25 * share
    box_height = (area * torch.exp2(2 * aspect - 1)).sqrt().clamp(max=1)  # of 1
    box_width = (area / box_height).clamp(max=1)
    y = ((torch.arange(height, device=device) + 0.5) / height)[:, None]
    x = (torch.arange(width, device=device) + 0.5) / width
    top, left = top * (1 - box_height), left * (1 - box_width)
    in_rows = (y >= top[:, None, None]) & (y < (top + box_height)[:, None, None])
    in_columns = (x >= left[:, None, None]) & (x < (left + box_width)[:, None, None])
    keep: Tensor = ~(in_rows & in_columns)
    return keep


def mix(values: Tensor, other: Tensor, keep: Tensor) -> Tensor:
    """`values` (B, H, W) or (B, C, H, W) where `keep` (B, H, W), else those of `other`."""
    return torch.where(keep if values.dim() == 3 else keep[:, None], values, other)
