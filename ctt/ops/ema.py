"""Update of the teachers: exponential moving average of the students' tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctt.ops import _library  # noqa: F401  (defines the operators)
from ctt.ops._nvtx import named_range
from ctt.ops._plans import plan_of
from ctt.ops._registry import select


def ema_update_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    *,
    backend: str = "auto",
) -> None:
    """teacher <- decay * teacher + (1 - decay) * student, in place, for all tensors at once.

    Args:
        teacher: floating-point tensors of any shapes, all on one device; written in place. The same
            tensors call after call, not new views of them, spare their being looked at again.
        student: as many tensors, pairwise of the same shape; a student in half precision may
            feed a teacher in float32.
        decay: a in 0..1. A tensor of shape () is read on the device, so that a captured graph can
            be replayed with another value; its range is then not checked.
        backend: "auto" or a name from `ctt.ops.available_backends()`.

    Raises:
        TypeError: an element is no floating-point tensor (copy integer buffers instead).
        ValueError: another number of tensors, unequal shapes or devices, or decay outside 0..1.
        RuntimeError: the backend that was asked for cannot run here.
    """
    _check(teacher, student, decay)
    if len(teacher) == 0:
        return
    if torch.compiler.is_compiling():
        value = decay if isinstance(decay, Tensor) else torch.tensor(decay, dtype=torch.float64)
        torch.ops.ctt.ema_update_(list(teacher), list(student), value, backend)
        return
    plan = plan_of(teacher, student)
    device = teacher[0].device
    with torch.no_grad(), named_range("ctt.ema_update_", device):
        select("ema_update_", backend, device).ema_update_(teacher, student, decay, plan)


def _check(teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor) -> None:
    if isinstance(decay, Tensor):
        if decay.dim() != 0 or not decay.is_floating_point():
            raise ValueError(
                f"ema_update_: decay must be a number or a floating-point tensor of shape (), "
                f"got {decay.dtype} {tuple(decay.shape)}"
            )
    elif not (isinstance(decay, (int, float)) and 0 <= decay <= 1):
        raise ValueError(f"ema_update_: decay must be in 0..1, got {decay!r}")
    if len(teacher) != len(student):
        raise ValueError(
            f"ema_update_: teacher and student must hold as many tensors, got {len(teacher)} "
            f"and {len(student)}"
        )
