"""The place of this process among those that torchrun has started, and its processors."""

from __future__ import annotations

import os

from ctt.errors import UserError


def rank() -> int:
    """Return the number of this process among those of the run; a rank without others says nothing.

    Raises:
        UserError: as the functions below do, too, where the variable holds no number.
    """
    return _number("RANK", 0) if world_size() > 1 else 0


def world_size() -> int:
    """Return how many processes torchrun has started for the run; without it, one."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return _number("LOCAL_RANK", 0)


def local_size() -> int:
    """Return how many processes of this run its machine has."""
    return _number("LOCAL_WORLD_SIZE", 1)


def cpus() -> int:
    """Return how many processors this process may use: of a machine that others share, not all."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"The environment variable {variable} is {text!r}, which is no number. Start all "
            f"processes of a run with torchrun, which sets it, or unset it."
        ) from None
