"""What is unusual in image files: allowed, but a reason to look whether it is meant."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ctt.data.pictures import STATS, is_turned, open_picture, pages, raw_mode
from ctt.data.pixels import WORD, is_deep
from ctt.data.rasters import Raster, size_of
from ctt.errors import UserError
from ctt.processes import cpus

LARGE = 50_000_000  # pixels of an image from which on it takes most of the time of a step
PAGED = (".tif", ".tiff", ".webp")  # endings of formats that often have several pages


@dataclass(frozen=True)
class Traits:
    """Remarks on an image that its file gives rise to.

    Attributes:
        turned: viewers turn or mirror it.
        pages: images in the file.
        fourth: it is a TIFF file of more than three channels.
        clear: some pixels are transparent.
        largest: the largest value of a grey image of 16 bits; 0 of other ones.
        deep: it has colours of 16 bits.
        gaps: it is a TIFF file that says that some pixels have no data.
    """

    path: Path
    turned: bool
    pages: int
    fourth: bool
    clear: bool
    largest: float
    deep: bool
    gaps: bool


def traits(paths: Iterable[Path], threads: int = 1, pixels: bool = True) -> list[Traits]:
    """Return the traits of the images that can be opened.

    Args:
        threads: files read at a time; 0: one for each core.
        pixels: also read their pixels, without which `clear`, `largest` and `gaps` stay False or 0.
    """
    with ThreadPoolExecutor(threads or cpus()) as pool:
        found = pool.map(partial(_traits, pixels=pixels), paths)
        return [image for image in found if image is not None]


def _traits(path: Path, pixels: bool) -> Traits | None:
    try:
        with open_picture(path) as file:
            return _traits_of(path, file, pixels)
    except Exception:
        return None  # reading the image reports what is wrong with it


def _traits_of(path: Path, file: Image.Image, pixels: bool) -> Traits:
    alpha = "A" in file.getbands() or "transparency" in file.info
    tiff = file.format == "TIFF"
    count, turned = pages(file), is_turned(file)
    opacity = file.convert("RGBA").getchannel("A") if pixels and alpha and not tiff else None
    clear = opacity is not None and int(np.asarray(opacity).min()) < 255
    deep = pixels and file.mode.startswith("I;16")
    largest = float(np.asarray(file).max()) if deep else 0
    colours = "16" in raw_mode(file) and not is_deep(file.mode)
    gaps = pixels and tiff and _has_gaps(path)
    return Traits(path, turned, count, alpha and tiff, clear, largest, colours, gaps)


def _has_gaps(path: Path) -> bool:
    with contextlib.suppress(UserError, ModuleNotFoundError), Raster(path) as raster:
        return raster.may_lack_data and bool(raster.picture()[1].any())
    return False


def of_pages(images: list[Traits]) -> list[str]:
    """Return a warning if only a part of some files is used."""
    return _remark(
        images,
        lambda image: image.pages > 1,
        "Warning: {} of the {} images looked at are files of several pages, such as {}: only the "
        "first page is used.",
    )


def of_channels(images: list[Traits]) -> list[str]:
    """Return a warning if some images have more than three channels."""
    return _remark(
        images,
        lambda image: image.fourth,
        "Warning: {} of the {} images looked at have a fourth channel, such as {}: only the first "
        "three are used.",
    ) + _remark(
        images,
        lambda image: image.clear,
        "Warning: {} of the {} images looked at have transparent pixels, such as {}: they are "
        "shown on white.",
    )


def of_size(paths: Iterable[Path], threads: int = 1) -> list[str]:
    """Return a warning if some images are so large that reading them takes long.

    Args:
        threads: files opened at a time; 0: one for each core.
    """
    files = list(paths)
    with ThreadPoolExecutor(threads or cpus()) as pool:
        sizes = pool.map(_pixels, files)
        large = [path for path, size in zip(files, sizes, strict=True) if size > LARGE]
    return (
        [
            f"Warning: {len(large)} of the {len(files)} images looked at have more than {LARGE:,} "
            f"pixels, such as {large[0]}. Training reads all of one for each crop of it. "
            f"`ctt-data tiles` cuts a folder into pieces."
        ]
        if large
        else []
    )


def _pixels(path: Path) -> int:
    """Return the size of an image; 0 if it cannot be opened (reading it reports why)."""
    with contextlib.suppress(UserError, ModuleNotFoundError):
        return math.prod(size_of(path, turned=False))
    return 0


def of_depth(images: list[Traits]) -> list[str]:
    """Return a warning if some images have colours of 16 bits."""
    return _remark(
        images,
        lambda image: image.deep,
        "Warning: {} of the {} images looked at have colours of 16 bits, such as {}: only the "
        f"upper 8 bits are used. After `{STATS}` all are.",
    )


def of_gaps(images: list[Traits]) -> list[str]:
    """Return a warning if some images have pixels without data."""
    return _remark(
        images,
        lambda image: image.gaps,
        "Warning: {} of the {} images looked at have pixels without data (the file's nodata value "
        f"or mask says so), such as {{}}: they are learned as they look. After `{STATS}` they are "
        "ignored.",
    )


def of_turning(images: list[Traits]) -> list[str]:
    """Return a sentence if some images are turned, which their masks must be too."""
    return _remark(
        images,
        lambda image: image.turned,
        "{} of the {} images looked at are turned as the camera's note in the file (EXIF) says, "
        "such as {}: their masks must fit what viewers show.",
    )


def of_darkness(images: list[Traits]) -> list[str]:
    """Return a warning if 16-bit images use so few of their values that they are dark."""
    largest = max((image.largest for image in images), default=0)
    if not 0 < largest <= WORD / 8:
        return []
    bits = math.ceil(math.log2(largest + 1))
    return [
        f"Warning: the images of 16 bits hold values up to {largest:.0f} only, of {WORD} that "
        f"stand for white, so that they are nearly black. Say in dataset.yaml which value is "
        f"white, such as `white: {2**bits - 1}`."
    ]


def _remark(images: list[Traits], holds: Callable[[Traits], bool], text: str) -> list[str]:
    such = [image for image in images if holds(image)]
    return [text.format(len(such), len(images), such[0].path)] if such else []
