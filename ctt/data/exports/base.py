"""What every form of export gives: images, and how the label of each is painted."""

from __future__ import annotations

import dataclasses
import itertools
import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from ctt.data import IMAGE_SUFFIXES
from ctt.data.dataset import IGNORE
from ctt.data.description import MOST_CLASSES
from ctt.data.files import same_name
from ctt.data.folder import walk
from ctt.data.masks import Colour
from ctt.data.shapes import Painted
from ctt.errors import UserError

BACKGROUND = "background"
BACKGROUNDS = (BACKGROUND, "_background_")  # names that mean what is outside of all shapes
# words of paths that name a part, such as train2017; of several in one path the first here counts
PARTS = {
    "val": re.compile(r"(val|valid|validation)(\d{4})?"),
    "test": re.compile(r"test(\d{4})?"),
    "train": re.compile(r"train(ing)?(\d{4})?"),
}
# folders whose names say what kind of file they hold, and not which images
KINDS = ("images", "image", "imgs", "img", "jpegimages", "labels", "annotations", "json", "jsons")
WITHOUT_AREA = "images, which count as not annotated: lines, points and tags have no area"
HEAD = 2**16  # bytes of a file that tell which form it is of
Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Request:
    """What is to be read, and how.

    Attributes:
        source: a file, or a folder.
        target: below it nothing is read.
        images: the folder of the images; None: the place that the export names.
        masks, table: the folder of coloured masks, and the file that names their colours.
        classes: names in the order of their numbers; none: those of the export.
        closed: the export may have no other classes.
        empty: what images are that the export lists without any shape.
        crowd: what COCO's crowds are.
        tolerance: by how much a channel may differ from a colour.
    """

    source: Path
    target: Path
    images: Path | None = None
    masks: Path | None = None
    table: Path | None = None
    classes: tuple[str, ...] = ()
    closed: bool = False
    empty: str = "unlabeled"
    crowd: str = "class"
    tolerance: int = 0

    @property
    def folder(self) -> Path:
        """Return the folder of the source."""
        return self.source if self.source.is_dir() else self.source.parent


@dataclass(frozen=True)
class Item:
    """An image of the export.

    Attributes:
        name: path below the folder of the images.
        paint: the label for a height and width; None: the image is not annotated.
        size: for which the outlines were drawn, where the export says so.
        mask: the file of which the label has the size.
        entry: what the export calls it, for messages.
        evaluation: it belongs to the part to evaluate on.
    """

    name: str
    paint: Callable[[int, int], Painted] | None
    size: Size | None = None
    mask: Path | None = None
    entry: str = ""
    evaluation: bool = False


