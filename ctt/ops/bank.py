"""The memory bank: one first-in first-out queue of pixel features per class."""

import copy
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ctt.ops import _checks
from ctt.ops.push import queue_push_
from ctt.ops.topk import class_topk

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MemoryBank(nn.Module):
    """Memory bank: a first-in first-out queue of L2-normalised features (keys) for each class.

    Buffers (saved in the state dict): `keys` (C, V, D) of PyTorch's default dtype, which is
    float32, `count` (C,) int64 keys held, `cursor` (C,) int64 next place to write. Pass `keys` and
    `count` to `info_nce` and `pair_info_nce`.

    Args:
        num_classes: C, at least 1.
        capacity: V, most keys of a class, at least 1.
        dim: D, channels of the features, at least 1.
        group: the processes that share one bank: every one of them must call `push` at each step.
            None: all processes, where torch.distributed is initialised. "local": this process has a
            bank of its own, `push` waits for no other, and the banks differ from rank to rank
            (inside a DistributedDataParallel module: with broadcast_buffers=False, or every forward
            overwrites them with rank 0's).

    Raises:
        TypeError: a size is no integer, or `group` is none of these.
        ValueError: a size is below 1, or this process is not in the group.
    """

    keys: Tensor
    count: Tensor
    cursor: Tensor

    def __init__(
        self,
        num_classes: int,
        capacity: int,
        dim: int,
        *,
        group: "ProcessGroup | Literal['local'] | None" = None,
    ) -> None:
        super().__init__()
        sizes = (("num_classes", num_classes), ("capacity", capacity), ("dim", dim))
        num_classes, capacity, dim = (_checks.positive_int("MemoryBank", *size) for size in sizes)
        self.num_classes, self.capacity, self.dim = num_classes, capacity, dim
        self.group = _checked(group)
        self.register_buffer("keys", torch.zeros(num_classes, capacity, dim))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Remove all keys; a bank made on the meta device needs it after `to_empty`."""
        for buffer in (self.keys, self.count, self.cursor):
            buffer.zero_()

    def __getstate__(self) -> dict[str, Any]:
        if self.group not in (None, "local"):
            raise TypeError(
                "MemoryBank: a bank with a process group cannot be pickled; save its state_dict()"
            )
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.group)] = self.group  # a process group cannot be copied
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

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
        are kept, and of these at most `per_class`, or as many as a queue holds, are pushed, drawn
        at random when there are more (none is drawn when top_k <= per_class). The candidates of all
        ranks of the bank's group are pooled first, in the order of the ranks, so that every rank
        ends with the bank that one process with the joined batch would have.

        Args:
            features: (N, D) floating point.
            label: (N,) int64.
            confidence: (N,) floating point.
            valid: (N,) bool, None: all.
            top_k: candidates of a class, at least 1.
            per_class: keys of a class that are pushed, at least 1.
            generator: source of the draw; None: torch's default generator of the device. Ranks use
                the draw of the group's rank 0.
            ticket: (C, top_k) random numbers of the device, the same on every rank, instead
                of a generator: the candidates with the highest are pushed. A captured graph can be
                replayed with others.

        Raises:
            TypeError, ValueError: an argument of another dtype, shape or range.
        """
        _checks.tensor("MemoryBank.push", "features", features, ("N", self.dim), None)
        _checks.tensor("MemoryBank.push", "label", label, (features.shape[0],), torch.int64)
        top_k = _checks.positive_int("MemoryBank.push", "top_k", top_k)
        per_class = _checks.positive_int("MemoryBank.push", "per_class", per_class)
        if ticket is not None:
            shape = (self.num_classes, top_k)
            _checks.tensor("MemoryBank.push", "ticket", ticket, shape, None, features.device)
        if top_k <= per_class:  # nothing is drawn
            top_k = min(top_k, self.capacity)
        per_class = min(per_class, self.capacity)
        index, _ = class_topk(confidence, label, top_k, self.num_classes, valid=valid)
        pooled = self._ranks() > 1
        chosen = self._pool_ranks(confidence, index) if pooled else index
        if top_k > per_class:
            if ticket is None:
                ticket = self._tickets(chosen, generator)
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
            torch.empty((self._ranks(), *x.shape), dtype=x.dtype, device=x.device)
            for x in (score, owner)
        ]
        for target, source in zip(pooled, (score, owner), strict=True):
            dist.all_gather(list(target.unbind()), source, group=self._process_group)
        # a rank lists its candidates by falling confidence and, among equals, by position, so the
        # order of the pool decides ties as the joined batch would
        scores, owners = (x.flatten() for x in pooled)
        chosen, _ = class_topk(scores, owners, k, num_classes)
        return chosen

    def _fetch(self, features: Tensor, index: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Features (C * p, D) of the pooled positions `chosen` (C, p), and their index (C, p).

        Only what is pushed travels: each rank fills in its own rows, and the sum joins them.
        """
        own = chosen - dist.get_rank(self._process_group) * index.numel()
        mine = (chosen >= 0) & (own >= 0) & (own < index.numel())
        dtype = torch.promote_types(features.dtype, torch.float32)  # which every group can sum
        rows = features.new_zeros(chosen.numel(), self.dim, dtype=dtype)
        if features.shape[0]:
            place = index.flatten()[own.clamp(0, index.numel() - 1)].clamp(min=0).flatten()
            rows = torch.where(mine.flatten()[:, None], features[place].to(dtype), 0)
        dist.all_reduce(rows, group=self._process_group)
        numbers = torch.arange(chosen.numel(), device=chosen.device).view_as(chosen)
        return rows, torch.where(chosen >= 0, numbers, -1)

    def _tickets(self, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform random numbers (C, k), on every rank those of the group's rank 0."""
        shape, dtype = index.shape, torch.float32
        ticket = torch.rand(shape, generator=generator, dtype=dtype, device=index.device)
        if self._ranks() > 1:
            group = self._process_group
            first = 0 if group is None else dist.get_global_rank(group, 0)
            dist.broadcast(ticket, first, group=group)
        return ticket

    def _ranks(self) -> int:
        """How many processes share the bank."""
        if self.group == "local" or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self._process_group)

    @property
    def _process_group(self) -> "ProcessGroup | None":
        return None if self.group == "local" else self.group

    @property
    def full(self) -> Tensor:
        """Return which queues hold V keys: (C,) bool."""
        return self.count >= self.capacity

    def queue(self, c: int) -> Tensor:
        """Return the keys (count[c], D) of class c, oldest first."""
        if not 0 <= c < self.num_classes:
            raise ValueError(f"MemoryBank.queue: c must be in 0..{self.num_classes - 1}, got {c}")
        held = int(self.count[c])
        oldest = int(self.cursor[c]) - held
        places = (oldest + torch.arange(held, device=self.keys.device)) % self.capacity
        return self.keys[c, places]

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, capacity={self.capacity}, dim={self.dim}"


def _checked(group: Any) -> Any:
    """Return `group` where this process can share a bank with it."""
    if group is None or group == "local":
        return group
    if dist.is_available():
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "MemoryBank: this process is not in the group; only its members make the bank"
            )
        if isinstance(group, dist.ProcessGroup):
            return group
    raise TypeError(
        f"MemoryBank: group must be a process group, None (all processes) or 'local', got {group!r}"
    )


def _draw(index: Tensor, per_class: int, ticket: Tensor) -> Tensor:
    """At most `per_class` entries of each row of index (C, k), in their order."""
    ticket = ticket.masked_fill(index < 0, -torch.inf)  # padding is drawn last
    place = ticket.topk(min(per_class, index.shape[1]), dim=1).indices.sort(dim=1).values
    return index.gather(1, place)
