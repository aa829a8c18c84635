"""Text with names out of files, which may hold anything, for terminals and lists."""

import re
import sys
from typing import IO

# what a terminal would obey: control codes but line ends and tabs, and marks that reverse the text
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
BYTE_OF_A_NAME = re.compile(r"[\udc80-\udcff]")  # as Python holds what is no UTF-8 in a file name
BYTES_AS_THEY_ARE = "surrogateescape"  # writes and reads such names as the bytes that they are


def printable(text: str) -> str:
    r"""Return a text with `\x1b` in place of a control code or of a byte that is no UTF-8."""
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
