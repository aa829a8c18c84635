"""Masks of unlabelled images that another model made, in a folder of their own."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ctt.data.check import histogram
from ctt.data.dataset import Dataset
from ctt.data.faults import Fault
from ctt.data.files import FileDataset
from ctt.data.labels import plain_map
from ctt.data.masks import read_mask
from ctt.data.packed import pack, unpack
from ctt.data.prepare import Prepared, resize_label
from ctt.errors import UserError
from ctt.files import expanded

SURE = 255  # confidence of a pixel where no map says otherwise
FIELDS = ("`masks.folder`", "`masks.confidence`")


class ExternalMasks:
    """Finds and reads the masks.

    Args:
        folder: of the masks. confidence: of the maps of confidence, or None.
        options: how the user gave the two folders, for messages.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(
        self,
        dataset: Dataset,
        folder: Path,
        confidence: Path | None,
        options: tuple[str, str] = FIELDS,
    ) -> None:
        self.dataset, self.options = dataset, options
        self.folder = expanded(folder, options[0])
        self.sure = expanded(confidence, options[1]) if confidence is not None else None
        for option, place in zip(options, (self.folder, self.sure), strict=True):
            if place is not None and not place.is_dir():
                raise UserError(f"{option} {place}: there is no such folder.")
        info = dataset.info
        self.pixels = torch.zeros(len(info.classes) + 1, dtype=torch.int64)  # of those looked at
        colours = {colour: c for c, colour in enumerate(info.palette)}
        self.labels = plain_map(info.classes, colours=colours)

    def path(self, name: str, kind: str = "mask") -> Path:
        """Return the file of an image, or where it would be; `kind` is mask or confidence.

        Raises:
            UserError: it could also be that of another image.
        """
        folder = self.folder if kind == "mask" else self.sure
        assert folder is not None
        ends = [f"_{kind}", ""]
        if kind == "confidence" and folder == self.folder:
            ends.pop()  # that would be the mask
        whole, short = self._stems(name)
        for stem in (*whole, *short):
            for end in ends:
                place = folder / f"{stem}{end}.png"
                if place.is_file():
                    if stem in short:
                        self._refuse_shared(stem, place, folder / f"{whole[0]}{end}.png")
                    return place
        return folder / f"{whole[0]}{ends[0]}.png"

    def _stems(self, name: str) -> tuple[list[str], list[str]]:
        """Return what the files of an image are called: by its whole name, and by what is left of
        its path where `ctt-predict` was given one of the folders above it."""
        files = self.dataset.files(name, labeled=False)
        if not files:
            return [name], []
        whole = [str(PurePosixPath(name).with_name(files[0].stem)), name]
        parts = files[0].absolute().with_name(files[0].stem).parts
        short = ["/".join(parts[first:]) for first in range(1, len(parts))]
        return whole, [stem for stem in short if stem not in whole]

    @cached_property
    def _owners(self) -> dict[str, list[str]]:
        """The images to which a part of a path belongs."""
        dataset, owners = self.dataset, defaultdict[str, list[str]](list)
        for name in (*dataset.train_ids(), *dataset.unlabeled_ids(), *dataset.eval_ids()):
            for stem in itertools.chain(*self._stems(name)):
                owners[stem].append(name)
        return owners

    def _refuse_shared(self, stem: str, place: Path, mended: Path) -> None:
        owners = self._owners[stem]
        if len(owners) > 1:
            raise UserError(
                f"{place} could belong to {owners[0]} or to {owners[1]}. Name it by the whole path "
                f"of its image in the dataset, such as {mended}."
            )

    def read(self, name: str, size: tuple[int, ...]) -> Tensor:
        """Return mask and confidence of an image in one, see `pack`: (H, W) int32.

        Args:
            size: H and W of the image.

        Raises:
            UserError: a file is missing or broken, holds what is no class, or they are not of one
                size.
        """
        path = self._there(name, "mask")
        label = self.labels(read_mask(path), path)
        if label.shape != size:
            raise UserError(_sizes(path, tuple(label.shape), "image", size))
        if self.sure is None:
            return pack(label, torch.full_like(label, SURE))
        path = self._there(name, "confidence")
        values = read_mask(path).shown()
        if values.ndim != 2 or values.min() < 0 or values.max() > SURE:
            raise UserError(
                f"{path}: a map of confidence is a grey image of 8 bits, in which 255 stands for "
                f"a probability of 1."
            )
        if values.shape != label.shape:
            raise UserError(_sizes(path, values.shape, "mask", tuple(label.shape)))
        return pack(label, torch.from_numpy(values.astype(np.uint8)))

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return an image (3, H, W) and its mask as `read` does.

        Raises:
            UserError: they are not of one size, or cannot be read.
        """
        image = self.dataset.image(name)
        return image, self.read(name, tuple(image.shape[1:]))

    def _there(self, name: str, kind: str) -> Path:
        path = self.path(name, kind)
        if not path.is_file():
            option = self.options[0] if kind == "mask" else self.options[1]
            what = "mask" if kind == "mask" else "map of confidence"
            raise UserError(
                f"{path}: there is no such file, but {option} must hold a {what} of every "
                f"unlabelled image: NAME.png or NAME_{kind}.png, with or without the folders in "
                f"front of NAME. Make it, or leave the image out "
                f"of the unlabelled ones by `split_unlabeled`."
            )
        return path

    def check(self, unlabeled: Sequence[str], look_at: Sequence[str]) -> None:
        """Refuse masks that are missing, and wrong ones among some images.

        Raises:
            UserError: names the first file, and how many are missing.
        """
        kinds = ["mask", *(["confidence"] if self.sure is not None else [])]
        missing = [n for n in unlabeled if not all(self.path(n, k).is_file() for k in kinds)]
        if missing:
            try:
                for kind in kinds:
                    self._there(missing[0], kind)
            except UserError as error:
                more = f" The same holds for {len(missing) - 1} more images." if missing[1:] else ""
                raise UserError(f"{error}{more}") from None
        for name in look_at:
            self._look_at(name)
        self.dataset.notes += self.remarks()

    def faults(self, names: Sequence[str], advance: Callable[[], None]) -> Iterator[Fault]:
        """Yield what is wrong with the masks of these images, each read.

        Args:
            advance: called after each image.
        """
        for name in names:
            try:
                self._look_at(name)
            except UserError as error:
                yield Fault(str(error), name, (name,))
            advance()

    def _look_at(self, name: str) -> None:
        label, _ = unpack(self.pair(name)[1])
        self.pixels += histogram(label, len(self.dataset.info.classes))

    def remarks(self) -> tuple[str, ...]:
        """Return a warning if the masks looked at show one of two classes alone, and 255."""
        *shown, none = self.pixels.tolist()
        if len(shown) != 2 or not none or min(shown) > 0:
            return ()
        missing = shown.index(0)
        name = self.dataset.info.classes[missing]
        return (
            f"Warning: no mask looked at in {self.folder} shows {name}, but they hold 255, of "
            f"which nothing is learnt. If 255 stands for {name}, write the masks again with "
            f"{missing} in its place.",
        )


class WithMasks(Prepared):
    """Unlabelled images with the masks that another model made, resized for training."""

    def __init__(
        self,
        dataset: Dataset,
        size: tuple[int, int] | None,
        cache: Path | None,
        masks: ExternalMasks,
    ) -> None:
        super().__init__(dataset, size, cache)
        self.masks = masks
        self._sizes: dict[str, tuple[int, int]] = {}  # of cached images, before the resize

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the image (3, H, W) and its mask (H, W) as `pack` has it.

        Raises:
            UserError: they are not of one size before the resize, or cannot be read.
        """
        if self.cache is None:
            image, mask = self.masks.pair(name)
            image = self._resized_image(image)
        else:
            image = self.image(name)
            mask = self.masks.read(name, self._size_of(name, image))
        if self.size is not None:
            mask = resize_label(mask.float(), self.size).to(mask.dtype)
        return image, mask

    def _size_of(self, name: str, cached: Tensor) -> tuple[int, ...]:
        """Return height and width of an image as it is in its file."""
        if self.size is None:
            return tuple(cached.shape[1:])
        if name not in self._sizes:
            assert isinstance(self.dataset, FileDataset)
            self._sizes[name] = self.dataset.size(name)
        return self._sizes[name]


def _sizes(path: Path, found: tuple[int, ...], other: str, wanted: tuple[int, ...]) -> str:
    return (
        f"{path} has {found[1]}x{found[0]} pixels, but its {other} has {wanted[1]}x{wanted[0]}. "
        f"Both must be of one size: make it from the image as it is stored."
    )
