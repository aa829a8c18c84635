"""A training strategy: which teachers label the unlabelled images for which student."""

from abc import ABC, abstractmethod


class Method(ABC):
    """What is taught by whom. The loop, the losses and the data are the same for all.

    Attributes:
        default_pairs: K where the user asks for none.
        contrast: whether the high-level and low-level contrast belong to the method.
    """

    default_pairs: int
    contrast: bool

    @abstractmethod
    def teachers_of(self, student: int, pairs: int) -> list[int]:
        """Numbers of the teachers whose mean probability labels unlabelled images for `student`.

        An empty list: unlabelled images are not used.
        """
