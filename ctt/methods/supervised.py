"""Training on the labelled images alone: the floor that every other method is held against."""

from ctt.methods.base import Method


class Supervised(Method):
    """Equations (1)(2); the teacher is then a mere running average of its student."""

    default_pairs = 1
    contrast = False

    def teachers_of(self, student: int, pairs: int) -> list[int]:
        return []
