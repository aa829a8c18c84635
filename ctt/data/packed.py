"""Labels and their confidence in one tensor, which one resampling moves."""

import torch
from torch import Tensor


def pack(label: Tensor, confidence: Tensor) -> Tensor:
    """Return label + 256 * confidence (H, W) int32.

    Args:
        label, confidence: (H, W), both in 0..255.
    """
    return label.to(torch.int32) + 256 * confidence.to(torch.int32)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return label (int64) and confidence in 0..1 of what `pack` gives; outside of an image,
    where views put -1, they are 255 and 0."""
    return (packed & 255).long(), (packed >> 8).clamp(min=0).float() / 255
