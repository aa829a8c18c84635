"""Whether outlines were drawn on the pixels of a file, or on what viewers make of them (EXIF)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ctt.data.exports.base import Item, Size
from ctt.data.pictures import ON_ITS_SIDE, ORIENTATION, open_picture
from ctt.data.rasters import size_of, stored_size
from ctt.data.shapes import Painted
from ctt.errors import UserError


@dataclass(frozen=True)
class View:
    """How an image was shown when it was annotated.

    Attributes:
        stored: height and width of the pixels in the file.
        turn: how viewers turn them (EXIF); 1: not at all.
        as_stored: without being turned; None: the sizes do not tell.
    """

    stored: Size
    turn: int
    as_stored: bool | None

    def is_as_stored(self, others: bool | None) -> bool | None:
        """Return whether outlines are turned with the image; None: nobody knows.

        Args:
            others: what `convention` says of the export.
        """
        return self.turn > 1 and (others if self.as_stored is None else self.as_stored)


def convention(views: Iterable[object]) -> bool | None:
    """Return whether images were annotated as they are stored; None: no size tells, or they differ.

    Args:
        views: of an export; anything else among them does not count.
    """
    told = {view.as_stored for view in views if isinstance(view, View) and view.turn > 1} - {None}
    return told.pop() if len(told) == 1 else None


def view_of(item: Item, source: Path) -> View:
    """Return how an image was shown when it was annotated.

    Raises:
        UserError: it cannot be read as an image, is a too large one, or the outlines were drawn for
            an image of another size.
    """
    try:
        with open_picture(source) as file:
            stored, turn = stored_size(file)
    except UserError:
        raise
    except Exception:  # bytes that are no image can raise anything; or a raster of bands
        stored, turn = size_of(source, turned=False), 1
    shown = stored[::-1] if turn in ON_ITS_SIDE else stored
    size = item.size or (size_of(item.mask, turned=True) if item.mask else None)
    if size not in (None, stored, shown):
        raise UserError(
            f"{source}: the image has {shown[1]}x{shown[0]} pixels, but was annotated with "
            f"{size[1]}x{size[0]}. Give the images that were annotated (`images`)."
        )
    return View(stored, turn, None if size is None or stored == shown else size == stored)


def paint_as_shown(item: Item, view: View, as_stored: bool | None) -> Painted:
    """Return the label of an image as viewers show it."""
    assert item.paint is not None
    if not as_stored:
        return item.paint(*(view.stored[::-1] if view.turn in ON_ITS_SIDE else view.stored))
    painted = item.paint(*view.stored)
    picture = Image.fromarray(painted.label)
    picture.getexif()[ORIENTATION] = view.turn
    return painted._replace(label=np.asarray(ImageOps.exif_transpose(picture)))
