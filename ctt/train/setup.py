"""How PyTorch is set up for a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ctt.ops import prefer_backend
from ctt.ops._registry import preferred
from ctt.processes import cpus, local_size
from ctt.settings import Settings
from ctt.train.compiling import uncompiled


def set_up_torch(settings: Settings) -> None:
    """Set threads, the backend of the operations and determinism, for the whole process."""
    if settings.train.threads or local_size() > 1:
        own_share = max(1, cpus() // local_size())
        torch.set_num_threads(settings.train.threads or own_share)
    prefer_backend(settings.train.backend)
    if settings.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # all crops are of one size, so the search for the fastest convolutions is made once
    torch.backends.cudnn.benchmark = not settings.train.deterministic
    torch.use_deterministic_algorithms(settings.train.deterministic)


def not_deterministic(error: RuntimeError) -> str | None:
    """Return what to do if PyTorch has an operation in no deterministic form; None for others."""
    name, found, _ = str(error).partition(" does not have a deterministic implementation")
    if not found:
        return None
    return (
        f"`train.deterministic`: PyTorch has no deterministic form of {name.split()[-1]} on this "
        f"device. Leave the option out, or choose a network and options that do without it."
    )


@contextlib.contextmanager
def restored_torch() -> Iterator[None]:
    """Undo in the end what `set_up_torch` sets: other code may run in the process."""
    threads, tuned = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    backend = preferred()
    try:
        yield
    finally:
        prefer_backend(backend)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = tuned
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextlib.contextmanager
def without_fixed_size_tuning(compiled: str) -> Iterator[None]:
    """Switch off cuDNN's search and torch.compile within the context, for evaluation.

    Both repeat their work for every new image size; evaluation has many sizes.

    Args:
        compiled: the setting `train.compile`.
    """
    searching = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with uncompiled(compiled):
            yield
    finally:
        torch.backends.cudnn.benchmark = searching
