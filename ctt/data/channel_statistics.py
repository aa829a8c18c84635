"""Range, mean and deviation of the channels of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from ctt.data.channels import channels_of
from ctt.data.dataset import Dataset
from ctt.data.files import FileDataset
from ctt.data.pictures import TIFF, broken, open_picture, raw_mode
from ctt.data.pixels import has_open_scale, is_deep
from ctt.data.rasters import Raster, read_bands
from ctt.data.seeding import derive_seed
from ctt.errors import UserError
from ctt.files import atomic_write
from ctt.text import from_yaml

SAMPLE = 8_000_000  # numbers looked at, of all images together; all of them where there are fewer
PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
SIDE = 512  # of the windows in which rasters are read
Ranges = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Statistics:
    """Statistics of the channels of a dataset, in the units of its files.

    Attributes:
        percentiles: (channels, `PERCENTILES`). low, high: smallest and largest value.
        ranges: what becomes 0 and 1. mean, std: after that, in 0..1.
        pixels: looked at.
        images: they are of.
        gaps: pixels without data, which are none of these.
    """

    bands: tuple[int, ...]
    percentiles: np.ndarray[Any, Any]
    low: tuple[float, ...]
    high: tuple[float, ...]
    ranges: tuple[tuple[float, float], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: int
    images: int
    gaps: int


def statistics(
    dataset: Dataset, cut: tuple[float, float], advance: Callable[[], object] = lambda: None
) -> Statistics:
    """Return the statistics of the images that a dataset trains on, labelled or not.

    Pixels without data are left out. Of large sets pixels are drawn at random, the same ones
    every time; rasters are read in windows.

    Args:
        cut: percentiles that become 0 and 1, where the dataset does not say its ranges and its
            numbers have more than 8 bits.
        advance: called after each image.

    Raises:
        UserError: a file that cannot be read, or files of different channels.
    """
    names = [*dataset.train_ids(), *dataset.unlabeled_ids()]
    as_rgb = not isinstance(dataset, FileDataset) or _is_read_as_rgb(dataset, names)
    found: list[np.ndarray[Any, Any]] = []
    low, high, gaps = np.inf, -np.inf, 0
    for name in names:
        rng = np.random.default_rng(derive_seed("statistics", name))
        for values, pixels, missing in _parts(dataset, name, as_rgb):
            gaps += missing
            if found and values.dtype != found[0].dtype and not dataset.info.ranges:
                raise UserError(
                    f"{_path(dataset, name)} holds {values.dtype}, and {_path(dataset, names[0])} "
                    f"{found[0].dtype}, which have no scale in common. Save all images with one "
                    f"type of numbers, or say in dataset.yaml which `range` they have."
                )
            if found and len(values) != len(found[0]):
                both = range(1, min(len(values), len(found[0])) + 1)
                raise UserError(
                    f"{_path(dataset, name)}: the image has {len(values)} channels, and "
                    f"{_path(dataset, names[0])} has {len(found[0])}. Say in dataset.yaml which "
                    f"bands of the files are read, such as `bands: {[*both]}`, or take one of the "
                    f"two out."
                )
            if values.shape[1]:
                low = np.minimum(low, values.min(axis=1))
                high = np.maximum(high, values.max(axis=1))
            share = max(1, SAMPLE // (len(names) * len(values)))  # pixels of an image
            wanted = min(values.shape[1], -(-share * values.shape[1] // pixels))
            if wanted < values.shape[1]:
                values = values[:, rng.choice(values.shape[1], wanted, replace=False)]
            found.append(values)
        advance()
    sample = np.concatenate(found, axis=1)
    if not sample.shape[1]:
        raise UserError("The images have no pixel with data.")
    ends = np.broadcast_to([low, high], (2, len(sample)))
    return _of_sample(dataset, sample, ends, cut, names, gaps)


def _of_sample(
    dataset: Dataset,
    sample: np.ndarray[Any, Any],
    ends: np.ndarray[Any, Any],
    cut: tuple[float, float],
    names: list[str],
    gaps: int,
) -> Statistics:
    info, kind = dataset.info, sample.dtype
    ranges: Ranges = info.ranges
    if not ranges and kind == np.uint8:
        ranges = [(0.0, 255.0)] * len(sample)
    elif not ranges and not info.bands and info.white is not None:
        ranges = [(0.0, info.white)] * len(sample)
    elif not ranges:
        lows, highs = np.percentile(sample, cut, axis=1)
        ranges = [*zip(lows, np.where(highs > lows, highs, lows + 1), strict=True)]
    low, high = (np.array(side)[:, None] for side in zip(*ranges, strict=True))
    unit = ((sample - low) / (high - low)).clip(0, 1)
    return Statistics(
        info.bands or tuple(range(1, len(sample) + 1)),
        np.percentile(sample, PERCENTILES, axis=1).T,
        tuple(ends[0].tolist()),
        tuple(ends[1].tolist()),
        tuple((float(a), float(b)) for a, b in ranges),
        tuple(unit.mean(axis=1).tolist()),
        tuple(s or 1.0 for s in unit.std(axis=1).tolist()),  # 1 where a channel is constant
        sample.shape[1],
        len(names),
        gaps,
    )


def _path(dataset: Dataset, name: str) -> Path | str:
    files = dataset.files(name, labeled=False)
    return files[0] if files else name


class _Kind(NamedTuple):
    """What the head of an image's file says.

    Attributes:
        channels: how many. numbers: their type.
        is_raster: it is a TIFF file without a palette, whose channels may be any.
    """

    channels: int
    numbers: str
    is_raster: bool


def _kind(path: Path) -> _Kind:
    if path.suffix.lower() in TIFF:
        with Raster(path) as raster:
            has_palette = raster.first.colorinterp[0].name == "palette"
            return _Kind(raster.count, raster.first.dtypes[0], not has_palette)
    try:
        with open_picture(path) as file:
            if is_deep(file.mode):
                return _Kind(1, file.mode if has_open_scale(file) else "uint16", False)
            return _Kind(
                len(file.getbands()), "uint16" if "16" in raw_mode(file) else "uint8", False
            )
    except UserError:
        raise
    except Exception as error:  # bytes that are no image can raise anything
        raise broken(path, "an image", error) from None


def _is_read_as_rgb(dataset: FileDataset, names: list[str]) -> bool:
    """Return whether images are looked at as training without `bands` sees them: RGB of 8 bits.

    These are photographs and what is mixed with them, and grey images whose white is known. Others
    are looked at channel by channel, as with `bands`.
    """
    if dataset.info.bands:
        return False
    kinds = {_kind(dataset.image_path(name)) for name in names}
    knows_white = dataset.info.white is not None
    fits = all(
        (kind.channels in (1, 3) or not kind.is_raster)
        if kind.numbers == "uint8"
        else kind.channels == 1 and (kind.numbers == "uint16" or knows_white)
        for kind in kinds
    )
    has_photographs = any(kind.numbers == "uint8" and not kind.is_raster for kind in kinds)
    differ = len({(kind.channels, kind.numbers) for kind in kinds}) > 1
    return fits and (has_photographs or differ or knows_white)


def _parts(
    dataset: Dataset, name: str, as_rgb: bool
) -> Iterator[tuple[np.ndarray[Any, Any], int, int]]:
    """Yield pixels with data (C, n) of an image, a part at a time, how many pixels the image has,
    and how many of the part have no data."""
    if as_rgb or not isinstance(dataset, FileDataset):
        image = dataset.image(name).numpy()
        yield image.reshape(len(image), -1), image[0].size, 0
        return
    path = dataset.image_path(name)
    if path.suffix.lower() not in TIFF:
        values, _ = read_bands(path, dataset.info.bands, turned=dataset.turned)
        yield values.reshape(len(values), -1), values[0].size, 0
        return
    from rasterio.windows import Window

    with Raster(path) as raster:
        for row in range(0, raster.height, SIDE):
            for column in range(0, raster.width, SIDE):
                size = (min(SIDE, raster.width - column), min(SIDE, raster.height - row))
                values, missing = raster.read(dataset.info.bands, Window(column, row, *size))
                pixels = raster.height * raster.width
                yield values[:, ~missing], pixels, int(missing.sum())


def lines(found: Statistics, known: Sequence[str] = ()) -> list[str]:
    """Return what belongs into dataset.yaml, but for the keys that are `known` there.

    Images of three channels of 8 bits are RGB, and need mean and std alone, unless pixels have no
    data, which are ignored in bands only.
    """
    new = adds_bands(found, known)
    values: dict[str, Any] = {}
    if new or "bands" in known:
        values["bands"] = list(found.bands)
        values["range"] = [[_short(low), _short(high)] for low, high in found.ranges]
    values |= {"mean": [*map(_short, found.mean)], "std": [*map(_short, found.std)]}
    text = {key: value for key, value in values.items() if new or key not in known}
    return [_line(key, value) for key, value in text.items()]


def adds_bands(found: Statistics, known: Sequence[str]) -> bool:
    """Return whether `lines` makes a folder of bands of one that was read as RGB until now."""
    plain = len(found.bands) == 3 and all(pair == (0.0, 255.0) for pair in found.ranges)
    return not (plain and not found.gaps) and "bands" not in known


def _short(value: float) -> float | int:
    short = float(f"{value:.7g}")
    return int(short) if short == int(short) and abs(short) > 1 else short


def _line(key: str, value: list[Any]) -> str:
    return yaml.safe_dump({key: value}, default_flow_style=None, width=10**6).strip()


def append(path: Path, text: Sequence[str], outdated: Sequence[str] = ()) -> None:
    """Add lines at the end of a dataset.yaml.

    Args:
        outdated: keys whose lines become comments.

    Raises:
        UserError: the file would not hold them then, such as one in braces, or not be valid;
            nothing is written.
        UnwritableError: there is no room for them.
    """
    before, added = path.read_text("utf-8-sig"), "".join(f"{line}\n" for line in text)
    kept = _commented(before, outdated)
    after = kept + ("" if kept.endswith("\n") or not kept else "\n") + added
    old = {k: v for k, v in from_yaml(before, str(path)).items() if k not in outdated}
    wanted = {**old, **from_yaml(added, str(path))}
    channels_of(wanted, path)
    try:
        fits = from_yaml(after, str(path)) == wanted
    except UserError:
        fits = False
    if not fits:
        instead = f" in place of {', '.join(outdated)}" if outdated else ""
        raise UserError(
            f"{path}: nothing is written, because lines at the end of this file would not be read "
            f"as `name: value` lines. Is it in braces, as JSON is? Put these in by hand{instead}: "
            f"{', '.join(text)}"
        )
    with atomic_write(path) as part:
        part.write_text(after, "utf-8")


def _commented(text: str, keys: Sequence[str]) -> str:
    """Return the text of a dataset.yaml in which the lines of some keys are comments."""
    rows = text.split("\n")
    file = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(file, yaml.MappingNode)  # as the dataset has been opened
    for key, value in file.value:
        if key.value in keys:
            in_rows = isinstance(value, yaml.SequenceNode) and not value.flow_style
            last = value.value[-1] if in_rows else value  # a list in rows ends at the next key
            for row in range(key.start_mark.line, last.end_mark.line + 1):
                rows[row] = f"# {rows[row]}"
    return "\n".join(rows)
