"""Any data in folders: images/, masks/, optional unlabeled/ and val/, and a dataset.yaml."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath

from ctt.data import IMAGE_SUFFIXES, other_images
from ctt.data.channels import UNKNOWN_MEAN, UNKNOWN_STD
from ctt.data.dataset import IGNORE
from ctt.data.description import DESCRIPTION, read_description
from ctt.data.files import FileDataset, list_names, require_root, same_name
from ctt.data.labels import LabelMap
from ctt.data.options import DatasetOptions
from ctt.data.pictures import STATS
from ctt.data.remarks import of_size
from ctt.data.split import NO_MASK, read_lines, readings
from ctt.errors import UserError

LAYOUT = "holds images/, masks/ and dataset.yaml"
IMAGE_FOLDERS = ("images", "unlabeled", "val/images")
MASK_FOLDERS = ("masks", "val/masks")
PARTS = ("images", "masks", "unlabeled", "val")
OTHER_NAMES = {  # of the parts, in other programs
    "image": "images",
    "imgs": "images",
    "img": "images",
    "mask": "masks",
    "unlabelled": "unlabeled",
    "valid": "val",
    "validation": "val",
}
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
JPEG_SUFFIXES = (".jpg", ".jpeg")  # taken for a mask where there is no other, and then refused
JOINTS = "_-. "  # with which programs add to the name of an image
COMPARED = 1000  # names of masks among which the nearest one is searched


class Folder(FileDataset):
    """Names are paths below the root: `images/photo 1.jpg`, whose mask is `masks/photo 1.png`.

    Subfolders of images/ are found and mirrored in masks/. The images of unlabeled/ have no masks.
    Evaluation is on val/images with val/masks; without val/ a share of the images is held out.

    Args:
        root: the folder.

    Raises:
        UserError: the layout is not complete, or dataset.yaml is wrong.
    """

    turned = True
    states_white = True

    def __init__(self, root: Path | None, options: DatasetOptions) -> None:
        self.root = require_root(root, "folder", LAYOUT)
        path = self.root / DESCRIPTION
        self.description = description = read_description(path)
        classes = description.info.classes
        self.lossy = by_grey = description.threshold is not None
        self.labels = LabelMap(
            description.mapping, classes, description.colours, str(path), by_grey
        )
        self.assumed_ignore = None if description.says_ignore else IGNORE
        train = find_images(self.root, "images")
        if not train:
            raise UserError(
                f"{self.root / 'images'}: there are no images ({', '.join(IMAGE_SUFFIXES)})."
                f"{' '.join([*self._misnamed(), *self._of_other_forms()])}"
            )
        unlabeled = find_images(self.root, "unlabeled")
        evaluation = find_images(self.root, "val/images")
        if (self.root / "val").is_dir() and not evaluation:
            raise UserError(f"{self.root / 'val' / 'images'}: there are no images.")
        everything = [*train, *unlabeled, *evaluation]
        self._known = {same_name(name): name for name in everything}
        for name in everything:
            self._known.setdefault(_stem(name), name)
        for name in train:  # other programs' lists leave the folder out
            short = name.removeprefix("images/")
            self._known.setdefault(same_name(short), name)
            self._known.setdefault(_stem(short), name)
        self._masks = self._read_pairs()
        self._strays: list[Path] = []  # masks of no image
        for names, folder in ((train, ""), (evaluation, "val/")):
            self._match(names, folder)
        super().__init__(description.info, self.root, (train, unlabeled, evaluation), options)
        if description.info.bands and not description.says_statistics:
            self.notes += (
                f"{DESCRIPTION} says neither mean nor std of the bands, which are taken for "
                f"{UNKNOWN_MEAN} and {UNKNOWN_STD}. `{STATS}` finds them.",
            )
        strange = [*self._misnamed(), *self._of_other_forms()]
        self.notes += tuple(f"Warning:{text}" for text in strange)
        if self._strays:
            stray = self._strays[0].relative_to(self.root)
            self.notes += (
                f"Warning: {len(self._strays)} of the masks belong to no image, such as {stray}.",
            )

    def meaning(self) -> dict[str, str]:
        numbers, colours = self.description.mapping, self.description.colours or {}
        return {"numbers": str(sorted(numbers.items())), "colours": str(sorted(colours.items()))}

    def _misnamed(self) -> list[str]:
        """Return a sentence for each folder whose name is nearly one of this layout."""
        found = [name for name in list_names(self.root) if (self.root / name).is_dir()]
        meant = {name: OTHER_NAMES.get(name.lower(), name.lower()) for name in found}
        return [
            f" {self.root / name} is not read: is it meant as {part}/? Rename it."
            for name, part in meant.items()
            if part in PARTS and name != part and part not in found
        ]

    def _of_other_forms(self) -> list[str]:
        """Return a sentence for each folder of images with files of forms that are not read."""
        found = {part: other_images(walk(self.root, part)) for part in IMAGE_FOLDERS}
        return [f" {self.root / part} holds {text}" for part, text in found.items() if text]

    def _read_pairs(self) -> dict[str, Path]:
        """Return the masks that the list of pairs gives to images.

        Raises:
            UserError: a line is no image and a mask below the root, or an image has two masks.
        """
        masks: dict[str, Path] = {}
        if not self.description.pairs:
            return masks
        path = self.root / self.description.pairs
        for number, line in read_lines(path).items():
            found = [
                (name, mask)
                for image, text in readings(line.replace("\\", "/"))
                if text and text != NO_MASK
                if (name := self.find(image)) and (mask := self._file(text))
            ]
            if not found:
                raise UserError(
                    f"{path}, line {number}: {line.strip()} is no image and its mask, with a tab "
                    f"between them. Both are paths below {self.root}, such as images/1.jpg and "
                    f"masks/a.png, and must be there."
                )
            name, mask = found[0]
            if masks.setdefault(name, mask) != mask:
                raise UserError(
                    f"{path}, line {number}: {name} has the mask {mask}, and in a line before it "
                    f"the mask {masks[name]}. Take one of the two out."
                )
        return masks

    def _match(self, names: list[str], folder: str) -> None:
        """Give the images of a part that the list of pairs does not name masks by their names.

        Raises:
            UserError: two images would share a mask.
        """
        masks = find_masks(self.root, f"{folder}masks", self.description.mask_suffix)
        owners = {mask: name for name, mask in self._masks.items()}
        for name in names:
            key = _stem(name.removeprefix(f"{folder}images/"))
            mask = masks.get(key.removesuffix(same_name(self.description.image_suffix)))
            if mask is None or name in self._masks:
                continue
            other = owners.setdefault(mask, name)
            if other != name:
                raise UserError(
                    f"{mask} would be the mask of two images, {self.root / other} and "
                    f"{self.root / name}. Say in a list `pairs:` in {DESCRIPTION} which mask each "
                    f"of them has, or move the one without a mask to unlabeled/."
                )
            self._masks[name] = mask
        self._strays += sorted(masks.values() - owners.keys())

    def image_path(self, name: str) -> Path:
        return self.root / name

    def mask_path(self, name: str) -> Path:
        if name in self._masks:
            return self._masks[name]
        path = PurePosixPath(name.replace("images/", "masks/", 1))
        stem = path.stem.removesuffix(self.description.image_suffix)
        return self.root / path.with_name(f"{stem}{self.description.mask_suffix}.png")

    def candidate(self, name: str) -> str:
        """Return a sentence on what is likeliest meant where the mask of an image is missing."""
        stem = PurePosixPath(name).stem
        for path in self._strays:
            shown = path.relative_to(self.root)
            if path.stem.startswith(stem) and path.stem[len(stem) :][:1] in JOINTS:
                setting = f"mask_suffix: {path.stem[len(stem) :]}"
            elif stem.startswith(path.stem) and stem[len(path.stem) :][:1] in JOINTS:
                setting = f"image_suffix: {stem[len(path.stem) :]}"
            else:
                continue
            return f" {shown} is there: if it is the mask, write `{setting}` into {DESCRIPTION}."
        if elsewhere := self._elsewhere.get(stem):
            return f" Is {elsewhere} meant? Masks are expected in masks/."
        names = {path.stem: path for path in self._strays[:COMPARED]}
        if near := difflib.get_close_matches(stem, names, 1):
            shown = names[near[0]].relative_to(self.root)
            return (
                f" The nearest name is {shown}: rename it, or give a list `pairs:` in "
                f"{DESCRIPTION}."
            )
        return " Move images without masks to unlabeled/."

    @cached_property
    def _elsewhere(self) -> dict[str, str]:
        """Files by their names without the ending, outside of the folders of this layout."""
        own = tuple(f"{folder}/" for folder in (*IMAGE_FOLDERS, *MASK_FOLDERS))
        return {
            PurePosixPath(name).stem: name
            for name in walk(self.root, "")
            if name.lower().endswith(MASK_SUFFIXES) and not name.startswith(own)
        }

    def remarks(self, names: Iterable[str], threads: int = 1) -> list[str]:
        listed = [*names]
        large = of_size((self.image_path(name) for name in listed), threads)
        return [*super().remarks(listed, threads), *large]

    def label_map(self, mask: Path) -> LabelMap:
        return self.labels

    def find(self, entry: str) -> str | None:
        """Find an image by a path below the root or below images/, with or without its ending.

        Before them may stand what leads to the root: its own name, or a whole path on any machine.
        """
        return next((self._known[path] for path in self._below(entry) if path in self._known), None)

    def is_mask(self, name: str, path: str) -> bool | None:
        file = self._file(path)
        return None if file is None else file == self.mask_path(name)

    def _below(self, entry: str) -> Iterator[str]:
        """Yield what a path in a list may mean below the root."""
        entry = same_name(entry.removeprefix("./"))
        yield entry
        for folder in {self.root.absolute().name, self.root.resolve().name}:
            _, found, below = f"/{entry}".partition(f"/{same_name(folder)}/")
            if found:
                yield below

    def _file(self, entry: str) -> Path | None:
        """Return the file below the root that a path in a list means; None: there is none."""
        paths = (PurePosixPath(path) for path in self._below(entry))
        inside = (path for path in paths if not path.is_absolute() and ".." not in path.parts)
        try:
            return next((self.root / p for p in inside if (self.root / p).is_file()), None)
        except OSError:  # such as a name that is too long
            return None


def _stem(name: str) -> str:
    return same_name(str(PurePosixPath(name).with_suffix("")))


def refuse_among_images(out: Path, option: str = "`out`") -> None:
    """Refuse to write into a folder from which a dataset reads all images or masks.

    The pictures written there would be taken for images of the next run.

    Args:
        option: by which `out` was given, for the message.

    Raises:
        UserError: `out` is such a folder, or lies in one.
    """
    named = Path(os.path.abspath(out))  # noqa: PTH100  a folder of the dataset may be a link
    for whole in (named, out.resolve()):
        for root, folder in product(whole.parents, (*IMAGE_FOLDERS, *MASK_FOLDERS)):
            if whole.is_relative_to(root / folder) and (root / DESCRIPTION).is_file():
                raise UserError(
                    f"{option} {out}: {root / DESCRIPTION} makes every picture in {root / folder} "
                    f"a part of that dataset, so what is written there would be trained on. Give a "
                    f"folder outside of it."
                )


def find_images(root: Path, folder: str) -> list[str]:
    """Return the paths below `root` of the images in `folder` and its subfolders.

    Raises:
        UserError: two images would share a mask.
    """
    names = [n for n in walk(root, folder) if n.lower().endswith(IMAGE_SUFFIXES)]
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_stem(name), name)
        if other != name:
            raise UserError(
                f"{root / other} and {root / name} differ in their endings only, so that one mask "
                f"would belong to both. Rename one of them."
            )
    return names


def find_masks(root: Path, folder: str, suffix: str = "") -> dict[str, Path]:
    """Return the masks in `folder` by their paths in it, without suffix and ending.

    Raises:
        UserError: two masks would belong to one image.
    """
    names = walk(root, folder)
    masks: dict[str, Path] = {}
    for endings in (MASK_SUFFIXES, JPEG_SUFFIXES):
        found: dict[str, Path] = {}
        for name in names:
            stem = _stem(name.removeprefix(f"{folder}/"))
            if not name.lower().endswith(endings) or not stem.endswith(same_name(suffix)):
                continue
            key = stem.removesuffix(same_name(suffix))
            other = found.setdefault(key, root / name)
            if other != root / name:
                raise UserError(
                    f"{other} and {root / name} differ in their endings only, so that both would "
                    f"be the mask of one image. Take one of them away."
                )
        masks = {**found, **masks}
    return masks


def walk(root: Path, folder: str) -> list[str]:
    """Return the paths below `root` of all files in `folder`, sorted, without hidden ones.

    Links are followed, and each folder is visited once.
    """
    names = []
    visited: set[Path] = set()
    for place, folders, files in os.walk(root / folder, followlinks=True):
        # real folders first, so that their images have the names of those and not of a link
        folders[:] = [f for f in folders if not f.startswith(".")]
        folders.sort(key=lambda name: (Path(place, name).is_symlink(), name))
        # a link to a folder above would show every image again, until the path is too long
        if (real := Path(place).resolve()) in visited:
            folders.clear()
            continue
        visited.add(real)
        below = Path(place).relative_to(root)
        names += [(below / file).as_posix() for file in files if not file.startswith(".")]
    return sorted(names)
