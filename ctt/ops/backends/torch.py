"""One-pass algorithms in blocked plain PyTorch calls, for any device and with bounded memory.

The bank takes no gradient and every pixel's loss depends on its own query alone, so the gradient is
made together with the loss. With s = cos / tau, Z the sum of e^s over the negatives and s+ the
score of a positive, the loss of a positive is softplus(log Z - s+), its derivative by s+ is
-w with w = sigmoid(log Z - s+), and by the score of a negative w e^s / Z. So a block of pixels
needs two matrix products: queries with keys, and weights with keys.

Nothing waits for a GPU: shapes are fixed and pixels that do not count are computed and thrown away.
On a CPU, where looking costs nothing, they are left out first. Matrix products of float32 follow
`torch.set_float32_matmul_precision`, as PyTorch's own do.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.ops._library import gradient_dtype, without_autocast
from ctt.ops._plans import Plan
from ctt.ops.reference import NORM_EPS, key_of, normalize

__all__ = ["class_topk", "ema_update_", "info_nce", "pair_info_nce", "queue_push_", "why_not"]

# Scores held at a time. On a CPU a row takes the same time in blocks of 2 to 10 MiB, and smaller
# ones slow the matrix products by up to a tenth; on a GPU a block must hide the launches.
_SCORE_BYTES = {"cpu": 8 << 20}
_SCORE_BYTES_OTHER = 64 << 20
_WIDE = {torch.float32, torch.float64}
# Below this the gradient of a pixel is 0 in every type; a sum of M exponentials divided by it must
# stay within float32.
_LEAST_PUSH = 1e-30
# Copies in a wider type that an update of the teachers may hold at a time.
_COPY_VALUES = 4 << 20


_Result = tuple[Tensor, Tensor | None, Tensor | None]


def why_not(operation: str, device: torch.device) -> str | None:
    return None


def info_nce(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
) -> _Result:
    num_classes, capacity, _ = keys.shape
    filled = _filled(keys, count)
    bank = _bank(query, [keys], [filled])
    holds = _holds(bank)  # (C,)
    can_count = holds & (holds.sum() > 1)

    def contrast(block: _Block) -> tuple[Tensor, Tensor | None]:
        place = (torch.arange(len(block.label), device=label.device), block.label)
        score = _scores(block, bank, temperature)  # (b, C, V)
        own = score[place]  # (b, V)
        score[place] = _minus_infinity(score)
        weight, log_z, z = _exponentiate(score.flatten(1))  # (b, C * V), (b, 1), (b, 1)
        over = log_z - own  # (b, V)
        term, push = -F.logsigmoid(-over), over.sigmoid()  # (b, V), (b, V)
        share: Tensor | float = 1 / capacity
        if bank.filled is not None:
            held = bank.filled[block.label]  # (b, V)
            term, push = term.masked_fill(~held, 0), push.masked_fill(~held, 0)
            share = 1 / held.sum(dim=1, keepdim=True).to(term.dtype)  # (b, 1)
        loss = (share * term.sum(dim=1, keepdim=True)).squeeze(1)  # (b,)
        if not (need_grad or need_slope):
            return loss, None
        total = push.sum(dim=1, keepdim=True)  # (b, 1)
        # the weights of the positives join those of the negatives for one matrix product; both are
        # brought to their scale on the (b, D) product instead of the (b, C * V) weights
        ratio = -z / total.clamp(min=_LEAST_PUSH)
        weight.view(-1, num_classes, capacity)[place] = push * ratio
        return loss, (weight @ bank.flat).mul_(share * total / (z * temperature))

    options = (temperature, reduction, need_grad, need_slope)
    return _sweep(query, label, mask, can_count, bank, *options, contrast)


def pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    keys: Sequence[Tensor],
    counts: Sequence[Tensor | None],
    mask: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
) -> _Result:
    bank = _bank(query, keys, [_filled(k, c) for k, c in zip(keys, counts, strict=True)])
    holds = _holds(bank)  # (C,)
    can_count = holds.sum() - holds.long() > 0

    def contrast(block: _Block) -> tuple[Tensor, Tensor | None]:
        score = _scores(block, bank, temperature)  # (b, C, V)
        place = (torch.arange(len(block.label), device=label.device), block.label)
        score[place] = _minus_infinity(score)
        weight, log_z, z = _exponentiate(score.flatten(1))  # (b, C * V), (b, 1), (b, 1)
        peer = normalize(block.take(positive).to(weight.dtype))  # (b, D)
        own = (block.direction * peer).sum(dim=1, keepdim=True) / temperature  # (b, 1)
        over = log_z - own
        loss = -F.logsigmoid(-over).squeeze(1)
        if not (need_grad or need_slope):
            return loss, None
        push = over.sigmoid() / temperature  # (b, 1)
        return loss, (weight @ bank.flat).mul_(push / z).sub_(push * peer)

    options = (temperature, reduction, need_grad, need_slope)
    return _sweep(query, label, mask, can_count, bank, *options, contrast)


class _Bank(NamedTuple):
    """Keys of all banks side by side, V of them for a class."""

    flat: Tensor  # (C * V, D), in the type that is computed in
    filled: Tensor | None  # (C, V) bool; None: every place holds a key
    bias: Tensor | None  # (C * V,), -inf at the places that hold no key
    num_classes: int


class _Rows(NamedTuple):
    """The pixels to go through."""

    label: Tensor  # (n,), a class for every row
    counts: Tensor  # (n,) bool
    pixel: Tensor | None  # (n,), where they stand among the N pixels; None: all, in their order


class _Block(NamedTuple):
    """Some of the rows."""

    label: Tensor  # (b,)
    direction: Tensor  # (b, D), the normalised queries
    take: Callable[[Tensor], Tensor]  # picks the rows of a tensor (N, ..)
    buffer: Tensor  # (b, C * V), for the scores


def _filled(keys: Tensor, count: Tensor | None) -> Tensor | None:
    """(C, V) bool, or None where every place is known to hold a key."""
    if count is None:
        return None
    if _may_look(count.device) and bool((count >= keys.shape[1]).all()):
        return None
    return torch.arange(keys.shape[1], device=keys.device) < count[:, None]


def _bank(query: Tensor, keys: Sequence[Tensor], filled: Sequence[Tensor | None]) -> _Bank:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    joined = keys[0].to(wide) if len(keys) == 1 else torch.cat([k.to(wide) for k in keys], dim=1)
    num_classes, _, dim = joined.shape
    if all(f is None for f in filled):
        return _Bank(joined.reshape(-1, dim), None, None, num_classes)
    parts = [
        k.new_ones(k.shape[:2], dtype=torch.bool) if f is None else f
        for k, f in zip(keys, filled, strict=True)
    ]
    held = torch.cat(parts, dim=1)  # (C, V)
    # a place without a key may hold anything; a weight of 0 would not stop NaN
    joined = torch.where(held[:, :, None], joined, 0)
    bias = torch.zeros_like(held, dtype=wide).masked_fill_(~held, -torch.inf)
    return _Bank(joined.reshape(-1, dim), held, bias.flatten(), num_classes)


def _holds(bank: _Bank) -> Tensor:
    """(C,) bool: the classes with a key."""
    if bank.filled is not None:
        return bank.filled.any(dim=1)
    some = bank.flat.shape[0] > 0
    return torch.full((bank.num_classes,), some, dtype=torch.bool, device=bank.flat.device)


def _rows(label: Tensor, can_count: Tensor, mask: Tensor | None) -> _Rows:
    inside = label.clamp(0, len(can_count) - 1)  # (N,)
    counts = (inside == label) & can_count[inside]
    if mask is not None:
        counts = counts & mask
    if not _may_look(label.device):
        return _Rows(inside, counts, None)
    pixel = counts.nonzero().flatten()
    if len(pixel) == len(label):
        return _Rows(inside, counts, None)
    return _Rows(inside[pixel], counts[pixel], pixel)


def _sweep(
    query: Tensor,
    label: Tensor,
    mask: Tensor | None,
    can_count: Tensor,
    bank: _Bank,
    temperature: float | Tensor,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
    contrast: Callable[[_Block], tuple[Tensor, Tensor | None]],
) -> _Result:
    """can_count (C,) bool: whether the bank has what a pixel of the class needs. `contrast` gives
    the losses (b,) of a block and the gradients (b, D) by the direction."""
    if len(bank.flat) == 0:
        loss = bank.flat.new_zeros(len(query) if reduction == "none" else ())
        empty = torch.zeros_like(query, dtype=gradient_dtype(query)) if need_grad else None
        return loss, empty, torch.zeros_like(loss) if need_slope else None
    rows = _rows(label, can_count, mask)
    loss = bank.flat.new_empty(len(rows.label))  # (n,)
    factor = _factor(rows, bank.num_classes, reduction, loss.dtype)  # (n,) or ()
    new = torch.empty_like if rows.pixel is None else torch.zeros_like
    slope = torch.zeros_like(loss) if need_slope else None  # (n,)
    grad = None  # (N, D)
    if need_grad:
        kept = gradient_dtype(query)
        grad = new(query, dtype=kept, memory_format=torch.contiguous_format)
    with without_autocast(query.device):
        for part, block, inverse in _blocks(query, rows, bank):
            loss[part], by_direction = contrast(block)
            if by_direction is None:
                continue
            if slope is not None:  # the scores are v . key / tau, by whose tau only v can tell
                along = (by_direction * block.direction).sum(dim=1)  # (b,)
                slope[part] = -along / temperature
            if grad is None:
                continue
            scale = inverse * (factor[part, None] if factor.dim() else factor)  # (b, 1)
            by_query = _through_norm(by_direction, block.direction, scale)
            if rows.pixel is None:
                keep = rows.counts[part, None]
                grad[part] = torch.where(keep, by_query, 0) if _masks(rows) else by_query
            else:
                grad[rows.pixel[part]] = by_query.to(grad.dtype)
    value = _reduce(loss, rows, factor, len(query), reduction)
    if slope is not None:
        slope = _reduce(slope, rows, factor, len(query), reduction)
    return value, grad, slope


def _blocks(query: Tensor, rows: _Rows, bank: _Bank) -> Iterator[tuple[slice, _Block, Tensor]]:
    """Rows, block, and 1 / |q| (b, 1), 0 where a query has no direction."""
    n, places = len(rows.label), bank.flat.shape[0]
    if n == 0:
        return
    limit = _SCORE_BYTES.get(query.device.type, _SCORE_BYTES_OTHER)
    size = min(n, max(1, limit // (places * bank.flat.element_size())))
    buffer = bank.flat.new_empty(size, places)  # one for all blocks: fresh pages cost more
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        which = part if rows.pixel is None else rows.pixel[part]
        q = query[which].to(bank.flat.dtype)  # (b, D)
        squared = q.square().sum(dim=1, keepdim=True)  # (b, 1)
        inverse = torch.where(squared > NORM_EPS**2, squared, torch.inf).rsqrt()
        block = _Block(rows.label[part], q * inverse, _taker(which), buffer[: len(q)])
        yield part, block, inverse


def _taker(which: slice | Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x[which]


def _scores(block: _Block, bank: _Bank, temperature: float | Tensor) -> Tensor:
    """(b, C, V) cos / tau, -inf where a place holds no key."""
    v = block.direction / temperature
    if bank.bias is None:
        score = torch.mm(v, bank.flat.T, out=block.buffer)
    else:
        score = torch.addmm(bank.bias, v, bank.flat.T, out=block.buffer)
    return score.view(len(score), bank.num_classes, -1)


def _exponentiate(score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """score (b, M) in place -> e^(score - max), log of the sum of e^score, and sum of the first."""
    top = score.amax(dim=1, keepdim=True)
    weight = score.sub_(top).exp_()
    z = weight.sum(dim=1, keepdim=True)
    return weight, top + z.log(), z


def _through_norm(by_direction: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
    """Gradient by v = q / |q| -> gradient by q, times scale |q| (b, 1)."""
    along = (by_direction * direction).sum(dim=1, keepdim=True)
    return by_direction.sub_(along * direction).mul_(scale)


def _may_look(device: torch.device) -> bool:
    """Whether values can be read without waiting for a device."""
    return device.type == "cpu"


def _masks(rows: _Rows) -> bool:
    """Whether some of the rows may not count."""
    return not _may_look(rows.label.device)


def _factor(rows: _Rows, num_classes: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """What the loss of a pixel is multiplied with in the result."""
    if reduction == "none":
        return torch.ones((), dtype=dtype, device=rows.label.device)
    counts = rows.counts.to(dtype)
    if reduction == "mean":
        return 1 / counts.sum().clamp(min=1)
    pixels = counts.new_zeros(num_classes).scatter_add_(0, rows.label, counts)  # (C,)
    present = (pixels > 0).sum()
    share = 1 / (pixels * present).clamp(min=1)
    return share[rows.label]


def _reduce(loss: Tensor, rows: _Rows, factor: Tensor, total: int, reduction: str) -> Tensor:
    if _masks(rows):
        loss = torch.where(rows.counts, loss, 0)
    if reduction != "none":
        return (loss * factor).sum()
    return loss if rows.pixel is None else loss.new_zeros(total).index_copy_(0, rows.pixel, loss)


def class_topk(
    confidence: Tensor, label: Tensor, k: int, num_classes: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    n = len(label)
    if n == 0:
        return label.new_full((num_classes, k), -1), label.new_zeros(num_classes)
    candidate = (label >= 0) & (label < num_classes) & ~confidence.isnan()
    if valid is not None:
        candidate &= valid
    owner = torch.where(candidate, label, num_classes)  # (N,)
    order, edge = _by_class(confidence, owner, num_classes)
    count = (edge[1:] - edge[:-1]).clamp(max=k)  # (C,)
    rank = torch.arange(k, device=label.device)
    place = (edge[:-1, None] + rank).clamp(max=n - 1)  # (C, k)
    return torch.where(rank < count[:, None], order[place], -1), count


def _by_class(confidence: Tensor, owner: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Pixels (N,) by class, then falling confidence, then index; where each class starts (C + 1,).

    A stable sort of unique keys gives the same order everywhere.
    """
    classes = torch.arange(num_classes + 1, device=owner.device)
    if confidence.dtype == torch.float64:  # class and confidence do not fit one 64-bit key
        order = confidence.sort(descending=True, stable=True).indices
        by_class = owner[order].sort(stable=True)
        return order[by_class.indices], torch.searchsorted(by_class.values, classes)
    key = (owner << 32) + _falling(confidence)
    by_key = key.sort(stable=True)
    return by_key.indices, torch.searchsorted(by_key.values, classes << 32)


