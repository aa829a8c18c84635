"""YOLO: a text file of outlines in shares of the image's sides beside each image."""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ctt.data import IMAGE_SUFFIXES
from ctt.data.exports.base import (
    BACKGROUND,
    Export,
    Images,
    Item,
    Request,
    as_class,
    class_outside,
    part_of,
    with_background,
)
from ctt.data.folder import walk
from ctt.data.shapes import IGNORED, Painted, Shape, outline, paint, rectangle
from ctt.errors import UserError
from ctt.text import brief, from_yaml

BOX = 4  # numbers of a box: its middle, width and height
BOXES = "lines with a box and no outline: their pixels are ignored"


def read(request: Request) -> Export:
    """Return the images below the folder of data.yaml, and the outlines in its labels/."""
    path = _description(request)
    try:
        values = from_yaml(path.read_text("utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    names = _names(values, path)
    known = [as_class(name) for name in names]
    classes = with_background(known, request)
    images = Images(request.images or path.parent, request.target)
    outside, order = class_outside(known, classes), "the smaller shape lies on top"
    export = Export("YOLO", images, classes, order, outside)
    labels = _label_files(path.parent)
    evaluation = {_last_folders(entry) for entry in _entries(values.get("val"))}
    training = {_last_folders(entry) for entry in _entries(values.get("train"))}
    for name in images.names:
        file = labels.pop(_key(name), None)
        folder = PurePosixPath(name).parent.as_posix()
        part = part_of(folder)
        if any(folder.endswith(end) for end in evaluation - training if end):
            part = "val"
        filled = file is not None and (file.stat().st_size > 0 or request.empty == BACKGROUND)
        if filled or part == "test":
            painted = partial(_paint, file, names, export) if file is not None else None
            export.add(Item(name, painted), part)
    export.faults += [
        f"{file}: there is no image of this name in {images.root}." for file in labels.values()
    ]
    return export


def _description(request: Request) -> Path:
    if request.source.is_file():
        return request.source
    paths = [*request.source.glob("*.yaml"), *request.source.glob("*.yml")]
    found = sorted(paths, key=lambda path: (path.stem != "data", path))
    if not found:
        raise UserError(f"{request.source}: there is no data.yaml, which names YOLO's classes.")
    return found[0]


def _names(values: Any, path: Path) -> list[str]:
    """Return the names of the classes in the order of their numbers."""
    names = values.get("names") if isinstance(values, dict) else None
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise UserError(
            f"{path}: names must be a list of the classes, or names by their numbers from 0 on, "
            f"got {brief(names)}."
        )
    return [str(name) for name in names]


def _label_files(root: Path) -> dict[str, Path]:
    """Return the text files below folders named `labels`, by the images that they belong to."""
    found = {}
    for name in walk(root, ""):
        path = PurePosixPath(name)
        if path.suffix == ".txt" and "labels" in path.parts[:-1]:
            found[_key(name)] = root / name
    return found


def _key(name: str) -> str:
    """Return what an image and its labels have in common: the path without images/ or labels/."""
    path = PurePosixPath(name).with_suffix("")
    return "/".join(part for part in path.parts if part not in ("images", "labels"))


def _entries(value: Any) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, str)]


def _last_folders(entry: str) -> str:
    """Return the folders of a path in data.yaml, without what leads to them on another machine."""
    parts = PurePosixPath(entry.replace("\\", "/")).parts
    named = not entry.lower().endswith((".txt", *IMAGE_SUFFIXES))
    kept = [part for part in parts if part not in ("..", ".", "/")]
    return "/".join(kept[-2:]) if named else ""


def _paint(file: Path, names: list[str], export: Export, height: int, width: int) -> Painted:
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from None
    shapes, boxes = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            kind, *numbers = map(float, line.split())
            if not (kind.is_integer() and 0 <= kind < len(names)):
                raise UserError(f"there is no class {kind:g}")
            label = as_class(names[int(kind)])
            if len(numbers) == BOX:
                x, y, w, h = numbers
                points, label = rectangle(x - w / 2, y - h / 2, x + w / 2, y + h / 2), IGNORED
                boxes += 1
            else:
                points = outline(numbers)
        except (ValueError, UserError) as error:
            raise UserError(f"{file}, line {number}: {error}.") from None
        shapes.append(Shape(label, (points * (width, height),)))
    painted = paint(shapes, export.numbers, height, width, by_area=True, outside=export.outside)
    return painted._replace(dropped={BOXES: boxes} if boxes else {})
