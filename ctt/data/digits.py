"""The embedded dataset: real handwritten digits on real photographs, made in memory from a seed.

Digits are scikit-learn's `load_digits` (1,797 scans of 8x8 pixels, from the UCI repository), the
backgrounds are crops of the two photographs of `load_sample_images`. The task has the traits of the
real ones in small: a dominant background, objects of several sizes at any place, touching and
covering each other, and a texture that can be mistaken for an object. Digits of training and
evaluation images come from disjoint scans.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.dataset import Dataset, DatasetInfo
from ctt.data.seeding import generator
from ctt.errors import UserError

CANVAS = 40  # pixels; with smaller objects on larger canvases nothing is learnt in minutes
DIGIT_SIZES = (20, 30)  # pixels, smallest and largest
PHOTO_BRIGHTNESS = 0.5
NOISE = 0.02  # standard deviation, of 0..1
INK = 0.35  # opacity from which a pixel is labelled as the digit
SCANS = {"train": (0, 1200), "val": (1200, 1797), "tune_train": (0, 1000), "tune": (1000, 1200)}

INFO = DatasetInfo(
    name="digits",
    classes=("background", *"0123456789"),
    palette=(
        (0, 0, 0),
        (230, 25, 75),
        (60, 180, 75),
        (255, 225, 25),
        (0, 130, 200),
        (245, 130, 48),
        (145, 30, 180),
        (70, 240, 240),
        (240, 50, 230),
        (210, 245, 60),
        (250, 190, 212),
    ),
    mean=(0.33, 0.32, 0.29),
    std=(0.27, 0.26, 0.26),
)


class Digits(Dataset):
    """`train` images for training and `evaluation` images to evaluate on, of 40x40 pixels.

    Args:
        eval_split: "val", or "tune" to evaluate on scans held out of the training scans.
        seed: fixes the canvases; the same for every run that is to be compared.
    """

    info = INFO

    def __init__(self, train: int, evaluation: int, eval_split: str = "val", seed: int = 0) -> None:
        train_scans = "tune_train" if eval_split == "tune" else "train"
        self._images: dict[str, Tensor] = {}
        self._labels: dict[str, Tensor] = {}
        self._train = self._make("train", train, SCANS[train_scans], seed)
        self._eval = self._make(eval_split, evaluation, SCANS[eval_split], seed)

    def _make(self, prefix: str, images: int, scans: tuple[int, int], seed: int) -> list[str]:
        made_images, made_labels = make_canvases(images, scans, f"{prefix}-{seed}")
        width = len(str(images - 1))
        ids = [f"{prefix}-{i:0{width}}" for i in range(images)]
        self._images.update(zip(ids, made_images, strict=True))
        self._labels.update(zip(ids, made_labels, strict=True))
        return ids

    def train_ids(self) -> list[str]:
        return list(self._train)

    def eval_ids(self) -> list[str]:
        return list(self._eval)

    def image(self, name: str) -> Tensor:
        return self._find(self._images, name)

    def label(self, name: str) -> Tensor:
        return self._find(self._labels, name)

    @staticmethod
    def _find(images: dict[str, Tensor], name: str) -> Tensor:
        if name not in images:
            raise UserError(
                f"There is no digits image {name!r}. Names run from {next(iter(images))} "
                f"to {next(reversed(images))}."
            )
        return images[name]


def make_canvases(images: int, scans: tuple[int, int], purpose: str) -> tuple[Tensor, Tensor]:
    """Return canvases (n, 3, 40, 40) and labels (n, 40, 40), uint8, of the digits in `scans`."""
    rng = generator("digits", purpose)
    glyphs, values, photos = _scans_and_photos()
    glyphs, values = glyphs[slice(*scans)], values[slice(*scans)]
    pictures = torch.empty(images, 3, CANVAS, CANVAS, dtype=torch.uint8)
    labels = torch.zeros(images, CANVAS, CANVAS, dtype=torch.uint8)
    for i in range(images):
        canvas = _background(photos, rng)
        for _ in range(1 + _integer(2, rng)):
            scan = _integer(len(glyphs), rng)
            _draw(canvas, labels[i], glyphs[scan], int(values[scan]), rng)
        canvas += NOISE * torch.randn(canvas.shape, generator=rng)
        pictures[i] = (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
    return pictures, labels


@cache
def _scans_and_photos() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return scans (n, 8, 8) in 0..1, their digits (n,) and photographs (3, H, W) in 0..1."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    photos = [
        torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255
        for p in load_sample_images().images
    ]
    return torch.from_numpy(digits.images / 16).float(), torch.from_numpy(digits.target), photos


def _integer(end: int, rng: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=rng))


def _background(photos: list[Tensor], rng: torch.Generator) -> Tensor:
    """A darkened crop (3, 40, 40), twice reduced so that it shows objects rather than grain."""
    photo = photos[_integer(len(photos), rng)]
    side = 2 * CANVAS
    y = _integer(photo.shape[1] - side, rng)
    x = _integer(photo.shape[2] - side, rng)
    return PHOTO_BRIGHTNESS * F.avg_pool2d(photo[:, y : y + side, x : x + side], 2)


def _draw(canvas: Tensor, label: Tensor, glyph: Tensor, value: int, rng: torch.Generator) -> None:
    """Lay a digit of random size, place and bright colour over what is there, in place."""
    low, high = DIGIT_SIZES
    size = low + _integer(high - low + 1, rng)
    opacity = F.interpolate(
        glyph[None, None], size=(size, size), mode="bicubic", align_corners=False
    )[0, 0].clamp(0, 1)
    y, x = _integer(CANVAS - size + 1, rng), _integer(CANVAS - size + 1, rng)
    colour = 0.7 + 0.3 * torch.rand(3, 1, 1, generator=rng)
    window = canvas[:, y : y + size, x : x + size]
    window.copy_(window + opacity * (colour - window))
    label[y : y + size, x : x + size][opacity > INK] = value + 1
