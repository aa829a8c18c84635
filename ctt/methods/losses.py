"""The terms of the objective, equations (1) to (10), and the masks of the contrast.

Shapes: B images of H x W pixels, features and contrast on the grid h x w of the network.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.models.base import Grid, subsample, upsample
from ctt.ops import MemoryBank, info_nce, pair_info_nce


def to_grid(values: Tensor, grid: Grid) -> Tensor:
    """Return labels or confidences (B, H, W) of the pixels on which the cells of a grid lie:
    (B, h, w), by default ceil(H / stride) and ceil(W / stride)."""
    if not grid.label and not grid.cells:
        return values[:, :: grid.stride, :: grid.stride]
    rows, columns = (grid.pixels(n, values.device) for n in values.shape[1:])
    return values[:, rows[:, None], columns]


def coarsen(maps: Tensor, grid: Grid, coarse: Grid, size: Sequence[int]) -> Tensor:
    """Return maps (B, D, h, w) at the cells nearest to those of a coarser grid: (B, D, *size).

    Args:
        grid: of `maps`.
        coarse: the coarser one.
        size: its height and width.
    """
    if not grid.cells and coarse.stride % grid.stride == 0 and coarse.origin == grid.origin:
        return subsample(maps, coarse.stride // grid.stride)
    rows, columns = (
        grid.nearest(coarse, n, length, maps.device)
        for n, length in zip(size, maps.shape[-2:], strict=True)
    )
    return maps[..., rows[:, None], columns]


def as_pixels(maps: Tensor) -> Tensor:
    """Return (B, D, h, w) -> (B * h * w, D)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


Total = Callable[[Tensor], Tensor]
"""Sum of a count over all processes that share a batch."""


def alone(count: Tensor) -> Tensor:
    """Return the total of one process."""
    return count


def valid_pixels(label: Tensor, total: Total = alone) -> Tensor:
    """Count the pixels of all processes that are not 255; at least 1, so that none gives 0."""
    return total((label != IGNORE).sum()).clamp(min=1)


