"""Optimiser states in parts, one for each process (ZeRO, stage 1), by PyTorch's own optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sharded(
    kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]], **options: Any
) -> torch.optim.Optimizer:
    """Return an optimiser of this kind whose states are shared out among the processes.

    Each process updates the parameters whose states it has and sends them to the others, so what
    comes out is what the whole optimiser computes. One process has all.

    Args:
        groups: of parameters, with what differs from the options.
        options: of the optimiser.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return kind(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import

    return ZeroRedundancyOptimizer(groups, optimizer_class=kind, **options)


def own_states(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser that has this process's part of the states."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
    return inner


def gather(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Bring the states of all processes to the first one, whose `state_dict` is then whole.

    All processes must come here.
    """
    for optimizer in optimizers:
        if own_states(optimizer) is not optimizer:
            whole: Any = optimizer
            whole.consolidate_state_dict(to=0)


def settle(optimizer: torch.optim.Optimizer) -> None:
    """Put right what a sharded optimiser has loaded.

    It brings numbers of steps to the CPU, where fused optimisers do not take them, and keeps a
    second copy of the states that nothing reads.
    """
    if own_states(optimizer) is optimizer:
        return
    optimizer.state.clear()
    for parameter, state in own_states(optimizer).state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                state[name] = value.to(parameter.device)
