"""Images and masks in files: how they are read, and what is said of one that is broken."""

from __future__ import annotations

import math
import os
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from ctt.data.options import SourceOptions
from ctt.data.pixels import WORD, is_deep, to_rgb
from ctt.data.source import IGNORE, DatasetInfo, Source
from ctt.data.split import NO_MASK, draw_split
from ctt.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MASK_MODES = ("1", "L", "P", "I", "I;16")
# Pillow spreads the values of grey PNGs of 2 and 4 bits over 0..255
SPREAD = {"L;2": 85, "L;4": 17}
VALUES = 2**16  # that a mask may hold
SHOWN = 5  # bad values named in a message
BROKEN = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
)


def read_image(path: Path, white: float | None = None, *, turned: bool = True) -> Tensor:
    """(3, H, W) uint8.

    Args:
        white: the value of white in images of more than 8 bits, see `to_rgb`.
        turned: as the camera's note in the file (EXIF) says, and as viewers do.

    Raises:
        UserError: there is no such file, or it is no image, or a broken one.
    """
    try:
        with Image.open(path) as file:
            if white is not None and "16" in raw_mode(file) and not is_deep(file.mode):
                raise UserError(
                    f"{path}: `white` is for grey images, and of this one in colours of 16 bits "
                    f"only the upper 8 can be read. Write it again with 8 bits a colour."
                )
            picture = ImageOps.exif_transpose(file) if turned else file
            picture.format = file.format  # which a turned copy lacks
            pixels = to_rgb(picture, white)
    except BROKEN as error:
        raise _broken(path, "an image", error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def raw_mode(file: Image.Image) -> str:
    """Return how the pixels lie in the file, such as `RGB;16B`; empty where Pillow does not say."""
    arguments = file.tile[0][3] if isinstance(file, ImageFile.ImageFile) and file.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def largest_value(path: Path) -> float:
    """Return the largest value of a grey image of 16 bits; 0 for other ones and for no images."""
    try:
        with Image.open(path) as file:
            return float(np.asarray(file).max()) if file.mode.startswith("I;16") else 0
    except BROKEN:
        return 0


def read_mask(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.integer]]:
    """(H, W) numbers as they are stored: of a palette PNG the indices, not the colours.

    Raises:
        UserError: there is no such file, or it is no image, a broken one or one of colours.
    """
    try:
        with Image.open(path) as file:
            mode, raw = file.mode, raw_mode(file)
            if mode not in MASK_MODES:
                raise UserError(
                    f"{path}: the mask is an image of colours (mode {mode}), but one number for "
                    f"each pixel is expected, the class: a PNG with a palette (mode P) or a grey "
                    f"one (mode L). Write it again with the classes as values."
                )
            values = np.array(file)
    except BROKEN as error:
        raise _broken(path, "a mask", error) from None
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    return values // SPREAD[raw] if raw in SPREAD else values


