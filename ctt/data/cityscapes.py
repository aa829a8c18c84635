"""Cityscapes with its 19 classes of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path, PurePosixPath

from ctt.data.channels import IMAGENET_MEAN, IMAGENET_STD
from ctt.data.dataset import IGNORE, DatasetInfo, Submission
from ctt.data.files import FileDataset, first_with, list_names, require_root, same_name
from ctt.data.labels import LabelMap, plain_map
from ctt.data.options import DatasetOptions
from ctt.errors import UserError

LAYOUT = "holds leftImg8bit and gtFine"
IMAGES, MASKS = "leftImg8bit", "gtFine"
PLACES = ("", "cityscapes", "..")
ENDING = "_leftImg8bit.png"
SPLITS = ("train", "val", "train_extra", "test")
TRAIN, EVALUATION = 2975, 500
COUNTS = {Fraction(1, 30): 100, Fraction(1, 2): 1487}  # the paper's; the other ones are rounded

CLASSES: dict[str, tuple[int, tuple[int, int, int]]] = {  # number in labelIds, and colour
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
INFO = DatasetInfo(
    "cityscapes",
    tuple(CLASSES),
    tuple(colour for _, colour in CLASSES.values()),
    IMAGENET_MEAN,
    IMAGENET_STD,
)


class Cityscapes(FileDataset):
    """Names are city, sequence and frame: `aachen_000000_000019`.

    Args:
        root: the folder that holds leftImg8bit and gtFine, or leftImg8bit itself.

    Raises:
        UserError: the layout is not complete.
    """

    submission = Submission(
        tuple(number for number, _ in CLASSES.values()), "_labelIds.png", False, f"{IMAGES}/test"
    )

    def __init__(self, root: Path | None, options: DatasetOptions) -> None:
        root = require_root(root, "cityscapes", LAYOUT)
        self.images = self._find(root, IMAGES)
        self.masks = self._find(root, MASKS)
        self._places: dict[str, str] = {}  # split/city of each image
        for split in SPLITS:
            for city in list_names(self.images / split):
                for file in list_names(self.images / split / city):
                    if file.endswith(ENDING):
                        self._places[file.removesuffix(ENDING)] = f"{split}/{city}"
        self._known = {same_name(name): name for name in self._places}
        numbers = [number for number, _ in CLASSES.values()]
        self._ids = LabelMap(
            {v: numbers.index(v) if v in numbers else IGNORE for v in range(256)}, CLASSES
        )
        self._train_ids = plain_map(CLASSES)
        of = {
            split: [n for n, place in self._places.items() if place.startswith(f"{split}/")]
            for split in ("train", "val")
        }
        for split, names in of.items():
            if not names:
                raise UserError(
                    f"{self.images / split}: there are no images CITY/*{ENDING}. Unpack "
                    f"leftImg8bit_trainvaltest.zip of Cityscapes there."
                )
        super().__init__(
            INFO, self.images.parent, (of["train"], [], of["val"]), options, (TRAIN, EVALUATION)
        )

    def test_ids(self) -> list[str]:
        return sorted(name for name, place in self._places.items() if place.startswith("test/"))

    @property
    def paper_counts(self) -> Mapping[Fraction, int]:  # type: ignore[override]
        return COUNTS if len(self._train) == TRAIN else {}

    @staticmethod
    def _find(root: Path, folder: str) -> Path:
        """`folder` as it is in the official archives, unpacked into one place or each by itself."""
        places = (*PLACES, f"{folder}_trainvaltest", f"../{folder}_trainvaltest")
        found = first_with(root, places, folder)
        if found is None:
            raise UserError(
                f"`data_root` {root}: there is no folder {folder}. Give the folder that {LAYOUT}."
            )
        return found / folder

    def image_path(self, name: str) -> Path:
        return self.images / self._places[name] / f"{name}{ENDING}"

    def mask_path(self, name: str) -> Path:
        """Return the labelTrainIds file, if it has been made, else the labelIds file."""
        stem = self.masks / self._places[name] / f"{name}_gtFine"
        made = stem.with_name(f"{stem.name}_labelTrainIds.png")
        return made if made.is_file() else stem.with_name(f"{stem.name}_labelIds.png")

    def label_map(self, mask: Path) -> LabelMap:
        return self._train_ids if mask.name.endswith("_labelTrainIds.png") else self._ids

    def find(self, entry: str) -> str | None:
        """Find an image by its bare name or a path, in Cityscapes' own folders or any other."""
        file = PurePosixPath(entry).name
        return self._known.get(same_name(file.removesuffix(ENDING)))
