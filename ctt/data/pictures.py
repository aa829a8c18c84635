"""Images in files: how they are read, and what is said of one that is broken."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from ctt.data.pixels import has_open_scale, is_deep, to_rgb
from ctt.errors import UserError

# of an image, unless CTT_MAX_PIXELS says otherwise; reading one takes some 5 GB
MOST_PIXELS = 500_000_000
MOST_PIXELS_VARIABLE = "CTT_MAX_PIXELS"
TIFF = (".tif", ".tiff")
REDUCED, MASK = 1, 4  # bits of a TIFF page that is a small copy of another one, or its mask
SUBFILE_TYPE = 254  # its tag
ORIENTATION = 0x0112
EXTRA_SAMPLES, PREMULTIPLIED = 338, 1  # a tag about the fourth channel, and its value
TURNED, ON_ITS_SIDE = range(2, 9), range(5, 9)  # its values that are not upright
BIG_TIFF, BIG_ENDIAN_BIG_TIFF, PNG = b"II+\0", b"MM\0+", b"\x89PNG"
STATS = "ctt-data stats --data-root FOLDER --write"


class _NoLimit:
    """While it is entered, by any thread, Pillow opens images of any size.

    Its own limit is one of the whole process, and far below what microscopes and satellites give.
    """

    def __init__(self) -> None:
        self.lock, self.depth = threading.Lock(), 0
        self.limit: int | None = None

    def __enter__(self) -> None:
        with self.lock:
            if self.depth == 0:
                self.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.depth += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                Image.MAX_IMAGE_PIXELS = self.limit


_no_limit = _NoLimit()


def most_pixels() -> int:
    """Return how many pixels an image may have.

    Raises:
        UserError: the environment variable that says so holds no number.
    """
    text = os.environ.get(MOST_PIXELS_VARIABLE, "")
    try:
        return int(float(text)) if text else MOST_PIXELS
    except (ValueError, OverflowError):
        raise UserError(
            f"{MOST_PIXELS_VARIABLE}={text}: this must be a number of pixels, such as "
            f"{MOST_PIXELS}."
        ) from None


@contextlib.contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open an image whose pixels are not read yet.

    Raises:
        UserError: it has more pixels than `most_pixels`.
    """
    # also while it is open: Pillow checks the size of a TIFF again before it reads the pixels
    with _no_limit, Image.open(path) as file:
        width, height = file.size
        if width * height > most_pixels():
            raise too_large(path, width, height)
        yield file


def too_large(path: Path, width: int, height: int) -> UserError:
    """Return the message about an image of more pixels than `most_pixels`."""
    return UserError(
        f"{path}: the image has {width}x{height} pixels, and {most_pixels():,} are read at most, "
        f"so that a small file cannot fill the memory. If it is as large as that, set the "
        f"environment variable {MOST_PIXELS_VARIABLE}={width * height}; "
        f"`ctt-data tiles` cuts a TIFF file into pieces without it."
    )


