"""Outlines and bitmaps of annotation tools, painted into one label of classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from ctt.data.dataset import IGNORE
from ctt.errors import UserError

IGNORED = ""  # as the label of a shape: its pixels belong to no class
WITHOUT_PIXEL = "shapes without a pixel in their image: they are outside of it, or too thin"
FEWEST_POINTS = 3
Outline = np.ndarray[tuple[int, int], np.dtype[np.float64]]  # (P, 2), x and y
Bitmap = np.ndarray[tuple[int, int], np.dtype[np.bool_]]
Label = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


@dataclass(frozen=True)
class Shape:
    """One annotated region: the union of its outlines and of its bitmap.

    Attributes:
        label: name of the class, or `IGNORED`.
        outlines: polygons in pixels; (0, 0) is the upper left corner of the image.
        bitmap: (h, w), or None.
        left, top: column and row of the image of its first pixel.
    """

    label: str
    outlines: tuple[Outline, ...] = ()
    bitmap: Bitmap | None = None
    left: int = 0
    top: int = 0


class Painted(NamedTuple):
    """Return value of `paint`.

    Attributes:
        label: (H, W) class or 255.
        clashes: pixels that lie in shapes of more than one class.
        unmatched: pixels that were annotated, but as no class.
        dropped: what of the annotation was not used, and how often.
        example: some of the values that match no class, and their file; "" if they have no values.
    """

    label: Label
    clashes: int
    unmatched: int = 0
    dropped: Mapping[str, int] = MappingProxyType({})
    example: str = ""

    def also_dropped(self, more: Mapping[str, int]) -> Painted:
        """Return the same with more that was not used."""
        return self._replace(dropped={**self.dropped, **more})


def outline(numbers: object) -> Outline:
    """Return a polygon (P, 2) from `[x1, y1, x2, y2, ...]` or `[[x1, y1], ...]`.

    Raises:
        UserError: it does not hold the coordinates of three points; the text names no file.
    """
    try:
        points = np.asarray(numbers, np.float64)
        points = points.reshape(-1, 2) if points.ndim == 1 else points
    except (ValueError, TypeError):
        points = np.empty((0, 2))
    if (
        points.ndim != 2
        or points.shape[1] != 2
        or len(points) < FEWEST_POINTS
        or not np.isfinite(points).all()
    ):
        raise UserError(f"an outline must hold x and y of at least {FEWEST_POINTS} points")
    return points


def rectangle(left: float, top: float, right: float, bottom: float) -> Outline:
    """Return the outline (4, 2) of a box."""
    return outline([left, top, right, top, right, bottom, left, bottom])


def from_runs(runs: Sequence[object], height: int, width: int, *, by_columns: bool) -> Bitmap:
    """Return a bitmap (height, width) from the lengths of alternating runs of 0 and 1.

    Args:
        by_columns: the runs go down the columns, as those of COCO do; else along the rows.

    Raises:
        UserError: the runs do not fill the bitmap; the text names no file.
    """
    try:
        lengths = np.asarray(runs, np.int64)
    except (ValueError, TypeError, OverflowError):
        lengths = np.full(1, -1)
    pixels = height * width
    inside = lengths.ndim == 1 and ((lengths >= 0) & (lengths <= pixels)).all()
    if not inside or lengths.sum() != pixels:
        raise UserError(f"the run lengths must have the sum {height} * {width}")
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return flat.reshape((height, width), order="F" if by_columns else "C")


def pixels_of(shape: Shape, height: int, width: int) -> Bitmap:
    """Return the pixels (height, width) of a shape; what lies outside of the image is left out.

    Polygons are filled by pycocotools, so that outlines from COCO give COCO's own masks.

    Raises:
        UserError: an outline is longer than any in such an image; the text names no file.
    """
    result = np.zeros((height, width), np.bool_)
    if shape.outlines:
        from pycocotools import mask as coco

        longest = height * width + 100 * (height + width)
        for points in shape.outlines:
            # pycocotools walks along the edges, however far they lead
            if np.abs(np.diff(points, axis=0, append=points[:1])).sum() > longest:
                raise UserError("an outline leads far out of the image")
        runs = coco.frPyObjects([list(p.ravel()) for p in shape.outlines], height, width)
        result |= coco.decode(coco.merge(runs)).astype(np.bool_)
    if shape.bitmap is not None:
        top, left = max(0, shape.top), max(0, shape.left)
        part = shape.bitmap[top - shape.top :, left - shape.left :]
        part = part[: max(0, height - top), : max(0, width - left)]
        result[top : top + part.shape[0], left : left + part.shape[1]] |= part
    return result


def paint(
    shapes: Iterable[Shape],
    numbers: Mapping[str, int],
    height: int,
    width: int,
    *,
    by_area: bool,
    outside: int = 0,
) -> Painted:
    """Return the label of an image.

    Args:
        numbers: class of each name; shapes of other names, and ignored ones, become 255.
        by_area: the smaller of two shapes lies on top, of equal ones the later; else the later.
        outside: class where there is no shape.
    """
    ordered = list(shapes)
    if by_area:  # drawn twice, because the bitmaps of all would fill the memory
        areas = [int(pixels_of(shape, height, width).sum()) for shape in ordered]
        order = sorted(range(len(ordered)), key=lambda i: -areas[i])
        ordered = [ordered[i] for i in order]  # of equal ones the later is on top
    empty = 0
    label = np.full((height, width), outside, np.uint8)
    covered, clash = np.zeros((2, height, width), np.bool_)
    for shape in ordered:
        pixels, number = pixels_of(shape, height, width), numbers.get(shape.label, IGNORE)
        empty += not pixels.any()
        clash |= pixels & covered & (label != number)
        covered |= pixels
        label[pixels] = number
    dropped = {WITHOUT_PIXEL: empty} if empty else {}
    return Painted(label, int(clash.sum()), int((label == IGNORE).sum()), dropped)