class Images:
    """The images below a folder, found by what exports call them.

    Only files that a walk through the folder finds are ever returned, so no name leads out of it.

    Args:
        root: the folder.
        target: below it there are no images of the export.
        without: folders of masks below `root`.
    """

    def __init__(self, root: Path, target: Path, without: Iterable[Path] = ()) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder of images.")
        self.root = root
        hidden = [path.resolve() for path in (target, *without)]
        self.names = [
            name
            for name in walk(root, "")
            if name.lower().endswith(IMAGE_SUFFIXES)
            if not any((root / name).resolve().is_relative_to(path) for path in hidden)
        ]
        self._by_file: dict[str, list[str]] = {}
        for name in self.names:
            path = PurePosixPath(same_name(name))
            for key in {path.name, path.stem}:
                self._by_file.setdefault(key, []).append(name)
        self._folders = {posixpath.dirname(same_name(name)) for name in self.names}
        self._ends: set[str] = set()  # of a/b both a/b and b
        for folder in self._folders:
            parts = PurePosixPath(folder).parts
            self._ends |= {"/".join(parts[i:]) for i in range(len(parts) or 1)}

    def find(self, entry: str, near: str | None = None) -> str:
        """Return the path below the folder of the image that an export calls `entry`.

        The last folders of both paths, as many as the shorter one has, must be the same, except
        `KINDS`. A name without folders is of an image in `near`, or below if there are none in it.

        Args:
            entry: a path as any machine wrote it, or a name without its ending.
            near: the folder that the entry starts from; None: any.

        Raises:
            UserError: there is none, or more than one.
        """
        text = same_name(entry.replace("\\", "/"))
        path = posixpath.normpath(posixpath.join(near or "", text))
        named, own = self._by_file.get(posixpath.basename(path), []), telling(path)
        bare = "/" not in text
        if bare and near in self._folders:
            found = [name for name in named if telling(name) == own]
        else:
            below = f"{near}/" if bare and near else "/"  # with which no name starts
            found = [
                name
                for name in named
                if all(map(str.__eq__, own, telling(name))) or same_name(name).startswith(below)
            ]
        if len(found) > 1:
            fit = {
                name: (same_name(name) == path, telling(name) == own, _shared_end(path, name))
                for name in found
            }
            found = [name for name in found if fit[name] == max(fit.values())]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{entry} may be {found[0]} or {found[1]} in {self.root}.")
        other = (
            f" {named[0]} is in another folder; if it is this image, give its folder (`images`)."
            if named
            else ""
        )
        raise UserError(f"{entry}: there is no such image in {self.root}.{other}")

    def place(self, file: Path, request: Request) -> str | None:
        """Return the folder of a file of the export below that of the images, empty: this one.

        Of a file elsewhere its folder below the source, or None.
        """
        folder, root = file.parent.resolve(), self.root.resolve()
        if folder == root:
            return ""
        bases = (root, request.folder.resolve())
        base = next((base for base in bases if folder.is_relative_to(base)), folder)
        return same_name(folder.relative_to(base).as_posix()) if folder != base else None

    def near(self, folder: str | None) -> str | None:
        """Return `folder` if there are images in a folder of this name, else None."""
        return folder if folder is not None and same_name(folder) in self._ends else None

    def others(self, used: set[str], tests: set[str]) -> tuple[list[str], int]:
        """Return the images beside used ones, and how many there are in other folders."""
        folders = {str(PurePosixPath(name).parent) for name in used}
        rest = [name for name in self.names if name not in used and name not in tests]
        beside = [name for name in rest if str(PurePosixPath(name).parent) in folders]
        return beside, len(rest) - len(beside)


