"""Masks in forms that annotation tools open: COCO JSON, LabelMe's JSON files, CVAT's archive."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from contourpy import contour_generator
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ctt.data.dataset import DatasetInfo
from ctt.files import atomic_write
from ctt.inference.render import colorize

Form = Literal["coco", "labelme", "cvat"]
FORMS: tuple[Form, ...] = ("coco", "labelme", "cvat")
SMALLEST = 8  # pixels of an area that stays one; smaller ones are noise of predictions
BACKGROUND = "background"  # the name of a first class that nobody draws
LABELME = "5.0.0"  # whose form the files have
Array = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True)
class Outline:
    """An area of one class, without its holes.

    Attributes:
        label: number of the class.
        points: (n, 2) x and y of its corners, in pixels from the corner of the image.
        area: pixels.
    """

    label: int
    points: Array
    area: int


def drawn_classes(info: DatasetInfo) -> dict[int, str]:
    """Return the classes that annotations have: all but a first one that is called background."""
    named = dict(enumerate(info.classes))
    if named[0] == BACKGROUND:
        del named[0]
    return named


def outlines(label: Tensor, info: DatasetInfo) -> list[Outline]:
    """Return the areas of a mask (H, W), the largest first.

    Holes are filled: what lies in one is a smaller area of its own that comes later, so that the
    mask is what results from drawing all in their order, or the smaller on top. Areas of fewer than
    `SMALLEST` pixels belong to what is nearest. Pixels without data (255) in a hole are covered by
    what is around them: COCO has no sign for them, and a dataset ignores them by itself.
    """
    values = without_specks(label.cpu().numpy())
    found = [
        outline
        for number in np.unique(values)
        if number in drawn_classes(info) or (number == 0 and info.classes[0] == BACKGROUND)
        for outline in _of_class(values == number, int(number))
    ]
    found.sort(key=lambda outline: -outline.area)
    classes = drawn_classes(info)
    # background matters only where it lies in a hole of something
    is_around = _areas_around([outline for outline in found if outline.label in classes])
    return [outline for outline in found if outline.label in classes or is_around(outline)]


def _areas_around(found: list[Outline]) -> Callable[[Outline], bool]:
    """Return whether the box of a larger one of the areas, the largest first, is around one's."""
    if not found:
        return lambda outline: False
    # as arrays, for a mask may have thousands of areas
    left, top = np.array([outline.points.min(axis=0) for outline in found]).T.copy()
    right, bottom = np.array([outline.points.max(axis=0) for outline in found]).T.copy()
    falling = np.array([-outline.area for outline in found])

    def is_around(outline: Outline) -> bool:
        (x0, y0), (x1, y1) = outline.points.min(axis=0), outline.points.max(axis=0)
        n = int(np.searchsorted(falling, -outline.area))
        around = (left[:n] < x0) & (top[:n] < y0) & (right[:n] > x1) & (bottom[:n] > y1)
        return bool(around.any())

    return is_around


def without_specks(label: Array) -> Array:
    """Return a mask (H, W) whose areas of fewer than `SMALLEST` pixels take the nearest class."""
    specks = np.zeros(label.shape, np.bool_)
    for number in np.unique(label):
        parts, _ = ndimage.label(label == number)
        sizes = np.bincount(parts.ravel())
        specks |= (parts > 0) & (sizes < SMALLEST)[parts]
    if specks.all():
        return label
    nearest = ndimage.distance_transform_edt(specks, return_distances=False, return_indices=True)
    result: Array = label[tuple(nearest)]
    return result


def _of_class(mask: Array, label: int) -> Iterator[Outline]:
    parts, _ = ndimage.label(mask)
    for number, place in enumerate(ndimage.find_objects(parts), 1):
        part = np.pad(parts[place] == number, 1)
        filled = ndimage.binary_fill_holes(part)
        # through the middles between pixels of both kinds
        lines: Any = contour_generator(z=filled.astype(np.float64)).lines(0.5)
        points = max(lines, key=len)[:-1] - 0.5  # of the padded part, whose first pixel is at -1
        corner = np.array([place[1].start, place[0].start])
        yield Outline(label, _corners(points) + corner, int(filled.sum()))


def _corners(points: Array) -> Array:
    """Return a polygon without the points on a straight line between their neighbours."""
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turn = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    corners: Array = points[np.abs(turn) > 1e-9]
    return corners


