"""What is found out once for the lists of tensors of `ema_update_`, and kept for the next call."""

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

PLANS = 16  # a few models'

_dtype_of = attrgetter("dtype")


class Plan:
    """Two lists that fit each other, as long as all their tensors live and lie where they are.

    Attributes:
        tables: what backends have made for the lists, by their names.
    """

    def __init__(self, watches: list[weakref.ref[Tensor]]) -> None:
        self.tables: dict[str, Any] = {}
        self._watches = watches  # end the plan with the first of its tensors


_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()


def plan_of(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Plan:
    """Return the plan of equally many tensors, made where they are new or have changed.

    The key holds all that a plan depends on: `x.data = x.data.t()` keeps the object, its address
    and its bytes, and changes the layout. To run the checks again would cost more than a GPU's
    whole update of 600 tensors. An id and an address could come to belong to another tensor, so a
    plan ends with the first of its tensors.

    Raises:
        TypeError, ValueError: they do not fit, as `ema_update_` tells.
    """
    tensors = (*teacher, *student)
    try:
        key = (
            *map(id, tensors),
            *map(Tensor.data_ptr, tensors),
            *map(_dtype_of, tensors),
            *map(Tensor.size, tensors),
            *map(Tensor.stride, tensors),
        )
    except (AttributeError, TypeError):  # something that is no tensor
        _check(teacher, student)
        raise
    plan = _plans.get(key)
    if plan is not None:
        _plans.move_to_end(key)
        return plan
    _check(teacher, student)
    watches = [weakref.ref(t, lambda _: _plans.pop(key, None)) for t in tensors]
    plan = _plans[key] = Plan(watches)
    if len(_plans) > PLANS:
        _plans.popitem(last=False)
    return plan


def _check(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if not (isinstance(t, Tensor) and isinstance(s, Tensor)):
            raise TypeError(f"ema_update_: element {i} must be a pair of tensors")
        if not (t.is_floating_point() and s.is_floating_point()):
            raise TypeError(
                f"ema_update_: element {i} must be floating point, got teacher {t.dtype} and "
                f"student {s.dtype}; copy integer buffers instead"
            )
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
