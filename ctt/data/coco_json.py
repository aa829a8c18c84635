"""COCO's JSON files of instances: images, categories and outlines, read without trust in them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctt.data.pictures import most_pixels
from ctt.data.shapes import IGNORED, Shape, from_runs, outline, rectangle
from ctt.errors import UserError
from ctt.text import brief

# numbers of 5 bits a sign: all but the last sign of a number have bit 5 set; 7 hold 35 bits
RUN_STRING = re.compile(r"(?:[P-o]{0,6}[0-O])*")
Key = int | str


class NoInstancesError(UserError):
    """Raised when a JSON file is none of instances, such as one of captions."""


@dataclass(frozen=True)
class CocoImage:
    """An image's entry in the file; `height` and `width` are 0 if it gives none."""

    name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoFile:
    """The parts of an instance file.

    Attributes:
        images: by their ids.
        categories: names by their ids, in rising order.
        annotations: as they stand in the file, by the ids of their images.
        strays: annotations whose image or category is not in the file.
    """

    path: Path
    images: dict[Key, CocoImage]
    categories: dict[Key, str]
    annotations: dict[Key, list[dict[str, Any]]]
    strays: int

    def shapes(self, image: Key, *, crowd: bool = True) -> list[Shape]:
        """Return the shapes of an image: crowds first, for of two of one size the later is on top.

        An annotation with a box and no outline becomes a box of pixels to ignore.

        Args:
            crowd: crowds belong to their class; else their pixels are ignored.

        Raises:
            UserError: an outline or a run-length code that is none; names the annotation.
        """
        found = self.annotations.get(image, [])
        ordered = sorted(found, key=lambda annotation: not annotation.get("iscrowd"))
        shapes = []
        for annotation in ordered:
            label = self.categories[annotation["category_id"]]
            try:
                ignored = bool(annotation.get("iscrowd")) and not crowd
                shape = self._shape(annotation, IGNORED if ignored else label, image)
            except UserError as error:
                raise UserError(
                    f"{self.path}: annotation {brief(annotation.get('id'))}: {error}."
                ) from None
            shapes.append(shape)
        return shapes

    def _shape(self, annotation: dict[str, Any], label: str, image: Key) -> Shape:
        drawn = annotation.get("segmentation")
        if isinstance(drawn, dict):
            return Shape(label, bitmap=self._bitmap(drawn, self.images[image]))
        if isinstance(drawn, list) and drawn:
            parts = drawn if isinstance(drawn[0], list) else [drawn]
            return Shape(label, tuple(map(outline, parts)))
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise UserError("it has neither a segmentation nor a box")
        x, y, width, height = box
        return Shape(IGNORED, (rectangle(x, y, x + width, y + height),))

    def _bitmap(self, code: dict[str, Any], image: CocoImage) -> Any:
        size, counts = code.get("size"), code.get("counts")
        if size != [image.height, image.width]:
            raise UserError(
                f"the run-length code is of the size {brief(size)}, and its image of "
                f"[{image.height}, {image.width}]"
            )
        runs = counts if isinstance(counts, list) else decoded_runs(counts)
        return from_runs(runs, image.height, image.width, by_columns=True)


def decoded_runs(text: object) -> list[int]:
    """Return the run lengths in COCO's compressed string.

    Each number is written in groups of 5 bits, lowest first, in signs from `0` on; from the fourth
    number on it is the difference to the number two before it.

    Raises:
        UserError: it is no such string; the text names no file.
    """
    if not isinstance(text, str) or not RUN_STRING.fullmatch(text):
        raise UserError("the run-length code is neither a list of numbers nor COCO's string")
    runs: list[int] = []
    number = shift = 0
    for sign in text:
        bits = ord(sign) - ord("0")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    return runs


def read_coco(path: Path) -> CocoFile:
    """Return what an instance file holds.

    Raises:
        NoInstancesError: it lacks what an instance file has.
        UserError: it cannot be read, is no JSON, gives one id to two images or categories, or names
            an image of more than `most_pixels`.
    """
    values = read_json(path)
    parts = ("images", "annotations", "categories")
    lists = [values.get(part) if isinstance(values, dict) else None for part in parts]
    if not all(isinstance(part, list) for part in lists):
        raise NoInstancesError(
            f"{path} is no COCO file of instances: it must hold the lists {', '.join(parts)}."
        )
    images: dict[Key, CocoImage] = {}
    categories: dict[Key, str] = {}
    for entry in lists[0] or ():
        image = CocoImage(_name(entry, "file_name", path), *_size(entry, path))
        other = images.setdefault(_key(entry, path), image)
        if other != image:
            raise _repeated("images", entry, other.name, image.name, path)
    for entry in lists[2] or ():
        name = _name(entry, "name", path)
        first = categories.setdefault(_key(entry, path), name)
        if first != name:
            raise _repeated("categories", entry, first, name, path)
    if not images or not categories:
        raise UserError(f"{path}: the file names no images, or no categories.")
    annotations: dict[Key, list[dict[str, Any]]] = {}
    strays = 0
    for entry in lists[1] or ():
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {brief(entry)} is no annotation.")
        image_id, category = entry.get("image_id"), entry.get("category_id")
        known = all(isinstance(i, int | str) for i in (image_id, category))
        if known and image_id in images and category in categories:
            annotations.setdefault(image_id, []).append(entry)
        else:
            strays += 1
    ordered = dict(sorted(categories.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))
    return CocoFile(path, images, ordered, annotations, strays)


def read_json(path: Path) -> Any:
    """Return the values in a JSON file.

    Raises:
        UserError: it cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except RecursionError:
        raise UserError(f"{path} is no valid JSON (it is nested too deep).") from None
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}).") from None


def _key(entry: Any, path: Path) -> Key:
    key = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(key, int | str):
        raise UserError(f"{path}: {brief(entry)} has no id.")
    return key


def _repeated(what: str, entry: Any, one: str, other: str, path: Path) -> UserError:
    return UserError(
        f"{path}: the {what} {brief(one)} and {brief(other)} have the same id "
        f"{brief(entry['id'])}, so that nothing says to which of them an annotation belongs. Give "
        f"each an id of its own, as the tool does if all are exported together."
    )


def _name(entry: Any, key: str, path: Path) -> str:
    name = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: {brief(entry)} has no {key}.")
    return name


def _size(entry: dict[str, Any], path: Path) -> tuple[int, int]:
    height, width = entry.get("height") or 0, entry.get("width") or 0
    if not all(_is_number(v) and v == int(v) and v >= 0 for v in (height, width)):
        raise UserError(f"{path}: {brief(entry)} has no height and width in pixels.")
    if height * width > most_pixels():
        raise UserError(f"{path}: {brief(entry)} has more than {most_pixels():,} pixels.")
    return int(height), int(width)


def _is_number(value: object) -> bool:
    # a difference of itself is 0 but for infinity and NaN, which JSON of Python may hold
    return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0
