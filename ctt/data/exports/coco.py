"""COCO: one JSON file of instances for each part."""

from __future__ import annotations

import posixpath
from collections import Counter
from functools import partial
from pathlib import Path

from ctt.data.coco_json import CocoFile, Key, NoInstancesError, read_coco
from ctt.data.exports.base import (
    BACKGROUND,
    Export,
    Images,
    Item,
    Request,
    as_class,
    files_of,
    part_of,
    with_background,
)
from ctt.data.shapes import Painted, Shape, paint
from ctt.errors import UserError

BOXES = "annotations with a box and no outline: their pixels are ignored"


def read(request: Request) -> Export:
    """Return the images and outlines of one instance file, or of all in a folder."""
    files, faults, left_out = _files(request.source)
    images = Images(_folder_of_images(request, files), request.target)
    found = [(file, *_found(file, images, request)) for file in files]
    # COCO's own folder also has files of the keypoints and the ground of the same images
    own = {n for file, names, _ in found if _is_own(file.path) for n in names.values()}
    same = [
        f for f, names, _ in found if names and not _is_own(f.path) and own >= {*names.values()}
    ]
    if same:
        left_out[f"JSON files of images that those of instances have, such as {same[0].path}"] += (
            len(same)
        )
    found = [entry for entry in found if entry[0] not in same]
    labels = [label for file, _, _ in found for label in file.categories.values()]
    classes = with_background(labels, request)
    export = Export("COCO", images, classes, "the smaller shape lies on top", left_out=left_out)
    export.faults += faults
    for file, names, missing in found:
        export.faults += missing
        _add(file, names, export, request)
    return export


def _is_own(path: Path) -> bool:
    return "instances" in path.stem.lower()


def _files(source: Path) -> tuple[list[CocoFile], list[str], Counter[str]]:
    """Return the instance files, what is wrong with others, and what is left out.

    Raises:
        UserError: there is no instance file.
    """
    files, faults, others = [], [], []
    for path in files_of(source, "*.json"):
        try:
            files.append(read_coco(path))
        except NoInstancesError as error:
            others.append((path, str(error)))
        except UserError as error:
            faults.append(str(error))
    if not files:
        messages = [*faults, *(text for _, text in others), f"{source}: there is no .json file."]
        raise UserError(messages[0])
    reason = (
        f"JSON files that are none of COCO's instances, such as {others[0][0]}" if others else ""
    )
    return files, faults, Counter({reason: len(others)} if others else {})


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


def _found(file: CocoFile, images: Images, request: Request) -> tuple[dict[Key, str], list[str]]:
    """Return the images of a file by their ids, and what is wrong with others."""
    near = images.near(images.place(file.path, request))
    names, faults = {}, []
    for key, image in file.images.items():
        try:
            names[key] = images.find(image.name, near)
        except UserError as error:
            faults.append(f"{file.path}: {error}")
    return names, faults


def _add(file: CocoFile, names: dict[Key, str], export: Export, request: Request) -> None:
    if file.strays:
        export.left_out["annotations of images or categories that are not in the file"] += (
            file.strays
        )
    # of one file that was named everything is wanted
    alone = file.path == request.source
    own = "" if alone else file.path.relative_to(request.source).as_posix()
    for key, name in names.items():
        image = file.images[key]
        annotated = key in file.annotations or request.empty == BACKGROUND
        size = (image.height, image.width) if image.height else None
        painted = partial(_paint, file, key, export, request.crowd == "class")
        entry = f"{image.name} in {file.path}"
        part = "train" if alone else part_of(own, posixpath.dirname(name))
        export.add(Item(name, painted if annotated else None, size, entry=entry), part)


def _paint(
    file: CocoFile, key: Key, export: Export, crowd: bool, height: int, width: int
) -> Painted:
    shapes = file.shapes(key, crowd=crowd)
    named = [Shape(as_class(s.label), s.outlines, s.bitmap) for s in shapes]
    boxes = sum(not a.get("segmentation") for a in file.annotations.get(key, []))
    painted = paint(named, export.numbers, height, width, by_area=True, outside=export.outside)
    return painted.also_dropped({BOXES: boxes} if boxes else {})
