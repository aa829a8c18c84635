"""ClassMix (Olsson et al., WACV 2021, arXiv 2007.07936), as in its authors' program.

A mean teacher labels the unmixed images. Half of the classes that it sees in an image, of an odd
number the smaller half, are pasted onto another image, and the student learns the labels of both.
Every pixel counts alike: the mean over all of them is weighed by the share of confident ones.

The program pastes onto the next image of the batch, this one onto the one before, and its teacher
normalises by its own batch, this one by its running statistics. On VOC it changes no colours
(--views.jitter 0 --views.blur-probability 0), on Cityscapes as the defaults do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ctt.methods.base import Setup, Step
from ctt.methods.mean_teacher import MeanTeacher
from ctt.methods.options import Options
from ctt.ranges import AT_LEAST_0, SHARE


@dataclass(frozen=True)
class ClassMixOptions(Options):
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the unlabelled images (the program's)."""
    threshold: Annotated[float, SHARE] = 0.968
    """Confidence of a pixel that counts in the share (the paper's, section 4.2)."""


class ClassMix(MeanTeacher):
    """A mean teacher on images that are mixed by class."""

    options: ClassMixOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mix, self.unlabeled_mean = "classmix-fewer", "all"
        self.confidence_weight, self.threshold = "uniform", self.options.threshold

    def unlabeled_weight(self, step: Step) -> float:
        return self.options.weight
