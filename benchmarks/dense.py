"""The losses in plain PyTorch with fixed shapes: what one writes without the operations of `ctt`.

`ctt.ops.reference` takes the pixels that count out by boolean indexing, which torch.compile cannot
trace in one graph. These compute every pixel and leave the others out at the end. The matrix
product runs in the dtype of the query, so that for half precision this is the error that one
accepts with plain PyTorch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.ops.reference import normalize


def info_nce(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None = None,
    *,
    temperature: float,
    mask: Tensor | None = None,
    reduction: str = "class",
) -> Tensor:
    num_classes, capacity, _ = keys.shape
    filled = _filled(keys, count)  # (C, V)
    own, inside = _own(label, num_classes)  # (N, C), (N,)
    holds = filled.any(dim=1)
    counts = _and_mask((own & holds).any(dim=1) & (~own & holds).any(dim=1), mask)  # (N,)
    v = _direction(query, counts)  # (N, D)
    score = _scores(v, torch.where(filled[:, :, None], keys, 0), temperature)  # (N, C, V)
    log_z = _log_z(score, own, filled)  # (N,)
    positive = score.gather(1, inside[:, None, None].expand(-1, 1, capacity)).squeeze(1)  # (N, V)
    held = filled[inside]  # (N, V)
    term = F.softplus(torch.where(counts, log_z, 0)[:, None] - positive) * held
    loss = term.sum(dim=1) / held.sum(dim=1).clamp(min=1)
    return _reduce(loss, counts, own, reduction)


def pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    banks: Sequence[tuple[Tensor, Tensor | None]],
    *,
    temperature: float,
    mask: Tensor | None = None,
    reduction: str = "class",
) -> Tensor:
    filled = torch.cat([_filled(k, c) for k, c in banks], dim=1)  # (C, V)
    own, _ = _own(label, filled.shape[0])  # (N, C)
    counts = _and_mask(own.any(dim=1) & (~own & filled.any(dim=1)).any(dim=1), mask)  # (N,)
    v, peer = _direction(query, counts), _direction(positive.detach(), counts)  # (N, D), (N, D)
    keys = torch.where(filled[:, :, None], torch.cat([k for k, _ in banks], dim=1), 0)
    log_z = _log_z(_scores(v, keys, temperature), own, filled)  # (N,)
    score = (v.to(log_z.dtype) * peer.to(log_z.dtype)).sum(dim=1) / temperature  # (N,)
    return _reduce(F.softplus(torch.where(counts, log_z, 0) - score), counts, own, reduction)


def _filled(keys: Tensor, count: Tensor | None) -> Tensor:
    if count is None:
        return torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
    return torch.arange(keys.shape[1], device=keys.device) < count[:, None]


def _own(label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    own = label[:, None] == torch.arange(num_classes, device=label.device)
    return own, label.clamp(0, num_classes - 1)


def _and_mask(counts: Tensor, mask: Tensor | None) -> Tensor:
    return counts if mask is None else counts & mask


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _direction(x: Tensor, counts: Tensor) -> Tensor:
    return normalize(_wide(torch.where(counts[:, None], x, 0))).to(x.dtype)


def _scores(v: Tensor, keys: Tensor, temperature: float) -> Tensor:
    score = _wide(v @ keys.to(v.dtype).flatten(0, 1).T) / temperature
    return score.view(-1, *keys.shape[:2])


def _log_z(score: Tensor, own: Tensor, filled: Tensor) -> Tensor:
    negative = ~own[:, :, None] & filled
    return score.masked_fill(~negative, -torch.inf).flatten(1).logsumexp(dim=1)


def _reduce(loss: Tensor, counts: Tensor, own: Tensor, reduction: str) -> Tensor:
    loss = torch.where(counts, loss, 0)
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.sum() / counts.sum().clamp(min=1)
    member = (own & counts[:, None]).to(loss.dtype)  # (N, C)
    pixels = member.sum(dim=0)  # (C,)
    per_class = (member * loss[:, None]).sum(dim=0) / pixels.clamp(min=1)
    return per_class.sum() / (pixels > 0).sum().clamp(min=1)
