"""What annotation tools export, read as images with shapes or coloured masks: one file a form."""

from __future__ import annotations

import re
from pathlib import Path

from ctt.data.exports.base import Export, Request, files_of, head_of
from ctt.errors import UserError

FORMS = ("coco", "yolo", "labelme", "cvat", "masks")
TABLES = ("labelmap.txt", "dataset_meta.json", "class_dict.csv", "label_colors.txt", "_classes.csv")
YOLO_FILES = ("data.yaml", "data.yml", "dataset.yaml")
OF_LABELME = re.compile(rb'"(shapes|imagePath)"\s*:')
OF_COCO = re.compile(rb'"(images|annotations|categories)"\s*:')
OF_YOLO = re.compile(rb"^names\s*:", re.MULTILINE)


def read_export(request: Request, form: str = "auto") -> Export:
    """Return what an export holds; images and masks are not read yet.

    Args:
        form: one of `FORMS`, or `auto`.

    Raises:
        UserError: it is of no known form, or does not follow its form.
    """
    source = request.source
    if not source.exists():
        raise UserError(f"{source}: there is no such file or folder.")
    if source.suffix.lower() in (".zip", ".tar", ".gz", ".7z"):
        raise UserError(f"{source} is an archive: unpack it first, and give the folder.")
    form = found_form(source) if form == "auto" else form
    if form == "coco":
        from ctt.data.exports.coco import read
    elif form == "yolo":
        from ctt.data.exports.yolo import read
    elif form == "labelme":
        from ctt.data.exports.labelme import read
    elif form == "cvat":
        from ctt.data.exports.cvat import read
    else:
        from ctt.data.exports.masks import read
    export = read(request)
    export.add_the_rest()
    return export


def found_form(source: Path) -> str:
    """Return the form of a file, or of the files in a folder.

    Raises:
        UserError: none of the known ones.
    """
    files = [source] if source.is_file() else files_of(source, "*")
    names = {path.name.lower(): path for path in reversed(files)}
    if any(name in names for name in TABLES):
        return "masks"
    if any(name in names and OF_YOLO.search(head_of(names[name])) for name in YOLO_FILES):
        return "yolo"
    if source.is_file() and source.suffix.lower() in (".yaml", ".yml"):
        return "yolo"
    if any(path.suffix.lower() == ".xml" and b"<annotations" in head_of(path) for path in files):
        return "cvat"
    for path in files:
        if path.suffix.lower() == ".json":
            head = head_of(path)
            if OF_LABELME.search(head):
                return "labelme"
            if OF_COCO.search(head):
                return "coco"
    raise UserError(
        f"{source}: none of the forms {', '.join(FORMS)} is recognised. A COCO or LabelMe export "
        f"has .json files, CVAT's an annotations.xml, YOLO's a data.yaml with `names`, and "
        f"coloured masks a labelmap.txt. Name the form by `form`."
    )
