"""Settings of dataset.yaml for the channels of the images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ctt.errors import UserError
from ctt.text import brief

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
UNKNOWN_MEAN, UNKNOWN_STD = 0.5, 0.25  # of bands of which dataset.yaml does not say
KEYS = ("bands", "range", "shown", "mean", "std", "white")
MOST_BANDS = 1000


class Channels(NamedTuple):
    """The facts of `DatasetInfo` that belong to channels, under its names."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float | None
    bands: tuple[int, ...]
    ranges: tuple[tuple[float, float], ...]
    shown: tuple[int, int, int]


def channels_of(values: dict[Any, Any], path: Path) -> Channels:
    """Return what the values of a dataset.yaml say of the channels.

    Args:
        path: of the file, for the message.

    Raises:
        UserError: a value that cannot be meant.
    """
    bands = _bands(values.get("bands"), path)
    if not bands and (key := next((k for k in ("range", "shown") if k in values), None)):
        raise UserError(
            f"{path}: {key} belongs to images of channels other than 8-bit red, green and blue. "
            f"Say which channels of the files are read, such as `bands: [1, 2, 3, 4]`, or take "
            f"{key} out."
        )
    count = len(bands) or 3
    mean = (UNKNOWN_MEAN,) * count if bands else IMAGENET_MEAN
    std = (UNKNOWN_STD,) * count if bands else IMAGENET_STD
    return Channels(
        _shares(values.get("mean"), mean, "mean", path),
        _shares(values.get("std"), std, "std", path),
        _white(values.get("white"), bands, path),
        bands,
        _ranges(values.get("range"), count, path),
        _shown(values.get("shown"), bands, path),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bands(value: Any, path: Path) -> tuple[int, ...]:
    if value is None:
        return ()
    numbers = value if isinstance(value, list) else []
    good = all(isinstance(b, int) and not isinstance(b, bool) and b >= 1 for b in numbers)
    if not good or not 1 <= len(numbers) <= MOST_BANDS or len(set(numbers)) < len(numbers):
        raise UserError(
            f"{path}: bands must be a list of the channels of the files that are read, by their "
            f"numbers from 1, such as [1, 2, 3, 4], got {brief(value)}."
        )
    return tuple(numbers)


def _ranges(value: Any, count: int, path: Path) -> tuple[tuple[float, float], ...]:
    if value is None:
        return ()
    pairs = value if isinstance(value, list) else []
    if len(pairs) == 2 and all(map(_is_number, pairs)):
        pairs = [pairs] * count
    for pair in pairs:
        good = isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))
        if not good or not pair[0] < pair[1]:
            pairs = []
            break
    if len(pairs) != count:
        raise UserError(
            f"{path}: range must be the lowest and the highest value, such as [0, 10000], or "
            f"{count} such pairs, one for each of the bands, got {brief(value)}."
        )
    return tuple((float(low), float(high)) for low, high in pairs)


def _shown(value: Any, bands: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    if value is None:
        return (0, 1, 2) if not bands or len(bands) >= 3 else (0, 0, 0)
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or any(number not in bands for number in numbers):
        raise UserError(
            f"{path}: shown must be three of the bands {list(bands)}, which pictures show as red, "
            f"green and blue, got {brief(value)}."
        )
    red, green, blue = map(bands.index, numbers)
    return red, green, blue


def _shares(value: Any, default: tuple[float, ...], key: str, path: Path) -> tuple[float, ...]:
    if value is None:
        return default
    numbers = value if isinstance(value, list) else []
    lowest = 0 if key == "mean" else math.ulp(0)
    if len(numbers) == len(default) and all(_is_number(v) and lowest <= v <= 1 for v in numbers):
        return tuple(map(float, numbers))
    count = "three" if len(default) == 3 else str(len(default))
    raise UserError(f"{path}: {key} must be {count} numbers in 0..1, got {brief(value)}.")


def _white(value: Any, bands: tuple[int, ...], path: Path) -> float | None:
    if value is not None and not (_is_number(value) and value > 0):
        raise UserError(
            f"{path}: white must be the value of white in images of more than 8 bits, such as "
            f"4095, got {brief(value)}."
        )
    if value is not None and bands:
        raise UserError(f"{path}: beside bands write `range: [0, {value}]`, and not white.")
    return None if value is None else float(value)
