"""Masks in the colours or numbers that a table names, as CVAT, Geti and CamVid have them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ctt.data.coco_json import read_json
from ctt.data.dataset import IGNORE
from ctt.data.exports import TABLES
from ctt.data.exports.base import (
    Export,
    Images,
    Item,
    Request,
    as_class,
    named_part,
    part_of,
    with_background,
)
from ctt.data.exports.pairs import pairs_of
from ctt.data.files import list_names
from ctt.data.labels import SHOWN, VALUES
from ctt.data.masks import NO_COLOUR, Array, Colour, read_mask
from ctt.data.shapes import Painted
from ctt.data.voc import LISTS, bit_palette
from ctt.errors import UserError
from ctt.text import brief

IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "image")
MASK_FOLDERS = ("SegmentationClass", "masks", "Masks", "mask", "labels", "annotations")
IGNORED_NAMES = ("void", "ignore", "ignored", "__ignore__")
# name:r,g,b:parts:actions | r g b name | name,r,g,b | number,name | name:number
LINES = (
    re.compile(r"(?P<name>[^:]+):(?P<r>\d+),(?P<g>\d+),(?P<b>\d+):.*"),
    re.compile(r"(?P<r>\d+)[\s,;]+(?P<g>\d+)[\s,;]+(?P<b>\d+)[\s,;:]+(?P<name>.*\S)"),
    re.compile(r"(?P<name>.*?\S)[\s,;:]+(?P<r>\d+)[\s,;]+(?P<g>\d+)[\s,;]+(?P<b>\d+)"),
    re.compile(r"(?P<n>\d+)\s*[,;:\s]\s*(?P<name>.*\S)"),
    re.compile(r"(?P<name>.*?\S)\s*[,;:]\s*(?P<n>\d+)"),
)
CHANNEL = 1024  # more than the values of a channel, from NO_COLOUR to 255
Key = Colour | int  # what stands for a class in a mask


def read(request: Request) -> Export:
    """Return the images that have masks, and what a table says of the colours in these."""
    path = request.table or _table_in(request)
    table = read_table(path)
    names = [name for name, _ in table]
    ignored = tuple(
        n for n in dict.fromkeys(names) if n.lower() in IGNORED_NAMES and n not in request.classes
    )
    used = [name for name in names if name not in ignored]
    classes = with_background(used, request, always=False)
    colours = dict(reversed(table))
    default = bit_palette(len(classes))
    palette = tuple(
        key if isinstance(key := colours.get(name), tuple) else default[number]
        for number, name in enumerate(classes)
    )
    root, masks = _folders(request)
    others = [masks] if masks != root else []
    if (root / "SegmentationObject").is_dir():
        others.append(root / "SegmentationObject")
    images = Images(root, request.target, others)
    if len(set(palette)) < len(palette):
        palette = default
    export = Export("masks", images, classes, palette=palette, ignored=ignored)
    numbers = {key: export.numbers.get(name, IGNORE) for name, key in table}
    named = {*export.numbers, *ignored}
    unused = [name for name in dict.fromkeys(names) if name not in named]
    export.ignored += tuple(unused)
    listed = _listed(dict.fromkeys([request.folder / LISTS, path.parent / LISTS]), export)
    for name, file in pairs_of(masks, export):
        part = listed.get(name) or part_of(PurePosixPath(name).parent.as_posix())
        painted = functools.partial(_paint, file, numbers, request.tolerance, path)
        export.add(Item(name, painted, mask=file), part)
    export.tests |= {name for name, part in listed.items() if part == "test"}  # also without a mask
    return export


def _listed(folders: Iterable[Path], export: Export) -> dict[str, str]:
    """Return the parts of the images that lists name whose file names say which part they are.

    An image in several lists is of the part test before val, and of val before train.
    """
    files = [folder / name for folder in folders for name in list_names(folder)]
    lists = {file: named_part(file.stem) for file in files if file.suffix.lower() == ".txt"}
    found: dict[str, str] = {}
    for part in ("train", "val", "test"):
        for file in (file for file in lists if lists[file] == part):
            names, wrong = _images_in(file, export.images)
            found |= dict.fromkeys(names, part)
            if wrong and part != "train":
                export.faults.append(
                    f"{file}: {len(wrong)} lines are no image. {wrong[0]} Mend the lines "
                    f"or take them out, or images of the part {part} may be learned."
                )
    return found


def _images_in(path: Path, images: Images) -> tuple[list[str], list[str]]:
    """Return the images that the lines of a list name, and what is wrong with other lines."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    names, wrong = [], []
    for line in filter(None, (line.strip().strip('"') for line in lines)):  # quoted: with blanks
        try:
            names.append(images.find(line))
        except UserError as error:
            wrong.append(str(error))
    return names, wrong


def read_table(path: Path) -> list[tuple[str, Key]]:
    """Return the names of the classes and their colours or numbers, in the order of the file.

    Raises:
        UserError: it cannot be read, names no class, or one colour twice, or both colours and
            numbers.
    """
    entries = _of_json(path) if path.suffix.lower() == ".json" else [*_of_text(path)]
    keys: dict[Key, str] = {}
    for name, key in entries:
        values = key if isinstance(key, tuple) else (key,)
        if max(values) >= (256 if isinstance(key, tuple) else VALUES):
            raise UserError(f"{path}: {brief(key)} of {name} is no colour or number of a mask.")
        if keys.setdefault(key, name) != name:
            raise UserError(f"{path}: {keys[key]} and {name} have the same colour {brief(key)}.")
    if not entries:
        raise UserError(
            f"{path} names no classes. A line must hold a name and three numbers, such as "
            f"`cat:128,0,0::`, or a number and a name, such as `1, cat`."
        )
    kinds = {isinstance(key, tuple): (name, key) for name, key in reversed(entries)}
    if len(kinds) > 1:
        (coloured, colour), (numbered, number) = kinds[True], kinds[False]
        raise UserError(
            f"{path}: {coloured} has the colour {brief(colour)}, but {numbered} the number "
            f"{number}. Masks hold one or the other: give all classes colours, or all numbers."
        )
    return entries


