"""Gradients and running statistics as means over the processes of a run."""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctt.methods.base import Method
from ctt.train.distributed import World


class DataParallel:
    """A method whose gradients, with several processes, are averaged during the backward pass.

    Args:
        statistics: average the running statistics of what is trained too; not where batch norms
            take them from all processes themselves.

    Attributes:
        module: what returns the terms of the objective; the method itself where this process is
            alone.
    """

    def __init__(self, method: Method, world: World, statistics: bool) -> None:
        self.world = world
        self.module: Method | DistributedDataParallel = method
        self.statistics: list[Tensor] = []
        if world.size > 1:
            self.module = averaging_gradients(method, world)
            self.statistics = list(running_statistics(method)) if statistics else []

    @contextlib.contextmanager
    def summing(self, yes: bool) -> Iterator[None]:
        """Let backward passes leave the gradients of this process as they are, unless `yes`."""
        if not yes and isinstance(self.module, DistributedDataParallel):
            with self.module.no_sync():
                yield
            return
        yield

    def average_statistics(self) -> None:
        """Set the running statistics on every process to the mean over the processes."""
        if not self.statistics:
            return
        flat = torch.cat([buffer.flatten() for buffer in self.statistics])
        mean = self.world.total(flat) / self.world.size
        parts = mean.split_with_sizes([buffer.numel() for buffer in self.statistics])
        views = [p.view_as(b) for p, b in zip(parts, self.statistics, strict=True)]
        torch._foreach_copy_(self.statistics, views)


def averaging_gradients(method: Method, world: World) -> DistributedDataParallel:
    """Return the method with its gradients averaged over the processes during backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of broadcast_buffers, the name until 2.14
        parallel = DistributedDataParallel(
            method,
            broadcast_buffers=False,  # see DataParallel.average_statistics
            gradient_as_bucket_view=True,
            find_unused_parameters=method.find_unused,
        )
    if next(method.parameters()).device.type == "cpu":
        parallel.register_comm_hook(world, average_in_order)
    return parallel


def average_in_order(
    world: World,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Return the mean of a bucket of gradients, summed in the order of the processes.

    An all-reduce sums each part of a bucket in another order, and DDP fills its buckets anew after
    the first step: after a resume a gradient could be rounded otherwise.
    """
    own = bucket.buffer()
    parts = own.new_empty(world.size, own.numel())
    gathered = dist.all_gather(list(parts.unbind()), own, async_op=True).get_future()
    return gathered.then(lambda _: functools.reduce(torch.add, parts.unbind()) / world.size)


def running_statistics(method: Method) -> Iterator[Tensor]:
    """Return the running statistics that training changes; teachers and copies are not trained."""
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.weight is None or module.weight.requires_grad
        ):
            yield from (x for x in module.buffers() if x.is_floating_point())