@dataclass
class Export:
    """What an export holds.

    Attributes:
        classes: names, class 0 first.
        palette: their colours, or none.
        order: which of two shapes lies on top, as the end of a sentence.
        items: images that it lists.
        tests: those of the part test, which are not used.
        left_out: why something else is not used, and how often.
        faults: what is wrong with single images, a sentence each.
        ignored: names of classes that are no classes, but pixels to ignore.
    """

    form: str
    images: Images
    classes: tuple[str, ...]
    order: str = ""
    palette: tuple[Colour, ...] = ()
    items: list[Item] = field(default_factory=list)
    tests: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    ignored: tuple[str, ...] = ()

    def add(self, item: Item, part: str) -> None:
        """Add an image of the part `train`, `val` or `test`."""
        if part == "test":
            self.tests.add(item.name)
        else:
            self.items.append(dataclasses.replace(item, evaluation=part == "val"))

    def add_the_rest(self) -> None:
        """Add the images without annotation in the folders of annotated ones."""
        used = {item.name for item in self.items}
        self.items = self._once()
        beside, elsewhere = self.images.others(used, self.tests)
        self.items += [Item(name, None) for name in beside]
        if self.tests:
            self.left_out["images of the part test"] += len(self.tests)
        if elsewhere:
            self.left_out[f"images in folders of {self.images.root} without annotated ones"] += (
                elsewhere
            )

    def _once(self) -> list[Item]:
        """Return each image once, without tests; one that two entries annotate becomes a fault.

        Either may lack a part of the shapes, or mean another image.
        """
        entries: dict[str, list[Item]] = {}
        for item in self.items:
            entries.setdefault(item.name, []).append(item)
        items = []
        for name in (name for name in entries if name not in self.tests):
            annotated = [item for item in entries[name] if item.paint is not None]
            if len(annotated) < 2:
                items += annotated or entries[name][:1]
                continue
            one, other = (item.entry or str(item.mask) for item in annotated[:2])
            self.faults.append(
                f"{self.images.root / name}: the image is annotated twice, as {one} and as "
                f"{other}; neither is used. Take one out, or correct which image it is of."
            )
        return items

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Return the class number of each name, as `as_class` gives it."""
        return {as_class(name): number for number, name in enumerate(self.classes)}

    @property
    def outside(self) -> int:
        """Return the class of pixels in no shape: the background, or 255 if no class is one."""
        return self.numbers.get(BACKGROUND, IGNORE)


def _folders(path: str) -> tuple[str, ...]:
    """Return the folders of a path, the last one first."""
    return PurePosixPath(same_name(path)).parts[-2::-1]


def telling(path: str) -> list[str]:
    """Return the folders of a path that tell images apart, the last one first."""
    drives = ("/", "..", ":")  # what stands before folders
    return [f for f in _folders(path) if not f.endswith(drives) and f.lower() not in KINDS]


def _shared_end(path: str, other: str) -> int:
    """Return how many folders before the file name are the same."""
    pairs = zip(_folders(path), _folders(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def with_background(
    names: Iterable[str], request: Request, *, always: bool = True
) -> tuple[str, ...]:
    """Return the names of the classes: the wanted ones, or all with the background in front.

    Args:
        names: those of the export.
        always: there is a background, whether or not it is named.

    Raises:
        UserError: there are none, or more than a mask can number, or one that is not to be there;
            or images without shapes are to be background, and no class is.
    """
    found = list(dict.fromkeys(names))
    others = [name for name in found if name.lower() not in BACKGROUNDS]
    first = [BACKGROUND] if always or len(others) < len(found) else []
    classes = request.classes or (*first, *others)
    new = [name for name in others if name not in classes]
    if request.closed and new:
        raise UserError(
            f"`to` {request.target} has the classes {', '.join(classes)}, and the export also "
            f"{', '.join(new)}. Give a new folder, or leave these pixels out by `classes` "
            f"{shlex.join(classes)}."
        )
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise UserError(
            f"There must be 2 to {MOST_CLASSES} classes, the background among them, and here are "
            f"{len(classes)}. `classes` names those that are wanted."
        )
    if len({*map(as_class, classes)}) < len(classes):
        raise UserError(f"`classes` names a class twice ({', '.join(classes)}).")
    if request.empty == BACKGROUND and BACKGROUND not in map(as_class, classes):
        raise UserError(
            f"`empty` {BACKGROUND}: none of the classes is called {BACKGROUND}, of "
            f"{', '.join(classes)}."
        )
    return classes


def as_class(label: str) -> str:
    """Return the name of the class that a label of a shape means."""
    return BACKGROUND if label.lower() in BACKGROUNDS else label


def files_of(source: Path, pattern: str) -> list[Path]:
    """Return the files of a folder and its subfolders that fit a pattern, those above first.

    Hidden ones are left out, such as `._a.json`, which macOS writes. Of a source that is a file,
    that file.
    """
    if source.is_file():
        return [source]
    names = (name for name in walk(source, "") if PurePosixPath(name).match(pattern))
    found = (path for path in map(source.joinpath, names) if path.is_file())
    return sorted(found, key=lambda path: (len(path.parts), path))


def head_of(path: Path) -> bytes:
    """Return the beginning of a file, which tells what form it is of.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def why_unclear(file: Path, images: Images, names: Sequence[str]) -> str:
    """Return why a mask or file of labels is not used that may be of several images."""
    one, other = (images.root / name for name in names[:2])
    return (
        f"{file} may be of {one} or of {other}; neither is used. Take one of the two out, or "
        f"rename it."
    )


def named_part(path: str) -> str | None:
    """Return `val`, `test` or `train`, by the words of a path; None: it names no part."""
    words = re.split(r"[/._\- ]+", path.lower())
    return next((part for part, form in PARTS.items() if any(map(form.fullmatch, words))), None)


def part_of(*paths: str) -> str:
    """Return the part that the first of the paths names which names one; else `train`."""
    return next(filter(None, map(named_part, paths)), "train")
