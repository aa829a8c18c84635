"""What is wrong with the files and lists of a dataset, told once for each kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SHOWN = 3  # other files or lines that a group of faults names
A_PATH = re.compile(r"\S*/\S*")
NUMBERS = re.compile(r"\d[\d.,]*(,? \[?\d[\d.,]*\]?)*( \.\.\.)?")  # one, or a list of them


@dataclass(frozen=True)
class Fault:
    """A fault of one file, or of one line of a list.

    Attributes:
        text: sentences that name it and say what is wrong.
        place: the file or the line, as it is named among others; empty: the text alone names it.
        names: what else in the text belongs to it alone, such as the image's name.
    """

    text: str
    place: str
    names: tuple[str, ...] = ()

    def kind(self) -> str:
        """Return the text without what tells this fault from others of its kind."""
        text = self.text
        for name in sorted({self.place, *self.names} - {""}, key=len, reverse=True):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "", text)
        return NUMBERS.sub("#", A_PATH.sub("", text))


def grouped(faults: Iterable[Fault]) -> list[str]:
    """Return the first fault of each kind, with how many others are like it and where."""
    groups: dict[str, list[Fault]] = {}
    for fault in faults:
        groups.setdefault(fault.kind(), []).append(fault)
    texts = []
    for first, *others in groups.values():
        text = first.text
        if others:
            text += f" The same holds for {len(others):,} more"
            places = ", ".join(fault.place for fault in others[:SHOWN] if fault.place)
            text += f": {places}" if places else ""
            text += ", ..." if places and len(others) > SHOWN else "."
        texts.append(text)
    return texts
