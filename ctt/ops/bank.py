"""The memory bank: one first-in first-out queue of pixel features per class."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ctt.ops import _checks
from ctt.ops.push import queue_push_
from ctt.ops.topk import class_topk


class MemoryBank(nn.Module):
    """Queues Q_c of at most `capacity` L2-normalised keys for each of `num_classes` classes.

    Buffers (saved in the state dict): `keys` (C, V, D) float32, `count` (C,) int64 keys held,
    `cursor` (C,) int64 next place to write. Pass `keys` and `count` to `info_nce` and
    `pair_info_nce`.

    Args:
        num_classes: C, at least 1. capacity: V, at least 1. dim: D, at least 1.

    Raises:
        TypeError, ValueError: one of them is no integer or below 1.
    """

    keys: Tensor
    count: Tensor
    cursor: Tensor

    def __init__(self, num_classes: int, capacity: int, dim: int) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("capacity", capacity), ("dim", dim)):
            _checks.positive_int("MemoryBank", name, value)
        self.num_classes, self.capacity, self.dim = num_classes, capacity, dim
        self.register_buffer("keys", torch.zeros(num_classes, capacity, dim))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def push(
        self,
        features: Tensor,
        label: Tensor,
        confidence: Tensor,
        *,
        valid: Tensor | None = None,
        top_k: int,
        per_class: int,
        generator: torch.Generator | None = None,
        ticket: Tensor | None = None,
    ) -> None:
        """Store some of the most confident pixels of each class.

        Candidates of class c are the valid pixels with label c; of these the `top_k` most confident
        are kept, and of these at most `per_class` are pushed, drawn at random when there are more
        (none is drawn when top_k <= per_class). Under torch.distributed the candidates of all ranks
        are pooled first, in the order of the ranks, so that every rank ends with the bank that one
        process with the joined batch would have.

        Args:
            features: (N, D) floating point. label: (N,) int64. confidence: (N,) floating point.
            valid: (N,) bool, None: all.
            top_k, per_class: at least 1.
            generator: source of the draw; None: torch's default generator of the device. Ranks use
                the draw of rank 0.
            ticket: (C, top_k) uniform random numbers of the device, the same on every rank, instead
                of a generator: the candidates with the highest are pushed. A captured graph can be
                replayed with others.

        Raises:
            TypeError, ValueError: an argument of another dtype, shape or range.
        """
        _checks.tensor("MemoryBank.push", "features", features, ("N", self.dim), None)
        _checks.tensor("MemoryBank.push", "label", label, (features.shape[0],), torch.int64)
        _checks.positive_int("MemoryBank.push", "per_class", per_class)
        if ticket is not None:
            shape = (self.num_classes, top_k)
            _checks.tensor("MemoryBank.push", "ticket", ticket, shape, None, features.device)
        index, _ = class_topk(confidence, label, top_k, self.num_classes, valid=valid)
        pooled = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        chosen = self._pool_ranks(confidence, index) if pooled else index
        if top_k > per_class:
            if ticket is None:
                ticket = _tickets(chosen, generator)
            chosen = _draw(chosen, per_class, ticket)
        if pooled:
            features, chosen = self._fetch(features, index, chosen)
        queue_push_(self.keys, self.count, self.cursor, features, chosen)

    def _pool_ranks(self, confidence: Tensor, index: Tensor) -> Tensor:
        """The top k (C, k) of every rank's candidates, as positions among all (W, C, k) of them."""
        num_classes, k = index.shape
        score = confidence.new_zeros(num_classes * k)
        if len(confidence):
            score = confidence[index.clamp(min=0).flatten()].contiguous()
        owner = torch.arange(num_classes, device=index.device).repeat_interleave(k)
        owner = torch.where((index >= 0).flatten(), owner, -1)
        pooled = [
            torch.empty((dist.get_world_size(), *x.shape), dtype=x.dtype, device=x.device)
            for x in (score, owner)
        ]
        for target, source in zip(pooled, (score, owner), strict=True):
            dist.all_gather(list(target.unbind()), source)
        # a rank lists its candidates by falling confidence and, among equals, by position, so the
        # order of the pool decides ties as the joined batch would
        scores, owners = (x.flatten() for x in pooled)
        chosen, _ = class_topk(scores, owners, k, num_classes)
        return chosen

    def _fetch(self, features: Tensor, index: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Features (C * p, D) of the pooled positions `chosen` (C, p), and their index (C, p).

        Only what is pushed travels: each rank fills in its own rows, and the sum joins them.
        """
        own = chosen - dist.get_rank() * index.numel()
        mine = (chosen >= 0) & (own >= 0) & (own < index.numel())
        dtype = torch.promote_types(features.dtype, torch.float32)  # which every group can sum
        rows = features.new_zeros(chosen.numel(), self.dim, dtype=dtype)
        if features.shape[0]:
            place = index.flatten()[own.clamp(0, index.numel() - 1)].clamp(min=0).flatten()
            rows = torch.where(mine.flatten()[:, None], features[place].to(dtype), 0)
        dist.all_reduce(rows)
        numbers = torch.arange(chosen.numel(), device=chosen.device).view_as(chosen)
        return rows, torch.where(chosen >= 0, numbers, -1)

    @property
    def full(self) -> Tensor:
        """(C,) bool: the queues that hold V keys."""
        return self.count >= self.capacity

    def queue(self, c: int) -> Tensor:
        """The keys (count[c], D) of class c, oldest first."""
        if not 0 <= c < self.num_classes:
            raise ValueError(f"MemoryBank.queue: c must be in 0..{self.num_classes - 1}, got {c}")
        held = int(self.count[c])
        oldest = int(self.cursor[c]) - held
        places = (oldest + torch.arange(held, device=self.keys.device)) % self.capacity
        return self.keys[c, places]

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, capacity={self.capacity}, dim={self.dim}"


def _tickets(index: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform random numbers (C, k), on every rank those of rank 0."""
    ticket = torch.rand(index.shape, generator=generator, device=index.device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(ticket, 0)
    return ticket


def _draw(index: Tensor, per_class: int, ticket: Tensor) -> Tensor:
    """At most `per_class` entries of each row of index (C, k), in their order."""
    ticket = ticket.masked_fill(index < 0, -1)  # padding is drawn last
    place = ticket.topk(min(per_class, index.shape[1]), dim=1).indices.sort(dim=1).values
    return index.gather(1, place)
