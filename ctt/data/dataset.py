"""What a dataset is to the rest: names of images, and an image or a label for a name."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ctt.errors import UserError

IGNORE = 255  # label of pixels that belong to no class


@dataclass(frozen=True)
class DatasetInfo:
    """Facts that do not depend on an image.

    Attributes:
        classes: C names.
        palette: C colours (r, g, b) in 0..255.
        mean: of the channels in 0..1, for normalisation.
        std: standard deviation of the channels in 0..1, likewise.
        white: the value that stands for white in images of more than 8 bits; None: what their files
            can hold at most.
        bands: which channels of a file, from 1, are those of the images; none: images are RGB.
        ranges: of bands, the two values of each that become 0 and 1; none: those of the file's
            type of numbers.
        shown: of bands, which of them, from 0, pictures show as red, green and blue.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float | None = None
    bands: tuple[int, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()
    shown: tuple[int, int, int] = (0, 1, 2)

    @property
    def channels(self) -> int:
        """Return the number of channels of the images."""
        return len(self.mean)


def first_difference(trained: DatasetInfo, found: DatasetInfo) -> str:
    """Return in words the first fact on which what a network takes and gives depends and which
    differs; empty if there is none."""
    for c, (ours, theirs) in enumerate(zip(trained.classes, found.classes, strict=False)):
        if ours != theirs:
            return f"class {c} is {ours!r} to the network and {theirs!r} in the data"
    if len(trained.classes) != len(found.classes):
        return f"{len(trained.classes)} and {len(found.classes)} classes"
    for fact in ("white", "bands", "ranges", "mean", "std"):
        ours, theirs = getattr(trained, fact), getattr(found, fact)
        if ours != theirs:
            return f"{fact} is {ours} to the network and {theirs} in the data"
    return ""


def _channels(info: DatasetInfo) -> str:
    """Return in words which channels of a file the images have."""
    return f"the channels {', '.join(map(str, info.bands))}" if info.bands else "RGB images"


@dataclass(frozen=True)
class Submission:
    """The form in which a benchmark's server expects predictions of its test images.

    Attributes:
        values: the number in the file for each class.
        ending: of the file, after the name of the image.
        palette: the file has the dataset's colours; else it is grey.
        images: where the test images are expected, for the message that there are none.
    """

    values: tuple[int, ...]
    ending: str
    palette: bool
    images: str


class Dataset(ABC):
    """A dataset. `image` and `label` are called from loader processes and must not keep state.

    Attributes:
        submission: None where no server evaluates test images.
        notes: sentences on what was found and what follows from it, for the user.
        assumed_ignore: the number in the masks that is ignored though nobody said so, or None.
        paper_counts: labelled images of a ratio where the paper's count is not the rounded one.
    """

    info: DatasetInfo
    submission: ClassVar[Submission | None] = None
    notes: tuple[str, ...] = ()
    assumed_ignore: int | None = None
    paper_counts: ClassVar[Mapping[Fraction, int]] = {}

    @abstractmethod
    def train_ids(self) -> list[str]:
        """Return names of the training images that may be labelled, sorted."""

    @abstractmethod
    def eval_ids(self) -> list[str]:
        """Return names of the images to evaluate on, sorted."""

    @abstractmethod
    def image(self, name: str) -> Tensor:
        """Return (3, H, W) uint8; of bands (C, H, W) float32 in 0..1, NaN where no data is."""

    @abstractmethod
    def label(self, name: str) -> Tensor:
        """Return (H, W) uint8, class or 255. Never called for an unlabelled image."""

    def take_scale_of(self, trained: DatasetInfo) -> list[str]:
        """Read images by the ranges, white, mean and deviation that networks were trained with, as
        `ctt-predict` does, and return a sentence on each fact of the files that differs.

        Raises:
            UserError: the networks take other channels.
        """
        ours = self.info
        if (trained.bands, trained.channels) != (ours.bands, ours.channels):
            raise UserError(
                f"The networks take {_channels(trained)}, but {ours.name} has {_channels(ours)}. "
                f"Give the dataset that the networks were trained on."
            )
        white = trained.white if trained.white is not None else ours.white
        self.info = replace(
            ours, ranges=trained.ranges, white=white, mean=trained.mean, std=trained.std
        )
        return [
            f"Images are read by the {fact} {now} that the networks were trained with, not by the "
            f"dataset's {own}."
            for fact in ("ranges", "white")
            if (own := getattr(ours, fact)) != (now := getattr(self.info, fact))
        ]

    def test_ids(self) -> list[str]:
        """Return names of the test images, whose labels only the benchmark's server has; sorted."""
        return []

    def unlabeled_ids(self) -> list[str]:
        """Return names of the training images that have no label whatever the split, sorted."""
        return []

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return image (C, H, W) and label (H, W), which is 255 where the image has no data.

        Raises:
            UserError: they are not of one size.
        """
        image, label = self.image(name), self.label(name)
        if image.shape[1:] != label.shape:
            (height, width), (rows, columns) = image.shape[1:], label.shape
            files = self.files(name, labeled=True)
            raise UserError(
                f"{files[1] if files else name}: the mask has {columns}x{rows} pixels, but its "
                f"image{f' {files[0]}' if files else ''} has {width}x{height}. Both must be of one "
                f"size.{self.why_sizes_differ(name, image, label)}"
            )
        if image.is_floating_point():
            label = label.masked_fill(image.isnan().any(dim=0), IGNORE)
        return image, label

    def why_sizes_differ(self, name: str, image: Tensor, label: Tensor) -> str:
        """Return a sentence on why an image and its mask are of two sizes; empty: unknown."""
        return ""

    def meaning(self) -> dict[str, str]:
        """Return what the `numbers` and `colours` in masks mean, for a resumed run to compare;
        nothing where a benchmark fixes it."""
        return {}

    def find(self, entry: str) -> str | None:
        """Return the name of the image that `entry` in a split list means; None if there is
        none."""
        return entry if entry in self._names else None

    def is_mask(self, name: str, path: str) -> bool | None:
        """Return whether the file at `path` in a list is the image's mask; None: there is no
        mask."""
        return None

    def evaluate_on(self, names: Iterable[str]) -> None:  # noqa: B027 (most datasets fix it)
        """Evaluate on these images alone, and hold out those of them that could be trained on."""

    def line(self, name: str) -> list[str]:
        """Return what a split list for other programs says of an image: its path and its mask's."""
        return [name]

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset([*self.train_ids(), *self.unlabeled_ids(), *self.eval_ids()])

    def files(self, name: str, labeled: bool) -> list[Path]:
        """Return the image's file and, if `labeled`, that of its mask; none for images in
        memory."""
        return []
