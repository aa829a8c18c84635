"""Pictures of any kind as 8-bit RGB."""

import numpy as np
from PIL import Image

BYTE, WORD = 2**8 - 1, 2**16 - 1


def is_deep(mode: str) -> bool:
    """Return whether pictures of this mode are grey ones of more than 8 bits."""
    return mode in ("F", "I") or mode.startswith("I;16")


def has_open_scale(picture: Image.Image) -> bool:
    """Return whether a picture is grey and its kind of numbers does not say which one is white.

    Older versions of Pillow open also PNG and PGM files of 16 bits in the mode I.
    """
    return picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM"))


def to_rgb(
    picture: Image.Image, white: float | None = None
) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """Return (H, W, 3): grey is repeated, 16 bits are scaled to 8, transparent pixels are white.

    Args:
        white: the value of white in grey pictures of more than 8 bits, and of all above it; by
            default 65535 where there are 16. Where there are more it is then 1 (of fractions), 255
            or 65535, the first that no value of this picture exceeds.

    The fourth band of a TIFF file is left out: near infrared is often marked as transparency.
    """
    if is_deep(picture.mode):
        grey = np.nan_to_num(np.asarray(picture, dtype=np.float64)).clip(0, white)
        white = white or _white(grey, picture)
        scaled = (grey * (BYTE / white)).round().astype(np.uint8)
        return np.repeat(scaled[:, :, None], 3, axis=2)
    if picture.format == "TIFF" and "A" in picture.getbands():
        return np.array(picture.convert("RGBA"))[:, :, :3]
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return np.array(picture.convert("RGB"))


def _white(grey: np.ndarray[tuple[int, ...], np.dtype[np.float64]], picture: Image.Image) -> float:
    """The value that stands for white: of the steps that formats use, the first that suffices."""
    if not has_open_scale(picture):
        return WORD
    largest = float(grey.max(initial=0))
    steps = (1, BYTE, WORD) if picture.mode == "F" else (BYTE, WORD)
    return float(next((step for step in steps if largest <= step), largest))
