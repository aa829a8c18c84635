"""Writes what an export holds as a folder that `--dataset folder` reads."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image, ImageOps

from ctt.data import IMAGE_SUFFIXES
from ctt.data.check import content
from ctt.data.dataset import IGNORE
from ctt.data.description import DESCRIPTION, read_description
from ctt.data.exports.base import Export, Item, Size
from ctt.data.files import same_name
from ctt.data.folder import IMAGE_FOLDERS, MASK_SUFFIXES, walk
from ctt.data.pictures import ORIENTATION, broken, is_turned, open_picture
from ctt.data.shapes import Label, Painted
from ctt.data.voc import bit_palette
from ctt.errors import UserError
from ctt.files import atomic_write

ANOTHER = "images, for another one of the same name is there already: rename them"
HEAD = "# The numbers in masks/ and what they mean; written by ctt-data convert.\n"


@dataclass
class Result:
    """What was written, and what was not.

    Attributes:
        labeled, evaluation, unlabeled: images.
        present: of these, those that were there before.
        clashes, unmatched: pixels, and the images that have some.
        turned: images whose outlines were drawn before a viewer turns them.
        left_out: why something was not used, and how often.
        faults: images that were skipped, and why.
    """

    labeled: int = 0
    evaluation: int = 0
    unlabeled: int = 0
    present: int = 0
    pixels: int = 0
    clashes: list[int] = field(default_factory=list)
    unmatched: list[int] = field(default_factory=list)
    turned: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Job(NamedTuple):
    """An image, its file, and where it goes below the target."""

    item: Item
    source: Path
    place: str


@dataclass(frozen=True)
class _Done:
    """What became of one image."""

    painted: Painted | None = None
    turned: bool = False
    present: bool = False
    another: bool = False


def convert(
    export: Export,
    target: Path,
    unlabeled: Iterable[Path] = (),
    *,
    link: bool = False,
    threads: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Result:
    """Write images/, masks/, unlabeled/, val/ and dataset.yaml. No file is ever overwritten.

    A call that was stopped goes on when it is made again: images that are there are left alone.

    Args:
        unlabeled: files of images without annotation, beside those of the export.
        link: symbolic links in place of copies.
        threads: 0: one for each core.
        advance: called after each image.

    Raises:
        UserError: the target holds something else, or cannot be written.
    """
    export.items = _once(export)
    if not any(item.paint for item in export.items):
        first = f" {export.faults[0]}" if export.faults else ""
        tests = (
            f" The part test is left out, {len(export.tests)} images: if it is to be learned, "
            f"rename its files or folders, or give its JSON file in place of the folder."
            if export.tests
            else ""
        )
        raise UserError(f"{export.images.root}: no annotated image is found.{tests}{first}")
    prepare(target, export)
    jobs = _jobs(export, unlabeled)
    result = Result(left_out=export.left_out, faults=export.faults)

    def work(job: Job) -> _Done | str:
        try:
            return _write(job, target, export, link)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        try:
            for (item, _, place), done in zip(jobs, pool.map(work, jobs), strict=True):
                advance()
                if isinstance(done, str):
                    result.faults.append(done)
                    continue
                if done.another:
                    result.left_out[ANOTHER] += 1
                    continue
                result.present += done.present
                result.turned += done.turned
                result.unlabeled += item.paint is None
                result.evaluation += place.startswith("val/")
                result.labeled += place.startswith("images/")
                if done.painted is not None:
                    _count(result, done.painted)
        finally:
            pool.shutdown(cancel_futures=True)
    return result


def _count(result: Result, painted: Painted) -> None:
    result.pixels += painted.label.size
    result.clashes += [painted.clashes] if painted.clashes else []
    result.unmatched += [painted.unmatched] if painted.unmatched else []
    result.left_out.update(painted.dropped)


def description(export: Export) -> str:
    """Return the text of dataset.yaml."""
    values = {"classes": [*export.classes], "ignore_index": IGNORE}
    if export.palette:
        values["palette"] = [list(colour) for colour in export.palette]
    return HEAD + yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )


def classes_of(target: Path) -> tuple[str, ...]:
    """Return the classes of a folder to which images can be added; none if it is a new one.

    Raises:
        UserError: its masks are not what `convert` writes, or its description cannot be read.
    """
    path = target / DESCRIPTION
    if not path.is_file():
        return ()
    found = read_description(path)
    classes = found.info.classes
    own = {**{number: number for number in range(len(classes))}, IGNORE: IGNORE}
    if found.mapping != own or found.mask_suffix or found.image_suffix or found.pairs:
        raise UserError(
            f"`to` {target}: {path} describes masks with other numbers or names than ctt-data "
            f"convert writes. Give a new folder."
        )
    return classes


def prepare(target: Path, export: Export) -> None:
    """Make the folder, or go on with one of the same classes.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    path = target / DESCRIPTION
    try:
        if path.is_file():
            if classes_of(target) == export.classes:
                return
            raise UserError(
                f"`to` {target}: {path} is there already, with other classes. Give a new folder."
            )
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"`to` {target} holds something already. Give a new folder.")
        target.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(description(export), "utf-8")
    except OSError as error:
        raise UserError(f"`to` {target} cannot be used ({error}).") from None


