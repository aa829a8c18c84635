"""Any data in folders: images/, masks/, optional unlabeled/ and val/, and a dataset.yaml."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ctt.data import IMAGE_SUFFIXES
from ctt.data.files import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VALUES,
    FileSource,
    LabelMap,
    require_root,
    same_name,
)
from ctt.data.options import SourceOptions
from ctt.data.source import IGNORE, DatasetInfo
from ctt.data.voc import bit_palette
from ctt.errors import UserError

LAYOUT = "holds images/, masks/ and dataset.yaml"
DESCRIPTION = "dataset.yaml"
KEYS = ("classes", "palette", "ignore_index", "id_map", "mean", "std", "white")
IGNORED = "ignore"  # as a target in the id map
MOST_CLASSES = IGNORE


@dataclass(frozen=True)
class Description:
    """What dataset.yaml says.

    Attributes:
        mapping: class, or 255, for each number that a mask may hold.
        says_ignore: it says which numbers are ignored.
    """

    info: DatasetInfo
    mapping: dict[int, int]
    says_ignore: bool


class Folder(FileSource):
    """Names are paths below the root: `images/photo 1.jpg`, whose mask is `masks/photo 1.png`.

    Subfolders of images/ are found and mirrored in masks/. The images of unlabeled/ have no masks.
    Evaluation is on val/images with val/masks; without val/ a share of the images is held out.

    Args:
        root: the folder.

    Raises:
        UserError: the layout is not complete, or dataset.yaml is wrong.
    """

    turned = True

    def __init__(self, root: Path | None, options: SourceOptions) -> None:
        self.root = require_root(root, "folder", LAYOUT)
        description = read_description(self.root / DESCRIPTION)
        self.labels = LabelMap(description.mapping, description.info.classes)
        self.assumed_ignore = None if description.says_ignore else IGNORE
        train = find_images(self.root, "images")
        if not train:
            raise UserError(
                f"{self.root / 'images'}: there are no images ({', '.join(IMAGE_SUFFIXES)})."
            )
        unlabeled = find_images(self.root, "unlabeled")
        evaluation = find_images(self.root, "val/images")
        if (self.root / "val").is_dir() and not evaluation:
            raise UserError(f"{self.root / 'val' / 'images'}: there are no images.")
        self._masks = {
            name: masks[key]
            for folder in ("", "val/")
            for masks in [find_masks(self.root, f"{folder}masks")]
            for name in (evaluation if folder else train)
            if (key := _stem(name.removeprefix(f"{folder}images/"))) in masks
        }
        super().__init__(description.info, self.root, (train, unlabeled, evaluation), options)
        everything = [*train, *unlabeled, *evaluation]
        self._known = {same_name(name): name for name in everything}
        for name in everything:
            self._known.setdefault(_stem(name), name)
        for name in train:  # other programs' lists leave the folder out
            short = name.removeprefix("images/")
            self._known.setdefault(same_name(short), name)
            self._known.setdefault(_stem(short), name)

    def image_path(self, name: str) -> Path:
        return self.root / name

    def mask_path(self, name: str) -> Path:
        if name in self._masks:
            return self._masks[name]
        expected = PurePosixPath(name.replace("images/", "masks/", 1)).with_suffix(".png")
        return self.root / expected

    def label_map(self, mask: Path) -> LabelMap:
        return self.labels

    def find(self, entry: str) -> str | None:
        """Paths below the root or below images/, with or without the ending.

        Before them may stand what leads to the root: its own name, or a whole path on any machine.
        """
        entry = same_name(entry.removeprefix("./"))
        if entry in self._known:
            return self._known[entry]
        for folder in {self.root.absolute().name, self.root.resolve().name}:
            _, found, below = f"/{entry}".partition(f"/{same_name(folder)}/")
            if found and below in self._known:
                return self._known[below]
        return None


def _stem(name: str) -> str:
    return same_name(str(PurePosixPath(name).with_suffix("")))


def find_images(root: Path, folder: str) -> list[str]:
    """Paths below `root` of the images in `folder` and its subfolders.

    Raises:
        UserError: two images would share a mask.
    """
    names = [n for n in _walk(root, folder) if n.lower().endswith(IMAGE_SUFFIXES)]
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_stem(name), name)
        if other != name:
            raise UserError(
                f"{root / other} and {root / name} differ in their endings only, so that one mask "
                f"would belong to both. Rename one of them."
            )
    return names


def find_masks(root: Path, folder: str) -> dict[str, Path]:
    """PNG files in `folder` and its subfolders, by their paths in it without the ending."""
    names = [n for n in _walk(root, folder) if n.lower().endswith(".png")]
    return {_stem(name.removeprefix(f"{folder}/")): root / name for name in names}


def _walk(root: Path, folder: str) -> list[str]:
    """Return the paths below `root` of all files in `folder`, sorted, without hidden ones.

    Links are followed, and each folder is visited once.
    """
    names = []
    visited: set[Path] = set()
    for place, folders, files in os.walk(root / folder, followlinks=True):
        # real folders first, so that their images have the names of those and not of a link
        folders[:] = [f for f in folders if not f.startswith(".")]
        folders.sort(key=lambda name: (Path(place, name).is_symlink(), name))
        # a link to a folder above would show every image again, until the path is too long
        if (real := Path(place).resolve()) in visited:
            folders.clear()
            continue
        visited.add(real)
        below = Path(place).relative_to(root)
        names += [(below / file).as_posix() for file in files if not file.startswith(".")]
    return sorted(names)


def read_description(path: Path) -> Description:
    """The classes and what the numbers in the masks mean.

    Raises:
        UserError: the file is missing, or a value in it cannot be meant.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file. It must name the classes in the order of their "
            f"numbers in the masks, for example `classes: [background, cat, dog]`."
        )
    try:
        values = yaml.safe_load(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: this is no valid YAML ({reason}).") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `name: value` lines, at least `classes: [...]`.")
    strange = [str(key) for key in values if key not in KEYS]
    if strange:
        raise UserError(f"{path}: {strange[0]} is none of the known keys: {', '.join(KEYS)}.")
    classes = _classes(values.get("classes"), path)
    palette = _palette(values.get("palette"), len(classes), path)
    ignore = values.get("ignore_index", IGNORE)
    if not _is_integer(ignore, VALUES):
        raise UserError(
            f"{path}: ignore_index must be a number in 0..{VALUES - 1}, got {ignore!r}."
        )
    mapping = _mapping(values.get("id_map"), ignore, classes, path)
    if "ignore_index" in values and mapping.get(ignore) != IGNORE:
        raise UserError(
            f"{path}: id_map says that {ignore} is the class {classes[mapping[ignore]]}, and "
            f"ignore_index that it is ignored. Take one of the two out."
        )
    if "id_map" not in values and ignore < len(classes):
        kept = ", ".join(f"{c + (c >= ignore)}: {c}" for c in range(len(classes) - 1))
        raise UserError(
            f"{path}: ignore_index {ignore} is also the number of the class {classes[ignore]}, "
            f"which no pixel could have then. Take {classes[ignore]} out of the classes and write "
            f"`id_map: {{{kept}}}`, or give another ignore_index."
        )
    mean = _statistics(values.get("mean"), IMAGENET_MEAN, "mean", path)
    std = _statistics(values.get("std"), IMAGENET_STD, "std", path)
    white = values.get("white")
    number = isinstance(white, int | float) and not isinstance(white, bool)
    if white is not None and not (number and 0 < white < math.inf):
        raise UserError(
            f"{path}: white must be the value of white in images of more than 8 bits, such as "
            f"4095, got {white!r}."
        )
    says_ignore = "ignore_index" in values or "id_map" in values
    return Description(
        DatasetInfo("folder", classes, palette, mean, std, white), mapping, says_ignore
    )


