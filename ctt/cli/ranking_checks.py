"""What ctt-predict --rank finds in its folder, and which images it refuses."""

from __future__ import annotations

import csv
import filecmp
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ctt.errors import UserError
from ctt.text import BYTES_AS_THEY_ARE

if TYPE_CHECKING:
    from ctt.cli.ranking import Entry
    from ctt.data.dataset import Dataset

RESULTS = ("rank.csv", "rank.png", "images", "annotations.json", "cvat.zip")  # in --out


def check_copies(out: Path, entries: list[Entry], dataset: Dataset | None) -> None:
    """Refuse, even with --overwrite, to write over an image that is ranked or in the dataset.

    Raises:
        UserError: names the file.
    """
    from ctt.data.check import identity, image_files

    copies = [out / "images" / entry.place for entry in entries]
    targets = [out / "rank.png", *copies, *earlier(out)]
    there = {identity(target): target for target in targets if target.exists()}
    if not there:
        return
    files = [entry.file for entry in entries if entry.file is not None]
    if dataset is not None:
        names = (dataset.train_ids(), dataset.unlabeled_ids(), dataset.eval_ids())
        files += [path for part in image_files(dataset, *names).values() for path in part]
    for file in files:
        if target := there.get(identity(file)):
            raise UserError(f"{target} is one of the images. Give another --out.")


def is_drawn(copied: Path) -> bool:
    """Return whether somebody has drawn or changed masks of a copy in LabelMe, which stay."""
    from ctt.inference.annotations import is_of_labelme

    return is_of_labelme(copied.with_suffix(".json"))


def check_drawn(out: Path, entries: Iterable[Entry], dataset: Dataset | None) -> None:
    """Refuse another image under the name of a copy whose masks somebody has drawn in LabelMe.

    Its masks would be taken for those of the other image.

    Raises:
        UserError: names the file.
    """
    for entry in entries:
        copied = out / "images" / entry.place
        if not is_drawn(copied):
            continue
        drawn = copied.with_suffix(".json")
        if not copied.is_file():
            raise UserError(
                f"{drawn} was changed in LabelMe, but {copied}, on which it was drawn, is gone. "
                f"Put the image back, or give another --out."
            )
        if not _holds(copied, entry, dataset):
            raise UserError(
                f"{drawn} was changed in LabelMe, and {entry.name}, of which a copy would lie "
                f"beside it, is not the image that it was drawn on. Give another --out."
            )


def _holds(copied: Path, entry: Entry, dataset: Dataset | None) -> bool:
    """Return whether a copy is that of this image."""
    import torch

    from ctt.data.pictures import read_image

    if entry.file is not None:
        return filecmp.cmp(entry.file, copied, shallow=False)
    assert dataset is not None
    try:
        return torch.equal(read_image(copied), dataset.image(entry.name))
    except UserError:
        return False


def earlier(out: Path) -> list[Path]:
    """Return what an earlier call has written, but for copies that `is_drawn`."""
    table, images = out / "rank.csv", out / "images"
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8", errors=BYTES_AS_THEY_ARE) as file:
        reader = csv.DictReader(file)
        if "copy" not in (reader.fieldnames or ()):
            return []
        names = [row["copy"] for row in reader]
    found = [table, *(out / name for name in RESULTS if name != images.name)]
    for copied in (images / name for name in names if name):
        masks = copied.with_suffix(".json")
        if not is_drawn(copied) and copied.resolve().is_relative_to(images.resolve()):
            found += [copied, masks]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def check_places(entries: Iterable[Entry]) -> None:
    """Refuse images whose names differ in their endings alone, or not at all.

    Masks of both would have one name: LabelMe's files and CVAT's archive leave endings out.

    Raises:
        UserError: names the first two.
    """
    seen: dict[PurePosixPath, Entry] = {}
    for entry in entries:
        place = entry.place.with_suffix("")
        if place in seen:
            raise UserError(
                f"{seen[place].name} and {entry.name}: the masks of both would be named {place}. "
                f"Rename one of them, or give the images after the run in two calls with an --out "
                f"each."
            )
        seen[place] = entry


def check_names(entries: Iterable[Entry]) -> None:
    """Refuse images whose names CVAT's archive cannot hold.

    Raises:
        UserError: names the first one.
    """
    for entry in entries:
        try:
            str(entry.place).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{entry.name}: the name is not in UTF-8, as CVAT's archive needs it. Rename the "
                f"image, or leave cvat out of --annotations."
            ) from None
