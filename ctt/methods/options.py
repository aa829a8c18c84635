"""Settings that one method alone has, `--options.NAME`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Check = tuple[str, Any, bool, str]
"""An option, its value, whether it is good, and the rule that it must keep."""


@dataclass(frozen=True)
class Options:
    """No settings: the base of all."""

    def checks(self) -> list[Check]:
        """Return what the values must fulfil."""
        return []


def at_least_0(**options: float) -> list[Check]:
    """Return a check for each option: weights, and other numbers that may be 0."""
    return [
        _check(name, value, value >= 0, "must be at least 0") for name, value in options.items()
    ]


def above_0(**options: float) -> list[Check]:
    return [_check(name, value, value > 0, "must be above 0") for name, value in options.items()]


def shares(**options: float) -> list[Check]:
    return [
        _check(name, value, 0 <= value <= 1, "must be in 0..1") for name, value in options.items()
    ]


def _check(name: str, value: float, good: bool, rule: str) -> Check:
    return f"--options.{name.replace('_', '-')}", value, good, rule
