"""Cross-teacher training (Xiao et al., 2022), equations (3)-(5)."""

from ctt.methods.base import LOW_LEVEL_SETTINGS, Method


class CrossTeacher(Method):
    """Each student is taught by the *other* pairs' teachers; with one pair, by its own."""

    default_pairs = 2
    contrast = True

    def unused(self, pairs: int) -> tuple[str, ...]:
        return () if pairs > 1 else LOW_LEVEL_SETTINGS  # one student has no peer

    def teachers_of(self, student: int, pairs: int) -> list[int]:
        return [k for k in range(pairs) if k != student] or [student]
