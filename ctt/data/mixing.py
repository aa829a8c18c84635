"""Mixing of images: which pixels of an image are kept, the rest come from its neighbour."""

import torch
from torch import Tensor


def classmix_mask(label: Tensor, num_classes: int, rng: torch.Generator) -> Tensor:
    """Keep the pixels of half of the classes that an image shows (Olsson et al., ClassMix, 2021).

    Args:
        label: (B, H, W) int64; pixels outside 0..C-1 are not kept.

    Returns:
        (B, H, W) bool.
    """
    member = label[:, None] == torch.arange(num_classes, device=label.device)[:, None, None]
    present = member.flatten(2).any(dim=2)  # (B, C)
    ticket = torch.rand(present.shape, generator=rng, device=label.device)
    place = ticket.masked_fill(~present, 2).argsort(dim=1).argsort(dim=1)
    kept = present & (place < (present.sum(dim=1, keepdim=True) + 1) // 2)  # (B, C)
    return (member & kept[:, :, None, None]).any(dim=1)


def cutmix_mask(shape: tuple[int, int, int], rng: torch.Generator, device: torch.device) -> Tensor:
    """Keep all but a random box of a quarter to a half of the area (French et al., 2020).

    Returns:
        (B, H, W) bool for shape (B, H, W).
    """
    batch, height, width = shape
    share, aspect, top, left = torch.rand(4, batch, generator=rng, device=device)
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


def mix(values: Tensor, keep: Tensor) -> Tensor:
    """`values` (B, H, W) or (B, C, H, W) where `keep` (B, H, W), else those of the next in line."""
    if values.dim() == 4:
        keep = keep[:, None]
    return torch.where(keep, values, values.roll(1, dims=0))
