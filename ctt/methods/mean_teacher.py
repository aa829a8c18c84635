"""Mean teacher (Tarvainen and Valpola, 2017) with hard labels: the baseline of teaching."""

from ctt.methods.base import Method


class MeanTeacher(Method):
    """Each student is taught by the running average of itself."""

    default_pairs = 1
    contrast = False

    def teachers_of(self, student: int, pairs: int) -> list[int]:
        return [student]
