"""Writes what an export holds as a folder that `--dataset folder` reads."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import yaml
from PIL import Image

from ctt.data import IMAGE_SUFFIXES
from ctt.data.check import content
from ctt.data.dataset import IGNORE
from ctt.data.description import DESCRIPTION, read_description
from ctt.data.exports.base import Export, Item
from ctt.data.exports.views import View, convention, paint_as_shown, view_of
from ctt.data.files import same_name
from ctt.data.folder import IMAGE_FOLDERS, MASK_SUFFIXES, walk
from ctt.data.shapes import Label, Painted
from ctt.errors import UserError
from ctt.files import atomic_write
from ctt.processes import cpus

ANOTHER = "images, for another one of the same name is there already: rename them"
OTHER_PART = "changes between images/ and val/: images stay in the part in which they are"
T = TypeVar("T")
HEAD = "# The numbers in masks/ and what they mean; written by ctt-data convert.\n"


@dataclass
class Result:
    """What was written, and what was not.

    Attributes:
        labeled, evaluation, unlabeled: images.
        present: of these, those that were there before.
        clashes, unmatched: pixels, and the images that have some.
        example: of unmatched values in masks, those of the first image that has some.
        turned: images whose outlines were drawn before a viewer turns them.
        unsure: images of which nothing says whether they were drawn before or after.
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
    example: str = ""
    turned: int = 0
    unsure: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Job(NamedTuple):
    """An image, its file, and where it goes below the target."""

    item: Item
    source: Path
    place: str


@dataclass(frozen=True)
class _Done:
    """What became of one image.

    Attributes:
        place: below the target; empty: another image has it.
        as_stored: it was annotated before a viewer turns it; None: nobody knows.
    """

    place: str
    painted: Painted | None = None
    present: bool = False
    as_stored: bool | None = False


@dataclass(frozen=True)
class _Target:
    """Where images go.

    Attributes:
        present: images that were there before, below the folder, by their file names.
        sources: files by the places below the folder where they go.
        palette: red, green and blue of the numbers 0 to 255 in masks.
    """

    folder: Path
    present: dict[str, list[str]]
    sources: dict[str, Path]
    palette: list[int]
    link: bool


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
    sources = {job.place: job.source for job in jobs}
    place = _Target(target, _present(target), sources, _palette(target), link)
    with ThreadPoolExecutor(threads or cpus()) as pool:
        try:
            views = [*pool.map(_tried(view_of), (j.item for j in jobs), (j.source for j in jobs))]
            work = _tried(partial(_write, target=place, as_stored=convention(views)))
            for job, done in zip(jobs, pool.map(work, jobs, views), strict=True):
                advance()
                if isinstance(done, UserError):
                    result.faults.append(str(done))
                elif done.place:
                    _count(result, job, done)
                else:
                    result.left_out[ANOTHER] += 1
        finally:
            pool.shutdown(cancel_futures=True)
    return result


def _tried(work: Callable[..., T]) -> Callable[..., T | UserError]:
    """Return a function that returns its UserError in place of raising it."""

    def try_it(*arguments: Any) -> T | UserError:
        try:
            return work(*arguments)
        except UserError as error:
            return error

    return try_it


def _count(result: Result, job: Job, done: _Done) -> None:
    result.present += done.present
    result.unlabeled += done.place.startswith("unlabeled/")
    result.evaluation += done.place.startswith("val/")
    result.labeled += done.place.startswith("images/")
    if job.item.paint is not None and done.place.startswith("val/") != job.item.evaluation:
        result.left_out[OTHER_PART] += 1
    if (painted := done.painted) is None:
        return
    result.turned += done.as_stored is True
    result.unsure += [job.source] if done.as_stored is None else []
    result.pixels += painted.label.size
    result.clashes += [painted.clashes] if painted.clashes else []
    result.unmatched += [painted.unmatched] if painted.unmatched else []
    result.example = result.example or painted.example
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

    An image that cannot be used becomes a fault.
    """
    jobs: dict[str, Job] = {}
    folders = [PurePosixPath(item.name).parent for item in export.items]
    common = os.path.commonpath(folders)  # such as images/, which stays out of the names
    for item in export.items:
        part = "unlabeled" if item.paint is None else "val/images" if item.evaluation else "images"
        place = PurePosixPath(part) / PurePosixPath(item.name).relative_to(common)
        _put(jobs, Job(item, export.images.root / item.name, place.as_posix()), export)
    sizes: dict[int | None, list[Path]] = {}
    tests = [export.images.root / name for name in export.tests]  # whose copies are not used either
    for path in [*(job.source for job in jobs.values()), *tests]:
        sizes.setdefault(_size(path), []).append(path)
    for folder in unlabeled:
        names = [folder.name] if folder.is_file() else walk(folder, "")
        base = folder.parent if folder.is_file() else folder
        for name in (name for name in names if name.lower().endswith(IMAGE_SUFFIXES)):
            path = base / name
            size = _size(path)
            if size is not None and content(path) in map(content, sizes.get(size, [])):
                export.left_out["images of `unlabeled` that are in the export too"] += 1
            else:
                _put(jobs, Job(Item(name, None), path, f"unlabeled/{name}"), export)
    return list(jobs.values())


def _size(path: Path) -> int | None:
    """Return how many bytes a file has; None: it cannot be read, as a link that leads nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _put(jobs: dict[str, Job], job: Job, export: Export) -> None:
    """Add a job, or a fault if its image cannot be read or would share its mask with another."""
    if _size(job.source) is None:
        export.faults.append(_why_missing(job.source))
        return
    stem = same_name(str(PurePosixPath(job.place).with_suffix("")))
    other = jobs.setdefault(stem, job)
    if other.source != job.source:
        export.faults.append(
            f"{job.source}: {other.source} has the same name and would be the same image of the "
            f"folder. Rename one of the two."
        )


