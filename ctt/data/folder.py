"""Any data in folders: images/, masks/, optional unlabeled/ and val/, and a dataset.yaml."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ctt.data import IMAGE_SUFFIXES
from ctt.data.files import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FileSource,
    require_root,
    same_name,
)
from ctt.data.labels import VALUES, LabelMap
from ctt.data.options import SourceOptions
from ctt.data.pictures import Colour
from ctt.data.source import IGNORE, DatasetInfo
from ctt.data.split import NO_MASK, read_lines, readings
from ctt.data.voc import bit_palette
from ctt.errors import UserError
from ctt.text import brief, from_yaml

LAYOUT = "holds images/, masks/ and dataset.yaml"
DESCRIPTION = "dataset.yaml"
KEYS = (
    "classes",
    "palette",
    "ignore_color",
    "ignore_index",
    "id_map",
    "mask_suffix",
    "image_suffix",
    "pairs",
    "mean",
    "std",
    "white",
)
IGNORED = "ignore"  # as a target in the id map
MOST_CLASSES = IGNORE
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
JPEG_SUFFIXES = (".jpg", ".jpeg")  # taken for a mask where there is no other, and then refused
JOINTS = "_-. "  # with which programs add to the name of an image
COMPARED = 1000  # names of masks among which the nearest one is searched


@dataclass(frozen=True)
class Description:
    """What dataset.yaml says.

    Attributes:
        mapping: class, or 255, for each number that a mask may hold.
        colours: class, or 255, for each colour that a mask may hold; None: it does not say.
        says_ignore: it says which numbers are ignored.
        mask_suffix, image_suffix: what stands after the name that image and mask have in common.
        pairs: a list of images and their masks; empty: none.
    """

    info: DatasetInfo
    mapping: dict[int, int]
    colours: dict[Colour, int] | None
    says_ignore: bool
    mask_suffix: str
    image_suffix: str
    pairs: str


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
        path = self.root / DESCRIPTION
        self.description = description = read_description(path)
        classes = description.info.classes
        self.labels = LabelMap(description.mapping, classes, description.colours, str(path))
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
        everything = [*train, *unlabeled, *evaluation]
        self._known = {same_name(name): name for name in everything}
        for name in everything:
            self._known.setdefault(_stem(name), name)
        for name in train:  # other programs' lists leave the folder out
            short = name.removeprefix("images/")
            self._known.setdefault(same_name(short), name)
            self._known.setdefault(_stem(short), name)
        self._masks = self._read_pairs()
        self._strays: list[Path] = []  # masks of no image
        for names, folder in ((train, ""), (evaluation, "val/")):
            self._match(names, folder)
        super().__init__(description.info, self.root, (train, unlabeled, evaluation), options)
        if self._strays:
            stray = self._strays[0].relative_to(self.root)
            self.notes += (
                f"Warning: {len(self._strays)} of the masks belong to no image, such as {stray}.",
            )

    def _read_pairs(self) -> dict[str, Path]:
        """Return the masks that the list of pairs gives to images.

        Raises:
            UserError: a line is no image and a mask below the root, or an image has two masks.
        """
        masks: dict[str, Path] = {}
        if not self.description.pairs:
            return masks
        path = self.root / self.description.pairs
        for number, line in read_lines(path).items():
            found = [
                (name, mask)
                for image, text in readings(line.replace("\\", "/"))
                if text and text != NO_MASK
                if (name := self.find(image)) and (mask := self._file(text))
            ]
            if not found:
                raise UserError(
                    f"{path}, line {number}: {line.strip()} is no image and its mask, with a tab "
                    f"between them. Both are paths below {self.root}, such as images/1.jpg and "
                    f"masks/a.png, and must be there."
                )
            name, mask = found[0]
            if masks.setdefault(name, mask) != mask:
                raise UserError(
                    f"{path}, line {number}: {name} has the mask {mask}, and in a line before it "
                    f"the mask {masks[name]}. Take one of the two out."
                )
        return masks

    def _match(self, names: list[str], folder: str) -> None:
        """Give the images of a part their masks by their names."""
        masks = find_masks(self.root, f"{folder}masks", self.description.mask_suffix)
        paired = set(self._masks.values())
        for name in names:
            key = _stem(name.removeprefix(f"{folder}images/"))
            key = key.removesuffix(same_name(self.description.image_suffix))
            mask = masks.pop(key, None)
            if mask is not None:
                self._masks.setdefault(name, mask)
        self._strays += sorted(set(masks.values()) - paired)

    def image_path(self, name: str) -> Path:
        return self.root / name

    def mask_path(self, name: str) -> Path:
        if name in self._masks:
            return self._masks[name]
        path = PurePosixPath(name.replace("images/", "masks/", 1))
        stem = path.stem.removesuffix(self.description.image_suffix)
        return self.root / path.with_name(f"{stem}{self.description.mask_suffix}.png")

    def candidate(self, name: str) -> str:
        """Return a sentence on the file that is likeliest meant as the mask of an image."""
        stem = PurePosixPath(name).stem
        for path in self._strays:
            shown = path.relative_to(self.root)
            if path.stem.startswith(stem) and path.stem[len(stem) :][:1] in JOINTS:
                setting = f"mask_suffix: {path.stem[len(stem) :]}"
            elif stem.startswith(path.stem) and stem[len(path.stem) :][:1] in JOINTS:
                setting = f"image_suffix: {stem[len(path.stem) :]}"
            else:
                continue
            return f" {shown} is there: if it is the mask, write `{setting}` into {DESCRIPTION}."
        if elsewhere := self._elsewhere.get(stem):
            return f" Is {elsewhere} meant? Masks are expected in masks/."
        names = {path.stem: path for path in self._strays[:COMPARED]}
        if near := difflib.get_close_matches(stem, names, 1):
            shown = names[near[0]].relative_to(self.root)
            return (
                f" The nearest name is {shown}: rename it, or give a list of `pairs` in "
                f"{DESCRIPTION}."
            )
        return ""

    @cached_property
    def _elsewhere(self) -> dict[str, str]:
        """Files by their names without the ending, outside of the folders of this layout."""
        own = ("images/", "unlabeled/", "val/images/", "masks/", "val/masks/")
        return {
            PurePosixPath(name).stem: name
            for name in _walk(self.root, "")
            if name.lower().endswith(MASK_SUFFIXES) and not name.startswith(own)
        }

    def label_map(self, mask: Path) -> LabelMap:
        return self.labels

    def find(self, entry: str) -> str | None:
        """Paths below the root or below images/, with or without the ending.

        Before them may stand what leads to the root: its own name, or a whole path on any machine.
        """
        return next((self._known[path] for path in self._below(entry) if path in self._known), None)

    def is_mask(self, name: str, path: str) -> bool | None:
        file = self._file(path)
        return None if file is None else file == self.mask_path(name)

    def _below(self, entry: str) -> Iterator[str]:
        """Yield what a path in a list may mean below the root."""
        entry = same_name(entry.removeprefix("./"))
        yield entry
        for folder in {self.root.absolute().name, self.root.resolve().name}:
            _, found, below = f"/{entry}".partition(f"/{same_name(folder)}/")
            if found:
                yield below

    def _file(self, entry: str) -> Path | None:
        """Return the file below the root that a path in a list means; None: there is none."""
        paths = (PurePosixPath(path) for path in self._below(entry))
        inside = (path for path in paths if not path.is_absolute() and ".." not in path.parts)
        try:
            return next((self.root / p for p in inside if (self.root / p).is_file()), None)
        except OSError:  # such as a name that is too long
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


def find_masks(root: Path, folder: str, suffix: str = "") -> dict[str, Path]:
    """Masks in `folder` and its subfolders, by their paths in it without suffix and ending.

    Raises:
        UserError: two masks would belong to one image.
    """
    names = _walk(root, folder)
    masks: dict[str, Path] = {}
    for endings in (MASK_SUFFIXES, JPEG_SUFFIXES):
        found: dict[str, Path] = {}
        for name in names:
            stem = _stem(name.removeprefix(f"{folder}/"))
            if not name.lower().endswith(endings) or not stem.endswith(same_name(suffix)):
                continue
            key = stem.removesuffix(same_name(suffix))
            other = found.setdefault(key, root / name)
            if other != root / name:
                raise UserError(
                    f"{other} and {root / name} differ in their endings only, so that both would "
                    f"be the mask of one image. Take one of them away."
                )
        masks = {**found, **masks}
    return masks


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
    """Return the classes and what the numbers in the masks mean.

    Raises:
        UserError: the file is missing, or a value in it cannot be meant.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file. It must name the classes in the order of their "
            f"numbers in the masks, for example `classes: [background, cat, dog]`."
        )
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    values = from_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `name: value` lines, at least `classes: [...]`.")
    strange = [str(key) for key in values if key not in KEYS]
    if strange:
        raise UserError(f"{path}: {strange[0]} is none of the known keys: {', '.join(KEYS)}.")
    classes = _classes(values.get("classes"), path)
    palette = _palette(values.get("palette"), classes, path)
    colours = _colours(values, palette, classes, path)
    ignore = values.get("ignore_index", IGNORE)
    if not _is_integer(ignore, VALUES):
        raise UserError(
            f"{path}: ignore_index must be a number in 0..{VALUES - 1}, got {brief(ignore)}."
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
            f"4095, got {brief(white)}."
        )
    return Description(
        DatasetInfo("folder", classes, palette, mean, std, white),
        mapping,
        colours,
        "ignore_index" in values or "id_map" in values,
        _part_of_a_name(values, "mask_suffix", path),
        _part_of_a_name(values, "image_suffix", path),
        _part_of_a_name(values, "pairs", path),
    )


