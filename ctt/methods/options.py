"""Settings that one method alone has, `--options.NAME`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Check = tuple[str, Any, bool, str]
"""A field such as options.weight, its value, whether it is good, and the rule that it must keep."""


@dataclass(frozen=True)
class Options:
    """No settings: the base of all.

    A field has its range beside it, `weight: Annotated[float, AT_LEAST_0] = 1.0` of `ctt.ranges`;
    `--help` shows it.
    """

    def checks(self) -> list[Check]:
        """Return what the values must fulfil beside their ranges."""
        return []
