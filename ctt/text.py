"""Text with names out of files, which may hold anything, for terminals and lists."""

import contextlib
import functools
import os
import re
import reprlib
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ctt.errors import UserError

# what a terminal would obey: control codes but line ends and tabs, and marks that reverse the text
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
BYTE_OF_A_NAME = re.compile(r"[\udc80-\udcff]")  # as Python holds what is no UTF-8 in a file name
FIELD = re.compile(r"`([a-z_]+(?:\.[a-z0-9_]+)?)`")  # of settings, or a parameter, in messages
BRIEF = reprlib.Repr()
BRIEF.maxstring = BRIEF.maxother = BRIEF.maxlong = 80
BYTES_AS_THEY_ARE = "surrogateescape"  # writes and reads such names as the bytes that they are


_show_field: list[Callable[[str], str]] = ["`{}`".format]  # the last one holds


@contextlib.contextmanager
def fields_shown_by(show: Callable[[str], str]) -> Iterator[None]:
    """Let `printable` show fields, which messages have in backticks, as a program names them.

    Args:
        show: maps a field such as `data.crop` to what is shown in place of it and its backticks.
    """
    _show_field.append(show)
    try:
        yield
    finally:
        _show_field.remove(show)


def printable(text: str) -> str:
    r"""Return a text with `\x1b` in place of a control code or of a byte that is no UTF-8.

    Fields become what the program calls them, see `fields_shown_by`.
    """
    text = FIELD.sub(lambda match: _show_field[-1](match[1]), text)
    text = BYTE_OF_A_NAME.sub(lambda match: rf"\x{ord(match[0]) - 0xDC00:02x}", text)
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def say(text: str, file: IO[str] | None = None) -> None:
    """Print a text in which names may hold anything; by default on stdout."""
    print(printable(text), file=file)


def replace_what_cannot_be_shown() -> None:
    r"""Make stdout and stderr print `\u732b` for a letter that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # notebooks put other objects there
            stream.reconfigure(errors="backslashreplace")


def drop_closed_streams() -> bool:
    """Return whether nobody reads stdout or stderr any more, as of `ctt-data check | head -1`, or
    when the terminal is closed; what is left for them goes nowhere."""
    if not hasattr(select, "poll"):  # Windows, which has another error for it
        return False
    closed = []
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed when Python began
        with contextlib.suppress(OSError, ValueError):  # one that is no file
            state = select.poll()
            state.register(stream.fileno(), 0)
            closed += [stream.fileno()] if state.poll(0) else []
    with Path(os.devnull).open("w") as nowhere:
        for number in closed:
            os.dup2(nowhere.fileno(), number)
    return bool(closed)


def brief(value: object) -> str:
    """Return a value of a file as Python writes it, cut where it is long.

    A few lines of YAML can stand for so many values that their whole text fills the memory.
    """
    return BRIEF.repr(value)


def from_yaml(text: str, source: str) -> Any:
    """Return what a YAML text holds.

    Args:
        source: the name of the file, for the message.

    Raises:
        UserError: it is no YAML, has a key twice, or holds numbers or dates that are none.
    """
    import yaml

    try:
        return yaml.load(text, _safe_loader())
    except RecursionError:
        raise UserError(f"{source}: this is no valid YAML (it is nested too deep).") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the last two of odd numbers and keys
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: this is no valid YAML ({reason}).") from None


@functools.cache
def _safe_loader() -> Any:
    """Return a class that reads YAML and refuses a key that stands twice: PyYAML takes the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                    continue  # other keys are refused later, or may stand there again
                name = self.construct_object(key)
                if name in seen:
                    told = f"{brief(name)} stands there twice"
                    raise yaml.constructor.ConstructorError(None, None, told, key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    return Loader
