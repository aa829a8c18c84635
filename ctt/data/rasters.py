"""Images of any number of channels, of 8 or 16 bits or of fractions, whole or in windows."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH
from torch import Tensor

from ctt.data.dataset import DatasetInfo
from ctt.data.pictures import (
    EXTRA_SAMPLES,
    ON_ITS_SIDE,
    ORIENTATION,
    PREMULTIPLIED,
    STATS,
    TIFF,
    TURNED,
    broken,
    most_pixels,
    open_picture,
    orientation,
    raw_mode,
    read_image,
    tiff_tags,
    too_large,
)
from ctt.data.pixels import BYTE, is_deep
from ctt.errors import UserError

if TYPE_CHECKING:
    from rasterio.io import DatasetReader
    from rasterio.windows import Window

FORMATS = (*TIFF, ".png")  # of `Raster`
CACHE = 64  # megabytes of blocks that GDAL keeps; its own choice is a share of the memory
LAYOUT = "IMAGE_STRUCTURE"  # GDAL's tags about how the pixels lie in the file
LOSSLESS = (  # GDAL's names of compressions of TIFF files that keep the values, "": none; also LERC
    *("", "PACKBITS", "LZW", "DEFLATE", "LZMA", "ZSTD"),
    *("CCITTRLE", "CCITTRLEW", "CCITTFAX3", "CCITTFAX4"),
)
Values = np.ndarray[tuple[int, int, int], np.dtype[Any]]


def read_as(
    path: Path, info: DatasetInfo, *, turned: bool = True, same_scale: bool = False
) -> Tensor:
    """Return the image in a file as networks for the dataset `info` take it.

    Args:
        turned: as the camera's note in the file (EXIF) says.
        same_scale: refuse grey images whose scale would depend on the values of each one.

    Returns:
        (3, H, W) uint8; where `info` names bands (C, H, W) float32 in 0..1, the `info.ranges`, and
        NaN where the image has no data.

    Raises:
        UserError: a file that cannot be read, or without these channels.
    """
    if not info.bands:
        return read_image(path, info.white, turned=turned, same_scale=same_scale)
    return scaled(*read_bands(path, info.bands, turned=turned), info, path)


def scaled(
    values: Values, missing: np.ndarray[Any, Any], info: DatasetInfo, path: object
) -> Tensor:
    """Return channels (C, H, W) of any type as float32 in 0..1 by the dataset's ranges.

    Args:
        missing: (H, W) where there is no data.
        path: of the file or its name, for the message.

    Raises:
        UserError: the dataset has no ranges and the type of numbers none of its own.
    """
    ranges = info.ranges
    if not ranges:
        if values.dtype.kind != "u":
            raise UserError(
                f"{path}: the image holds {values.dtype}, numbers without a range of their own. "
                f"Say in dataset.yaml which `range` they have; `{STATS}` finds it."
            )
        ranges = ((0.0, float(np.iinfo(values.dtype).max)),) * len(values)
    low, high = (np.array(ends, np.float32)[:, None, None] for ends in zip(*ranges, strict=True))
    unit = ((values.astype(np.float32) - low) / (high - low)).clip(0, 1)
    unit[:, missing] = np.nan
    return torch.from_numpy(unit)


def read_bands(
    path: Path, bands: Sequence[int] = (), *, turned: bool = True
) -> tuple[Values, np.ndarray[Any, Any]]:
    """Return channels (C, H, W) of an image as they are in its file, and where (H, W) no data is.

    Args:
        bands: numbers of the channels from 1; without any all of the file.

    Raises:
        UserError: a file that cannot be read, or without these channels.
    """
    if path.suffix.lower() not in TIFF:
        with as_read_error(path), open_picture(path) as file:
            # Pillow keeps only the upper 8 bits of colours of 16
            if "16" not in raw_mode(file) or is_deep(file.mode):
                values = _channels(ImageOps.exif_transpose(file) if turned else file)
                chosen = values[[band - 1 for band in _existing(bands, len(values), path)]]
                return chosen, np.zeros(chosen.shape[1:], bool)
    with Raster(path) as raster:
        raster.refuse_too_large()
        return raster.read(bands)


def size_of(path: Path, *, turned: bool) -> tuple[int, int]:
    """Return height and width of an image, whose pixels need not be read.

    Args:
        turned: as the camera's note in the file (EXIF) says.

    Raises:
        UserError: a file that cannot be opened.
    """
    with as_read_error(path):
        try:
            with open_picture(path) as file:
                if not turned:
                    return file.height, file.width
                stored, turn = stored_size(file)
                return stored[::-1] if turn in ON_ITS_SIDE else stored
        except Exception:
            if path.suffix.lower() not in TIFF:
                raise
        # a TIFF of channels that Pillow does not know
        with Raster(path) as raster:
            return raster.height, raster.width


def stored_size(file: Image.Image) -> tuple[tuple[int, int], int]:
    """Return height and width of the pixels in an open file, and how viewers turn them (EXIF)."""
    turn = file.getexif().get(ORIENTATION, 1)
    size = (file.height, file.width)
    if isinstance(file, TiffImagePlugin.TiffImageFile):  # of which Pillow gives the turned size
        size = (file.tag_v2[IMAGELENGTH], file.tag_v2[IMAGEWIDTH])
    return size, turn if turn in TURNED else 1


def _channels(picture: Image.Image) -> Values:
    if picture.mode in ("P", "PA", "1"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    values = np.array(picture)
    return values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0)


def _existing(bands: Sequence[int], count: int, path: Path) -> Sequence[int]:
    if bands and max(bands) > count:
        raise UserError(
            f"{path}: the image has {count} channel{'s' * (count > 1)}, and dataset.yaml asks for "
            f"channel {max(bands)} (bands)."
        )
    return bands or range(1, count + 1)


@contextlib.contextmanager
def as_read_error(path: Path) -> Iterator[None]:
    """Turn any error of a library that reads a broken file into a UserError."""
    try:
        yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # bytes that are no image can raise anything
        raise broken(path, "an image", error) from None


class Raster:
    """A file that is open, and read in windows; needs the extra `geo`.

    Args:
        path: a TIFF or PNG file. The pages of a TIFF of one channel each are its channels.

    Attributes:
        first: of rasterio, with coordinates, types and blocks.
        height, width, count: of pixels and of channels.

    Raises:
        UserError: no such file, a broken one, another format, one that viewers turn, or several
            pages that are no channels.
    """

    def __init__(self, path: Path) -> None:
        import rasterio

        self.path, self._stack = path, contextlib.ExitStack()
        with as_read_error(path), self._stack, warnings.catch_warnings():
            if not path.is_file():
                raise FileNotFoundError(path)
            if path.suffix.lower() not in FORMATS:
                raise UserError(
                    f"{path}: as a raster only TIFF and PNG files are read ({', '.join(FORMATS)}). "
                    f"Save it as one of these; ctt-predict takes other formats without --geotiff."
                )
            # of files without coordinates, which are images too
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            self._stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
            first = self._open(path)
            pages = first.subdatasets
            if (turn := orientation(path)) in TURNED:  # which GDAL does not look at
                raise UserError(
                    f"{path}: a tag in the file says that viewers turn or mirror it (orientation "
                    f"{turn}), but rasters are read as they are stored. If it is right as it is "
                    f"stored, as files with coordinates are, remove the tag (`exiftool "
                    f"-Orientation= FILE`); else write it again upright (`magick FILE -auto-orient "
                    f"NEW`)."
                )
            self.files: list[DatasetReader] = [self._open(p) for p in pages] or [first]
            self.first = self.files[0]
            self._stack = self._stack.pop_all()
        self.height, self.width = self.first.height, self.first.width
        self.count = self.first.count if len(self.files) == 1 else len(self.files)
        if len(self.files) > 1 and {(1, *self.first.shape)} != {
            (file.count, *file.shape) for file in self.files
        }:
            self.close()
            raise UserError(
                f"{path}: the file holds {len(pages)} pages, which are not one channel of one "
                f"image each. Save each page as a file of its own."
            )

    def _open(self, path: Path | str) -> DatasetReader:
        import rasterio

        # GDAL knows other formats, in which a small file may name any other one
        driver = "GTiff" if self.path.suffix.lower() in TIFF else "PNG"
        reader: DatasetReader = rasterio.open(path, driver=driver)
        return self._stack.enter_context(reader)

    def __enter__(self) -> Raster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def keep_first_page(self) -> None:
        """Leave out the other pages of a TIFF, as Pillow does."""
        self.files, self.count = [self.first], self.first.count

    @property
    def may_lack_data(self) -> bool:
        """Return whether a nodata value or a mask of the file may say that pixels have no data."""
        from rasterio.enums import MaskFlags

        kinds = self.first.mask_flag_enums[0]
        return MaskFlags.nodata in kinds or kinds == [MaskFlags.per_dataset]

    def refuse_too_large(self) -> None:
        """Refuse a file that has too many pixels to be read whole.

        Raises:
            UserError: it has more than `most_pixels`.
        """
        if self.height * self.width > most_pixels():
            raise too_large(self.path, self.width, self.height)

    @property
    def compression(self) -> str:
        """Return GDAL's name of the compression; empty: none."""
        return str(self.first.tags(ns=LAYOUT).get("COMPRESSION", ""))

    @property
    def is_lossy(self) -> bool:
        """Return whether the compression of a TIFF file may change its values."""
        if self.compression.startswith("LERC"):
            return float(self.first.tags(ns=LAYOUT).get("MAX_Z_ERROR", 0)) > 0
        return self.compression not in LOSSLESS

    @property
    def is_png(self) -> bool:
        """Return whether it is a PNG file, else a TIFF."""
        return self.path.suffix.lower() not in TIFF

    @property
    def bits(self) -> int:
        """Return how many bits the numbers in the file have, such as 1 or 12."""
        held = np.dtype(self.first.dtypes[0]).itemsize * 8
        return int(self.first.tags(1, ns=LAYOUT).get("NBITS", held))

    @property
    def is_min_white(self) -> bool:
        """Return whether a grey TIFF file of 8 bits or fewer says that its lowest value is white.

        As Pillow does, this leaves out 16 bits; of one bit GDAL makes a palette.
        """
        says_so = self.first.tags(ns=LAYOUT).get("MINISWHITE") == "YES"
        return bool(says_so and self.first.dtypes[0] == "uint8")

    @functools.cached_property
    def is_premultiplied(self) -> bool:
        """Return whether the colours of a TIFF are multiplied by their opacity."""
        kinds = () if self.is_png else tiff_tags(self.path).get(EXTRA_SAMPLES, ())
        return self.first.count > 3 and kinds[:1] == (PREMULTIPLIED,)

    @property
    def has_coordinates(self) -> bool:
        """Return whether the file says where on Earth it is."""
        first = self.first
        return bool(
            first.crs is not None or not first.transform.is_identity or first.gcps[0] or first.rpcs
        )

    def read(
        self, bands: Sequence[int] = (), window: Window | None = None
    ) -> tuple[Values, np.ndarray[Any, Any]]:
        """Return channels (C, h, w) and where (h, w) there is no data, as `read_bands` does.

        There is none where a value is NaN or infinite, all channels hold the file's nodata value,
        or the file's own mask says so. (A channel that is marked as transparency is data here: near
        infrared often is.)
        """
        if self.is_png and (self.first.dtypes[0] == "uint8" or self.count == 1):
            picture, missing = self.picture(window)
            values = _channels(picture)
            return values[[b - 1 for b in _existing(bands, len(values), self.path)]], missing
        bands = _existing(bands, self.count, self.path)
        if self.first.dtypes[0].startswith("complex"):
            raise UserError(
                f"{self.path}: the raster holds complex numbers, of which only the real part would "
                f"be seen. Save amplitude and phase as channels of their own."
            )
        with as_read_error(self.path):
            if len(self.files) == 1:
                values = self.first.read(list(bands), window=window)
            else:
                values = np.stack([self.files[b - 1].read(1, window=window) for b in bands])
            return values, self._missing(values, window)

    def picture(self, window: Window | None = None) -> tuple[Image.Image, np.ndarray[Any, Any]]:
        """Return a part of the first page, of 8 or 16 bits, as Pillow opens the whole of it, and
        where (h, w) there is no data, as `read` does; transparency of PNG files is in the picture.

        Raises:
            UserError: the colours are stored in a way that only reading the whole file makes RGB.
        """
        first, kinds = self.first, [kind.name for kind in self.first.colorinterp]
        if first.tags(ns=LAYOUT).get("SOURCE_COLOR_SPACE") == "CIELAB":
            raise UserError(
                f"{self.path}: its colours are of the space CIELAB, which are not read in windows. "
                f"Save the image as RGB, or predict it without --geotiff."
            )
        with as_read_error(self.path):
            values = first.read([*range(1, min(first.count, 4) + 1)], window=window)
            missing = np.zeros(values.shape[1:], bool)
            if not self.is_png:
                missing = self._missing(values[: 3 if len(values) >= 3 else 1], window)
        if kinds[0] == "palette":
            picture = self._of_palette(values[0])
        else:
            picture = self._of_channels(values, kinds)
        picture.format = "PNG" if self.is_png else "TIFF"
        return picture, missing

    def _of_palette(self, values: np.ndarray[Any, Any]) -> Image.Image:
        picture = Image.fromarray(values, mode="P")
        colours = [colour for _, colour in sorted(self.first.colormap(1).items())]
        picture.putpalette([channel for colour in colours for channel in colour[:3]])
        if self.is_png and any(colour[3] < BYTE for colour in colours):
            picture.info["transparency"] = bytes(colour[3] for colour in colours)
        return picture

    def _of_channels(self, values: Values, kinds: Sequence[str]) -> Image.Image:
        first, count = self.first, 3 if len(values) >= 3 else 1
        if values.dtype == np.uint16 and len(values) == 1:
            return Image.fromarray(values[0])
        values = (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
        if self.bits < 8:
            values = (values.astype(np.uint16) * BYTE // (2**self.bits - 1)).astype(np.uint8)
        if self.is_min_white:
            values = BYTE - values
        mode = "RGB" if count == 3 else "L"
        if kinds[count : count + 1] == ["alpha"] and (self.is_png or self.is_premultiplied):
            mode += "A"
        picture = Image.merge(mode, [Image.fromarray(channel) for channel in values[: len(mode)]])
        if self.is_png and first.nodata is not None:
            clear = tuple(map(int, first.nodatavals))
            picture.info["transparency"] = clear if count == 3 else clear[0]
        if mode == "RGBA" and self.is_premultiplied:
            return Image.frombytes("RGBA", picture.size, picture.tobytes(), "raw", "RGBa")
        return picture

    def _missing(self, values: Values, window: Window | None) -> np.ndarray[Any, Any]:
        from rasterio.enums import MaskFlags

        missing: np.ndarray[Any, Any] = np.zeros(values.shape[1:], bool)
        if values.dtype.kind == "f":
            missing |= ~np.isfinite(values).all(axis=0)
        if (nodata := self.first.nodata) is not None:
            missing |= (values == nodata).all(axis=0)
        if self.first.mask_flag_enums[0] == [MaskFlags.per_dataset]:
            missing |= self.first.read_masks(1, window=window) == 0
        return missing