def read_image(
    path: Path, white: float | None = None, *, turned: bool = True, same_scale: bool = False
) -> Tensor:
    """Return the image in a file as RGB: (3, H, W) uint8.

    Args:
        white: the value of white in images of more than 8 bits, see `to_rgb`.
        turned: as the camera's note in the file (EXIF) says, and as viewers do.
        same_scale: refuse images whose scale would depend on the values of each one.

    Raises:
        UserError: there is no such file, or it is no image, a broken or a too large one.
    """
    try:
        with open_picture(path) as file:
            if white is not None and "16" in raw_mode(file) and not is_deep(file.mode):
                raise white_of_colours(path)
            if same_scale and white is None and has_open_scale(file):
                kind = "fractions" if file.mode == "F" else "numbers of 32 bits"
                raise UserError(
                    f"{path}: this grey image holds {kind}, and nothing says which value is white, "
                    f"so that each image would get a scale of its own. Write it into dataset.yaml, "
                    f"such as `white: {1 if file.mode == 'F' else 65535}`, or let `{STATS}` find "
                    f"the range."
                )
            if file.mode == "F" and not np.isfinite(np.asarray(file)).all():
                raise UserError(
                    f"{path}: the image has pixels that are no number (NaN, infinite). To have "
                    f"them ignored, take `white` out of dataset.yaml, if it is there, and run "
                    f"`{STATS}`."
                )
            picture = ImageOps.exif_transpose(file) if turned else file
            picture.format = file.format  # which a turned copy lacks
            pixels = to_rgb(picture, white)
    except UserError:
        raise
    except UnidentifiedImageError:
        hint = (
            f" If it is a TIFF of other channels than red, green and blue, or of more than 8 bits, "
            f"describe them in dataset.yaml: `{STATS}`."
        )
        error = broken(path, "an image", ValueError("its format is unknown"))
        raise UserError(f"{error}{hint if path.suffix.lower() in TIFF else ''}") from None
    except Exception as error:  # bytes that are no image can raise anything
        raise broken(path, "an image", error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def white_of_colours(path: Path) -> UserError:
    """Return the message about an image of 16-bit colours where dataset.yaml says `white`."""
    return UserError(
        f"{path}: `white` is for grey images, but this one has colours of 16 bits, of which only "
        f"the upper 8 can be read. Save it again with 8 bits a colour."
    )


def raw_mode(file: Image.Image) -> str:
    """Return how the pixels lie in the file, such as `RGB;16B`; empty where Pillow does not say."""
    arguments = file.tile[0][3] if isinstance(file, ImageFile.ImageFile) and file.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def is_turned(file: Image.Image) -> bool:
    """Return whether a camera's note in the file (EXIF) says that viewers turn or mirror it."""
    return file.getexif().get(ORIENTATION, 1) in TURNED


def orientation(path: Path) -> int:
    """Return how viewers turn a TIFF or PNG file, 1: not at all; its pixels are not read.

    Also of TIFFs whose channels Pillow does not know. Of big-endian BigTIFFs, whose tags it does
    not read, 1.
    """
    with path.open("rb") as stream:
        is_png = stream.read(len(PNG)) == PNG
    if not is_png:
        return int(tiff_tags(path).get(ORIENTATION, 1))
    with _no_limit, Image.open(path) as file:
        note = Image.Exif()
        note.load(file.info.get("exif", b""))
        return int(note.get(ORIENTATION, 1))


def tiff_tags(path: Path) -> Mapping[int, Any]:
    """Return the tags of a TIFF's first page; of big-endian BigTIFFs, which Pillow cannot read,
    none."""
    with path.open("rb") as stream:
        head = stream.read(8)
        if head.startswith(BIG_ENDIAN_BIG_TIFF):
            return {}
        if head.startswith(BIG_TIFF):
            head += stream.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        stream.seek(tags.next)
        tags.load(stream)
        return tags


def pages(file: Image.Image) -> int:
    """Return how many images the file holds, without small copies and masks of them."""
    if file.format == "MPO":  # whose other frames are previews and depths
        return 1
    if not isinstance(file, TiffImagePlugin.TiffImageFile):
        return int(getattr(file, "n_frames", 1))
    own = 0
    for page in itertools.count():
        try:
            file.seek(page)
        except EOFError:
            break
        except SyntaxError:  # of pixels that Pillow does not know, as in a mask; the tags are read
            pass
        own += not file.tag_v2.get(SUBFILE_TYPE, 0) & (REDUCED | MASK)
    file.seek(0)
    return max(own, 1)


def broken(path: Path, what: str, error: Exception) -> UserError:
    """Return the message about a file that cannot be read as `what`."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: there is no such file.")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(
        f"{path} cannot be read as {what} ({reason}). Replace the file by a whole one, or leave "
        f"it out."
    )
