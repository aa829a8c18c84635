"""What is known of each method without loading it: `--help` and `--list-methods` must be quick."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ctt.errors import UserError
from ctt.methods.options import Options

if TYPE_CHECKING:
    from ctt.methods.base import Method

LABELING = ("loss.ct", "loss.ct_ramp", "loss.confidence_weight", "loss.confidence_threshold")
LOW_LEVEL = ("loss.lc", "loss.tau_lc", "loss.directional", "loss.lc_pixels")
CONTRAST = (
    "bank",
    "loss.hc",
    "loss.tau_hc",
    "loss.gamma",
    "loss.hc_confidence",
    "loss.contrast_stride",
    "loss.contrast_reduction",
)
SHARED = ("ema", "loss.sup", "views.mix", *LABELING, *CONTRAST, *LOW_LEVEL)
TAUGHT = ("ema", "loss.sup", "views.mix", *LABELING)


@dataclass(frozen=True)
class About:
    """Facts of a method.

    Attributes:
        target: where it is, `module:Class`. paper: its source, in one line.
        pairs: K where the user asks for none.
        unlabeled: whether it takes unlabelled images.
        uses: settings of the run, or groups of them, that it reads among those that only some
            methods read.
        options: class of the settings that it alone has.
        contrast: whether the high-level and low-level contrast belong to it.
    """

    target: str
    paper: str
    pairs: int = 1
    unlabeled: bool = True
    uses: tuple[str, ...] = ()
    options: type[Options] = Options
    contrast: bool = False

    def unused(self, pairs: int) -> tuple[str, ...]:
        """Return the settings, or groups of settings, that change nothing under this method."""
        lonely = LOW_LEVEL if pairs == 1 else ()  # one student has no peer
        return tuple(name for name in SHARED if name not in self.uses or name in lonely)

    def load(self) -> type[Method]:
        """Return the class."""
        module, _, name = self.target.partition(":")
        found: type[Method] = getattr(importlib.import_module(module), name)
        return found


METHODS = {
    "cross-teacher": About(
        "ctt.methods.cross_teacher:CrossTeacher",
        "Xiao et al., Neurocomputing 508, 2022",
        pairs=2,
        uses=(*TAUGHT, *CONTRAST, *LOW_LEVEL),
        contrast=True,
    ),
    "cps": About(
        "ctt.methods.cps:CrossPseudoSupervision",
        "Chen et al., CVPR 2021",
        pairs=2,
        uses=TAUGHT,
    ),
    "dual-teachers": About(
        "ctt.methods.dual_teachers:DualTeachers",
        "Xiao et al., 2022, Table 5",
        pairs=2,
        uses=TAUGHT,
    ),
    "fixmatch": About("ctt.methods.fixmatch:FixMatch", "Sohn et al., NeurIPS 2020", uses=TAUGHT),
    "mean-teacher": About(
        "ctt.methods.mean_teacher:MeanTeacher",
        "Tarvainen and Valpola, NeurIPS 2017, with hard labels",
        uses=TAUGHT,
    ),
    "supervised": About(
        "ctt.methods.supervised:Supervised",
        "the labelled images alone",
        unlabeled=False,
        uses=("ema", "loss.sup"),
    ),
}


def names() -> list[str]:
    """Return the names that `get` knows."""
    return list(METHODS)


def get(name: str) -> About:
    """Return the method of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"--method {name}: no such method. Methods: {', '.join(names())}.")
    return METHODS[name]
