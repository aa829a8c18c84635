"""Checks of a dataset's files: a quick one before every training, and one of everything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePath

import torch
from torch import Tensor

from ctt.data.dataset import IGNORE, Dataset
from ctt.data.faults import Fault
from ctt.data.files import FileDataset
from ctt.data.split import UNLABELED_ALONE, all_others, examine_list, without_labeled
from ctt.errors import UserError
from ctt.processes import cpus

HANDFUL = 5  # pairs read by the quick check, of the labelled and of the evaluation images


def check_quickly(dataset: Dataset, labeled: list[str], unlabeled: list[str]) -> None:
    """Check that all files exist, and that a handful of images and masks can be read.

    What is allowed and probably not meant becomes one of the notes of `dataset`.

    Raises:
        UserError: names the first missing file, or the broken one, or what the masks seem to mean.
    """
    evaluation = dataset.eval_ids()
    missing = list(missing_files(dataset, [*labeled, *evaluation], unlabeled))
    if missing:
        name, path = missing[0]
        more = f" {len(missing)} files are missing in all." if len(missing) > 1 else ""
        near = dataset.candidate(name) if isinstance(dataset, FileDataset) else ""
        instead = (
            ": every run is evaluated on this image."
            if name in evaluation
            else ", or train with lists of the images that are there (`split_labeled`, "
            "`split_unlabeled`). Images without a mask can only be unlabelled ones."
        )
        raise UserError(
            f"{path}: there is no such file, but the dataset needs it.{near}{more} Complete the "
            f"dataset{instead}"
        )
    pixels = torch.zeros(len(dataset.info.classes) + 1, dtype=torch.int64)
    for names in (labeled, evaluation):
        for name in handful(names):
            pixels += histogram(dataset.pair(name)[1], len(dataset.info.classes))
    if fault := ignored_class(dataset, pixels.tolist()):
        raise UserError(fault)
    for name in unlabeled[:1]:
        dataset.image(name)
    if isinstance(dataset, FileDataset):
        dataset.notes += tuple(dataset.remarks(handful([*labeled, *unlabeled])))
    dataset.notes += tuple(overlaps(image_files(dataset, labeled, unlabeled, evaluation), identity))


def handful(names: list[str], count: int = HANDFUL) -> list[str]:
    """Return up to `count` of the names, evenly spread."""
    count = min(count, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def histogram(label: Tensor, classes: int) -> Tensor:
    """Return the pixels (C + 1) of each class in uint8 labels of any shape, the ignored ones last.

    No copy is made: labels of a large image in int64 would take gigabytes.
    """
    counts = torch.bincount(label.flatten(), minlength=IGNORE + 1)
    return torch.cat([counts[:classes], counts[IGNORE:]])


def ignored_class(dataset: Dataset, pixels: list[int]) -> str:
    """Return what is wrong if one of two classes has no pixel and the masks hold 255 instead.

    Args:
        pixels: of each class and of what is ignored.
    """
    value, classes = dataset.assumed_ignore, dataset.info.classes
    if value is None or len(classes) != 2 or not pixels[2] or min(pixels[:2]) > 0:
        return ""
    missing = pixels.index(0)
    other = 1 - missing
    return (
        f"The masks hold {f'{other} and {value}' if pixels[other] else value} only: {value} is "
        f"ignored unless dataset.yaml says otherwise, and no pixel is left of class {missing}, "
        f"{classes[missing]}. If {value} stands for {classes[missing]}, write `id_map: "
        f"{{{other}: {other}, {value}: {missing}}}` into dataset.yaml; if these pixels are to be "
        f"ignored, write `ignore_index: {value}`."
    )


def classes_without_pixel(dataset: Dataset, pixels: list[int]) -> list[str]:
    """Return a sentence if there are masks and some class has no pixel in them."""
    missing = [n for n, count in zip(dataset.info.classes, pixels, strict=False) if not count]
    if not missing or not sum(pixels):
        return []
    ignored = (
        f" {dataset.assumed_ignore} is ignored unless dataset.yaml says otherwise (id_map)."
        if pixels[-1] and dataset.assumed_ignore is not None
        else ""
    )
    return [
        f"Warning: no mask shows {', '.join(missing)}, so no network can learn it. Check the list "
        f"of classes and what the numbers in the masks mean.{ignored}"
    ]


def not_evaluated(dataset: Dataset, classes: list[str]) -> str:
    """Return the warning that no image to evaluate on shows some classes."""
    name = dataset.info.name
    held_out = isinstance(dataset, FileDataset) and dataset.holds_out
    ways = [  # others have images of their own to evaluate on, and no more
        *["`data.eval_images`"] * (name == "digits"),
        *["`data.holdout`"] * held_out,
        *["a val/ folder" if held_out else "in val/"] * (name == "folder"),
    ]
    more = f" Evaluate on more images ({', or '.join(ways)})." if ways else ""
    return (
        f"Warning: none of the {len(dataset.eval_ids())} images to evaluate on shows "
        f"{', '.join(classes)}, so the scores say nothing about it.{more}"
    )


def overlaps(parts: dict[str, list[Path]], key: Callable[[Path], Hashable]) -> list[str]:
    """Return a warning for each two parts of a dataset that hold the same file.

    Args:
        parts: files by what they are for.
        key: what makes two files the same; None of one that cannot be read.
    """
    keys = {part: {key(path): path for path in files} for part, files in parts.items()}
    warnings = []
    for one, other in combinations(keys, 2):
        both = sorted(keys[one].keys() & keys[other].keys() - {None}, key=lambda k: keys[one][k])
        if both:
            first, second = keys[one][both[0]], keys[other][both[0]]
            warnings.append(
                f"Warning: {len(both)} of the images {other} are also images {one}, such as "
                f"{first} and {second}. Take them out of one of the two, or what is learned or "
                f"scored is not what it seems."
            )
    return warnings


def identity(path: Path) -> Hashable:
    """Return what a file and all links to it have in common."""
    try:
        state = path.stat()
    except OSError:
        return None
    return (state.st_dev, state.st_ino)


def content(path: Path) -> Hashable:
    """Return what a file and all copies of it have in common."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None


