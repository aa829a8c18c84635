"""dataset.yaml: what the numbers and colours in the masks of a folder mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ctt.data import channels
from ctt.data.channels import channels_of
from ctt.data.dataset import IGNORE, DatasetInfo
from ctt.data.labels import VALUES
from ctt.data.masks import Colour
from ctt.data.voc import bit_palette
from ctt.errors import UserError
from ctt.text import brief, from_yaml

DESCRIPTION = "dataset.yaml"
KEYS = (
    "classes",
    "palette",
    "ignore_color",
    "ignore_index",
    "id_map",
    "threshold",
    "mask_suffix",
    "image_suffix",
    "pairs",
    *channels.KEYS,
)
IGNORED = "ignore"  # as a target in the id map
MOST_CLASSES = IGNORE
OF_OTHER_PROGRAMS = {  # keys of data.yaml and meta files, and what they are called here
    "names": "`names:` is called `classes:` here",
    "labels": "`labels:` is called `classes:` here",
    "colors": "`colors:` is called `palette:` here",
    "ignore_label": "`ignore_label:` is called `ignore_index:` here",
}
YOLO_KEYS = {"train", "val", "nc", "path"}


@dataclass(frozen=True)
class Description:
    """What dataset.yaml says.

    Attributes:
        mapping: class, or 255, for each number that a mask may hold.
        colours: class, or 255, for each colour that a mask may hold; None: it does not say.
        says_ignore: it says which numbers are ignored.
        threshold: the grey from which on a pixel is of the second of two classes, or None.
        mask_suffix, image_suffix: what stands after the name that image and mask have in common.
        pairs: a list of images and their masks; empty: none.
        says_statistics: it gives the mean and std of the channels.
    """

    info: DatasetInfo
    mapping: dict[int, int]
    colours: dict[Colour, int] | None
    says_ignore: bool
    threshold: int | None
    mask_suffix: str
    image_suffix: str
    pairs: str
    says_statistics: bool


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
        raise UserError(
            f"{path}: {strange[0]} is none of the known keys: {', '.join(KEYS)}.{_meaning(strange)}"
        )
    classes = _classes(values.get("classes"), path)
    palette = _palette(values.get("palette"), classes, path)
    colours = _colours(values, palette, classes, path)
    ignore = values.get("ignore_index", IGNORE)
    if not _is_integer(ignore, VALUES):
        raise UserError(
            f"{path}: ignore_index must be a number in 0..{VALUES - 1}, got {brief(ignore)}."
        )
    threshold = _threshold(values, classes, path)
    mapping = _mapping(values.get("id_map"), ignore, classes, path)
    if threshold is not None:
        mapping = {value: int(value >= threshold) for value in range(VALUES)}
        mapping |= {ignore: IGNORE} if "ignore_index" in values else {}
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
    return Description(
        DatasetInfo("folder", classes, palette, **channels_of(values, path)._asdict()),
        mapping,
        colours,
        bool({"ignore_index", "id_map", "threshold"} & set(values)),
        threshold,
        _part_of_a_name(values, "mask_suffix", path),
        _part_of_a_name(values, "image_suffix", path),
        _part_of_a_name(values, "pairs", path),
        {"mean", "std"} <= set(values),
    )


def _meaning(strange: list[str]) -> str:
    """Return a sentence on what keys of another program's file are called here."""
    known = [OF_OTHER_PROGRAMS[key] for key in strange if key in OF_OTHER_PROGRAMS]
    told = f" {', and '.join(known)}." if known else ""
    if not YOLO_KEYS & set(strange):
        return told
    return (
        f"{told} For YOLO's data.yaml and its labels/ there is `ctt-data convert FOLDER --to "
        f"NEW_FOLDER`."
    )


def _threshold(values: dict[Any, Any], classes: tuple[str, ...], path: Path) -> int | None:
    value = values.get("threshold")
    if value is None:
        return None
    if not _is_integer(value, VALUES) or not value or len(classes) != 2 or "id_map" in values:
        raise UserError(
            f"{path}: threshold must be the grey from which on a pixel is of the second of two "
            f"classes, such as 128, without an id_map beside it; got {brief(value)} and "
            f"{len(classes)} classes."
        )
    return int(value)


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