def _falling(confidence: Tensor) -> Tensor:
    """Integers in 0..2^32-1 that order float32 and half values from high to low."""
    bits = (confidence.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as signed integers in the order of the values
    return 0x7FFFFFFF - rising.long()


def queue_push_(
    keys: Tensor, count: Tensor, cursor: Tensor, features: Tensor, index: Tensor
) -> None:
    num_classes, capacity, _ = keys.shape
    n, k = len(features), index.shape[1]
    if n == 0 or k == 0 or capacity == 0:
        return
    pushed = ((index >= 0) & (index < n)).cumsum(dim=1)  # (C, k), how many up to here
    total = pushed[:, -1:]  # (C, 1)
    # Of more than V keys only the last V stay. Each class has `width` different places to write;
    # a place for which there is no key gets back what it holds, so that all shapes are fixed.
    width = min(k, capacity)
    rank = (total - capacity).clamp(min=0) + torch.arange(width, device=keys.device)  # (C, width)
    entry = torch.searchsorted(pushed, rank + 1)  # (C, width), the entry with that rank
    source = index.gather(1, entry.clamp(max=k - 1)).clamp(0, n - 1)
    place = (
        torch.arange(num_classes, device=keys.device)[:, None],
        (cursor[:, None] + rank) % capacity,
    )
    chosen = features[source]  # (C, width, D)
    wide = chosen.float() if chosen.dtype in (torch.float16, torch.bfloat16) else chosen
    fresh = key_of(wide).to(keys.dtype)
    keys[place] = torch.where((rank < total)[:, :, None], fresh, keys[place])
    total = total.squeeze(1)
    cursor.copy_((cursor + total) % capacity)
    count.copy_((count + total).clamp(max=capacity))


def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor, plan: Plan
) -> None:
    if isinstance(decay, Tensor) and _may_look(decay.device):
        decay = decay.item()
    if not isinstance(decay, Tensor):
        types = {t.dtype for t in teacher} | {s.dtype for s in student}
        if len(types) == 1 and types <= _WIDE:
            torch._foreach_lerp_(tuple(teacher), tuple(student), 1 - decay)
            return
    for group in _groups(list(zip(teacher, student, strict=True))):
        _average_copies(group, decay)


def _minus_infinity(like: Tensor) -> Tensor:
    """To be written at indices: a number would be brought to a GPU by a copy that is waited for."""
    return like.new_full((), -torch.inf)


def _groups(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Runs of pairs of at most `_COPY_VALUES` values, or one larger pair."""
    group: list[tuple[Tensor, Tensor]] = []
    held = 0
    for pair in pairs:
        if group and held + pair[0].numel() > _COPY_VALUES:
            yield group
            group, held = [], 0
        group.append(pair)
        held += pair[0].numel()
    if group:
        yield group


def _average_copies(pairs: list[tuple[Tensor, Tensor]], decay: float | Tensor) -> None:
    """Averages in the wider type of teacher and float32, then rounds once."""
    target = [t for t, _ in pairs]
    wide = [torch.promote_types(t.dtype, torch.float32) for t in target]
    mean = [t.to(w, copy=True) for t, w in zip(target, wide, strict=True)]
    other = [s.to(w, copy=True) for (_, s), w in zip(pairs, wide, strict=True)]
    torch._foreach_mul_(mean, decay)
    torch._foreach_mul_(other, 1 - decay)
    torch._foreach_add_(mean, other)
    torch._foreach_copy_(target, mean)
