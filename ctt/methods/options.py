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
