"""PASCAL VOC 2012 for segmentation, augmented (SBD) or classic."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path, PurePosixPath

from ctt.data.channels import IMAGENET_MEAN, IMAGENET_STD
from ctt.data.dataset import IGNORE, DatasetInfo, Submission
from ctt.data.files import (
    FileDataset,
    first_with,
    jpeg_files,
    jpeg_name,
    list_names,
    require_root,
    same_name,
)
from ctt.data.labels import LabelMap, plain_map
from ctt.data.options import DatasetOptions
from ctt.data.split import read_lines, resolve
from ctt.errors import UserError

LAYOUT = "holds VOCdevkit/VOC2012 with JPEGImages, SegmentationClass and ImageSets"
PLACES = ("", "VOC2012", "VOCdevkit/VOC2012", "VOCdevkit")
LISTS = Path("ImageSets") / "Segmentation"
AUG_MASKS, CLASSIC_MASKS = "SegmentationClassAug", "SegmentationClass"
AUG_LISTS = ("train_aug.txt", "trainaug.txt")
# shares of 10,582 that the paper rounds down; the classic ones are the rounded ones
AUG_COUNTS = {Fraction(1, 8): 1322, Fraction(1, 4): 2645}
AUG_TRAIN, CLASSIC_TRAIN, EVALUATION = 10_582, 1464, 1449


def bit_palette(colours: int) -> tuple[tuple[int, int, int], ...]:
    """Return VOC's colours: the bits of a class go to r, g and b in turn, from the highest down."""
    palette = []
    for number in range(colours):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
        palette.append((channels[0], channels[1], channels[2]))
    return tuple(palette)


CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
BORDER = (224, 224, 192)  # the colour of the pixels to ignore
INFO = DatasetInfo("voc", CLASSES, bit_palette(len(CLASSES)), IMAGENET_MEAN, IMAGENET_STD)


class Voc(FileDataset):
    """Names are those of the lists: `2007_000032`.

    Args:
        root: VOC2012, the VOCdevkit around it, or the folder around that.

    Raises:
        UserError: the layout is not complete.
    """

    submission = Submission(tuple(range(len(CLASSES))), ".png", True, f"{LISTS / 'test.txt'}")

    def __init__(self, root: Path | None, options: DatasetOptions) -> None:
        root = require_root(root, "voc", LAYOUT)
        folder = first_with(root, PLACES, "JPEGImages")
        if folder is None:
            raise UserError(
                f"`data_root` {root}: no folder JPEGImages in it or in its VOCdevkit/VOC2012. Give "
                f"the folder that {LAYOUT}."
            )
        self.folder = folder
        colours = {colour: c for c, colour in enumerate(INFO.palette)}
        self.labels = plain_map(CLASSES, colours={**colours, BORDER: IGNORE})
        self._files = jpeg_files(folder / "JPEGImages")
        self._known = {same_name(name): name for name in self._files}
        order = (AUG_MASKS, CLASSIC_MASKS)
        self._masks = self._find_masks(order if options.voc_set == "aug" else order[::-1])
        evaluation, classic = self._list("val.txt"), self._list("train.txt")
        augmented = self._augmented(set(evaluation))
        others = sorted(set(augmented) - set(classic))
        if options.voc_set == "classic":
            train, unlabeled = classic, others
            if not others:
                self.notes += (
                    f"There is no {AUG_MASKS} that names the 9,118 images which are unlabelled "
                    f"in the classic set: only those of train.txt are used.",
                )
        else:
            train, unlabeled = augmented, []
        self._incomplete = options.voc_set == "aug" and not others
        published = (AUG_TRAIN if options.voc_set == "aug" else CLASSIC_TRAIN, EVALUATION)
        super().__init__(INFO, folder, (train, unlabeled, evaluation), options, published)

    def train_ids(self) -> list[str]:
        """Return the sorted names.

        Raises:
            UserError: the augmented masks are wanted and are not here. Evaluation needs none.
        """
        if self._incomplete:
            raise UserError(
                f"`data.voc_set` aug: {self.folder} holds the masks of the classic set only. Put "
                f"the 12,031 augmented ones into {self.folder / AUG_MASKS}, or make them with "
                f"ctt-data fetch voc-aug, or use `data.voc_set` classic."
            )
        return super().train_ids()

    def test_ids(self) -> list[str]:
        has_list = (self.folder / LISTS / "test.txt").is_file()
        return sorted(self._list("test.txt")) if has_list else []

    @property
    def paper_counts(self) -> Mapping[Fraction, int]:  # type: ignore[override]
        return AUG_COUNTS if len(self._train) == AUG_TRAIN else {}

    def _find_masks(self, folders: tuple[str, ...]) -> dict[str, Path]:
        """Masks by name; of two for one name that of the first folder."""
        masks: dict[str, Path] = {}
        for folder in folders:
            for file in list_names(self.folder / folder):
                if file.lower().endswith(".png"):
                    masks.setdefault(same_name(file[:-4]), self.folder / folder / file)
        if not masks:
            raise UserError(f"{self.folder}: there are no masks in {' or '.join(folders)}.")
        return masks

    def _list(self, file: str) -> list[str]:
        """Names in a list that comes with the dataset; those without an image are kept as well."""
        names = []
        for line in read_lines(self.folder / LISTS / file).values():
            found = resolve(line, self.find)
            name = found[0] if found is not None else line.strip()
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(
                    f"{self.folder / LISTS / file}: {name} is no image of this dataset, but leads "
                    f"to another folder. Take it out of the list."
                )
            names.append(name)
        return names

    def _augmented(self, evaluation: set[str]) -> list[str]:
        for file in AUG_LISTS:
            if (self.folder / LISTS / file).is_file():
                return self._list(file)
        return [self._known.get(n, n) for n in self._masks if n not in evaluation]

    def image_path(self, name: str) -> Path:
        return self.folder / "JPEGImages" / self._files.get(name, f"{name}.jpg")

    def mask_path(self, name: str) -> Path:
        return self._masks.get(same_name(name), self.folder / CLASSIC_MASKS / f"{name}.png")

    def label_map(self, mask: Path) -> LabelMap:
        return self.labels

    def find(self, entry: str) -> str | None:
        """Find an image by its bare name or the path of a JPEG file."""
        return self._known.get(jpeg_name(entry))
