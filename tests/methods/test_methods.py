import pytest

from ctt import methods
from ctt.errors import UserError
from ctt.settings import Settings
from tests.train.steps import make


def taught_by(settings: Settings, name: str, pairs: int) -> list[list[int]]:
    method = make(settings.with_method(name), pairs).method
    return [method.taught_by(k) for k in range(pairs)]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "pairs", "expected"),
    [
        ("cross-teacher", 1, [[0]]),
        ("cross-teacher", 2, [[1], [0]]),
        ("cross-teacher", 3, [[1, 2], [0, 2], [0, 1]]),
        ("mean-teacher", 2, [[0], [1]]),
        ("cps", 2, [[1], [0]]),
        ("dual-teachers", 2, [[0, 1], [0, 1]]),
        ("fixmatch", 1, [[0]]),
    ],
)
def test_who_teaches_whom(tiny: Settings, name: str, pairs: int, expected: list[list[int]]) -> None:
    assert taught_by(tiny, name, pairs) == expected


def test_unknown_method_lists_the_known() -> None:
    with pytest.raises(UserError, match="cross-teacher, supervised, mean-teacher, "):
        methods.get("student-teacher")