def _of_json(path: Path) -> list[tuple[str, Key]]:
    """Return what Datumaro and Geti write: names by numbers, and a list of colours."""
    values = read_json(path)
    names, colours = (
        values.get(key) if isinstance(values, dict) else None
        for key in ("label_map", "segmentation_colors")
    )
    if not isinstance(names, dict) or not isinstance(colours, list | None):
        raise UserError(f"{path} must hold `label_map`, and `segmentation_colors` in its order.")
    entries: list[tuple[str, Key]] = []
    for place, (number, name) in enumerate(names.items()):
        key: Any = colours[place] if colours and place < len(colours) else number
        numbers = key if isinstance(key, list) else [key]
        if len(numbers) not in (1, 3) or not all(str(v).isdecimal() for v in numbers):
            raise UserError(f"{path}: {brief(key)} of {brief(name)} is no colour and no number.")
        r, *more = map(int, numbers)
        entries.append((as_class(str(name)), (r, more[0], more[1]) if more else r))
    return entries


def _of_text(path: Path) -> Iterator[tuple[str, Key]]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = next(filter(None, (form.fullmatch(line) for form in LINES)), None)
        if found is None:
            if number == 1:
                continue  # the heads of the columns
            raise UserError(f"{path}, line {number}: {brief(line)} is no class and its colour.")
        parts = found.groupdict()
        key = int(parts["n"]) if "n" in parts else tuple(int(parts[c]) for c in "rgb")
        yield as_class(parts["name"].strip()), key  # type: ignore[misc]


def _table_in(request: Request) -> Path:
    if request.source.is_file():
        return request.source
    places = [request.folder, request.folder / "train"]
    for path in (place / name for place in places for name in TABLES):
        if path.is_file():
            return path
    raise UserError(
        f"{request.source}: there is no {', '.join(TABLES)}. Give the file that names the colours "
        f"of the classes by `table`, with lines such as `cat:128,0,0::`."
    )


def _folders(request: Request) -> tuple[Path, Path]:
    """Return the folders of the images and of the masks, which may be one."""

    def first(names: tuple[str, ...]) -> Path:
        folders = (request.folder / name for name in names)
        return next((folder for folder in folders if folder.is_dir()), request.folder)

    masks = request.masks or first(MASK_FOLDERS)
    if not masks.is_dir():
        raise UserError(f"`masks` {masks}: there is no such folder.")
    return request.images or first(IMAGE_FOLDERS), masks


def _paint(
    file: Path, numbers: Mapping[Key, int], tolerance: int, table: Path, height: int, width: int
) -> Painted:
    mask = read_mask(file, turned=True, lossy=tolerance > 0)
    coloured = any(isinstance(key, tuple) for key in numbers)
    values = mask.shown() if coloured else mask.values
    if not coloured and values.ndim == 3:
        if (values != values[..., :1]).any():
            raise UserError(f"{file} holds colours, and {table} names numbers.")
        values = values[..., 0]
    if values.shape[:2] != (height, width):
        raise UserError(
            f"{file}: the mask has {values.shape[1]}x{values.shape[0]} pixels, but its image has "
            f"{width}x{height}. Both must be of one size."
        )
    found, place = _distinct(values)
    if coloured and found.shape[1] == 1:
        found = np.repeat(found, 3, 1)  # a grey is a colour of three equal channels
    labels, unmatched = _matched(found, numbers, tolerance)
    counts = np.bincount(place, minlength=len(found))
    pixels = int(counts[unmatched].sum())
    order = np.argsort(-counts[unmatched])[:SHOWN]
    common = ", ".join(
        "numbers beyond the palette" if v[0] == NO_COLOUR else str(v.tolist())
        for v in found[unmatched][order]
    )
    label = labels[place].reshape(height, width)
    return Painted(label, 0, pixels, example=f"{common} in {file.name}" if pixels else "")


def _distinct(values: Array) -> tuple[Array, Any]:
    """Return the values (U, C) of a mask (H, W) or (H, W, C), and which of them each pixel has.

    Colours are packed into one number each, which NumPy sorts many times faster than rows.
    """
    packed = values.astype(np.int64)
    if values.ndim == 3:
        channels = np.moveaxis(packed - NO_COLOUR, -1, 0)  # 0 and above
        packed = functools.reduce(lambda upper, channel: upper * CHANNEL + channel, channels)
    _, first, place = np.unique(packed, return_index=True, return_inverse=True)
    rows = values.reshape(packed.size, -1)
    return rows[first], place.ravel()


def _matched(found: Array, numbers: Mapping[Key, int], tolerance: int) -> tuple[Any, Any]:
    """Return the class (U) of each value, and whether it is near none (U)."""
    keys = np.array([key if isinstance(key, tuple) else (key,) for key in numbers], np.int32)
    classes = np.array([*numbers.values()], np.uint8)
    labels = np.full(len(found), IGNORE, np.uint8)
    unmatched = np.ones(len(found), np.bool_)
    for row, value in enumerate(found.astype(np.int32)):
        distance = np.abs(keys - value).max(1)
        nearest = int(distance.argmin())
        if distance[nearest] <= tolerance:
            labels[row], unmatched[row] = classes[nearest], False
    return labels, unmatched