def pixel_cross_entropy(
    logits: Tensor, grid: Grid, label: Tensor, pixels: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy over the pixels whose label is not 255; 0 if there is none.

    Args:
        logits: (B, C, h, w), on this grid.
        label: (B, H, W) int64.
        weight: (), a factor on the mean.
        pixels: (), `valid_pixels` of the whole batch, of which these images may be a part; the
            means of the parts then add up to that of the whole.
    """
    scores = upsample(logits, (label.shape[-2], label.shape[-1]), grid)
    # summed here, because on CUDA the reduced form has no deterministic algorithm
    mean = F.cross_entropy(scores, label, ignore_index=IGNORE, reduction="none").sum() / pixels
    return mean if weight is None else mean * weight


def squared_distance(logits: Tensor, grid: Grid, soft: Tensor, valid: Tensor) -> Tensor:
    """Return the squared difference of probabilities, summed over the classes and valid pixels.

    Args:
        logits: (B, C, h, w), on this grid.
        soft: (B, C, H, W).
        valid: (B, H, W) bool.
    """
    probability = upsample(logits, (soft.shape[-2], soft.shape[-1]), grid).softmax(dim=1)
    distance = (probability - soft).square().sum(dim=1)
    return distance.masked_fill(~valid, 0).sum()


def weigh_pseudo_label(
    pseudo_label: Tensor,
    confidence: Tensor,
    rule: str,
    threshold: float,
    total: Total = alone,
) -> tuple[Tensor, Tensor | None]:
    """Return the cross-teacher target under the option `confidence_weight`.

    Args:
        pseudo_label: (B, H, W) int64 with 255 for padding.
        confidence: (B, H, W) probability.
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
    return pseudo_label, total((sure & valid).sum()) / valid_pixels(pseudo_label, total)


def usable_counts(banks: Sequence[MemoryBank], start: str) -> list[Tensor]:
    """Fill counts (C,) of each bank, 0 for the classes that may not take part in contrast yet.

    `start` "class": a class joins when its own queue is full, so one that never appears among the
    labels blocks no other; "all": none joins before every queue of every bank is full (the paper).
    """
    full = torch.stack([bank.full for bank in banks])  # (K, C)
    ready = full & full.all() if start == "all" else full
    return [torch.where(r, bank.count, 0) for r, bank in zip(ready, banks, strict=True)]


def high_level_mask(confidence: Tensor, gamma: float) -> Tensor:
    """Return equation (7): m(v) = 1 where the confidence is at least gamma."""
    return confidence >= gamma


def low_level_mask(
    high: Tensor, confidence: Tensor, peer_confidence: Tensor, directional: bool
) -> Tensor:
    """Return equation (9): pixels outside m where, if directional, the peer is more confident."""
    return ~high & (confidence < peer_confidence) if directional else ~high


def high_level_contrast(
    features: Tensor,
    label: Tensor,
    mask: Tensor,
    bank: MemoryBank,
    count: Tensor,
    temperature: float,
    reduction: str,
    total: Total | None = None,
) -> Tensor:
    """Return equation (6) for features (B, D, h, w), label and mask (B, h, w).

    Args:
        total: sum over the processes; the means are then those of the joined batch, and the result
            is this process's part of them. None: there is one process.
    """
    label, mask = label.flatten(), mask.flatten()
    loss = info_nce(
        as_pixels(features),
        label,
        bank.keys,
        count,
        temperature=temperature,
        mask=mask,
        reduction="none" if total else reduction,
    )
    if total is None:
        return loss
    holds = count > 0
    return part_of_mean(loss, label, mask, holds & (holds.sum() > 1), reduction, total)


def low_level_contrast(
    features: Tensor,
    peer_features: Tensor,
    label: Tensor,
    mask: Tensor,
    banks: list[tuple[Tensor, Tensor]],
    temperature: float,
    reduction: str,
    total: Total | None = None,
) -> Tensor:
    """Return equation (8) for features of both (B, D, h, w), label and mask (B, h, w).

    Args:
        banks: keys and counts.
        total: as in `high_level_contrast`.
    """
    label, mask = label.flatten(), mask.flatten()
    loss = pair_info_nce(
        as_pixels(features),
        as_pixels(peer_features.detach()),
        label,
        banks,
        temperature=temperature,
        mask=mask,
        reduction="none" if total else reduction,
    )
    if total is None:
        return loss
    holds = torch.stack([count for _, count in banks]).amax(dim=0) > 0
    return part_of_mean(loss, label, mask, holds.sum() > holds.long(), reduction, total)


def part_of_mean(
    values: Tensor, label: Tensor, mask: Tensor, joins: Tensor, reduction: str, total: Total
) -> Tensor:
    """Return this process's part of the mean over all processes that `info_nce` would take.

    Args:
        values: (N,) losses, 0 where a pixel does not count.
        label: (N,) int64.
        mask: (N,) bool.
        joins: (C,) bool, the classes whose pixels count.
    """
    classes = torch.arange(len(joins), device=label.device)
    counts = (label[:, None] == classes) & mask[:, None] & joins  # (N, C)
    pixels = total(counts.sum(dim=0))  # (C,)
    if reduction == "mean":
        return values.sum() / pixels.sum().clamp(min=1)
    share = 1 / (pixels.clamp(min=1) * (pixels > 0).sum().clamp(min=1))  # (C,)
    return values @ (counts * share).sum(dim=1).to(values.dtype)


def mean_of(probability: Sequence[Tensor]) -> Tensor:
    """Return the mean over networks; that of one is itself, which saves a copy at full size."""
    return probability[0] if len(probability) == 1 else torch.stack(list(probability)).mean(dim=0)


def at_temperature(probability: Tensor, temperature: float) -> Tensor:
    """Return probabilities to the power of 1 / temperature, over their sum: (B, C, H, W).

    It divides logarithms, since small probabilities to a large power would all be 0.
    """
    return (probability.log() / temperature).softmax(dim=1)


def surest_of(probability: Sequence[Tensor]) -> Tensor:
    """Return the mean over networks, in each pixel weighted by their largest probability there.

    A network whose probabilities are NaN in a pixel is left out there.

    Args:
        probability: (B, C, H, W) of each network.
    """
    total, weights = torch.zeros_like(probability[0]), torch.zeros_like(probability[0][:, :1])
    for p in probability:
        known = p.nan_to_num(nan=0.0)
        weight = known.amax(dim=1, keepdim=True)
        total, weights = total + weight * known, weights + weight
    return total / weights.clamp(min=torch.finfo(weights.dtype).tiny)


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of shape ()."""
    return torch.stack(list(values)).sum()
