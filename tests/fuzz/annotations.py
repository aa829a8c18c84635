"""Exports of annotation tools, changed in their bytes or in one of their values."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from ctt.data.exports import read_export
from ctt.data.exports.base import Request
from ctt.errors import UserError
from tests.data import exports

CHANGED = {
    "coco": "annotations/instances_default.json",
    "yolo": "labels/train/photo 0.txt",
    "labelme": "photo 2.json",
    "cvat": "annotations.xml",
    "masks": "labelmap.txt",
}


@cache
def exported(form: str, folder: Path) -> tuple[Path, bytes]:
    """An export's folder, and what was in the file that is changed."""
    root = exports.FORMS[form](folder / form)
    return root, (root / CHANGED[form]).read_bytes()


def replaced(values: Any, place: float, new: Any) -> Any:
    """Values of JSON with another one in the place of one of them, at any depth."""
    spots: list[tuple[Any, Any]] = []

    def collect(inner: Any) -> None:
        pairs = inner.items() if isinstance(inner, dict) else enumerate(inner)
        for key, value in list(pairs):
            spots.append((inner, key))
            if isinstance(value, dict | list):
                collect(value)

    collect(values)
    holder, key = spots[min(int(place * len(spots)), len(spots) - 1)]
    holder[key] = new
    return values


def read_annotations(form: str, content: bytes, folder: Path) -> None:
    """Read the export with the changed file, and paint every label as far as it can be painted."""
    root, _ = exported(form, folder)
    (root / CHANGED[form]).write_bytes(content)
    export = read_export(Request(root, folder / "nowhere"), form)
    first = None
    for item in export.items:
        try:
            if item.paint is not None:
                assert item.paint(exports.H, exports.W).label.shape == (exports.H, exports.W)
        except UserError as error:
            first = error
    if first is not None:
        raise first


def with_value(form: str, folder: Path, place: float, new: Any) -> bytes:
    """The file with another value, if it is JSON."""
    _, content = exported(form, folder)
    if not CHANGED[form].endswith(".json"):
        return content
    return json.dumps(replaced(json.loads(content), place, new)).encode()