def _part_of_a_name(values: dict[Any, Any], key: str, path: Path) -> str:
    value = values.get(key, "")
    whole = isinstance(value, str) and not PurePosixPath(value).is_absolute()
    if not whole or ".." in PurePosixPath(value).parts:
        raise UserError(
            f"{path}: {key} must be a part of a name below the folder, got {brief(value)}."
        )
    return str(value)


def _is_integer(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _classes(value: Any, path: Path) -> tuple[str, ...]:
    if isinstance(value, dict) and sorted(value, key=str) == sorted(range(len(value)), key=str):
        value = [value[c] for c in range(len(value))]
    if not isinstance(value, list) or not 2 <= len(value) <= MOST_CLASSES:
        raise UserError(
            f"{path}: classes must be a list of 2 to {MOST_CLASSES} names, or names by their "
            f"numbers from 0 on, got {brief(value)}."
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


def _palette(value: Any, classes: tuple[str, ...], path: Path) -> tuple[Colour, ...]:
    if value is None:
        return bit_palette(len(classes))
    if not isinstance(value, list) or len(value) != len(classes) or not all(map(_is_colour, value)):
        raise UserError(
            f"{path}: palette must be a list of {len(classes)} colours, one for each class, such "
            f"as [128, 64, 0], got {brief(value)}."
        )
    return tuple((r, g, b) for r, g, b in value)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_integer(v, 256) for v in value)


def _colours(
    values: dict[Any, Any], palette: tuple[Colour, ...], classes: tuple[str, ...], path: Path
) -> dict[Colour, int] | None:
    """What colours in masks mean; None where the file does not say.

    Raises:
        UserError: one colour would mean two things, or is none.
    """
    ignored = values.get("ignore_color")
    if ignored is not None and (not _is_colour(ignored) or "palette" not in values):
        raise UserError(
            f"{path}: ignore_color must be a colour such as [255, 255, 255] beside a palette, got "
            f"{brief(ignored)}."
        )
    if values.get("palette") is None:
        return None
    named = [*zip(palette, classes, range(len(classes)), strict=True)]
    if ignored is not None:
        named.append(((ignored[0], ignored[1], ignored[2]), "ignore_color", IGNORE))
    seen: dict[Colour, str] = {}
    for colour, name, _ in named:
        if (other := seen.setdefault(colour, name)) != name:
            raise UserError(
                f"{path}: {other} and {name} have the same colour {list(colour)}. Give each its "
                f"own."
            )
    return {colour: label for colour, _, label in named}


def _mapping(value: Any, ignore: int, classes: tuple[str, ...], path: Path) -> dict[int, int]:
    if value is None:
        return {**{c: c for c in range(len(classes))}, ignore: IGNORE}
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: id_map must hold `number in the mask: class`, got {brief(value)}."
        )
    numbers = {name: c for c, name in enumerate(classes)}
    mapping = {ignore: IGNORE}
    for number, target in value.items():
        named = isinstance(target, str)
        label: Any = IGNORE if target == IGNORED else numbers.get(target) if named else target
        known = _is_integer(label, len(classes)) or target == IGNORED
        if not _is_integer(number, VALUES) or not known:
            raise UserError(
                f"{path}: id_map maps {brief(number)} to {brief(target)}. It must map a number in "
                f"the masks (0..{VALUES - 1}) to a class, by name or number "
                f"(0..{len(classes) - 1}), or to `{IGNORED}`."
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
    raise UserError(f"{path}: {key} must be three numbers in 0..1, got {brief(value)}.")
