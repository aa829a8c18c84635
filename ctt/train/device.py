"""Where a run computes, and how PyTorch is set up for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ctt.errors import UserError
from ctt.ops import prefer_backend
from ctt.train.compiling import uncompiled
from ctt.train.distributed import local_rank, local_size
from ctt.train.settings import Settings


def pick_device(name: str, option: str = "--train.device") -> torch.device:
    """Return the device of that name; `auto` is a GPU where there is one.

    Under torchrun each process has a GPU of its own.

    Args:
        option: where the name comes from, for the message.

    Raises:
        UserError: not a device, or one that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and "WORLD_SIZE" in os.environ:
            if name != device.type:
                raise RuntimeError("torchrun gives every process a device; leave the number out")
            device = torch.device("cuda", local_rank())
        elif name == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option} {name} cannot be used here ({reason}).") from None
    return device


def set_up_torch(settings: Settings) -> None:
    """Set threads, the backend of the operations and determinism, for the whole process."""
    if settings.train.threads or local_size() > 1:
        own_share = max(1, (os.cpu_count() or 1) // local_size())
        torch.set_num_threads(settings.train.threads or own_share)
    prefer_backend(settings.train.backend)
    if settings.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # all crops are of one size, so the search for the fastest convolutions is made once
    torch.backends.cudnn.benchmark = not settings.train.deterministic
    torch.use_deterministic_algorithms(settings.train.deterministic)


@contextlib.contextmanager
def images_of_any_size(compiled: str) -> Iterator[None]:
    """Run networks without what pays for images of one size alone: for evaluation.

    cuDNN would search the fastest convolutions anew for every size, and torch.compile compile.

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
