"""Training strategies by name, one file each."""

from ctt.errors import UserError
from ctt.methods.base import Method
from ctt.methods.cps import CrossPseudoSupervision
from ctt.methods.cross_teacher import CrossTeacher
from ctt.methods.dual_teachers import DualTeachers
from ctt.methods.fixmatch import FixMatch
from ctt.methods.mean_teacher import MeanTeacher
from ctt.methods.supervised import Supervised

_METHODS: dict[str, type[Method]] = {
    "cross-teacher": CrossTeacher,
    "cps": CrossPseudoSupervision,
    "dual-teachers": DualTeachers,
    "fixmatch": FixMatch,
    "mean-teacher": MeanTeacher,
    "supervised": Supervised,
}


def names() -> list[str]:
    """The strategies that `get` knows."""
    return list(_METHODS)


def get(name: str) -> Method:
    """The strategy of that name.

    Raises:
        UserError: there is none.
    """
    if name not in _METHODS:
        raise UserError(f"--method {name}: no such method. Methods: {', '.join(names())}.")
    return _METHODS[name]()
