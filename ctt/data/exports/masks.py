"""Masks in the colours or numbers that a table names, as CVAT, Geti and CamVid have them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ctt.data.coco_json import read_json
from ctt.data.dataset import IGNORE
from ctt.data.exports import TABLES
from ctt.data.exports.base import Export, Images, Item, Request, as_class, part_of, with_background
from ctt.data.folder import JOINTS, JPEG_SUFFIXES, MASK_SUFFIXES, walk
from ctt.data.labels import SHOWN, VALUES
from ctt.data.masks import NO_COLOUR, Array, Colour, read_mask
from ctt.data.shapes import Painted
from ctt.data.voc import bit_palette
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
    for name, file in _pairs(images, masks, export):
        part = part_of(PurePosixPath(name).parent.as_posix())
        painted = partial(_paint, file, numbers, request.tolerance, path)
        export.add(Item(name, painted, mask=file), part)
    return export


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


def _pairs(images: Images, masks: Path, export: Export) -> list[tuple[str, Path]]:
    """Return each image that has a mask, whose name may be longer by a suffix as in `a_mask`.

    All masks have one suffix: the one by which most of them belong to an image.
    """
    stems = {str(PurePosixPath(name).with_suffix("")): name for name in images.names}
    names = [n for n in walk(masks, "") if n.lower().endswith((*MASK_SUFFIXES, *JPEG_SUFFIXES))]
    found = {name: str(PurePosixPath(name).with_suffix("")) for name in names}
    together = masks == images.root  # a mask in the folder of the images must have a suffix
    suffixes = Counter(
        stem[cut:]
        for stem in found.values()
        for cut in (i for i in range(len(stem) + (not together)) if stem[i : i + 1] in JOINTS)
        if stem[:cut] in stems
    )
    if not suffixes:
        return []
    suffix = max(suffixes, key=lambda s: (suffixes[s], -len(s)))
    pairs = []
    for name, stem in found.items():
        image = stems.get(stem.removesuffix(suffix)) if stem.endswith(suffix) else None
        if image is not None:
            pairs.append((image, masks / name))
        elif not together:
            export.faults.append(
                f"{masks / name}: there is no image of this name in {images.root}."
            )
    used = {file for _, file in pairs}
    images.names = [name for name in images.names if images.root / name not in used]
    return pairs


def _paint(
    file: Path, numbers: Mapping[Key, int], tolerance: int, table: Path, height: int, width: int
) -> Painted:
    mask = read_mask(file, turned=True, lossy=tolerance > 0)
    coloured = any(isinstance(key, tuple) for key in numbers)
    values = mask.shown() if coloured else mask.values
    if coloured and values.ndim == 2:
        values = np.repeat(values[..., None], 3, 2)
    if not coloured and values.ndim == 3:
        if (values != values[..., :1]).any():
            raise UserError(f"{file} holds colours, and {table} names numbers.")
        values = values[..., 0]
    if values.shape[:2] != (height, width):
        raise UserError(
            f"{file}: the mask has {values.shape[1]}x{values.shape[0]} pixels, but its image has "
            f"{width}x{height}. Both must be of one size."
        )
    found, place = np.unique(values.reshape(height * width, -1), axis=0, return_inverse=True)
    labels, unmatched = _matched(found, numbers, tolerance)
    counts = np.bincount(place.ravel(), minlength=len(found))
    pixels = int(counts[unmatched].sum())
    order = np.argsort(-counts[unmatched])[:SHOWN]
    common = ", ".join(
        "numbers beyond the palette" if v[0] == NO_COLOUR else str(v.tolist())
        for v in found[unmatched][order]
    )
    dropped = {f"masks with colours of no class, such as {common} in {file.name}": 1}
    label = labels[place.ravel()].reshape(height, width)
    return Painted(label, 0, pixels, dropped if pixels else {})


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