def write_coco(path: Path, masks: Mapping[str, Tensor], info: DatasetInfo) -> None:
    """Write COCO's JSON of polygons, each image's in the order in which they are drawn.

    Background in a hole of an area is a polygon of the category `background`.

    Args:
        masks: (H, W) by the names of the images, as paths below the folder of images.
    """
    shapes = {name: outlines(label, info) for name, label in masks.items()}
    used = {outline.label for found in shapes.values() for outline in found}
    classes = {**({0: BACKGROUND} if 0 in used else {}), **drawn_classes(info)}
    categories = {label: number for number, label in enumerate(classes, 1)}
    annotations: list[dict[str, Any]] = []
    for image, found in enumerate(shapes.values(), 1):
        for outline in found:
            (left, top), (right, bottom) = outline.points.min(axis=0), outline.points.max(axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": categories[outline.label],
                    "segmentation": [outline.points.flatten().tolist()],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": outline.area,
                    "iscrowd": 0,
                }
            )
    images = [
        {"id": number, "file_name": name, "height": label.shape[0], "width": label.shape[1]}
        for number, (name, label) in enumerate(masks.items(), 1)
    ]
    content = {
        "images": images,
        "categories": [{"id": categories[c], "name": info.classes[c]} for c in classes],
        "annotations": annotations,
    }
    with atomic_write(path) as part:
        part.write_text(json.dumps(content), "utf-8")


def write_labelme(folder: Path, masks: Mapping[str, Tensor], info: DatasetInfo) -> None:
    """Write LabelMe's JSON of polygons beside each image, but where one lies that `is_of_labelme`.

    Args:
        folder: of the images.
        masks: (H, W) by the names of the images in it.
    """
    for name, label in masks.items():
        path = (folder / name).with_suffix(".json")
        if is_of_labelme(path):  # somebody's work of hours
            continue
        shapes = [
            {
                "label": info.classes[outline.label],
                "points": outline.points.tolist(),
                "group_id": None,
                "shape_type": "polygon",
                "flags": {},
            }
            for outline in outlines(label, info)
        ]
        content: dict[str, Any] = {
            "version": LABELME,
            "flags": {},
            "shapes": shapes,
            "imagePath": PurePosixPath(name).name,
            "imageData": None,
            "imageHeight": label.shape[0],
            "imageWidth": label.shape[1],
        }
        with atomic_write(path) as part:
            part.write_text(json.dumps(content), "utf-8")


def is_of_labelme(path: Path) -> bool:
    """Return whether a file is there that `write_labelme` has not written, or not like this."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return (content["version"], content["imageData"]) != (LABELME, None)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError):
        return True


def write_cvat(path: Path, masks: Mapping[str, Tensor], info: DatasetInfo) -> None:
    """Write the archive that CVAT calls "Segmentation mask 1.1": masks of colours, pixel by pixel.

    Args:
        masks: (H, W) by the names of the images.
    """
    colours = zip(info.classes, info.palette, strict=True)
    labels = [f"{name}:{','.join(map(str, colour))}::" for name, colour in colours]
    stems = [str(PurePosixPath(name).with_suffix("")) for name in masks]
    with atomic_write(path) as part, zipfile.ZipFile(part, "w") as archive:
        head = "# label:color_rgb:parts:actions"
        archive.writestr("labelmap.txt", "".join(f"{line}\n" for line in [head, *labels]))
        archive.writestr(
            "ImageSets/Segmentation/default.txt", "".join(f"{stem}\n" for stem in stems)
        )
        for stem, label in zip(stems, masks.values(), strict=True):
            file = io.BytesIO()
            Image.fromarray(colorize(label, info).numpy()).save(file, format="PNG")
            archive.writestr(f"SegmentationClass/{stem}.png", file.getvalue())


def write(
    form: Form, out: Path, images: Path, masks: Mapping[str, Tensor], info: DatasetInfo
) -> Path:
    """Write masks in one of the forms.

    Args:
        out: folder of annotations.json and cvat.zip.
        images: folder of the images, where LabelMe's files lie.
        masks: (H, W) by the names of the images in it.

    Returns:
        the file or folder.
    """
    if form == "labelme":
        write_labelme(images, masks, info)
        return images
    path = out / ("annotations.json" if form == "coco" else "cvat.zip")
    writer = write_coco if form == "coco" else write_cvat
    writer(path, masks, info)
    return path
