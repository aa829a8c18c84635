"""Masks in files: the numbers or colours that they hold, and why a file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ctt.data.pictures import TIFF, broken, open_picture, pages, raw_mode
from ctt.data.pixels import BYTE, is_deep
from ctt.data.rasters import Raster
from ctt.errors import UserError

NUMBERS = ("1", "L", "P", "I", "F")  # modes with one number a pixel, beside I;16 and its kin
WITH_ALPHA = {"LA": "L", "PA": "P", "RGBA": "RGB"}
LOSSLESS = ("PNG", "TIFF", "BMP", "DIB", "GIF")  # formats that keep the values of a mask,
# and Pillow's names of the compressions of TIFF files that do
LOSSLESS_TIFF = (
    *("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "lzma", "zstd"),
    *("tiff_ccitt", "group3", "group4", "tiff_thunderscan", "tiff_raw_16"),
)
# of a palette that has no colour for a number: further from any colour than a byte is wide
NO_COLOUR = -256
Array = np.ndarray[tuple[int, ...], np.dtype[np.integer]]
Colour = tuple[int, int, int]


class Mask(NamedTuple):
    """What a mask's file holds.

    Attributes:
        values: (H, W) numbers, of a palette PNG the indices; or (H, W, 3) colours.
        palette: of a palette PNG, the colours of the indices.
        step: by how much viewers show a number as brighter than the one before it: 255, 85 or 17
            where the file has 1, 2 or 4 bits.
    """

    values: Array
    palette: tuple[Colour, ...] = ()
    step: int = 1

    def shown(self) -> Array:
        """Return what viewers show: greys (H, W), or colours (H, W, 3), `NO_COLOUR` where the
        palette has none."""
        if not self.palette:
            return self.values * self.step
        colours = np.full((BYTE + 1, 3), NO_COLOUR, np.int16)
        colours[: len(self.palette)] = self.palette
        return colours[self.values]


def read_mask(path: Path, *, turned: bool = False, lossy: bool = False) -> Mask:
    """Read the numbers or colours of a mask as they are stored.

    Args:
        turned: as the camera's note in the file (EXIF) says, as `read_image` does.
        lossy: also take formats that change values, such as JPEG.

    Raises:
        UserError: there is no such file, or it is no image, a broken one, or one from which the
            drawn values cannot be recovered.
    """
    try:
        with open_picture(path) as file:
            raw = raw_mode(file)
            _refuse_altered(path, file, raw, lossy)
            bits = 1 if file.mode == "1" else int(raw[2]) if raw.startswith(("L;2", "L;4")) else 8
            return _of_picture(path, ImageOps.exif_transpose(file) if turned else file, bits)
    except UserError:
        raise
    except Exception as error:  # bytes that are no image can raise anything
        if isinstance(error, UnidentifiedImageError) and path.suffix.lower() in TIFF:
            return _of_raster(path, lossy)
        raise broken(path, "a mask", error) from None


def _of_picture(path: Path, picture: Image.Image, bits: int) -> Mask:
    """Return the mask in a picture; Pillow spreads greys of 2 and 4 bits over 0..255."""
    if picture.mode in WITH_ALPHA:
        picture = _without_alpha(path, picture)
    values, step = np.array(picture), BYTE // (2**bits - 1)
    palette = _colours_of(picture) if picture.mode == "P" else ()
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    elif step > 1:
        values //= step
    return Mask(_whole(path, values), palette, step)


def _of_raster(path: Path, lossy: bool) -> Mask:
    """Return the mask in a TIFF that Pillow does not know: of 64 bits, or a big-endian BigTIFF."""
    try:
        with Raster(path) as raster:
            if not lossy:
                refuse_lossy_raster(raster)
            raster.refuse_too_large()
            if raster.first.dtypes[0] in ("uint8", "uint16"):
                return _of_picture(path, raster.picture()[0], raster.bits)
            kind = raster.first.dtypes[0]
            if raster.count > 1 or not kind.startswith(("int", "uint", "float")):
                raise UserError(
                    f"{path}: the mask holds {raster.count} x {kind} for each pixel, but one whole "
                    f"number is expected, the class. Write it again with the classes as values."
                )
            values, _ = raster.read()
    except ModuleNotFoundError as error:
        raise broken(path, "a mask", ValueError(f"TIFFs of this kind need {error.name}")) from None
    return Mask(_whole(path, values[0]))


def refuse_lossy_raster(raster: Raster) -> None:
    """Refuse a mask in a TIFF file whose compression changes its values.

    Raises:
        UserError: names the compression.
    """
    if raster.is_lossy:
        raise _changed(raster.path, f"TIFF with {raster.compression} compression")


def _changed(path: Path, kind: str) -> UserError:
    return UserError(
        f"{path}: the mask is stored as {kind}, which changes the values at the edges of objects, "
        f"or may have done so. Save masks as PNG, from what they were drawn in. If you only have "
        f"such files: for two classes, write `threshold: 128` into dataset.yaml; masks in colours "
        f"are converted by `ctt-data convert --form masks --tolerance 20`."
    )


def _refuse_altered(path: Path, file: Image.Image, raw: str, lossy: bool) -> None:
    """Refuse files that do not hold, or do not give, one number or colour for each pixel."""
    if not lossy and file.format not in LOSSLESS:
        raise _changed(path, str(file.format))
    compression = file.info.get("compression") if file.format == "TIFF" else "raw"
    if not lossy and compression not in LOSSLESS_TIFF:
        raise _changed(path, f"TIFF with {compression} compression")
    if "16" in raw and not is_deep(file.mode):
        raise UserError(
            f"{path}: the mask has colours of 16 bits, of which only the upper 8 can be read. "
            f"Write it again as a grey PNG of class numbers, or with 8 bits a colour."
        )
    if (count := pages(file)) > 1:
        raise UserError(
            f"{path}: the mask's file holds {count} pages, but one number for each pixel is "
            f"expected, the class. Write the classes of all pages into one."
        )
    known = file.mode in (*NUMBERS, *WITH_ALPHA, "RGB") or file.mode.startswith("I;16")
    if not known:
        raise UserError(
            f"{path}: the mask is an image of colours (mode {file.mode}), but one number for each "
            f"pixel is expected, the class: a PNG with a palette (mode P) or a grey one (mode L). "
            f"Write it again with the classes as values."
        )


def _without_alpha(path: Path, picture: Image.Image) -> Image.Image:
    """Return a mask without transparency; transparent black, as drawing tools leave it, is black.

    Raises:
        UserError: other pixels are transparent, wholly or partly.
    """
    alpha = np.asarray(picture.getchannel("A"))
    opaque = picture.convert(WITH_ALPHA[picture.mode])
    clear = (alpha == 0) & (np.asarray(opaque).reshape(*alpha.shape, -1) == 0).all(-1)
    other = int(((alpha < 255) & ~clear).sum())
    if other:
        raise UserError(
            f"{path}: the mask has {other:,} transparent pixels (mode {picture.mode}), of which it "
            f"is unclear whether they count. Save it without transparency."
        )
    return opaque


def _colours_of(picture: Image.Image) -> tuple[Colour, ...]:
    channels = picture.getpalette() or []
    return tuple(zip(channels[::3], channels[1::3], channels[2::3], strict=True))


def _whole(path: Path, values: np.ndarray[tuple[int, ...], np.dtype[Any]]) -> Array:
    """Return the whole numbers that a file may hold as fractions, as geographic programs do."""
    if values.dtype.kind != "f":
        return values
    numbers = values.astype(np.int64) if np.isfinite(values).all() else None
    if numbers is None or (numbers != values).any():
        raise UserError(
            f"{path}: the mask holds fractions, but one whole number for each pixel is expected, "
            f"the class. Write it again with the classes as values."
        )
    return numbers
