"""ADE20K with its 150 classes, as the archive of the scene parsing benchmark unpacks."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from ctt.data.channels import IMAGENET_MEAN, IMAGENET_STD
from ctt.data.dataset import IGNORE, DatasetInfo
from ctt.data.files import (
    FileDataset,
    first_with,
    jpeg_files,
    jpeg_name,
    require_root,
    same_name,
)
from ctt.data.labels import LabelMap, plain_map
from ctt.data.masks import read_mask
from ctt.data.options import DatasetOptions
from ctt.data.voc import bit_palette
from ctt.errors import UserError

LAYOUT = "holds ADEChallengeData2016 with images and annotations"
PLACES = ("", "ADEChallengeData2016")
IMAGES, MASKS = "images", "annotations"
TRAIN, EVALUATION = 20_210, 2000
LOOKED_AT = 100  # masks that show what their numbers mean

CLASSES = tuple(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag""".replace("\n    ", " ").split(
        ", "
    )
)
# the archive has no colours of the classes: VOC's way to number colours, without its black
INFO = DatasetInfo(
    "ade20k", CLASSES, bit_palette(len(CLASSES) + 1)[1:], IMAGENET_MEAN, IMAGENET_STD
)


class Ade20k(FileDataset):
    """Names are those of the files: `ADE_train_00000001`.

    In the masks of the archive 0 means `other`, which is ignored, and c + 1 is class c. Masks that
    other programs have shifted hold class c as c and 255 for `other`. The
    numbers in a hundred of them show which of the two they are, and `notes` says so.

    Args:
        root: ADEChallengeData2016, or the folder around it.

    Raises:
        UserError: the layout is not complete.
    """

    def __init__(self, root: Path | None, options: DatasetOptions) -> None:
        root = require_root(root, "ade20k", LAYOUT)
        folder = first_with(root, PLACES, f"{IMAGES}/training")
        if folder is None:
            raise UserError(
                f"`data_root` {root}: there is no folder {IMAGES}/training in it or in its "
                f"ADEChallengeData2016. Give the folder that {LAYOUT}."
            )
        self.folder = folder
        of = {part: jpeg_files(folder / IMAGES / part) for part in ("training", "validation")}
        for part, files in of.items():
            if not files:
                raise UserError(
                    f"{folder / IMAGES / part}: there are no images. Unpack "
                    f"ADEChallengeData2016.zip of the scene parsing benchmark there."
                )
        self._parts = {name: part for part, files in of.items() for name in files}
        self._files = {name: file for files in of.values() for name, file in files.items()}
        self._known = {same_name(name): name for name in self._parts}
        train, evaluation = list(of["training"]), list(of["validation"])
        shifted = self._is_shifted(train)
        original = {0: IGNORE, **{c + 1: c for c in range(len(CLASSES))}}
        self.labels = plain_map(CLASSES) if shifted else LabelMap(original, CLASSES)
        super().__init__(INFO, folder, (train, [], evaluation), options, (TRAIN, EVALUATION))
        self.notes += (
            "The masks of ADE20K are shifted: class c is c, and 255 is ignored."
            if shifted
            else "The masks of ADE20K are those of the archive: class c is c + 1, and 0 (other) is "
            "ignored.",
        )

    def _is_shifted(self, names: list[str]) -> bool:
        """Whether 255 stands for other; a hundred masks of the archive hold no 255, and as many
        shifted ones do."""
        for name in names[:: max(1, len(names) // LOOKED_AT)][:LOOKED_AT]:
            path = self.mask_path(name)
            with contextlib.suppress(UserError):  # a broken one is reported when it is read
                values = read_mask(path).values if path.is_file() else np.zeros(1)
                if (values == IGNORE).any():
                    return True
                if (values == len(CLASSES)).any():
                    return False
        return False

    def image_path(self, name: str) -> Path:
        return self.folder / IMAGES / self._parts[name] / self._files[name]

    def mask_path(self, name: str) -> Path:
        return self.folder / MASKS / self._parts[name] / f"{name}.png"

    def label_map(self, mask: Path) -> LabelMap:
        return self.labels

    def find(self, entry: str) -> str | None:
        """Find an image by its bare name or the path of a JPEG file."""
        return self._known.get(jpeg_name(entry))
