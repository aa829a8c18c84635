"""Cross-teacher training (Xiao et al., 2022), equations (3)-(5)."""

from ctt.methods.base import Method


class CrossTeacher(Method):
    """Each student is taught by the *other* pairs' teachers; with one pair, by its own."""

    default_pairs = 2
    contrast = True

    def teachers_of(self, student: int, pairs: int) -> list[int]:
        return [k for k in range(pairs) if k != student] or [student]