def _jobs(export: Export, unlabeled: Iterable[Path]) -> list[Job]:
    """Return the images and their places below the target.

    An image that would share its mask with another one becomes a fault.
    """
    jobs: dict[str, Job] = {}
    folders = [PurePosixPath(item.name).parent for item in export.items]
    common = os.path.commonpath(folders)  # such as images/, which stays out of the names
    for item in export.items:
        part = "unlabeled" if item.paint is None else "val/images" if item.evaluation else "images"
        place = PurePosixPath(part) / PurePosixPath(item.name).relative_to(common)
        _put(jobs, Job(item, export.images.root / item.name, place.as_posix()), export)
    sizes: dict[int, list[Path]] = {}
    for job in jobs.values():
        sizes.setdefault(job.source.stat().st_size, []).append(job.source)
    for folder in unlabeled:
        names = [folder.name] if folder.is_file() else walk(folder, "")
        base = folder.parent if folder.is_file() else folder
        for name in names:
            path = base / name
            if not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            if content(path) in map(content, sizes.get(path.stat().st_size, [])):
                export.left_out["images of `unlabeled` that are in the export too"] += 1
            else:
                _put(jobs, Job(Item(name, None), path, f"unlabeled/{name}"), export)
    return list(jobs.values())


def _once(export: Export) -> list[Item]:
    """Return each image once; one that two entries annotate becomes a fault.

    Either may lack a part of the shapes, or mean another image.
    """
    entries: dict[str, list[Item]] = {}
    for item in export.items:
        entries.setdefault(item.name, []).append(item)
    items = []
    for name, found in entries.items():
        annotated = [item for item in found if item.paint is not None]
        if len(annotated) < 2:
            items.append(next(iter(annotated or found)))
            continue
        one, other = (item.entry or str(item.mask) for item in annotated[:2])
        export.faults.append(
            f"{export.images.root / name}: the image is annotated twice, as {one} and as {other}; "
            f"neither is used. Take one of the two out, or correct which image it is of."
        )
    return items


def _put(jobs: dict[str, Job], job: Job, export: Export) -> None:
    stem = same_name(str(PurePosixPath(job.place).with_suffix("")))
    other = jobs.setdefault(stem, job)
    if other.source != job.source:
        export.faults.append(
            f"{job.source}: {other.source} has the same name and would be the same image of the "
            f"folder. Rename one of the two."
        )


