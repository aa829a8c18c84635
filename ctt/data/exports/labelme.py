"""LabelMe: a JSON file of shapes beside each image."""

from __future__ import annotations

import base64
import binascii
import io
import math
import posixpath
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ctt.data.coco_json import read_json
from ctt.data.exports.base import (
    BACKGROUND,
    WITHOUT_AREA,
    Export,
    Images,
    Item,
    Request,
    as_class,
    files_of,
    part_of,
    with_background,
)
from ctt.data.shapes import IGNORED, Painted, Shape, outline, paint, rectangle
from ctt.errors import UserError
from ctt.text import brief

IGNORE_LABEL = "__ignore__"  # pixels of no class, in LabelMe's own conversion
WITH_AREA = ("polygon", "oriented_rectangle", "rectangle", "circle", "mask")
CORNERS = 64  # of the polygon that stands for a circle
LABELS = "labels.txt"  # names in the order of their numbers, where LabelMe was given one


def read(request: Request) -> Export:
    """Return the images of one file, or of all in a folder, with their shapes."""
    images = Images(request.images or request.folder, request.target)
    faults: list[str] = []
    found: dict[Path, tuple[str, Any]] = {}
    for path in files_of(request.source, "*.json"):
        if path.resolve().is_relative_to(request.target.resolve()):
            continue
        try:
            values = read_json(path)
            if not isinstance(values, dict) or not isinstance(values.get("shapes"), list):
                raise UserError(f"{path} is no LabelMe file: it has no list `shapes`.")
            name = _image(path, values, images, request)
            # not the rest: LabelMe keeps the whole image in the file
            kept = {key: values.get(key) for key in ("imageHeight", "imageWidth")}
            kept["labels"] = {_label(shape, path) for shape in values["shapes"]}
            kept["area"] = any(_kind(shape) in WITH_AREA for shape in values["shapes"])
            found[path] = (name, kept)
        except UserError as error:
            faults.append(str(error))
    labels = {label for _, values in found.values() for label in values["labels"]}
    listed = [*_listed(request.folder / LABELS), *sorted(labels)]
    names = [as_class(name) for name in listed if name not in (IGNORE_LABEL, IGNORED)]
    classes = with_background(names, request)
    export = Export("LabelMe", images, classes, "the later shape lies on top", faults=faults)
    for path, (name, values) in found.items():
        annotated = values["area"] or request.empty == BACKGROUND
        if values["labels"] and not annotated:
            export.left_out[WITHOUT_AREA] += 1
        size = (values["imageHeight"], values["imageWidth"])
        known = all(isinstance(side, int) and side > 0 for side in size)
        painted = partial(_paint, path, export) if annotated else None
        item = Item(name, painted, size if known else None, entry=str(path))
        export.add(item, _part(name, path, request))
    return export


def _part(name: str, path: Path, request: Request) -> str:
    """Return the part of an image, by its folder or else that of its file."""
    if path == request.source:  # of one file that was named everything is wanted
        return "train"
    return part_of(posixpath.dirname(name), path.parent.relative_to(request.source).as_posix())


def _image(path: Path, values: dict[str, Any], images: Images, request: Request) -> str:
    """Return the image of a file: the one that it names, or of its own name."""
    near = images.place(path, request)
    entry = values.get("imagePath")
    try:
        return images.find(entry if isinstance(entry, str) else path.stem, near)
    except UserError as error:
        try:
            return images.find(path.stem, near)
        except UserError:
            raise UserError(f"{path}: {error}") from None


def _listed(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None


def _label(shape: Any, path: Path) -> str:
    label = shape.get("label") if isinstance(shape, dict) else None
    if not isinstance(label, str) or not label:
        raise UserError(f"{path}: {brief(shape)} is no shape with a label.")
    return IGNORED if label == IGNORE_LABEL else as_class(label)


def _kind(shape: dict[str, Any]) -> Any:
    return shape.get("shape_type") or "polygon"


def _paint(path: Path, export: Export, height: int, width: int) -> Painted:
    shapes, dropped = [], dict[str, int]()
    for number, shape in enumerate(read_json(path)["shapes"], 1):
        try:
            drawn = _shape(shape, _label(shape, path), height * width)
        except UserError as error:
            raise UserError(f"{path}: shape {number}: {error}.") from None
        if drawn is None:
            reason = f"shapes of the kind {brief(shape.get('shape_type'))}, which have no area"
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            shapes.append(drawn)
    painted = paint(shapes, export.numbers, height, width, by_area=False, outside=export.outside)
    return painted.also_dropped(dropped)


def _shape(shape: dict[str, Any], label: str, pixels: int) -> Shape | None:
    """Return a shape; None: it has no area.

    Args:
        pixels: of the image, which a bitmap cannot exceed.
    """
    kind, points = _kind(shape), shape.get("points")
    if kind not in WITH_AREA:
        return None
    if kind in ("polygon", "oriented_rectangle"):
        return Shape(label, (outline(points),))
    try:
        (x, y), (right, bottom) = np.asarray(points, np.float64).tolist()
    except (ValueError, TypeError):
        x = math.nan
    if not all(map(math.isfinite, (x, y, right, bottom) if x == x else (x,))):
        raise UserError(f"a {kind} must have two points")
    if kind == "rectangle":
        return Shape(label, (rectangle(x, y, right, bottom),))
    if kind == "circle":  # the middle, and a point on it
        radius, turn = math.hypot(right - x, bottom - y), np.arange(CORNERS) * math.tau / CORNERS
        ring = np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], 1)
        return Shape(label, (ring,))
    return Shape(label, bitmap=_bitmap(shape.get("mask"), pixels), left=round(x), top=round(y))


def _bitmap(text: Any, pixels: int) -> Any:
    """Return the bitmap in a PNG that is written in base64."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as file:
            if file.width * file.height > pixels:
                raise UserError("the mask is larger than the image")
            return np.asarray(file.convert("L")) > 0
    except UserError:
        raise
    except (binascii.Error, TypeError, ValueError, SyntaxError, OSError) as error:
        raise UserError(f"the mask cannot be read ({error})") from None
