"""The operations in plain PyTorch, written to be read beside the paper.

This file is the truth that every backend is checked against: no trick, no blocking, works in
float64. Equation numbers are those of Xiao et al., "Semi-supervised semantic segmentation with
cross teacher training", Neurocomputing 508 (2022).

Pixels that do not count are taken out before anything is computed, so what they hold (NaN, inf)
cannot reach a result or a gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_EPS = 1e-12  # a vector shorter than this has no direction: cosine 0, gradient 0
# beyond this log(1 + e^x) is x even in float64; PyTorch's own choice of 20 is off by 2e-9 there


def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor
) -> None:
    """Update theta' <- a theta' + (1 - a) theta, in place."""
    for t, s in zip(teacher, student, strict=True):
        wide = torch.float64 if t.dtype == torch.float64 else torch.float32
        t.copy_(decay * t.to(wide) + (1 - decay) * s.to(wide))


def class_topk(
    confidence: Tensor, label: Tensor, k: int, num_classes: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return indices (C, k) of the k most confident pixels of each class, and their number (C,)."""
    index = label.new_full((num_classes, k), -1)
    count = label.new_zeros(num_classes)
    candidate = ~confidence.isnan()
    if valid is not None:
        candidate &= valid
    for c in range(num_classes):
        pixels = (candidate & (label == c)).nonzero().flatten()
        order = confidence[pixels].argsort(descending=True, stable=True)
        chosen = pixels[order[:k]]
        index[c, : len(chosen)] = chosen
        count[c] = len(chosen)
    return index, count


def queue_push_(
    keys: Tensor, count: Tensor, cursor: Tensor, features: Tensor, index: Tensor
) -> None:
    """Append features[index[c]], L2-normalised, to the ring of each class; the oldest leaves."""
    num_classes, capacity, _ = keys.shape
    for c in range(num_classes):
        for i in index[c].tolist():
            if 0 <= i < len(features):
                position = int(cursor[c])
                keys[c, position] = key_of(_widen(features[i])).to(keys.dtype)
                cursor[c] = (position + 1) % capacity
                count[c] = min(int(count[c]) + 1, capacity)


def info_nce(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None = None,
    *,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    reduction: str = "class",
) -> Tensor:
    """Return equation (6): the keys of the own queue are positives, those of the others
    negatives."""
    num_classes, capacity, _ = keys.shape
    filled = _filled(keys, count)  # (C, V)
    holds = filled.any(dim=1)  # (C,)
    own = _one_hot(label, num_classes)  # (N, C)
    counts = (own & holds).any(dim=1) & (~own & holds).any(dim=1)
    if mask is not None:
        counts = counts & mask

    v, c = normalize(_widen(query[counts])), label[counts]  # (n, D), (n,)
    keys = torch.where(filled[:, :, None], keys, 0)  # what other places hold must not leak
    score = v @ keys.to(v.dtype).flatten(0, 1).T / temperature  # (n, C * V), cos / tau
    score = score.view(len(c), num_classes, capacity)  # (n, C, V)
    is_negative = (~own[counts])[:, :, None] & filled  # (n, C, V)
    log_z = score.masked_fill(~is_negative, -torch.inf).flatten(1).logsumexp(dim=1)  # (n,)
    positive = score[torch.arange(len(c), device=c.device), c]  # (n, V)
    # e^s / (e^s + Z) = sigmoid(s - log Z), whose log never takes the log of 0
    term = -F.logsigmoid(positive - log_z[:, None]) * filled[c]  # (n, V)
    loss = term.sum(dim=1) / filled[c].sum(dim=1)  # (n,)
    return _reduce(loss, counts, c, num_classes, reduction)


def pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    banks: Sequence[tuple[Tensor, Tensor | None]],
    *,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    reduction: str = "class",
) -> Tensor:
    """Return equation (8): one positive per pixel, negatives are other classes' keys of every
    bank."""
    num_classes = banks[0][0].shape[0]
    own = _one_hot(label, num_classes)  # (N, C)
    filled = torch.cat([_filled(keys, count) for keys, count in banks], dim=1)  # (C, V1 + V2 + ..)
    counts = own.any(dim=1) & (~own & filled.any(dim=1)).any(dim=1)
    if mask is not None:
        counts = counts & mask

    v, c = normalize(_widen(query[counts])), label[counts]  # (n, D), (n,)
    v2 = normalize(_widen(positive.detach()[counts]).to(v.dtype))  # (n, D)
    keys = torch.cat([keys.to(v.dtype) for keys, _ in banks], dim=1)  # (C, V1 + V2 + .., D)
    keys = torch.where(filled[:, :, None], keys, 0)  # what other places hold must not leak
    score = torch.einsum("nd,cvd->ncv", v, keys) / temperature
    is_negative = (~own[counts])[:, :, None] & filled
    log_z = score.masked_fill(~is_negative, -torch.inf).flatten(1).logsumexp(dim=1)  # (n,)
    loss = -F.logsigmoid((v * v2).sum(dim=1) / temperature - log_z)  # (n,)
    return _reduce(loss, counts, c, num_classes, reduction)


def normalize(x: Tensor) -> Tensor:
    """Return x / |x| along the last dimension; a vector of length 0 gives 0, gradient 0."""
    squared = x.square().sum(dim=-1, keepdim=True)
    has_direction = ~(squared <= NORM_EPS**2)  # NaN shows
    norm = torch.where(has_direction, squared, 1).sqrt()
    return torch.where(has_direction, x / norm, torch.zeros((), dtype=x.dtype, device=x.device))


def key_of(x: Tensor) -> Tensor:
    """Return x / |x| along the last dimension; 0 where |x| is 0 or no finite number."""
    finite = x.square().sum(dim=-1, keepdim=True).isfinite()
    return torch.where(finite, normalize(x), torch.zeros((), dtype=x.dtype, device=x.device))


def _widen(x: Tensor) -> Tensor:
    """Half types are computed in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _one_hot(label: Tensor, num_classes: int) -> Tensor:
    """(N,) -> (N, C) bool; a label outside 0..C-1 has no class."""
    return label[:, None] == torch.arange(num_classes, device=label.device)


def _filled(keys: Tensor, count: Tensor | None) -> Tensor:
    """(C, V) bool: the places of the rings that hold a key."""
    num_classes, capacity, _ = keys.shape
    if count is None:
        return torch.ones(num_classes, capacity, dtype=torch.bool, device=keys.device)
    return torch.arange(capacity, device=keys.device) < count[:, None]


def _reduce(
    loss: Tensor, counts: Tensor, label: Tensor, num_classes: int, reduction: str
) -> Tensor:
    """Loss (n,) of the pixels that count, of classes label (n,) -> what the caller asked for."""
    if reduction == "none":
        return loss.new_zeros(len(counts)).masked_scatter(counts, loss)
    if reduction == "mean":
        return loss.sum() / max(len(loss), 1)
    member = _one_hot(label, num_classes).to(loss.dtype)  # (n, C)
    pixels = member.sum(dim=0)  # (C,)
    per_class = (member * loss[:, None]).sum(dim=0) / pixels.clamp(min=1)
    return per_class.sum() / (pixels > 0).sum().clamp(min=1)
