"""Datasets in files."""

from __future__ import annotations

import os
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from torch import Tensor

from ctt.data.dataset import IGNORE, Dataset, DatasetInfo
from ctt.data.labels import LabelMap
from ctt.data.masks import read_mask
from ctt.data.options import DatasetOptions
from ctt.data.rasters import read_as, size_of
from ctt.data.remarks import (
    of_channels,
    of_darkness,
    of_depth,
    of_gaps,
    of_pages,
    of_turning,
    traits,
)
from ctt.data.split import NO_MASK, draw_split, with_all_classes
from ctt.errors import UserError
from ctt.files import expanded

FEW = 300  # images with masks that are read through at the start
NO_SUCH_MASK = "An image without a mask can only be used as unlabelled."


class FileDataset(Dataset):
    """A dataset in files; its subclasses know the layout.

    Args:
        base: the folder that paths in split lists start from.
        names: of the images that may be labelled, of those that have no label, and of those to
            evaluate on. Without the last, or with the option `eval_split` tune, a share of the
            first is held out and evaluated on.
        published: how many images the whole dataset has for training and for evaluation.

    Attributes:
        turned: images are turned as their files say; published masks belong to the stored pixels.
        lossy: masks may be JPEG files and the like, because their exact values do not count.
        states_white: the user can state the value of white, so that it is never guessed.
        holds_out: images to evaluate on are a share of those that may be labelled.
    """

    turned = False
    lossy = False
    states_white = False

    def __init__(
        self,
        info: DatasetInfo,
        base: Path,
        names: tuple[Iterable[str], Iterable[str], Iterable[str]],
        options: DatasetOptions,
        published: tuple[int, int] | None = None,
    ) -> None:
        self.info, self.base = info, base
        self._train, self._unlabeled, self._eval = map(sorted, names)
        self._maskless = frozenset(self._unlabeled)
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
                f"published dataset has {published[0]:,} and {published[1]:,}.",
            )
        self.holds_out = options.eval_split == "tune" or not self._eval
        if self.holds_out:
            self._eval, self._train = self._draw(options.holdout)
            self.notes += (self._held_out(),)

    def evaluate_on(self, names: Iterable[str]) -> None:
        present = {*self._train, *self._eval}
        held_out = present & {self.find(name) for name in names}
        if self.holds_out and held_out:
            before = self._held_out()
            self._eval, self._train = sorted(held_out), sorted(present - held_out)
            self.notes = tuple(self._held_out() if n == before else n for n in self.notes)
        elif held_out and held_out != {*self._eval}:
            later = len({*self._eval} - held_out)
            self._eval, self._train = sorted(held_out), sorted({*self._train} - held_out)
            self.notes += (
                f"Evaluated on: the {len(held_out)} images that the run was evaluated on before. "
                f"{later} images to evaluate on came later and are left out.",
            )

    def _held_out(self) -> str:
        return f"Evaluated on: {len(self._eval)} of the images with masks, which are held out."

    def _draw(self, share: float) -> tuple[list[str], list[str]]:
        """Names to evaluate on and to train on, at least one of each.

        Of up to `FEW` images the masks are read, so that both parts show all classes if they can.
        """
        names = self.train_ids()
        if len(names) < 2:
            raise UserError(
                f"{self.base}: one image with a mask cannot be both learned and evaluated. Add "
                f"images with masks, or images to evaluate on."
            )
        count = max(1, round(share * len(names)))
        parts = draw_split(names, min(count, len(names) - 1), "holdout")
        if len(names) > FEW:
            return parts
        return with_all_classes(*parts, {name: self.classes_in(name) for name in names})

    def classes_in(self, name: str) -> set[int]:
        """Return the classes that a mask shows; none if it cannot be read."""
        try:
            return {*self.label(name).flatten().bincount().nonzero().flatten().tolist()} - {IGNORE}
        except UserError:
            return set()  # the checks report it

    @abstractmethod
    def image_path(self, name: str) -> Path:
        """Return where the image is, or would be."""

    @abstractmethod
    def mask_path(self, name: str) -> Path:
        """Return where the mask is, or would be."""

    @abstractmethod
    def label_map(self, mask: Path) -> LabelMap:
        """Return what the numbers in this mask mean."""

    def train_ids(self) -> list[str]:
        return list(self._train)

    def unlabeled_ids(self) -> list[str]:
        return list(self._unlabeled)

    def eval_ids(self) -> list[str]:
        return list(self._eval)

    def image(self, name: str) -> Tensor:
        path, same_scale = self.image_path(name), self.states_white
        return read_as(path, self.info, turned=self.turned, same_scale=same_scale)

    def size(self, name: str) -> tuple[int, int]:
        """Return height and width of an image, whose pixels need not be read."""
        return size_of(self.image_path(name), turned=self.turned)

    def remarks(self, names: Iterable[str], threads: int = 1) -> list[str]:
        """Return a sentence for each thing in these images that is allowed and maybe not meant.

        Args:
            threads: files read at a time; 0: one for each core.
        """
        paths = (self.image_path(name) for name in names)
        images = traits(paths, threads, pixels=not self.info.bands)
        turning = of_turning(images) if self.turned else []
        if self.info.bands:  # which say what is read
            return turning
        return [
            *turning,
            *of_pages(images),
            *of_channels(images),
            *of_depth(images),
            *of_gaps(images),
            *(of_darkness(images) if self.info.white is None else []),
        ]

    def why_sizes_differ(self, name: str, image: Tensor, label: Tensor) -> str:
        images = traits([self.image_path(name)], pixels=False) if self.turned else []
        if not any(image.turned for image in images) or image.shape[1:] != label.shape[::-1]:
            return ""
        return (
            " The camera's note in the image (EXIF) turns it, and the mask was drawn on the "
            "pixels as they are stored: turn the mask, or take the note out of the image."
        )

    def label(self, name: str) -> Tensor:
        path = self.mask_path(name)
        if not path.is_file():
            raise UserError(f"{path}: there is no such file. {NO_SUCH_MASK}{self.candidate(name)}")
        mask = read_mask(path, turned=self.turned, lossy=self.lossy)
        return self.label_map(path)(mask, path)

    def candidate(self, name: str) -> str:
        """Return a sentence on what may be the mask of an image that seems to have none."""
        return ""

    def line(self, name: str) -> list[str]:
        mask = self.mask_path(name)
        # of an unlabelled image it may name another file, such as the image itself
        there = name not in self._maskless and mask.is_file()
        paths = [self.image_path(name), *([mask] if there else [])]
        texts = [Path(os.path.relpath(path, self.base)).as_posix() for path in paths]
        return [*texts, NO_MASK][:2]

    def files(self, name: str, labeled: bool) -> list[Path]:
        return [self.image_path(name), *([self.mask_path(name)] if labeled else [])]


