import dataclasses
import itertools
import math
import re

import pytest

from ctt import methods
from ctt.cli.train import parse
from ctt.errors import UserError
from ctt.ranges import ABOVE_0, SHARE, SHARE_BELOW_1, Range, outside, ranges_of
from ctt.settings import OptimSettings, Settings, update, validate


@pytest.mark.parametrize(
    ("limits", "inside", "beyond", "text"),
    [
        (Range(2), (2, 1e9), (1.9,), "at least 2"),
        (ABOVE_0, (1e-9,), (0, -1), "above 0"),
        (SHARE, (0, 1), (-0.1, 1.1), "in 0..1"),
        (SHARE_BELOW_1, (0, 0.99), (1,), "in 0..1, below 1"),
        (Range(0, 1, above=True, below=True), (0.5,), (0, 1), "between 0 and 1"),
        (Range(0, 1, above=True), (1,), (0,), "above 0 and at most 1"),
        (Range(0, 2**31 - 1), (2**31 - 1,), (2**31,), "in 0..2147483647"),
        (Range(0.1, 10, kind="factors"), (1,), (0,), "factors in 0.1..10"),
        (Range(1, or_0=True), (0, 1), (0.5, -1), "0 or at least 1"),
    ],
)
def test_ranges(
    limits: Range, inside: tuple[float, ...], beyond: tuple[float, ...], text: str
) -> None:
    assert all(map(limits.holds, inside))
    assert not any(map(limits.holds, (*beyond, math.nan, math.inf)))
    assert limits.text == text


PARTS = [
    *itertools.product(
        ["cross-teacher"],
        ["data", "views", "model", "optim", "loss", "bank", "train", "labeled", "masks"],
    ),
    *((method, "options") for method in methods.names()),
]


def test_the_defaults_are_inside() -> None:
    assert list(outside(Settings())) == []


@pytest.mark.parametrize(("method", "group"), PARTS)
def test_each_number_is_refused_beyond_its_range(method: str, group: str) -> None:
    """No number of the settings is without a range, and `validate` looks at every one."""
    settings = Settings(method=method)
    part = getattr(settings, group)
    ranges = ranges_of(type(part))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(type(n) in (int, float) for n in numbers) or not numbers:
            continue
        if field.name in ("crop", "output_stride"):  # several ranges, told by `validate`
            continue
        assert field.name in ranges, f"{group}.{field.name}"
        wrong = tuple(-2 for _ in numbers) if isinstance(value, tuple) else -2
        changed = dataclasses.replace(part, **{field.name: wrong})
        with pytest.raises(UserError, match=rf"`{group}\.{field.name}` must "):
            validate(dataclasses.replace(settings, **{group: changed}))


def test_numbers_that_are_none_are_refused() -> None:
    settings = update(Settings(), {"ema": {"decay": math.nan}}, "test")
    with pytest.raises(UserError, match=r"`ema\.decay` must be in 0\.\.1, got nan"):
        validate(settings)


def test_the_help_shows_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--method", "unimatch", "--options.strong", "0.25", "--help"])
    shown = " ".join(re.sub(r"[│\n]", " ", capsys.readouterr().out).split())
    assert "(default: 0.1; above 0)" in shown  # --optim.lr
    assert "(default: 0.0; 0 or at least 1)" in shown  # --labeled.focal
    assert "(default: 0.5; in 0..1, below 1)" in shown  # --options.dropout
    assert "Warning" not in capsys.readouterr().err
    assert ranges_of(OptimSettings)["lr"].text == "above 0"


def test_threads_beyond_any_machine_are_refused() -> None:
    """The system ends a process that begins thousands of threads, without a message."""
    settings = update(Settings(), {"train": {"threads": 5000}}, "test")
    with pytest.raises(UserError, match=r"`train\.threads` must be in 0\.\.1024"):
        validate(settings)
