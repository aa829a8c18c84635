"""Training on the labelled images alone: the floor that every other method is held against."""

from ctt.methods.base import Method


class Supervised(Method):
    """Equations (1)(2); the teacher is then a mere running average of its student."""

    default_pairs = 1
    contrast = False

    def unused(self, pairs: int) -> tuple[str, ...]:
        teaching = (
            "loss.ct",
            "loss.ct_ramp",
            "loss.confidence_weight",
            "loss.confidence_threshold",
        )
        return (*super().unused(pairs), *teaching, "views.mix")

    def teachers_of(self, student: int, pairs: int) -> list[int]:
        return []
