"""The terms of the objective, equations (1) to (10), and the masks of the contrast.

Shapes: B images of H x W pixels, features and contrast on the grid h x w of the network.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.source import IGNORE
from ctt.ops import MemoryBank, info_nce, pair_info_nce


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, C, h, w) at the resolution of the image, in float32."""
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def to_grid(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels or confidences (B, H, W) on the grid of the features by nearest neighbour."""
    values = values[:, None]
    if not values.is_floating_point():
        return F.interpolate(values.float(), size=size, mode="nearest")[:, 0].to(values.dtype)
    return F.interpolate(values, size=size, mode="nearest")[:, 0]


def as_pixels(maps: Tensor) -> Tensor:
    """(B, D, h, w) -> (B * h * w, D)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def pixel_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the pixels whose label is not 255; 0 where there is none.

    Args:
        logits: (B, C, h, w). label: (B, H, W) int64. weight: (), a factor on the mean.
    """
    scores = upsample(logits, (label.shape[-2], label.shape[-1]))
    # summed here, because on CUDA the reduced form has no deterministic algorithm
    total = F.cross_entropy(scores, label, ignore_index=IGNORE, reduction="none").sum()
    # a crop without any valid pixel must give 0, not 0/0
    mean = total / (label != IGNORE).sum().clamp(min=1)
    return mean if weight is None else mean * weight


def weigh_pseudo_label(
    pseudo_label: Tensor, confidence: Tensor, rule: str, threshold: float
) -> tuple[Tensor, Tensor | None]:
    """The cross-teacher target under the option `confidence_weight`.

    Args:
        pseudo_label: (B, H, W) int64 with 255 for padding. confidence: (B, H, W) probability.
        rule: "none", "uniform" (factor: share of valid pixels at or over the threshold) or
            "threshold" (pixels below it become 255).

    Returns:
        the target (B, H, W) and the factor () or None.
    """
    if rule == "none":
        return pseudo_label, None
    sure = confidence >= threshold
    if rule == "threshold":
        return pseudo_label.masked_fill(~sure, IGNORE), None
    valid = pseudo_label != IGNORE
    return pseudo_label, (sure & valid).sum() / valid.sum().clamp(min=1)


def usable_counts(banks: Sequence[MemoryBank], start: str) -> list[Tensor]:
    """Fill counts (C,) of each bank, 0 for the classes that may not take part in contrast yet.

    `start` "class": a class joins when its own queue is full, so one that never appears among the
    labels blocks no other; "all": none joins before every queue of every bank is full (the paper).
    """
    full = torch.stack([bank.full for bank in banks])  # (K, C)
    ready = full & full.all() if start == "all" else full
    return [torch.where(r, bank.count, 0) for r, bank in zip(ready, banks, strict=True)]


def high_level_mask(confidence: Tensor, gamma: float) -> Tensor:
    """Equation (7): m(v) = 1 where the confidence is at least gamma."""
    return confidence >= gamma


def low_level_mask(
    high: Tensor, confidence: Tensor, peer_confidence: Tensor, directional: bool
) -> Tensor:
    """Equation (9): pixels outside m where, if directional, the peer is the more confident one."""
    return ~high & (confidence < peer_confidence) if directional else ~high


def high_level_contrast(
    features: Tensor,
    label: Tensor,
    mask: Tensor,
    bank: MemoryBank,
    count: Tensor,
    temperature: float,
    reduction: str,
) -> Tensor:
    """Equation (6) for features (B, D, h, w), label and mask (B, h, w)."""
    return info_nce(
        as_pixels(features),
        label.flatten(),
        bank.keys,
        count,
        temperature=temperature,
        mask=mask.flatten(),
        reduction=reduction,
    )


def low_level_contrast(
    features: Tensor,
    peer_features: Tensor,
    label: Tensor,
    mask: Tensor,
    banks: list[tuple[Tensor, Tensor | None]],
    temperature: float,
    reduction: str,
) -> Tensor:
    """Equation (8) for features of both (B, D, h, w), label and mask (B, h, w)."""
    return pair_info_nce(
        as_pixels(features),
        as_pixels(peer_features.detach()),
        label.flatten(),
        banks,
        temperature=temperature,
        mask=mask.flatten(),
        reduction=reduction,
    )
