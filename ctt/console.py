"""Where programs print."""

from rich.console import Console


def plain_console(quiet: bool = False) -> Console:
    """A console that prints paths and names as they are, though they look like rich's markup."""
    return Console(quiet=quiet, markup=False, emoji=False, highlight=False)
