"""Dual teachers: every student learns from all teachers (Table 5 of Xiao et al., 2022)."""

from ctt.methods.base import Method


class DualTeachers(Method):
    """Each student is taught by the mean probability of all teachers, its own among them."""

    default_pairs = 2
    contrast = False

    def teachers_of(self, student: int, pairs: int) -> list[int]:
        return list(range(pairs))
