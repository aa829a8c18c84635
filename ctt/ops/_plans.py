"""Cached checks and pointer tables of `ema_update_`, one plan for each two lists of tensors."""

import contextlib
import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from ctt.ops import _checks

try:
    from ctt._cpu import Layout as CppLayout
except ImportError:
    CppLayout = None  # type: ignore[assignment, misc]

PLANS = 16  # a few models'

Tensors = Sequence[Tensor]
_attributes = (attrgetter("dtype"), Tensor.data_ptr, Tensor.size, Tensor.stride)


class Layout(Protocol):
    """Where the tensors of two lists lie in memory, and in what form."""

    def matches(self, teacher: Tensors, student: Tensors) -> bool:
        """Return whether these are the same tensors, and still lie so."""


class PythonLayout:
    """The layout as the attributes that PyTorch gives; half a microsecond a tensor."""

    def __init__(self, teacher: Tensors, student: Tensors) -> None:
        self.ids = self._ids(teacher, student)
        self.attributes = self._read(teacher, student)

    def matches(self, teacher: Tensors, student: Tensors) -> bool:
        same = self.ids == self._ids(teacher, student)
        return same and self.attributes == self._read(teacher, student)

    @staticmethod
    def _ids(teacher: Tensors, student: Tensors) -> tuple[int, ...]:
        return (*map(id, teacher), *map(id, student))

    @staticmethod
    def _read(teacher: Tensors, student: Tensors) -> list[Any]:
        return [x for read in _attributes for x in (*map(read, teacher), *map(read, student))]


def layout_of(teacher: Tensors, student: Tensors) -> Layout:
    """Return the layout of both lists, read by C++ where PyTorch and the build let it."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if CppLayout is not None and exchange is not None:
        try:
            return CppLayout(exchange, teacher, student)
        except ValueError:  # subclasses whose memory is elsewhere
            pass
    return PythonLayout(teacher, student)


class Plan:
    """Two lists that fit each other, as long as all their tensors live and lie where they are.

    Attributes:
        averaged: positions of the pairs of floating-point tensors, of tied ones the first. None:
            all are.
        copied: positions of the others.
        half: the types of half-precision teachers.
        tables: what backends have made for the averaged pairs, by their names.
    """

    def __init__(self, teacher: Tensors, student: Tensors) -> None:
        self.layout = layout_of(teacher, student)
        self.copied = [i for i, t in enumerate(teacher) if not t.is_floating_point()]
        others = {*self.copied, *_tied(teacher, student)}
        self.averaged = [i for i in range(len(teacher)) if i not in others] if others else None
        self.half = {t.dtype for t in teacher} & {torch.float16, torch.bfloat16}
        self.tables: dict[str, Any] = {}
        self._watches = [weakref.ref(t, self._end) for t in (*teacher, *student)]

    def _end(self, _: object) -> None:
        """Drop the plan when one of its tensors dies: a new tensor may get its id and address."""
        _drop(self)


_plans: list[Plan] = []  # the last one used comes last


def _drop(plan: Plan) -> None:
    with contextlib.suppress(ValueError):  # another thread was first
        _plans.remove(plan)


def plan_of(teacher: Tensors, student: Tensors) -> Plan:
    """Return the plan of equally many tensors, made where they are new or have changed.

    All that a plan depends on is compared: `x.data = x.data.t()` keeps the object, its address and
    its bytes, and changes the layout. To run the checks again would cost more than a GPU's whole
    update of 600 tensors.

    Raises:
        TypeError, ValueError: they do not fit, as `ema_update_` tells.
    """
    for plan in reversed(_plans.copy()):
        if plan.layout.matches(teacher, student):
            if _plans[-1:] != [plan]:
                _drop(plan)
                _plans.append(plan)
            return plan
    check(teacher, student)
    plan = Plan(teacher, student)
    _plans.append(plan)
    del _plans[:-PLANS]
    return plan


def _tied(teacher: Tensors, student: Tensors) -> list[int]:
    """Return the positions of teachers that are in the list already, under another name.

    Raises:
        ValueError: their students are not the same.
    """
    first: dict[tuple[Any, ...], int] = {}
    found = []
    for i, t in enumerate(teacher):
        place = tuple(read(t) for read in _attributes)
        # tensors without memory of their own (DTensor) are at address 0, all of them
        if t.numel() == 0 or t.data_ptr() == 0 or (j := first.setdefault(place, i)) == i:
            continue
        if any(read(student[i]) != read(student[j]) for read in _attributes):
            raise ValueError(
                f"ema_update_: elements {j} and {i} are one teacher, which cannot follow two "
                f"students; tie the students' weights, or untie the teachers'"
            )
        found.append(i)
    return found


def check(teacher: Tensors, student: Tensors) -> None:
    """Refuse tensors that do not fit each other, in pairs.

    Raises:
        TypeError, ValueError: as `ema_update_` tells.
    """
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if not (isinstance(t, Tensor) and isinstance(s, Tensor)):
            raise TypeError(f"ema_update_: element {i} must be a pair of tensors")
        if t.is_floating_point() != s.is_floating_point() or t.is_complex() or s.is_complex():
            raise TypeError(
                f"ema_update_: element {i} must be floating point (averaged) or integer (copied) "
                f"in both, got teacher {t.dtype} and student {s.dtype}"
            )
        if t.is_floating_point():
            for name, x in (("teacher", t), ("student", s)):
                _checks.floating("ema_update_", f"element {i} of the {name}", x)
        if t.shape != s.shape:
            raise ValueError(
                f"ema_update_: element {i} must have one shape, got teacher {tuple(t.shape)} and "
                f"student {tuple(s.shape)}"
            )
        if t.device != teacher[0].device or s.device != t.device:
            raise ValueError(
                f"ema_update_: all tensors must be on {teacher[0].device}, got element {i} with "
                f"teacher on {t.device} and student on {s.device}"
            )
        # which torch.compile cannot trace; a compiled update asks again when it runs
        if not torch.compiler.is_compiling() and (t.is_neg() or s.is_neg()):
            raise ValueError(
                f"ema_update_: element {i} is a view that negates its memory; call resolve_neg()"
            )
