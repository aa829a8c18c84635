"""CVAT for images 1.1: one annotations.xml of outlines, boxes, ellipses and masks."""

from __future__ import annotations

import math
import posixpath
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ctt.data.exports.base import (
    BACKGROUND,
    WITHOUT_AREA,
    Export,
    Images,
    Item,
    Request,
    as_class,
    files_of,
    head_of,
    part_of,
    with_background,
)
from ctt.data.shapes import Outline, Painted, Shape, from_runs, outline, paint, rectangle
from ctt.errors import UserError

CORNERS = 64  # of the polygon that stands for an ellipse
WITH_AREA = ("polygon", "box", "ellipse", "mask")


class _Tree(ElementTree.TreeBuilder):
    """Builds the tree of a file without declarations, which could stand for any amount of text."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UserError("it holds a document type, which CVAT does not write")


def read(request: Request) -> Export:
    """Return the images of one file, or of all in a folder, with their shapes."""
    images = Images(request.images or request.folder, request.target)
    trees = {path: _parsed(path) for path in _files(request.source)}
    names = [
        as_class(label.findtext("name") or "")
        for tree in trees.values()
        for label in tree.iterfind("meta//labels/label")
        if not label.findtext("parent")  # a point of a skeleton
    ]
    used = {as_class(s.get("label", "")) for t in trees.values() for s in t.iterfind("image/*")}
    names = [*filter(None, [*names, *sorted(used)])]
    classes = with_background(names, request)
    order = "the shape of the higher z_order lies on top, of equal ones the later"
    export = Export("CVAT", images, classes, order)
    for path, tree in trees.items():
        for image in tree.iterfind("image"):
            try:
                name = images.find(image.get("name", ""), images.near(image.get("subset") or None))
            except UserError as error:
                export.faults.append(f"{path}: {error}")
                continue
            part = part_of(image.get("subset", ""), posixpath.dirname(name))
            annotated = any(shape.tag in WITH_AREA for shape in image)
            annotated |= request.empty == BACKGROUND
            if len(image) and not annotated:
                export.left_out[WITHOUT_AREA] += 1
            sides = [image.get("height", ""), image.get("width", "")]
            size = (int(sides[0]), int(sides[1])) if all(map(str.isdecimal, sides)) else None
            painted = partial(_paint, path, image, export) if annotated else None
            entry = f"{image.get('name')} in {path}"
            export.add(Item(name, painted, size, entry=entry), part)
    return export


def _files(source: Path) -> list[Path]:
    """Return one file, or those of a folder that are CVAT's and not of another program, as GDAL's.

    Raises:
        UserError: there are none.
    """
    files = files_of(source, "*.xml")
    found = files if source.is_file() else [f for f in files if b"<annotations" in head_of(f)]
    if not found:
        raise UserError(
            f"{source}: there is no .xml file with <annotations>, as CVAT for images 1.1 has it: "
            f"export the task in that format."
        )
    return found


def _parsed(path: Path) -> ElementTree.Element:
    try:
        parser = ElementTree.XMLParser(target=_Tree())
        root = ElementTree.parse(path, parser).getroot()
    except UserError as error:
        raise UserError(f"{path} is refused: {error}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path} is no valid XML ({error}).") from None
    if root is None or root.tag != "annotations" or root.find("track") is not None:
        raise UserError(f"{path} is no CVAT for images 1.1: export the task in that format.")
    return root


def _paint(
    path: Path, image: ElementTree.Element, export: Export, height: int, width: int
) -> Painted:
    found: list[tuple[float, Shape]] = []
    dropped: dict[str, int] = {}
    for number, element in enumerate(image, 1):
        if element.tag not in WITH_AREA:
            reason = f"{element.tag} annotations, which have no area"
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        try:
            found.append((_number(element, "z_order", 0), _shape(element, height * width)))
        except UserError as error:
            name = image.get("name")
            raise UserError(f"{path}: image {name}, annotation {number}: {error}.") from None
    found.sort(key=lambda pair: pair[0])
    shapes = [shape for _, shape in found]
    painted = paint(shapes, export.numbers, height, width, by_area=False, outside=export.outside)
    return painted.also_dropped(dropped)


def _shape(element: ElementTree.Element, pixels: int) -> Shape:
    label = as_class(element.get("label", ""))
    if element.tag == "polygon":
        points = [pair.split(",") for pair in element.get("points", "").split(";")]
        return Shape(label, (outline(points),))
    if element.tag == "box":
        sides = [_number(element, key) for key in ("xtl", "ytl", "xbr", "ybr")]
        return Shape(label, (_turned(rectangle(*sides), _number(element, "rotation", 0)),))
    if element.tag == "ellipse":
        x, y, rx, ry = (_number(element, key) for key in ("cx", "cy", "rx", "ry"))
        turn = np.arange(CORNERS) * math.tau / CORNERS
        ring = np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], 1)
        return Shape(label, (_turned(ring, _number(element, "rotation", 0)),))
    left, top, w, h = (round(_number(element, k)) for k in ("left", "top", "width", "height"))
    if w < 1 or h < 1 or w * h > pixels:
        raise UserError("the mask has no pixels, or more than the image")
    runs = [
        int(run) if run.strip().isdecimal() else -1 for run in element.get("rle", "").split(",")
    ]
    return Shape(label, bitmap=from_runs(runs, h, w, by_columns=False), left=left, top=top)


def _number(element: ElementTree.Element, key: str, default: float | None = None) -> float:
    text = element.get(key)
    if text is None and default is not None:
        return default
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{key} must be a number, got {text}")
    return value


def _turned(points: Outline, degrees: float) -> Outline:
    """Return an outline (P, 2) turned clockwise, as seen, around its middle."""
    angle = math.radians(degrees)
    middle = (points.min(0) + points.max(0)) / 2
    turn = np.array(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], np.float64
    )
    turned: Outline = (points - middle) @ turn + middle
    return turned