def _why_missing(path: Path) -> str:
    if path.is_symlink():
        return (
            f"{path}: the link leads to {path.readlink()}, which is not there. Bring that file "
            f"back, or remove the link."
        )
    return f"{path} cannot be read. Look whether it is there and who may read it."


def _write(job: Job, view: View | UserError, target: _Target, as_stored: bool | None) -> _Done:
    """Write the image and its mask.

    Args:
        as_stored: as `convention` returns it.
    """
    item, source, _ = job
    place = _place(job, target)
    if not place:
        return _Done("")
    image = target.folder / place
    mask = (target.folder / place.replace("images/", "masks/", 1)).with_suffix(".png")
    if image.exists() and (
        item.paint is None or any(mask.with_suffix(s).exists() for s in MASK_SUFFIXES)
    ):
        return _Done(place, present=True)
    if isinstance(view, UserError):
        raise view
    painted, turned = None, view.is_as_stored(as_stored)
    if item.paint is not None:
        painted = paint_as_shown(item, view, turned)
        if not mask.exists():
            mask.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(mask) as part:
                _picture(painted.label, target.palette).save(part, "PNG")
    if not image.exists():  # after its mask, without which it would be a fault
        image.parent.mkdir(parents=True, exist_ok=True)
        if before := _there(source, target, ("unlabeled/",)):
            (target.folder / before).rename(image)
        else:
            _bring(source, image, target.link)
    return _Done(place, painted, as_stored=turned)


def _place(job: Job, target: _Target) -> str:
    """Return where an image is or goes below the target; empty: another one has the place.

    Raises:
        UserError: a link is there that leads nowhere.
    """
    item, source, place = job
    image = target.folder / place
    if image.is_symlink() and not image.exists():
        raise UserError(
            f"{image}: the link leads to {image.readlink()}, which is not there. Bring that file "
            f"back, or remove the link and its mask, and give the command again."
        )
    if image.exists() and content(image) == content(source):
        return place
    # the folders of the names depend on which images an export holds
    parts = ("images/", "val/images/", *(["unlabeled/"] if item.paint is None else []))
    if there := _there(source, target, parts):
        return there
    endings = (ending for suffix in IMAGE_SUFFIXES for ending in (suffix, suffix.upper()))
    if image.exists() or any(image.with_suffix(ending).exists() for ending in endings):
        return ""  # also where another one has the mask
    return place


def _present(target: Path) -> dict[str, list[str]]:
    """Return the images below the target by their file names."""
    found: dict[str, list[str]] = {}
    for name in (name for part in IMAGE_FOLDERS for name in walk(target, part)):
        found.setdefault(same_name(PurePosixPath(name).name), []).append(name)
    return found


def _there(source: Path, target: _Target, parts: tuple[str, ...]) -> str | None:
    """Return the copy of an image that was in one of the parts of the target before.

    An equal image of the export, whose place it is, has it first.
    """
    for name in target.present.get(same_name(source.name), []):
        path, owner = target.folder / name, target.sources.get(name)
        if not name.startswith(parts) or not path.is_file() or content(path) != content(source):
            continue
        if owner is None or content(owner) != content(source):
            return name
    return None


def _bring(source: Path, image: Path, link: bool) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    if link:
        image.symlink_to(source.resolve())
        return
    with atomic_write(image) as part:
        shutil.copyfile(source, part)


def _picture(label: Label, palette: list[int]) -> Image.Image:
    picture = Image.fromarray(label, mode="P")
    picture.putpalette(palette)
    return picture


def _palette(target: Path) -> list[int]:
    """Return red, green and blue of each number in masks, as the target's description says."""
    found = read_description(target / DESCRIPTION)
    colours = found.info.palette
    ignored = [colour for colour, label in (found.colours or {}).items() if label == IGNORE]
    greys = ((v, v, v) for v in range(IGNORE, -1, -1) if (v, v, v) not in colours)
    free = ignored[0] if ignored else next(greys)
    # it must be whole, or Pillow gives 255 another number
    whole = [*colours, *[free] * (IGNORE + 1 - len(colours))]
    return [channel for colour in whole for channel in colour]
