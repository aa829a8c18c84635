"""Random samples of the pixels of all processes, class by class, without waiting for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctt.methods.base import Step
from ctt.methods.losses import as_pixels
from ctt.ops import MemoryBank
from ctt.ops.push import queue_push_

BINS = 1024  # of each of the three digits by which a value is found
NOBODY = -1  # the number of a pixel that is not in a sample


def entropy(scores: Tensor) -> Tensor:
    """Return the entropy (B, H, W) of logits (B, C, H, W), as a share of the largest possible."""
    log_p = scores.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1) / math.log(scores.shape[1])


def quantile(values: Tensor, valid: Tensor, share: float | Tensor, step: Step) -> Tensor:
    """Return the value () of which a share of the valid ones is below; infinite for all of them.

    Args:
        values: in 0..1, of any shape.
        valid: of the same, bool.
    """
    return class_quantiles(values, (~valid).long(), 1, share, step)[0][0]


def class_quantiles(
    values: Tensor, own: Tensor, classes: int, share: float | Tensor, step: Step
) -> tuple[Tensor, Tensor]:
    """Return `quantile` of the values of each class (C,), and whether it has any (C,).

    They are exact, out of the values of all processes in float32: numbers of networks that are sure
    crowd together near 0 or 1, where no histogram of even steps tells them apart.

    Args:
        own: of the same shape as the values; those of no class count for none.
    """
    # floats that are not negative have the order of their bits, here three digits of ten bits
    # (-0.0, which entropies of sure pixels are, becomes 0.0)
    bits = (values.float().clamp(0, 1) + 0.0).view(torch.int32).long().flatten()
    belongs, own = (own < classes).flatten(), own.flatten().clamp(0, classes - 1)
    found = bits.new_zeros(classes)  # the digits so far
    before = whole = found  # how many of the class come before, and how many there are
    for digit in (20, 10, 0):
        counted = belongs & (bits >> (digit + 10) == found[own])
        code = torch.where(counted, own * BINS + (bits >> digit) % BINS, classes * BINS)
        counts = bits.new_zeros(classes * BINS + 1).scatter_add_(0, code, torch.ones_like(code))
        counts = step.total(counts)[:-1].view(classes, BINS)
        if digit == 20:
            whole = counts.sum(dim=1)
            before = (share * whole).long()
        place = (counts.cumsum(dim=1) <= before[:, None]).sum(dim=1).clamp(max=BINS - 1)
        lower = counts.cumsum(dim=1) - counts
        before = before - lower.gather(1, place[:, None])[:, 0]
        found = found * BINS + place
    value = found.int().view(torch.float32)
    return value.masked_fill((share * whole).long() >= whole, math.inf), whole > 0


def highest(member: Tensor, count: int, ticket: Tensor) -> tuple[Tensor, Tensor]:
    """Return up to `count` members of each class with the highest numbers.

    Args:
        member: (..., N) bool.
        ticket: (N,) or (..., 1, N) random numbers in 0..1.

    Returns:
        their places (..., count) and numbers, which are -1 where there are fewer.
    """
    score = torch.where(member, ticket, -1.0)
    best, place = score.topk(min(count, score.shape[-1]), dim=-1)
    return place, best


def half_of_each(member: Tensor, kind: Tensor, count: int, ticket: Tensor) -> tuple[Tensor, Tensor]:
    """Draw up to `count` members, half of them of a kind, or more where there are too few others.

    Args:
        member, ticket: as in `highest`.
        kind: as `ticket`, bool.

    Returns:
        their places (..., count), and whether there is one.
    """
    both = [highest(member & own, count, ticket) for own in (kind, ~kind)]
    place, best = (torch.cat(x, dim=-1) for x in zip(*both, strict=True))
    turn = torch.arange(place.shape[-1] // 2, device=place.device).repeat(2)
    turn = turn.masked_fill(best < 0, count)  # of one kind and the other in turn
    turn, order = turn.sort(dim=-1, stable=True)
    return place.gather(-1, order[..., :count]), turn[..., :count] < count


def put_first(values: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (C, n, D) with those that are there (C, n) first, and how many there are."""
    order = (~there).to(torch.uint8).argsort(dim=1, stable=True)
    return values.gather(1, order[..., None].expand_as(values)), there.sum(dim=1)


def gathered(values: Tensor, step: Step) -> Tensor:
    """Return the values (C, n, ...) of all processes: (C, W * n, ...)."""
    if step.alone:
        return values
    pool = values.new_zeros(step.processes, *values.shape)
    pool[step.rank] = values
    return step.total(pool).movedim(0, 1).flatten(1, 2)


def class_members(own: Tensor, classes: int) -> Tensor:
    """Return which pixels are of each class (C, N), of their classes in any shape."""
    return own.flatten() == torch.arange(classes, device=own.device)[:, None]