def _write(job: Job, target: Path, export: Export, link: bool) -> _Done:
    item, source, place = job
    image = target / place
    if _is_taken(image, source):
        return _Done(another=True)
    if item.paint is None:
        if _there(item, source, target, IMAGE_FOLDERS) is not None:
            return _Done(present=True)
        stored_size(source)
        _bring(source, image, link)
        return _Done()
    mask = (target / place.replace("images/", "masks/", 1)).with_suffix(".png")
    if image.exists() and any(mask.with_suffix(s).exists() for s in MASK_SUFFIXES):
        return _Done(present=True)
    painted, turned = _label(item, source)
    if not mask.exists():
        mask.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(mask) as part:
            _picture(painted.label, export).save(part, "PNG")
    if not image.exists():  # after its mask, without which it would be a fault
        before = _there(item, source, target, ("unlabeled",))
        if before is None:
            _bring(source, image, link)
        else:
            image.parent.mkdir(parents=True, exist_ok=True)
            before.rename(image)
    return _Done(painted, turned)


def _is_taken(image: Path, source: Path) -> bool:
    """Return whether another image has the place, or the mask that would belong to it."""
    if image.exists():
        return content(image) != content(source)
    endings = (ending for suffix in IMAGE_SUFFIXES for ending in (suffix, suffix.upper()))
    return any(image.with_suffix(ending).exists() for ending in endings)


def _there(item: Item, source: Path, target: Path, parts: Iterable[str]) -> Path | None:
    """Return the copy of an image in one of the parts of the target, from before its annotation.

    An export may have put the image into more folders than it has there.
    """
    names = PurePosixPath(item.name).parts
    for part in parts:
        for start in range(len(names)):
            path = target.joinpath(part, *names[start:])
            if path.is_file() and content(path) == content(source):
                return path
    return None


def _bring(source: Path, image: Path, link: bool) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    if link:
        image.symlink_to(source.resolve())
        return
    with atomic_write(image) as part:
        shutil.copyfile(source, part)


def _picture(label: Label, export: Export) -> Image.Image:
    picture = Image.fromarray(label, mode="P")
    colours = export.palette or bit_palette(len(export.classes))
    # of pixels to ignore; the palette must be whole, or Pillow gives 255 another number
    free = next((v, v, v) for v in range(IGNORE, -1, -1) if (v, v, v) not in colours)
    whole = [*colours, *[free] * (IGNORE + 1 - len(colours))]
    picture.putpalette([channel for colour in whole for channel in colour])
    return picture


def stored_size(path: Path) -> tuple[Size, int]:
    """Return height and width of an image as it is stored, and how viewers turn it (EXIF).

    Raises:
        UserError: it cannot be read as an image, or is a too large one.
    """
    try:
        with open_picture(path) as file:
            turn = file.getexif().get(ORIENTATION, 1) if is_turned(file) else 1
            return (file.height, file.width), turn
    except UserError:
        raise
    except Exception as error:  # bytes that are no image can raise anything
        raise broken(path, "an image", error) from None


def _label(item: Item, source: Path) -> tuple[Painted, bool]:
    """Return the label of an image as viewers show it, and whether it was turned for that.

    Raises:
        UserError: the outlines were drawn for an image of another size.
    """
    assert item.paint is not None
    stored, turn = stored_size(source)
    shown = stored[::-1] if turn >= 5 else stored  # 5 to 8 exchange the sides
    size = item.size or (stored_size(item.mask)[0] if item.mask else shown)
    if size == shown:
        return item.paint(*shown), False
    if size != stored:
        raise UserError(
            f"{source}: the image has {shown[1]}x{shown[0]} pixels, but was annotated with "
            f"{size[1]}x{size[0]}. Give the images that were annotated (`images`)."
        )
    painted = item.paint(*stored)
    picture = Image.fromarray(painted.label)
    picture.getexif()[ORIENTATION] = turn
    turned = np.asarray(ImageOps.exif_transpose(picture))
    return painted._replace(label=turned), True
