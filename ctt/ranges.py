"""Ranges of settings, which stand beside their fields: `lr: Annotated[float, ABOVE_0]`."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have; a setting of several numbers has it for each.

    Attributes:
        low: the least number.
        high: the greatest number.
        above: whether `low` itself is excluded.
        below: whether `high` itself is excluded.
        kind: what the numbers are called in messages, such as `factors`.
        or_0: whether 0 is allowed as well.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    kind: str = ""
    or_0: bool = False

    def holds(self, number: float) -> bool:
        """Return whether a number, which is not NaN or infinite, lies in the range."""
        over = number > self.low if self.above else number >= self.low
        under = number < self.high if self.below else number <= self.high
        return (self.or_0 and number == 0) or (math.isfinite(number) and over and under)

    @property
    def text(self) -> str:
        """Return the range as it follows "must be"."""
        if self.high == math.inf:
            words = f"{'above' if self.above else 'at least'} {self.low:g}"
        elif self.above and self.below:
            words = f"between {self.low:g} and {self.high:g}"
        elif self.above:
            words = f"above {self.low:g} and at most {self.high:g}"
        else:
            end = f", below {self.high:g}" if self.below else ""
            words = (
                f"in {self.low:g}..{int(self.high) if self.high > 1e5 else f'{self.high:g}'}{end}"
            )
        words = f"0 or {words}" if self.or_0 else words
        return f"{self.kind} {words}" if self.kind else words


AT_LEAST_0 = Range(0)
AT_LEAST_1 = Range(1)
ABOVE_0 = Range(0, above=True)
SHARE = Range(0, 1)
SHARE_BELOW_1 = Range(0, 1, below=True)


def ranges_of(owner: type) -> dict[str, Range]:
    """Return the ranges of the fields of a dataclass, by their names."""
    hints = typing.get_type_hints(owner, include_extras=True)
    notes = {f.name: getattr(hints[f.name], "__metadata__", ()) for f in dataclasses.fields(owner)}
    return {name: n for name, some in notes.items() for n in some if isinstance(n, Range)}


def outside(settings: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield what lies outside its range: the field with its groups, the rule, and the value.

    Args:
        settings: a dataclass, whose fields may be dataclasses.
        prefix: the groups that it is in, such as `loss.`.
    """
    ranges = ranges_of(type(settings))
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from outside(value, f"{name}.")
        several = value if isinstance(value, tuple) else (value,)
        numbers = [n for n in several if isinstance(n, int | float) and not isinstance(n, bool)]
        if field.name in ranges and not all(map(ranges[field.name].holds, numbers)):
            yield name, f"must be {ranges[field.name].text}", value
        elif not all(map(math.isfinite, numbers)):
            yield name, "must be a finite number", value