def class_means(features: Tensor, member: Tensor, step: Step) -> Tensor:
    """Return the mean of the features (N, D) of the members (C, N) of all processes: (C, D)."""
    counts = step.total(member.sum(dim=1)).clamp(min=1)
    return step.total(member.to(features.dtype) @ features) / counts[:, None]


def tickets(name: str, own: Tensor, labeled: int, step: Step) -> Tensor:
    """Return a random number for each pixel ((B + U) * h * w) of labelled and unlabelled images.

    Args:
        name: of the numbers.
        own: (B + U, h, w), what the pixels are.
        labeled: B.
    """
    shapes = [(images, *own.shape[1:]) for images in (labeled, len(own) - labeled)]
    return torch.cat(step.rand_each(name, shapes, 0)).flatten()


def numbered(member: Tensor, count: int, ticket: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Draw up to `count` members of each class out of all processes, and number them.

    Args:
        member: (C, N) bool, a pixel belongs to one class at most.
        ticket: (N,) random numbers.

    Returns:
        the number (N,) of each pixel among those of its class, `NOBODY` for the others, and how
        many each class has (C,), over all processes.
    """
    place, own = highest(member, count, ticket)
    pool = gathered(own, step)
    index = torch.arange(pool.shape[1], device=pool.device)
    first = step.rank * own.shape[1]  # of this process's in the pool
    earlier = index < index[first : first + own.shape[1], None]
    # random numbers of 24 bits are often equal; then those that come first in the pool are first
    mine, pool = own[:, :, None], pool[:, None]
    rank = ((pool > mine) | (pool == mine) & earlier).sum(dim=2)
    chosen = (own >= 0) & (rank < count)
    pixels = member.shape[1]
    number = rank.new_full((pixels + 1,), NOBODY)  # the last one is of those not chosen
    number.scatter_(0, place.masked_fill(~chosen, pixels).flatten(), rank.flatten())
    return number[:pixels], step.total(chosen.sum(dim=1))


def places(own: Tensor, number: Tensor, classes: int, count: int) -> Tensor:
    """Return where the members of a sample are: (C, count), `NOBODY` where there is none here.

    Args:
        own, number: (N,), the class of each pixel and its number among those drawn of it.
    """
    none = classes * count
    code = torch.where(number == NOBODY, none, own * count + number)
    place = number.new_full((none + 1,), NOBODY)
    place.scatter_(0, code, torch.arange(len(own), device=own.device))
    return place[:-1].view(classes, count)


def number_each(name: str, own: Tensor, classes: int, count: int, step: Step) -> Tensor:
    """Draw up to `count` pixels of each class, and number them as `numbered` does: (B, h, w).

    Args:
        name: of the random numbers.
        own: (B, h, w), the class of each pixel.
    """
    ticket = step.rand(name, tuple(own.shape), 0).flatten()
    return numbered(class_members(own, classes), count, ticket, step)[0].view_as(own)


def sample_of(
    maps: Tensor, own: Tensor, number: Tensor, classes: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return the pixels (C, count, D) of a sample, and where there is one (C, count).

    Args:
        maps: (B, D, h, w).
        own, number: (B, h, w), see `places`.
    """
    place = places(own.flatten(), number.flatten(), classes, count)
    return as_pixels(maps)[place.clamp(min=0)], place != NOBODY


def push(
    bank: MemoryBank, member: Tensor, features: Tensor, count: int, ticket: Tensor, step: Step
) -> None:
    """Push features of up to `count` members of each class, drawn out of all processes.

    Args:
        member: (C, N) bool; a pixel may belong to several classes.
        features: (N, D).
        ticket: (N,) random numbers.
    """
    place, own = highest(member, count, ticket)
    pool, tickets = gathered(features[place], step), gathered(own, step)
    best, index = tickets.topk(min(count, tickets.shape[1]), dim=1)
    first = pool.shape[1] * torch.arange(len(pool), device=index.device)[:, None]
    index = (index + first).masked_fill(best < 0, -1)
    queue_push_(bank.keys, bank.count, bank.cursor, pool.flatten(0, 1), index)


def sampled_info_nce(
    anchors: Tensor, positive: Tensor, bank: MemoryBank, draw: Tensor, temperature: float
) -> Tensor:
    """Return the InfoNCE loss (C, n) of anchors against their positive and sampled negatives.

    Args:
        anchors: (C, n, D), normalised.
        positive: (C, D), normalised.
        bank: of negatives, for each class its own.
        draw: (C, n, m) random numbers, for m negatives of each anchor.
    """
    good = (anchors * positive[:, None]).sum(dim=2, keepdim=True)
    index = (draw * bank.count[:, None, None]).long().clamp(max=bank.capacity - 1)
    scores = torch.einsum("cnd,cvd->cnv", anchors, bank.keys.to(anchors.dtype))
    scores = torch.cat([good, scores.gather(2, index)], dim=2) / temperature
    return scores.logsumexp(dim=2) - scores[..., 0]
