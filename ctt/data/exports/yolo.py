"""YOLO: a text file of outlines in shares of the image's sides beside each image."""

from __future__ import annotations

import codecs
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
    part_of,
    telling,
    why_unclear,
    with_background,
)
from ctt.data.files import same_name
from ctt.data.folder import walk
from ctt.data.shapes import IGNORED, Painted, Shape, outline, paint, rectangle
from ctt.errors import UserError
from ctt.text import brief, from_yaml

PARTS = ("train", "val", "test")
LIST = ".txt"  # of images
FURTHEST = 2  # share of a side; larger ones are pixels, others stick out of the image a little
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
    export = Export("YOLO", images, classes, "the smaller shape lies on top")
    labels = _label_files(path.parent)
    named = {part: _entries(values.get(part)) for part in PARTS}
    listed = _listed(named, values.get("path"), path, export)
    _leave_out_unclear(labels, export)
    for name in images.names:
        file = labels.pop(_key(name), None)
        part = listed.get(name) or _part(name, named)
        filled = file is not None and (_is_filled(file) or request.empty == BACKGROUND)
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
    paths = [*request.source.glob("[!.]*.yaml"), *request.source.glob("[!.]*.yml")]
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
    if values.get("kpt_shape") is not None:  # a box and keypoints would be filled as an outline
        raise UserError(
            f"{path}: by kpt_shape the labels are poses, and keypoints have no area. Export the "
            f"outlines of the objects (segmentation), without kpt_shape."
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


def _leave_out_unclear(labels: dict[str, Path], export: Export) -> None:
    """Turn labels that may be of several images into faults, and use neither of these."""
    sharing: dict[str, list[str]] = {}
    for name in export.images.names:
        sharing.setdefault(_key(name), []).append(name)
    unclear = {key for key, names in sharing.items() if len(names) > 1 and key in labels}
    export.faults += [
        why_unclear(labels.pop(key), export.images, sharing[key]) for key in sorted(unclear)
    ]
    export.images.names = [name for name in export.images.names if _key(name) not in unclear]


def _is_filled(file: Path) -> bool:
    try:
        return bool(file.read_bytes().removeprefix(codecs.BOM_UTF8).strip())
    except OSError:
        return True  # painting it tells why it cannot be read


def _key(name: str) -> str:
    """Return what an image and its labels have in common: the path without images/ or labels/."""
    path = PurePosixPath(same_name(name)).with_suffix("")
    return "/".join(part for part in path.parts if part not in ("images", "labels"))


def _entries(value: Any) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, str)]


def _names_images(entry: str) -> bool:
    return entry.lower().endswith((LIST, *IMAGE_SUFFIXES))


def _inside(entry: str) -> list[str]:
    """Return the parts of a path in data.yaml but those that only lead upwards."""
    parts = PurePosixPath(same_name(entry.replace("\\", "/"))).parts
    return [part for part in parts if part not in ("..", ".", "/")]


def _part(name: str, named: dict[str, list[str]]) -> str:
    """Return the part of an image: of the deepest of its folders in data.yaml, else by its path.

    A folder that is named for training too, as where there is no other, is no other part.
    """
    depths = [
        (_depth(entry, name), part)
        for part in PARTS
        for entry in named[part]
        if not _names_images(entry)
    ]
    depth, part = max(depths, key=lambda pair: pair[0], default=(0, ""))
    if depth and part != PARTS[0]:
        return part
    return part_of(PurePosixPath(name).parent.as_posix())


def _depth(entry: str, name: str) -> int:
    """Return how deep in an image's path the folder lies that data.yaml names; 0: nowhere."""
    ends, folders = telling("/".join([*_inside(entry), "a file"])), telling(name)
    starts = range(len(folders) if ends else 0)
    fitting = (s for s in starts if all(map(str.__eq__, ends, folders[s:])))
    return max((len(folders) - start for start in fitting), default=0)


def _listed(named: dict[str, list[str]], base: Any, path: Path, export: Export) -> dict[str, str]:
    """Return the parts of the images in lists; of an image in several the last of `PARTS`.

    Args:
        base: the folder of the dataset, as data.yaml calls it.

    Raises:
        UserError: a list is not there, so that its images would be learned.
    """
    found = {}
    training = [*map(_inside, named[PARTS[0]])]
    for part in PARTS:
        lists = filter(_names_images, named[part])
        for entry in (e for e in lists if part == PARTS[0] or _inside(e) not in training):
            lines, wrong = _images_of(entry, part, base, path), []
            for line in lines:
                try:
                    found[export.images.find(line)] = part
                except UserError as error:
                    wrong.append(str(error))
            if wrong and part != PARTS[0]:
                export.faults.append(
                    f"{path}: {part}: {len(wrong)} lines of {entry} are no image. {wrong[0]}"
                )
    return found


def _images_of(entry: str, part: str, base: Any, path: Path) -> list[str]:
    """Return the paths of images in a list, or the one image that data.yaml itself names."""
    if not entry.lower().endswith(LIST):
        return [entry]
    file = _list_file(path.parent, f"{base or ''}/{entry}")
    if file is not None:
        return [*filter(None, map(str.strip, _lines(file)))]
    if part == PARTS[0]:
        return []
    raise UserError(
        f"{path}: {part}: the list {entry} is not in {path.parent}. Put it there, or take its name "
        f"out of {path.name}."
    )


def _list_file(root: Path, entry: str) -> Path | None:
    """Return the list below the folder of data.yaml, wherever it was on another machine."""
    parts = _inside(entry)
    places = (root.joinpath(*parts[start:]) for start in range(len(parts)))
    try:
        return next(filter(Path.is_file, places), None)
    except OSError:  # such as a name that is too long
        return None


def _refuse_pixels(numbers: list[float]) -> None:
    """Refuse coordinates far outside of the image, which would leave it without a shape."""
    far = next((number for number in numbers if abs(number) > FURTHEST), None)
    if far is not None:
        raise UserError(
            f"the coordinate {far:g} is far outside of the image. Coordinates must be shares of "
            f"its sides, from 0 to 1: divide pixels by its width and height"
        )


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from None


def _paint(file: Path, names: list[str], export: Export, height: int, width: int) -> Painted:
    shapes, boxes = [], 0
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            kind, *numbers = map(float, line.split())
            if not (kind.is_integer() and 0 <= kind < len(names)):
                raise UserError(f"there is no class {kind:g}")
            _refuse_pixels(numbers)
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
    return painted.also_dropped({BOXES: boxes} if boxes else {})
