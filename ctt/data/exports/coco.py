"""COCO: one JSON file of instances for each part."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ctt.data.coco_json import CocoFile, Key, read_coco
from ctt.data.exports.base import (
    BACKGROUND,
    Export,
    Images,
    Item,
    Request,
    as_class,
    class_outside,
    files_of,
    part_of,
    with_background,
)
from ctt.data.shapes import Painted, Shape, paint
from ctt.errors import UserError

BOXES = "annotations with a box and no outline: their pixels are ignored"


def read(request: Request) -> Export:
    """Return the images and outlines of one instance file, or of all in a folder."""
    files, faults = _files(request.source)
    images = Images(_folder_of_images(request, files), request.target)
    names = [name for file in files for name in file.categories.values()]
    classes = with_background(names, request)
    order = "the smaller shape lies on top"
    outside = class_outside(names, classes)
    export = Export("COCO", images, classes, order, outside, faults=faults)
    for file in files:
        _add(file, images, export, request)
    return export


def _files(source: Path) -> tuple[list[CocoFile], list[str]]:
    """Return the instance files, and what is wrong with others.

    COCO's own folder also has captions and keypoints of the same images, which do not count.
    """
    paths = files_of(source, "*.json")
    paths = [path for path in paths if "instances" in path.stem.lower()] or paths
    files, faults = [], []
    for path in paths:
        try:
            files.append(read_coco(path))
        except UserError as error:
            if path == paths[-1] and not files:
                raise
            faults.append(str(error))
    return files, faults


def _folder_of_images(request: Request, files: list[CocoFile]) -> Path:
    """Return the given folder, or the nearest one from which the images can be found."""
    if request.images is not None or not files:
        return request.images or request.folder
    sample = next(iter(files[0].images.values())).name
    for folder in (request.folder, request.folder.parent):
        try:
            Images(folder, request.target).find(sample)
        except UserError:
            continue
        return folder
    return request.folder


def _add(file: CocoFile, images: Images, export: Export, request: Request) -> None:
    if file.strays:
        export.left_out["annotations of images or categories that are not in the file"] += (
            file.strays
        )
    near = images.near(images.place(file.path, request))
    # of one file that was named everything is wanted
    alone = file.path == request.source
    part = "train" if alone else part_of(file.path.relative_to(request.source).as_posix())
    for key, image in file.images.items():
        try:
            name = images.find(image.name, near)
        except UserError as error:
            export.faults.append(f"{file.path}: {error}")
            continue
        annotated = key in file.annotations or request.empty == BACKGROUND
        size = (image.height, image.width) if image.height else None
        painted = partial(_paint, file, key, export, request.crowd == "class")
        entry = f"{image.name} in {file.path}"
        export.add(Item(name, painted if annotated else None, size, entry=entry), part)


def _paint(
    file: CocoFile, key: Key, export: Export, crowd: bool, height: int, width: int
) -> Painted:
    shapes = file.shapes(key, crowd=crowd)
    named = [Shape(as_class(s.label), s.outlines, s.bitmap) for s in shapes]
    boxes = sum(not a.get("segmentation") for a in file.annotations.get(key, []))
    painted = paint(named, export.numbers, height, width, by_area=True, outside=export.outside)
    return painted._replace(dropped={BOXES: boxes} if boxes else {})
