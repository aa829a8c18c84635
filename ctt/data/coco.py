"""COCO 2017 with background and its 80 classes of things."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from PIL import Image

from ctt.data.channels import IMAGENET_MEAN, IMAGENET_STD
from ctt.data.coco_json import CocoFile, CocoImage, Key, read_coco
from ctt.data.dataset import IGNORE, DatasetInfo
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
from ctt.data.shapes import paint
from ctt.data.voc import bit_palette
from ctt.errors import UserError
from ctt.files import atomic_write
from ctt.processes import cpus

LAYOUT = "holds train2017, val2017 and annotations of COCO 2017"
PLACES = ("", "coco", "COCO", "images")
PARTS = {"train2017": 118_287, "val2017": 5000}
MASKS = "masks"
COMMAND = "ctt-data coco-masks --data-root"

CLASSES = (
    "background",
    *"""person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", "),
)
INFO = DatasetInfo("coco", CLASSES, bit_palette(len(CLASSES)), IMAGENET_MEAN, IMAGENET_STD)


class Coco(FileDataset):
    """Names are those of the files: `000000391895`.

    Masks are PNG files in masks/train2017 and masks/val2017, or in masks alone, as `write_masks`
    makes them of the annotations, or as other programs have them.

    Args:
        root: the folder that holds train2017 and val2017, or the one around it.

    Raises:
        UserError: the layout is not complete, or there are no masks.
    """

    def __init__(self, root: Path | None, options: DatasetOptions) -> None:
        root = require_root(root, "coco", LAYOUT)
        self.images, self.masks = folders(root)
        if not any((self.masks / part).is_dir() for part in PARTS) and not list_names(self.masks):
            raise UserError(
                f"{self.masks}: there are no masks. Make them of the annotations with: "
                f"{COMMAND} {root}"
            )
        of = {part: jpeg_files(self.images / part) for part in PARTS}
        self._parts = {name: part for part, files in of.items() for name in files}
        self._files = {name: file for files in of.values() for name, file in files.items()}
        self._known = {same_name(name): name for name in self._parts}
        # palettes of other programs have colours of their own
        self.labels = plain_map(CLASSES)
        published = (PARTS["train2017"], PARTS["val2017"])
        names = (list(of["train2017"]), list[str](), list(of["val2017"]))
        super().__init__(INFO, self.images, names, options, published)

    def image_path(self, name: str) -> Path:
        return self.images / self._parts[name] / self._files[name]

    def mask_path(self, name: str) -> Path:
        own = self.masks / self._parts[name] / f"{name}.png"
        together = self.masks / f"{name}.png"
        return together if together.is_file() and not own.is_file() else own

    def label_map(self, mask: Path) -> LabelMap:
        return self.labels

    def find(self, entry: str) -> str | None:
        """Find an image by its bare name or the path of a JPEG file."""
        return self._known.get(jpeg_name(entry))


def folders(root: Path) -> tuple[Path, Path]:
    """Return the folder of train2017 and val2017, and that of the masks.

    Raises:
        UserError: a folder of images is missing, or has none.
    """
    images = first_with(root, PLACES, "train2017")
    if images is None:
        raise UserError(
            f"`data_root` {root}: there is no folder train2017. Give the folder that {LAYOUT}."
        )
    for part in PARTS:
        if not list_names(images / part):
            raise UserError(f"{images / part}: there are no images. Unpack {part}.zip there.")
    base = images.parent if images.name == "images" else images
    return images, base / MASKS


def instance_file(root: Path, part: str) -> Path:
    """Return the file of the official annotations of a part.

    Raises:
        UserError: there is none.
    """
    images, masks = folders(root)
    for folder in (masks.parent, images, images.parent):
        path = folder / "annotations" / f"instances_{part}.json"
        if path.is_file():
            return path
    raise UserError(
        f"{masks.parent / 'annotations' / f'instances_{part}.json'}: there is no such file. Unpack "
        f"annotations_trainval2017.zip of COCO there."
    )


def write_masks(
    root: Path, threads: int, begin: Callable[[str, int], None], advance: Callable[[], None]
) -> tuple[int, int]:
    """Write the masks that the annotations of both parts make; those that are there are left alone.

    Classes are numbered by the rising ids of their categories, from 1 on. Of overlapping instances
    the smaller lies on top; crowds belong to their class, and of instances of one size lie below;
    an image without annotation is background.

    Args:
        threads: images painted at a time; 0: one for each core.
        begin: called with a part and its number of images. advance: called after each image.

    Returns:
        masks written, and those that were there.

    Raises:
        UserError: a file that is missing or wrong.
    """
    written_now = present = 0
    for part in PARTS:
        path = instance_file(root, part)
        file = read_coco(path)
        wrong = sorted(set(file.categories.values()) ^ set(CLASSES[1:]))
        if wrong:
            raise UserError(
                f"{path}: its categories are not the 80 of COCO; these differ: "
                f"{', '.join(wrong[:5])}. Own classes are converted by ctt-data convert."
            )
        begin(part, len(file.images))
        for is_new in _paint_all(file, folders(root)[1] / part, threads):
            advance()
            written_now += is_new
            present += not is_new
    return written_now, present


def _paint_all(file: CocoFile, folder: Path, threads: int) -> Iterator[bool]:
    """Yield for each image True if its mask was written now, False if it was there."""
    numbers = {name: CLASSES.index(name) for name in file.categories.values()}

    def work(item: tuple[Key, CocoImage]) -> bool:
        key, image = item
        path = folder / f"{PurePosixPath(image.name).stem}.png"
        if path.is_file():
            return False
        shapes = file.shapes(key)
        if not image.height or not image.width:
            raise UserError(f"{file.path}: image {image.name} has no height and width.")
        try:
            label = paint(shapes, numbers, image.height, image.width, by_area=True).label
        except UserError as error:
            raise UserError(f"{file.path}: image {image.name}: {error}.") from None
        picture = Image.fromarray(label, "P")
        colours = [*INFO.palette, *[(0, 0, 0)] * (IGNORE - len(CLASSES)), (255, 255, 255)]
        picture.putpalette([channel for colour in colours for channel in colour])
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            picture.save(temporary, "PNG")
        return True

    with ThreadPoolExecutor(threads or cpus()) as pool:
        try:
            yield from pool.map(work, file.images.items())
        finally:
            pool.shutdown(cancel_futures=True)
