"""One process or many: what they sum, shift, agree on, and how they end together.

Every process trains on its own part of the batch. A loss is the process's part of the mean over the
whole batch, so that the parts add up to what one process would compute with the joined batch.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ctt.errors import AlreadyReportedError, UserError
from ctt.methods.base import M
from ctt.models.base import PooledNorm

TIMEOUT = timedelta(minutes=10)  # of a message; evaluation and checkpoints are shorter
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 3.0  # seconds that the first process waits for others that fail for the same reason


@dataclass
class World:
    """The processes of a run.

    Attributes:
        rank: number of this one.
        size: how many there are.
        messages: a group on the CPU, whose messages no GPU waits for.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    messages: Any = None
    _asked: tuple[Tensor, Any] | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and speaks to the user."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, without gradient."""
        if self.size == 1:
            return values
        values = values.detach().clone()
        dist.all_reduce(values)
        return values

    def roll(self, values: Tensor) -> Tensor:
        """Return `values.roll(1, dims=0)` of the joined batch: the first comes from the rank
        before."""
        if self.size == 1:
            return values.roll(1, dims=0)
        last = values[-1].contiguous()  # as messages must be
        before = torch.empty_like(last)
        requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, last, (self.rank + 1) % self.size),
                dist.P2POp(dist.irecv, before, (self.rank - 1) % self.size),
            ]
        )
        for request in requests:
            request.wait()
        return torch.cat([before[None], values[:-1]])

    def wait(self) -> None:
        """Wait until all processes have come here.

        A collective on a GPU does not do that: it only orders the work of the GPU, and the process
        goes on at once.
        """
        if self.size > 1:
            dist.barrier(self.messages)

    def broadcast(self, text: str) -> str:
        """Send the first process's text to all processes, and return it."""
        if self.size == 1:
            return text
        held = [text]
        dist.broadcast_object_list(held, src=0, group=self.messages)
        return held[0]

    def any_raised(self, flag: bool) -> bool:
        """Return whether any process had raised its flag at the previous call.

        With one process it is this call's. Asking and reading are one step apart, so that nothing
        blocks.
        """
        if self.size == 1:
            return flag
        raised = torch.tensor(int(flag))
        before, self._asked = (
            self._asked,
            (raised, dist.all_reduce(raised, dist.ReduceOp.MAX, self.messages, async_op=True)),
        )
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    def leave(self) -> None:
        """Leave in an orderly way; the processes need not come here at the same time."""
        if self.size == 1:
            return
        if self._asked is not None:
            self._asked[1].wait()
        dist.destroy_process_group()

    def report_first(self) -> bool:
        """Return whether no other process has reported an error yet."""
        try:
            first = bool(self.store.add("reported", 1) == 1)
        except RuntimeError:  # the store ended with the process that kept it
            return True
        if self.is_main and "TORCHELASTIC_RUN_ID" not in os.environ:
            # this process keeps the store, and others may be about to ask
            end = time.monotonic() + PATIENCE
            while self.store.add("reported", 0) < self.size and time.monotonic() < end:
                time.sleep(0.05)
        return first


def of_this_attempt(store: Store, rank: int, size: int) -> Store:
    """Return a part of the store that holds nothing of processes that had these ranks before.

    torchrun keeps the store when it restarts processes, and they would look for each other at the
    addresses of those that have ended. So each process writes a new name for itself, and the first
    one answers every name with that of the part until all processes have confirmed it. A name that
    an ended process has left is answered as well, but nobody confirms it.

    Raises:
        RuntimeError: a process has not come.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", mine)
        part = store.get(f"part/{mine}").decode()
        store.set(f"{part}/{rank}", "")
        return PrefixStore(part, store)
    told: dict[int, str] = {}
    missing = set(range(1, size))
    end = time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"here/{other}"]):
                name = store.get(f"here/{other}").decode()
                if told.get(other) != name:  # the first one found may be of a process that ended
                    store.set(f"part/{name}", mine)
                    told[other] = name
            if store.check([f"{mine}/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise RuntimeError(f"process {min(missing)} of {size} has not come")
        time.sleep(0.01)
    return PrefixStore(mine, store)


@contextlib.contextmanager
def join() -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun, this one is alone.

    An error of one process ends all: it is raised here, and `AlreadyReportedError` in the others.

    Raises:
        UserError: a process is lost or cannot be found, or this one belongs to others already.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"torch.distributed is initialised in this process already, with "
            f"{dist.get_world_size()} processes. Training joins the processes that torchrun starts "
            f"by itself: do without init_process_group, or call destroy_process_group before; "
            f"after a run of theirs that failed, start all of them again."
        )
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield World()
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        store = of_this_attempt(store, rank, size)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
        messages = dist.new_group(backend="gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:  # no number, no such address, nobody there
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, so this process looks for others of its "
            f"run, but it cannot find them ({reason}). Start all with torchrun, which sets "
            f"{', '.join(VARIABLES[:-1])} and {VARIABLES[-1]}, or unset WORLD_SIZE."
        ) from None
    world = World(rank, size, PrefixStore("ctt", store), messages)
    try:
        yield world
    except UserError:
        if not world.report_first():
            raise AlreadyReportedError from None
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        if not world.report_first():
            raise AlreadyReportedError from None
        raise UserError(
            f"Another process of this run has ended, so process {rank} of {size} ends too "
            f"({str(error).splitlines()[0]}). `resume` with its folder goes on from its last "
            f"checkpoint, if it has one yet, with as many processes as you like."
        ) from None
    world.leave()


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed because a process it needs is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed", "connection reset")
    )


def synchronize(network: M, device: torch.device) -> M:
    """Return the network with batch norms that take the batches of all processes as one."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return network
    if device.type == "cpu":
        synchronize_on_cpu(network)
        return network
    from timm.layers import convert_sync_batchnorm  # knows timm's norms with an activation in them

    converted: M = convert_sync_batchnorm(network)
    return converted


def synchronize_on_cpu(network: nn.Module) -> None:
    """Make the batch norms of the network, in place, take their statistics from all processes."""
    for module in network.modules():
        if type(module) in (nn.BatchNorm2d, PooledNorm):  # parameters and hooks stay
            module.__class__ = CpuSyncBatchNorm
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"`model.sync_batch_norm`: a {type(module).__name__} of this network cannot be "
                f"synchronised on the CPU. Leave it out, or take a backbone with plain batch norms."
            )


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the joined batch, for the CPU, where torch.nn.SyncBatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) -> the same."""
        if not self.training:
            return super().forward(x)
        pixels = x.numel() // x.shape[1] * dist.get_world_size()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own_variance, own_mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)  # (C,)
        means, variances = _Gather.apply(torch.stack([own_mean, own_variance])).unbind(dim=1)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (pixels / (pixels - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        result = wide * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        normalized: Tensor = result.to(x.dtype)
        return normalized


class _Gather(torch.autograd.Function):
    """Values of all processes in a new first axis; gradients flow back to the one they came from.

    Batches are of one size, so the mean over that axis is the mean over the joined batch.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        gathered = values.new_empty(dist.get_world_size(), *values.shape)
        dist.all_gather(list(gathered.unbind()), values)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]