def same_name(text: str) -> str:
    """Return one spelling of names that look alike: file systems store `ü` as one sign or two."""
    return unicodedata.normalize("NFC", text)


def list_names(folder: Path) -> list[str]:
    """Return the names of the files in a folder without hidden ones; none if there is no folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def jpeg_files(folder: Path) -> dict[str, str]:
    """Return the names of the JPEG files in a folder by those of the images: {"a": "a.JPG"}."""
    return {n[:-4]: n for n in list_names(folder) if n.lower().endswith(".jpg")}


def jpeg_name(entry: str) -> str:
    """Return the bare name of an image, as `same_name` spells it, from it or its file's path."""
    file = PurePosixPath(entry).name
    return same_name(file[:-4] if file.lower().endswith(".jpg") else file)


def first_with(root: Path, places: Iterable[str], needed: str) -> Path | None:
    """Return the first of the folders `places` below `root` that holds a folder `needed`."""
    return next((root / place for place in places if (root / place / needed).is_dir()), None)


def require_root(root: Path | None, dataset: str, layout: str) -> Path:
    """Return the folder that `data_root` names.

    Raises:
        UserError: none was given, or it is not there.
    """
    if root is None:
        raise UserError(f"`data_root`: the dataset {dataset} needs the folder that {layout}.")
    root = expanded(root, "`data_root`")
    if not root.is_dir():
        raise UserError(
            f"`data_root` {root}: there is no such folder. Give the folder that {layout}."
        )
    return root
