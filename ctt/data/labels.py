"""What the numbers and colours in masks mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.data.masks import Array, Colour, Mask
from ctt.data.pixels import BYTE
from ctt.errors import UserError

VALUES = 2**16  # that a mask may hold
SHOWN = 5  # bad values named in a message
DRAWN = 64  # colours of a mask above which some were not drawn, but come from smooth edges


class LabelMap:
    """From the numbers or colours in a mask to classes.

    Masks of three equal channels are grey ones: their numbers count, unless a grey in `colours`
    means another class than the number does.

    Args:
        mapping: class, or 255, for each number that a mask may hold.
        classes: the names, for the message.
        colours: class, or 255, for each colour that a mask may hold; None: nothing says what
            colours mean.
        origin: where the colours can be stated, for the message.
        by_grey: the mapping is of the greys that viewers show, not of the numbers in the file.
    """

    def __init__(
        self,
        mapping: Mapping[int, int],
        classes: Iterable[str],
        colours: Mapping[Colour, int] | None = None,
        origin: str = "",
        by_grey: bool = False,
    ) -> None:
        self.table = np.full(VALUES, -1, np.int16)
        for value, label in mapping.items():
            self.table[value] = label
        self.allowed = sorted(mapping)
        self.classes, self.by_grey = tuple(classes), by_grey
        self.colours, self.origin = dict(colours or {}), origin
        packed = sorted((_pack(colour), label) for colour, label in self.colours.items())
        self.packed = np.array([number for number, _ in packed], np.int32)
        self.of_packed = np.array([label for _, label in packed], np.int16)
        self.greys_mean_numbers = all(
            self.table[r] == label for (r, g, b), label in self.colours.items() if r == g == b
        )

    def __call__(self, mask: Mask, path: Path) -> Tensor:
        """Return the classes (H, W) uint8 of the mask (H, W) or (H, W, 3) in `path`.

        Raises:
            UserError: a number or colour that is no class, or a palette that says that another
                class is meant; names the file.
        """
        values = mask.shown() if self.by_grey else mask.values
        if self.by_grey and mask.palette and values.min() < 0:
            raise UserError(
                f"{path}: the mask holds numbers for which its palette has no colour, so that "
                f"nothing says how bright they are. Save it as a grey PNG."
            )
        if self.by_grey and values.max() > BYTE and self.table[BYTE] == 1:
            raise UserError(
                f"{path}: the mask has 16 bits, of which 65535 is white, but `threshold` is a grey "
                f"of 8 bits. Give it in 16 bits, such as 32768 for the middle, or save the masks "
                f"with 8 bits."
            )
        if values.ndim == 3:
            grey = (values == values[..., :1]).all()
            if not (grey and self.greys_mean_numbers):
                return self._of_colours(values, path)
            values = values[..., 0]
        inside = values.dtype == np.uint8 or (values.min() >= 0 and values.max() < VALUES)
        label = self.table[values] if inside else None
        if label is None or label.min() < 0:
            raise UserError(self._complain(np.unique(values), path))
        if not self.by_grey:
            self._compare(mask, path)
        return torch.from_numpy(label.astype(np.uint8))

    def key(self) -> bytes:
        """Return what tells this map from others."""
        parts = (self.table, self.packed, self.of_packed, np.array(self.by_grey))
        return b"".join(part.tobytes() for part in parts)

    def _of_colours(self, values: Array, path: Path) -> Tensor:
        """Return the classes (H, W) of colours (H, W, 3)."""
        red, green, blue = (values[..., i].astype(np.int32) for i in range(3))
        packed = red << 16 | green << 8 | blue
        place = np.searchsorted(self.packed, packed).clip(max=max(0, len(self.packed) - 1))
        unknown = packed != self.packed[place] if len(self.packed) else np.ones_like(packed, bool)
        if unknown.any():
            found, counts = np.unique(packed[unknown], return_counts=True)
            raise UserError(self._complain_of_colours(found[np.argsort(-counts)], path))
        return torch.from_numpy(self.of_packed[place].astype(np.uint8))

    def _compare(self, mask: Mask, path: Path) -> None:
        """Refuse a palette PNG in whose colours the classes have other numbers.

        A palette that has other colours than those of the classes says nothing.
        """
        meant = [self.colours.get(colour) for colour in mask.palette]
        differ = [v for v, c in enumerate(meant) if c is not None and c != self.table[v]]
        if not differ:
            return
        used = np.unique(mask.values).tolist()
        if not set(used) & set(differ) or any(v >= len(meant) or meant[v] is None for v in used):
            return
        value = next(v for v in differ if v in used)
        by_colour, by_number = self._name(meant[value]), self._name(self.table[value])
        raise UserError(
            f"{path}: the number {value} means {by_number}, but in the palette of the file it has "
            f"the colour {list(mask.palette[value])} of {by_colour}. Write the mask again with the "
            f"right numbers (`image.convert('RGB')` of Pillow keeps the colours, which are read), "
            f"or correct the palette in {self.origin}."
        )

    def _name(self, label: int | None) -> str:
        return self.classes[label] if label is not None and label != IGNORE else "ignored pixels"

    def _complain(self, found: Array, path: Path) -> str:
        bad = sorted(set(found.tolist()) - set(self.allowed))
        shown = ", ".join(map(str, bad[:SHOWN])) + (", ..." if len(bad) > SHOWN else "")
        return (
            f"{path}: the mask holds numbers that are no class: {shown}. Expected are "
            f"{ranges(self.allowed)} ({len(self.classes)} classes, {self.classes[0]} to "
            f"{self.classes[-1]}, and pixels to ignore). Correct the mask, or the list of classes."
        )

    def _complain_of_colours(self, bad: Array, path: Path) -> str:
        colours = [[v >> 16, v >> 8 & 255, v & 255] for v in bad[:SHOWN].tolist()]
        shown = ", ".join(map(str, colours)) + (", ..." if len(bad) > SHOWN else "")
        smooth = (
            " So many come from smooth edges, or from a format that changes colours."
            if len(bad) > DRAWN
            else ""
        )
        what = f"{len(bad):,} colours mean, most often" if len(bad) > 1 else "means"
        mend = (
            f"Give the colours of the classes as `palette` in {self.origin}, and that of pixels to "
            f"ignore as `ignore_color`"
            if self.origin
            else "Write it again with the classes as values"
        )
        return (
            f"{path}: the mask is an image of colours (mode RGB), and nothing says which class "
            f"{what} {shown}.{smooth} {mend}."
        )


def _pack(colour: Colour) -> int:
    r, g, b = colour
    return r << 16 | g << 8 | b


def ranges(numbers: list[int]) -> str:
    """Return sorted numbers as text: `0..20 and 255`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    texts = [str(a) if a == b else f"{a}..{b}" for a, b in parts]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def plain_map(
    classes: Iterable[str],
    ignore: int = IGNORE,
    colours: Mapping[Colour, int] | None = None,
) -> LabelMap:
    """Return the map of masks that hold the class itself, or `ignore`, or the class's colour."""
    names = tuple(classes)
    return LabelMap({**{c: c for c in range(len(names))}, ignore: IGNORE}, names, colours)
