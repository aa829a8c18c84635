import pytest

from ctt import methods
from ctt.errors import UserError


@pytest.mark.parametrize(
    ("pairs", "taught_by"), [(1, [[0]]), (2, [[1], [0]]), (3, [[1, 2], [0, 2], [0, 1]])]
)
def test_cross_teacher_never_teaches_its_own_student(
    pairs: int, taught_by: list[list[int]]
) -> None:
    method = methods.get("cross-teacher")
    assert [method.teachers_of(k, pairs) for k in range(pairs)] == taught_by


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_mean_teacher_teaches_its_own_student(pairs: int) -> None:
    method = methods.get("mean-teacher")
    assert [method.teachers_of(k, pairs) for k in range(pairs)] == [[k] for k in range(pairs)]


def test_supervised_uses_no_unlabelled_images() -> None:
    assert methods.get("supervised").teachers_of(0, 1) == []


def test_who_labels_for_whom() -> None:
    cps, dual, fixmatch = map(methods.get, ("cps", "dual-teachers", "fixmatch"))
    assert [cps.teachers_of(k, 2) for k in (0, 1)] == [[1], [0]]
    assert [dual.teachers_of(k, 2) for k in (0, 1)] == [[0, 1], [0, 1]]
    assert fixmatch.teachers_of(0, 1) == [0]
    assert [m.labels_by for m in (cps, dual, fixmatch)] == ["students", "teachers", "students"]


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(
        UserError, match="cross-teacher, cps, dual-teachers, fixmatch, mean-teacher"
    ):
        methods.get("student-teacher")
