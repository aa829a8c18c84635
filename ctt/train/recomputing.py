"""Gradient checkpointing: blocks whose inside is computed again in the backward pass, not kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ctt.errors import UserError
from ctt.train.compiling import repeated_blocks


def recompute_blocks(networks: Iterable[nn.Module]) -> None:
    """Have networks keep the inputs alone of the blocks that repeat in them, in place.

    In the backward pass a block is run once more with the random numbers and the precision of the
    first time, so that gradients are equal bit by bit. Its batch norms count the batch once.

    Raises:
        UserError: a network repeats no blocks.
    """
    for network in networks:
        blocks = repeated_blocks(network)
        if not blocks:
            raise UserError(
                "`train.gradient_checkpointing`: this network repeats no blocks that could be "
                "computed again. Leave it out, or choose another `model.name`."
            )
        for block in blocks:
            block.forward = partial(_recomputed, block, type(block).forward)


@contextlib.contextmanager
def recomputed(networks: Iterable[nn.Module], yes: bool) -> Iterator[None]:
    """Recompute the networks' repeated blocks within the context, if `yes`."""
    blocks = [block for net in networks for block in repeated_blocks(net)] if yes else []
    recompute_blocks(networks if yes else [])
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputed(block: nn.Module, forward: Any, *inputs: Any, **options: Any) -> Any:
    run = partial(forward, block)
    if not torch.is_grad_enabled():
        return run(*inputs, **options)
    contexts = partial(_contexts, block)
    return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), statistics_kept(block)


@contextlib.contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norms unchanged within the context."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, batches) in zip(norms, before, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if batches is None else batches.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
