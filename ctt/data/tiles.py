"""Cuts the images and masks of a folder into pieces, of which training reads one for a crop."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageOps

from ctt.data.dataset import IGNORE
from ctt.data.description import DESCRIPTION
from ctt.data.folder import Folder
from ctt.data.masks import read_mask, refuse_lossy_raster
from ctt.data.options import DatasetOptions
from ctt.data.pictures import TIFF, open_picture, raw_mode
from ctt.data.pixels import is_deep
from ctt.data.rasters import Raster, as_read_error
from ctt.errors import UserError
from ctt.files import as_write_error, atomic_write
from ctt.text import from_yaml

OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")  # modes that Pillow writes
Window = tuple[slice, slice]  # rows and columns


@dataclass
class Cut:
    """How many tiles were written.

    Attributes:
        labeled, unlabeled, evaluation: with masks, without, and to evaluate on.
        without_class: of `unlabeled`, tiles of images with masks that show no class there.
        left_out: tiles without data, or to evaluate on and without a class.
    """

    labeled: int = 0
    unlabeled: int = 0
    evaluation: int = 0
    without_class: int = 0
    left_out: int = 0


class _Whole(Folder):
    """A folder of which nothing is held out, for which masks would be read."""

    def _draw(self, share: float) -> tuple[list[str], list[str]]:
        return [], self.train_ids()


class _Picture:
    """An image or mask that Pillow reads whole; its tiles are PNG files."""

    suffix = ".png"

    def __init__(self, picture: Image.Image) -> None:
        self.picture = picture if picture.mode in OF_PNG else picture.convert("RGB")
        self.height, self.width = picture.height, picture.width

    @classmethod
    def of_image(cls, path: Path) -> _Picture:
        with as_read_error(path), open_picture(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()  # a file that is cut off shows here
            return cls(picture)

    @classmethod
    def of_mask(cls, path: Path, by_grey: bool) -> _Picture:
        mask = read_mask(path, turned=True, lossy=by_grey)
        values, palette = mask.values, mask.palette
        if not palette:
            values = mask.shown() if by_grey else values
            is_byte = values.dtype == np.uint8
            return cls(Image.fromarray(values if is_byte else values.astype(np.uint16)))
        picture = Image.fromarray(values.astype(np.uint8), mode="P")
        picture.putpalette([channel for colour in palette for channel in colour])
        return cls(picture)

    def save(self, window: Window, path: Path) -> bool:
        """Write a part; returns whether there is data in it."""
        rows, columns = window
        part = self.picture.crop((columns.start, rows.start, columns.stop, rows.stop))
        # a palette of few colours would be written with too few bits for 255
        options = {"bits": 8} if part.mode == "P" else {}
        with as_write_error(path):
            part.save(path, "PNG", **options)
        return True


class _Raster:
    """A TIFF file that is read in windows; its tiles are GeoTIFFs that lie where they lie in it."""

    suffix = ".tif"

    def __init__(self, raster: Raster, is_mask: bool) -> None:
        self.raster, self.is_mask = raster, is_mask
        self.height, self.width = raster.height, raster.width

    def save(self, window: Window, path: Path) -> bool:
        """Write a part, if there is data in it; returns whether there is."""
        import rasterio
        from rasterio.enums import ColorInterp, MaskFlags
        from rasterio.windows import Window as Part

        raster, first, part = self.raster, self.raster.first, Part.from_slices(*window)
        values, missing = raster.read(window=part)
        if missing.all() and not self.is_mask:  # whose values are classes, also that of nodata
            return False
        kinds = first.colorinterp
        options: dict[str, Any] = {}
        if kinds[:3] == (ColorInterp.red, ColorInterp.green, ColorInterp.blue):
            options = {"photometric": "RGB", "interleave": "pixel"}
            if raster.is_premultiplied:
                options["alpha"] = "PREMULTIPLIED"
        elif raster.is_min_white:
            options = {"photometric": "MINISWHITE"}
        if raster.bits < 8:
            options["nbits"] = raster.bits
        if not first.gcps[0]:
            options |= {"crs": first.crs, "transform": first.window_transform(part)}
        with (
            as_write_error(path),
            warnings.catch_warnings(),
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        ):
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(
                path,
                "w",
                driver="GTiff",
                height=values.shape[1],
                width=values.shape[2],
                count=len(values),
                dtype=values.dtype,
                nodata=first.nodata,
                compress="deflate",
                **options,
            ) as tile:
                of_creation = raster.is_premultiplied or raster.is_min_white
                if len(kinds) == len(values) and not of_creation:
                    tile.colorinterp = kinds
                if kinds[0] == ColorInterp.palette and not raster.is_min_white:
                    tile.write_colormap(1, first.colormap(1))
                tile.write(values)
                if first.mask_flag_enums[0] == [MaskFlags.per_dataset]:
                    tile.write_mask(first.read_masks(1, window=part))
        return True


@contextlib.contextmanager
def _opened(
    path: Path, *, lossy: bool | None = None, one_page: bool = True
) -> Iterator[_Picture | _Raster]:
    """Open an image, or a mask.

    Args:
        lossy: of a mask, whether it may be one whose values have changed; None: it is an image.
        one_page: of a TIFF of several pages the first is all that is read.
    """
    if path.suffix.lower() in TIFF or (lossy is None and _has_deep_colours(path)):
        with Raster(path) as raster:
            if one_page:
                raster.keep_first_page()
            if lossy is False:
                refuse_lossy_raster(raster)
            yield _Raster(raster, lossy is not None)
    else:
        yield _Picture.of_image(path) if lossy is None else _Picture.of_mask(path, lossy)


def _has_deep_colours(path: Path) -> bool:
    """Return whether Pillow would keep only the upper 8 bits of colours of 16."""
    with as_read_error(path), open_picture(path) as file:
        return "16" in raw_mode(file) and not is_deep(file.mode)


def cut(
    root: Path, target: Path, side: int, advance: Callable[[float], object] = lambda share: None
) -> Cut:
    """Write a folder like `root` whose images and masks are pieces of those there.

    Names get the row and column of a piece's first pixel. A piece of an image with a mask that
    shows no class becomes an unlabelled image. dataset.yaml is written last, so what a call that
    was stopped leaves is no dataset.

    Args:
        target: new folder.
        side: most rows and columns of a piece; those of one image are of nearly the same size.
        advance: called with the share of the images that is done since the last call.

    Raises:
        UserError: a file that cannot be read, a mask of another size, or a target with files in it.
    """
    dataset = _Whole(root, DatasetOptions())
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"`to` {target} holds something already. Give a new folder.")
    if target.resolve().is_relative_to(root.resolve()):
        raise UserError(f"`to` {target} lies in {root}, whose images are cut. Give another folder.")
    result = Cut()
    parts = (dataset.train_ids(), dataset.unlabeled_ids(), dataset.eval_ids())
    names = [*itertools.chain(*parts)]
    unlabeled = {*parts[1]}
    for name in names:
        for share in _cut_one(dataset, name, name not in unlabeled, target, side, result):
            advance(share / len(names))
    with atomic_write(target / DESCRIPTION) as part:
        part.write_text(_description(dataset), "utf-8")
    return result


def _cut_one(
    dataset: Folder, name: str, is_labeled: bool, target: Path, side: int, result: Cut
) -> Iterator[float]:
    """Write the tiles of an image; yields the share of it that each is."""
    with contextlib.ExitStack() as stack:
        one_page = not dataset.info.bands
        image = stack.enter_context(_opened(dataset.image_path(name), one_page=one_page))
        mask = None
        if is_labeled:
            path = dataset.mask_path(name)
            mask = stack.enter_context(_opened(path, lossy=dataset.lossy))
            if (mask.height, mask.width) != (image.height, image.width):
                raise UserError(
                    f"{path}: the mask has {mask.width}x{mask.height} pixels, but its image has "
                    f"{image.width}x{image.height}. Both must be of one size."
                )
        for window in windows(image.height, image.width, side):
            _cut_tile(dataset, name, image, mask, window, target, result)
            rows, columns = (part.stop - part.start for part in window)
            yield rows * columns / (image.height * image.width)


def _cut_tile(
    dataset: Folder,
    name: str,
    image: _Picture | _Raster,
    mask: _Picture | _Raster | None,
    window: Window,
    target: Path,
    result: Cut,
) -> None:
    said, path = dataset.description, PurePosixPath(name)
    stem = f"{path.stem.removesuffix(said.image_suffix)}_{window[0].start}_{window[1].start}"
    place = path.with_name(f"{stem}{said.image_suffix}{image.suffix}")
    file = _with_folder(target / place)
    if not image.save(window, file):
        result.left_out += 1
    elif mask is None:
        result.unlabeled += 1
    elif _save_mask(dataset, mask, window, target / masks_of(path), stem):
        result.evaluation += name.startswith("val/")
        result.labeled += not name.startswith("val/")
    elif name.startswith("val/"):
        file.unlink()
        result.left_out += 1
    else:  # below a folder of its own, for the unlabelled images may have the same names
        file.rename(_with_folder(target / "unlabeled" / place))
        result.unlabeled += 1
        result.without_class += 1


def _save_mask(
    dataset: Folder, mask: _Picture | _Raster, window: Window, folder: Path, stem: str
) -> bool:
    """Write a part of a mask, if it shows a class; returns whether it does."""
    file = _with_folder(folder / f"{stem}{dataset.description.mask_suffix}{mask.suffix}")
    mask.save(window, file)
    label = dataset.label_map(file)(read_mask(file, lossy=dataset.lossy), file)
    shows_class = bool((label != IGNORE).any())
    if not shows_class:
        file.unlink()
    return shows_class


def masks_of(image: PurePosixPath) -> PurePosixPath:
    """Return the folder of the mask of an image."""
    return PurePosixPath(str(image.parent).replace("images", "masks", 1))


def _with_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def windows(height: int, width: int, side: int) -> Iterator[Window]:
    """Yield the rows and columns of pieces of nearly one size that cover an image."""
    ends = [
        [round(i * length / math.ceil(length / side)) for i in range(math.ceil(length / side) + 1)]
        for length in (height, width)
    ]
    for rows, columns in itertools.product(*map(itertools.pairwise, ends)):
        yield slice(*rows), slice(*columns)


def _description(dataset: Folder) -> str:
    """Return the text of dataset.yaml, without a list of pairs, for masks get the images' names."""
    path = dataset.root / DESCRIPTION
    text = path.read_text("utf-8-sig")
    if not dataset.description.pairs:
        return text
    values = from_yaml(text, str(path))
    del values["pairs"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
