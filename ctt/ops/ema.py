"""Update of the teachers: exponential moving average of the students' tensors."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ctt.ops import _checks, _library
from ctt.ops._nvtx import named_range
from ctt.ops._plans import check, plan_of
from ctt.ops._registry import select

Averaged = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]

# Warn if a half-precision teacher ignores students that differ from it by up to this share.
_LOST_DIFFERENCE = 0.1
_warned: set[torch.dtype] = set()


def ema_update_(
    teacher: Averaged, student: Averaged, decay: float | Tensor, *, backend: str = "auto"
) -> None:
    """Update teacher <- decay * teacher + (1 - decay) * student, in place, for all tensors at once.

    Integer and boolean tensors, such as the counter of batches of a batch normalisation, are
    copied from the student.

    Args:
        teacher: written in place. A module, of which all parameters and buffers are taken, a state
            dict, or a list or other iterable of tensors of any shapes, all on one device. Quickest
            is the same list of the same tensor objects in every call, because its checks are
            cached; a module is walked through anew each time. Tied weights, which a state dict
            holds under several names, are averaged once.
        student: as many tensors, pairwise of the same shape (of modules and state dicts: of the
            same name); a student in half precision may feed a teacher in float32. A teacher in half
            precision loses steps that are smaller than its rounding: keep teachers in float32.
        decay: a in 0..1. A tensor of shape () is read on the device, so that a captured graph can
            be replayed with another value; its range is then not checked.
        backend: "auto" or a name from `ctt.ops.available_backends()`.

    Raises:
        TypeError: an element is no tensor, or the types of a pair do not fit.
        ValueError: another number of tensors, unequal names, shapes or devices, an iterator that
            is used up, or decay outside 0..1.
        RuntimeError: the backend that was asked for cannot run here.
    """
    decay = _checked(decay)
    teacher, student = _paired(teacher, student)
    if len(teacher) == 0:
        return
    if _library.is_traced(teacher[0]):
        _traced(teacher, student, decay, backend)
        return
    _checks.untransformed("ema_update_", (*teacher, *student))
    plan = plan_of(teacher, student)
    if plan.half and not isinstance(decay, Tensor):
        _warn_of_lost_steps(plan.half, decay)
    with torch.no_grad(), named_range("ema_update_", payload=len(teacher)):
        for i in plan.copied:
            teacher[i].copy_(student[i])
        if plan.averaged is not None:
            teacher = [teacher[i] for i in plan.averaged]
            student = [student[i] for i in plan.averaged]
        if teacher:
            run = select("ema_update_", backend, teacher[0].device).ema_update_
            run(teacher, student, decay, plan)


def _traced(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor, backend: str
) -> None:
    check(teacher, student)
    averaged = [(t, s) for t, s in zip(teacher, student, strict=True) if t.is_floating_point()]
    for t, s in zip(teacher, student, strict=True):
        if not t.is_floating_point():
            t.copy_(s)
    if averaged:
        value = (
            decay
            if isinstance(decay, Tensor)
            else torch.tensor(decay, dtype=torch.float64, device="cpu")
        )
        teacher, student = ([pair[i] for pair in averaged] for i in range(2))
        torch.ops.ctt.ema_update_(teacher, student, value, backend)


def _checked(decay: float | Tensor) -> float | Tensor:
    if isinstance(decay, Tensor):
        if decay.dim() != 0 or decay.dtype not in _checks.FLOATS:
            raise ValueError(
                f"ema_update_: decay must be a number or a floating-point tensor of shape (), "
                f"got {decay.dtype} {tuple(decay.shape)}"
            )
        return decay
    value = _checks.number("ema_update_", "decay", decay)
    if not 0 <= value <= 1:
        raise ValueError(f"ema_update_: decay must be in 0..1, got {decay!r}")
    return value


def _paired(teacher: Averaged, student: Averaged) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return both as sequences of equal length."""
    named = (nn.Module, Mapping)
    if isinstance(teacher, named) and isinstance(student, named):
        ours, theirs = _by_name(teacher), _by_name(student)
        for name in (*ours, *theirs):
            if name not in ours or name not in theirs:
                has, lacks = ("teacher", "student") if name in ours else ("student", "teacher")
                raise ValueError(
                    f"ema_update_: teacher and student must hold tensors of the same names; the "
                    f"{has} has {name!r}, the {lacks} has not"
                )
        return list(ours.values()), [theirs[name] for name in ours]
    t, s = _listed("teacher", teacher), _listed("student", student)
    if len(t) != len(s):
        raise ValueError(
            f"ema_update_: teacher and student must hold as many tensors, got {len(t)} and {len(s)}"
        )
    return t, s


def _by_name(x: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return x if isinstance(x, Mapping) else dict((*x.named_parameters(), *x.named_buffers()))


def _listed(name: str, x: Averaged) -> Sequence[Tensor]:
    if isinstance(x, (list, tuple)):
        return x
    if isinstance(x, (nn.Module, Mapping, Tensor)) or not isinstance(x, Iterable):
        raise TypeError(
            f"ema_update_: {name} must be an iterable of tensors, or both teacher and student "
            f"modules or state dicts; got {type(x).__name__}"
        )
    found = list(x)
    if not found and isinstance(x, Iterator):
        raise ValueError(
            f"ema_update_: {name} is an iterator without tensors; one can be walked through once, "
            f"so give a list, such as list(network.parameters())"
        )
    return found


def _warn_of_lost_steps(types: set[torch.dtype], decay: float) -> None:
    """Tell once for each type that its teachers cannot follow at this decay."""
    for dtype in types - _warned:
        # between a quarter and half of eps, relative to a value, is rounded away
        lost = torch.finfo(dtype).eps / 4 / (1 - decay) if decay < 1 else 0.0
        if lost > _LOST_DIFFERENCE:
            _warned.add(dtype)
            warnings.warn(
                f"ema_update_: with decay {decay:g} a teacher in {dtype} does not follow a student "
                f"that differs from it by less than {lost:.0%}, because the step is rounded away; "
                f"keep teachers in float32 (their students may be in half precision)",
                stacklevel=3,
            )