def _broken(path: Path, what: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        hint = " The image that it belongs to can only be an unlabelled one." * (what == "a mask")
        return UserError(f"{path}: there is no such file.{hint}")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(
        f"{path} cannot be read as {what} ({reason}). Replace the file by a whole one, or leave "
        f"it out."
    )


class LabelMap:
    """From the numbers in a mask to classes.

    Args:
        mapping: class, or 255, for each number that a mask may hold.
        classes: the names, for the message.
    """

    def __init__(self, mapping: Mapping[int, int], classes: Iterable[str]) -> None:
        self.table = np.full(VALUES, -1, np.int16)
        for value, label in mapping.items():
            self.table[value] = label
        self.allowed = sorted(mapping)
        self.classes = tuple(classes)

    def __call__(
        self, values: np.ndarray[tuple[int, int], np.dtype[np.integer]], path: Path
    ) -> Tensor:
        """(H, W) numbers of the mask in `path` -> (H, W) uint8.

        Raises:
            UserError: a number that is no class; names it and the file.
        """
        inside = values.dtype == np.uint8 or (values.min() >= 0 and values.max() < VALUES)
        label = self.table[values] if inside else None
        if label is None or label.min() < 0:
            raise UserError(self._complain(np.unique(values), path))
        return torch.from_numpy(label.astype(np.uint8))

    def _complain(self, found: np.ndarray[tuple[int], np.dtype[np.integer]], path: Path) -> str:
        bad = sorted(set(found.tolist()) - set(self.allowed))
        shown = ", ".join(map(str, bad[:SHOWN])) + (", ..." if len(bad) > SHOWN else "")
        return (
            f"{path}: the mask holds the label{'s' * (len(bad) > 1)} {shown}, which "
            f"{'are' if len(bad) > 1 else 'is'} no class. Expected are {ranges(self.allowed)} "
            f"({len(self.classes)} classes, {self.classes[0]} to {self.classes[-1]}, and pixels "
            f"to ignore). Correct the mask, or the list of classes."
        )


def ranges(numbers: list[int]) -> str:
    """Sorted numbers as text: `0..20 and 255`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    texts = [str(a) if a == b else f"{a}..{b}" for a, b in parts]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def plain_map(classes: Iterable[str], ignore: int = IGNORE) -> LabelMap:
    """Masks hold the class itself, or `ignore`."""
    names = tuple(classes)
    return LabelMap({**{c: c for c in range(len(names))}, ignore: IGNORE}, names)


class FileSource(Source):
    """A data set in files; its subclasses know the layout.

    Args:
        base: the folder that paths in split lists start from.
        names: of the images that may be labelled, of those that have no label, and of those to
            evaluate on. Without the last, or with the option `eval_split` tune, a share of the
            first is held out and evaluated on.
        published: how many images the whole data set has for training and for evaluation.

    Attributes:
        turned: images are turned as their files say; published masks belong to the stored pixels.
    """

    turned = False

    def __init__(
        self,
        info: DatasetInfo,
        base: Path,
        names: tuple[Iterable[str], Iterable[str], Iterable[str]],
        options: SourceOptions,
        published: tuple[int, int] | None = None,
    ) -> None:
        self.info, self.base = info, base
        self._train, self._unlabeled, self._eval = map(sorted, names)
        for name in (*self._train, *self._unlabeled, *self._eval):
            if "\n" in name or "\r" in name:
                raise UserError(
                    f"{base}: the name of the image {name!r} holds the end of a line, which a list "
                    f"of images cannot hold. Rename it."
                )
        found = (len(self._train), len(self._eval))
        if published is not None and found != published:
            self.notes += (
                f"{base} has {found[0]:,} images for training and {found[1]:,} for evaluation; the "
                f"published data set has {published[0]:,} and {published[1]:,}.",
            )
        self._drawn = options.eval_split == "tune" or not self._eval
        if self._drawn:
            self._eval, self._train = self._draw(options.holdout)
            self.notes += (self._held_out(),)

    def evaluate_on(self, names: Iterable[str]) -> None:
        present = {*self._train, *self._eval}
        held_out = present & {self.find(name) for name in names}
        if self._drawn and held_out:
            before = self._held_out()
            self._eval, self._train = sorted(held_out), sorted(present - held_out)
            self.notes = tuple(self._held_out() if n == before else n for n in self.notes)

    def _held_out(self) -> str:
        return f"{len(self._eval)} of the images with masks are held out and evaluated on."

    def _draw(self, share: float) -> tuple[list[str], list[str]]:
        """Names to evaluate on and to train on, at least one of each."""
        names = self.train_ids()
        if len(names) < 2:
            raise UserError(
                f"{self.base}: one image with a mask cannot be both learned and evaluated. Add "
                f"images with masks, or images to evaluate on."
            )
        count = max(1, round(share * len(names)))
        return draw_split(names, min(count, len(names) - 1), "holdout")

    @abstractmethod
    def image_path(self, name: str) -> Path:
        """Where the image is, or would be."""

    @abstractmethod
    def mask_path(self, name: str) -> Path:
        """Where the mask is, or would be."""

    @abstractmethod
    def label_map(self, mask: Path) -> LabelMap:
        """What the numbers in this mask mean."""

    def train_ids(self) -> list[str]:
        return list(self._train)

    def unlabeled_ids(self) -> list[str]:
        return list(self._unlabeled)

    def eval_ids(self) -> list[str]:
        return list(self._eval)

    def image(self, name: str) -> Tensor:
        return read_image(self.image_path(name), self.info.white, turned=self.turned)

    def dark(self, names: Iterable[str]) -> str:
        """Return a warning if 16-bit images use so few of their values that they are dark."""
        if self.info.white is not None:
            return ""
        largest = max((largest_value(self.image_path(name)) for name in names), default=0)
        if not 0 < largest <= WORD / 8:
            return ""
        bits = math.ceil(math.log2(largest + 1))
        return (
            f"Warning: the images of 16 bits hold values up to {largest:.0f} only, of {WORD} that "
            f"stand for white, so that they are nearly black. Say in dataset.yaml which value is "
            f"white, such as `white: {2**bits - 1}`."
        )

    def label(self, name: str) -> Tensor:
        path = self.mask_path(name)
        return self.label_map(path)(read_mask(path), path)

    def line(self, name: str) -> str:
        mask = self.mask_path(name)
        paths = [self.image_path(name), *([mask] if mask.is_file() else [])]
        texts = [Path(os.path.relpath(path, self.base)).as_posix() for path in paths]
        return " ".join([*texts, NO_MASK][:2])

    def files(self, name: str, labeled: bool) -> list[Path]:
        return [self.image_path(name), *([self.mask_path(name)] if labeled else [])]


def same_name(text: str) -> str:
    """One spelling for names that look alike: file systems store `ü` as one sign or as two."""
    return unicodedata.normalize("NFC", text)


def list_names(folder: Path) -> list[str]:
    """File names in a folder, none where there is no such folder; hidden ones left out."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def first_with(root: Path, places: Iterable[str], needed: str) -> Path | None:
    """The first of the folders `places` below `root` that holds a folder `needed`."""
    return next((root / place for place in places if (root / place / needed).is_dir()), None)


def require_root(root: Path | None, dataset: str, layout: str) -> Path:
    """The folder given by --data-root.

    Raises:
        UserError: none was given, or it is not there.
    """
    if root is None:
        raise UserError(f"--data-root: the data set {dataset} needs the folder that {layout}.")
    root = root.expanduser()
    if not root.is_dir():
        raise UserError(
            f"--data-root {root}: there is no such folder. Give the folder that {layout}."
        )
    return root
