"""Datasets, split lists, geometric and photometric views, mixing. Knows nothing of networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctt.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ctt.data.dataset import Dataset
    from ctt.data.options import DatasetOptions

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# what telephones, cameras, browsers, microscopes and scanners of bodies write beside these
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".jxl", ".gif", ".dng", ".cr2", ".cr3"),
    *(".nef", ".arw", ".czi", ".lif", ".nd2", ".svs", ".ndpi", ".nii", ".nii.gz", ".dcm", ".npy"),
)
WITHOUT_FOLDER = {
    "digits": "the embedded dataset digits",
    "earth": "the dataset earth, which is in packages,",
}


def other_images(names: Iterable[str]) -> str:
    """Return a warning about image files in formats that are not read; empty if there are none."""
    found = [name for name in names if name.lower().endswith(OTHER_SUFFIXES)]
    if not found:
        return ""
    return (
        f"{len(found):,} file{'s' * (len(found) > 1)} in a format that is not read, such as "
        f"{found[0]}: convert them, to {', '.join(IMAGE_SUFFIXES)}."
    )


def names() -> list[str]:
    """Return the datasets that `open_dataset` knows."""
    return ["digits", "earth", "voc", "cityscapes", "ade20k", "coco", "folder"]


def check_name(name: str) -> None:
    """Refuse a name that is none of a dataset.

    Raises:
        UserError: names those that there are.
    """
    if name not in names():
        raise UserError(f"`dataset` {name}: no such dataset. Datasets: {', '.join(names())}.")


def open_dataset(name: str, root: Path | None, options: DatasetOptions) -> Dataset:
    """Return the dataset of that name.

    Args:
        root: its folder; None for a set without one.

    Raises:
        UserError: no such dataset, a folder given for one that has none, or one whose layout is
            not complete.
    """
    check_name(name)
    if name in WITHOUT_FOLDER and root is not None:
        raise UserError(f"`data_root`: {WITHOUT_FOLDER[name]} has no folder; leave it out.")
    if name == "digits":
        from ctt.data.digits import Digits

        return Digits(options.labeled_pool, options.eval_images, options.eval_split)
    if name == "earth":
        from ctt.data.earth import Earth

        return Earth(options.eval_split)
    if name == "voc":
        from ctt.data.voc import Voc

        return Voc(root, options)
    if name == "cityscapes":
        from ctt.data.cityscapes import Cityscapes

        return Cityscapes(root, options)
    if name == "ade20k":
        from ctt.data.ade20k import Ade20k

        return Ade20k(root, options)
    if name == "coco":
        from ctt.data.coco import Coco

        return Coco(root, options)
    from ctt.data.folder import Folder

    return Folder(root, options)