def _is_integer(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _classes(value: Any, path: Path) -> tuple[str, ...]:
    if isinstance(value, dict) and sorted(value, key=str) == sorted(range(len(value)), key=str):
        value = [value[c] for c in range(len(value))]
    if not isinstance(value, list) or not 2 <= len(value) <= MOST_CLASSES:
        raise UserError(
            f"{path}: classes must be a list of 2 to {MOST_CLASSES} names, or names by their "
            f"numbers from 0 on, got {value!r}."
        )
    for name in value:
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise UserError(
                f"{path}: YAML reads one of the names of the classes as {name!r}. Put it in quotes."
            )
    names = tuple(str(name) for name in value)
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two classes have the same name ({', '.join(names)}).")
    return names


def _palette(value: Any, classes: int, path: Path) -> tuple[tuple[int, int, int], ...]:
    if value is None:
        return bit_palette(classes)
    good = (
        isinstance(value, list)
        and len(value) == classes
        and all(isinstance(colour, list) and len(colour) == 3 for colour in value)
        and all(_is_integer(channel, 256) for colour in value for channel in colour)
    )
    if not good:
        raise UserError(
            f"{path}: palette must be a list of {classes} colours, one for each class, such as "
            f"[128, 64, 0], got {value!r}."
        )
    return tuple((r, g, b) for r, g, b in value)


def _mapping(value: Any, ignore: int, classes: tuple[str, ...], path: Path) -> dict[int, int]:
    if value is None:
        return {**{c: c for c in range(len(classes))}, ignore: IGNORE}
    if not isinstance(value, dict):
        raise UserError(f"{path}: id_map must hold `number in the mask: class`, got {value!r}.")
    numbers = {name: c for c, name in enumerate(classes)}
    mapping = {ignore: IGNORE}
    for number, target in value.items():
        label: Any = IGNORE if target == IGNORED else numbers.get(target, target)
        known = _is_integer(label, len(classes)) or target == IGNORED
        if not _is_integer(number, VALUES) or not known:
            raise UserError(
                f"{path}: id_map maps {number!r} to {target!r}. It must map a number in the masks "
                f"(0..{VALUES - 1}) to a class, by name or number (0..{len(classes) - 1}), or to "
                f"`{IGNORED}`."
            )
        mapping[number] = label
    return mapping


def _statistics(
    value: Any, default: tuple[float, float, float], key: str, path: Path
) -> tuple[float, float, float]:
    if value is None:
        return default
    numbers = value if isinstance(value, list) else []
    if len(numbers) == 3 and all(isinstance(v, int | float) and 0 < v <= 1 for v in numbers):
        return (float(numbers[0]), float(numbers[1]), float(numbers[2]))
    raise UserError(f"{path}: {key} must be three numbers in 0..1, got {value!r}.")
