"""A training strategy: which teachers label the unlabelled images for which student."""

from abc import ABC, abstractmethod
from typing import Literal

LOW_LEVEL_SETTINGS = ("loss.lc", "loss.tau_lc", "loss.directional", "loss.lc_pixels")
CONTRAST_SETTINGS = (
    "bank",
    "loss.hc",
    "loss.tau_hc",
    "loss.gamma",
    "loss.hc_confidence",
    "loss.contrast_stride",
    "loss.contrast_reduction",
    *LOW_LEVEL_SETTINGS,
)


class Method(ABC):
    """What is taught by whom. The loop, the losses and the data are the same for all.

    Attributes:
        default_pairs: K where the user asks for none.
        contrast: whether the high-level and low-level contrast belong to the method.
        labels_by: whether teachers make the labels, in evaluation mode, or the students of their
            pairs, in training mode; in both cases without gradient.
    """

    default_pairs: int
    contrast: bool
    labels_by: Literal["teachers", "students"] = "teachers"

    def unused(self, pairs: int) -> tuple[str, ...]:
        """Return the settings, or groups of settings, that change nothing under this method.

        Args:
            pairs: K, pairs of student and teacher.
        """
        return () if self.contrast else CONTRAST_SETTINGS

    @abstractmethod
    def teachers_of(self, student: int, pairs: int) -> list[int]:
        """Return the pairs whose mean probability labels unlabelled images for `student`.

        An empty list: unlabelled images are not used.
        """
