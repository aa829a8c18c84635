"""Pictures of any kind as 8-bit RGB."""

import numpy as np
from PIL import Image

BYTE, WORD = 2**8 - 1, 2**16 - 1


def to_rgb(picture: Image.Image) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """(H, W, 3). Grey is repeated, 16 bits are scaled to 8, and what is transparent is white.

    The fourth band of a TIFF file is left out: near infrared is often marked as transparency.
    """
    if picture.mode in ("F", "I") or picture.mode.startswith("I;16"):
        grey = np.nan_to_num(np.asarray(picture, dtype=np.float64)).clip(min=0)
        scaled = (grey * (BYTE / _white(grey, picture.mode))).round().astype(np.uint8)
        return np.repeat(scaled[:, :, None], 3, axis=2)
    if picture.format == "TIFF" and "A" in picture.getbands():
        return np.array(picture.convert("RGBA"))[:, :, :3]
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return np.array(picture.convert("RGB"))


def _white(grey: np.ndarray[tuple[int, ...], np.dtype[np.float64]], mode: str) -> float:
    """The value that stands for white: of the steps that formats use, the first that suffices."""
    if mode.startswith("I;16"):
        return WORD
    largest = float(grey.max(initial=0))
    steps = (1, BYTE, WORD) if mode == "F" else (BYTE, WORD)
    return float(next((step for step in steps if largest <= step), largest))
