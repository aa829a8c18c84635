"""Where programs print."""

from typing import Any

from rich.console import Console
from rich.text import Text

from ctt.text import printable


class _PlainConsole(Console):
    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        return super().render_str(printable(text), *args, **options)


def plain_console(quiet: bool = False) -> Console:
    """Return a console that prints names as they are, though they look like rich's markup.

    Control codes in them are shown, not sent to the terminal, see `printable`.
    """
    return _PlainConsole(quiet=quiet, markup=False, emoji=False, highlight=False)