def image_files(
    dataset: Dataset, labeled: list[str], unlabeled: list[str], evaluation: list[str]
) -> dict[str, list[Path]]:
    """Return the images' files by what they are for; none of images in memory."""
    parts = {"with masks": labeled, "without masks": unlabeled, "to evaluate on": evaluation}
    return {
        part: [path for name in names for path in dataset.files(name, labeled=False)]
        for part, names in parts.items()
    }


def missing_files(
    dataset: Dataset, labeled: list[str], unlabeled: list[str]
) -> Iterator[tuple[str, Path]]:
    """Yield the name of each image of which a file is missing, and that file."""
    for names, has_mask in ((labeled, True), (unlabeled, False)):
        for name in names:
            for path in dataset.files(name, has_mask):
                if not path.is_file():
                    yield name, path


@dataclass(frozen=True)
class Report:
    """What was found in a dataset.

    Attributes:
        faults: all that is wrong.
        warnings: what is allowed and probably not meant.
        images, pixels: for each class and for what is ignored, images that show it and pixels.
    """

    faults: list[Fault]
    warnings: list[str]
    images: list[int]
    pixels: list[int]


def examine_split(
    dataset: Dataset, labeled_list: Path | None, unlabeled_list: Path | None
) -> tuple[list[str], list[str], list[Fault]]:
    """Read the split lists (or, without lists, take all images) and collect every fault in them.

    Returns:
        labelled names, unlabelled names, faults.

    Raises:
        UserError: a list cannot be read or is empty, or that of the labelled images is missing.
    """
    if labeled_list is None and unlabeled_list is None:
        return dataset.train_ids(), dataset.unlabeled_ids(), []
    if labeled_list is None:
        raise UserError(UNLABELED_ALONE)
    labeled, faults = examine_list(labeled_list, dataset, labeled=True)
    if unlabeled_list is None:
        return labeled, all_others(dataset, labeled), faults
    unlabeled, more = examine_list(unlabeled_list, dataset, labeled=False)
    return labeled, without_labeled(dataset, labeled, unlabeled), faults + more


def fault_of_files(files: list[Path], name: str, text: str) -> Fault:
    """Return what is wrong with an image or its mask; the file named first is at fault."""
    paths = sorted((str(path) for path in files if str(path) in text), key=text.index)
    return Fault(text, next(iter(paths), name), (*paths, name, PurePath(name).stem))


def check_all(
    dataset: Dataset,
    labeled: list[str],
    unlabeled: list[str],
    threads: int,
    advance: Callable[[], None],
) -> Report:
    """Read every image, and every mask of the labelled and the evaluation images.

    Args:
        threads: files read at a time; 0: one for each core.
        advance: called after each image.
    """
    classes = len(dataset.info.classes)
    evaluation = dataset.eval_ids()
    images, learned, scored = torch.zeros(3, classes + 1, dtype=torch.int64)  # the last: pixels
    faults = []

    def look(name: str, has_mask: bool) -> Tensor | Fault:
        try:
            if not has_mask:
                dataset.image(name)
                return torch.zeros(classes + 1, dtype=torch.int64)
            return histogram(dataset.pair(name)[1], classes)
        except UserError as error:
            return fault_of_files(dataset.files(name, has_mask), name, str(error))

    names = [*labeled, *evaluation, *unlabeled]
    masks = [i < len(labeled) + len(evaluation) for i in range(len(names))]
    with ThreadPoolExecutor(threads or cpus()) as pool:
        try:
            for i, found in enumerate(pool.map(look, names, masks)):
                advance()
                if isinstance(found, Fault):
                    faults.append(found)
                else:
                    part = learned if i < len(labeled) else scored
                    part += found
                    images += found > 0
        finally:
            pool.shutdown(cancel_futures=True)
    pixels = learned + scored
    fault = ignored_class(dataset, pixels.tolist())
    warnings = [] if fault else classes_without_pixel(dataset, pixels.tolist())
    unscored = ((learned > 0) & (scored == 0))[:-1].tolist()
    missing = [n for n, left_out in zip(dataset.info.classes, unscored, strict=True) if left_out]
    if evaluation and missing:
        warnings.append(not_evaluated(dataset, missing))
    if isinstance(dataset, FileDataset):
        warnings += dataset.remarks(names, threads)
    warnings += overlaps(image_files(dataset, labeled, unlabeled, evaluation), content)
    if fault:
        faults.append(Fault(fault, "the masks"))
    return Report(faults, warnings, images.tolist(), pixels.tolist())
