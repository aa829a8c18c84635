"""Which training images are labelled: by ratio and seed, or by lists."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path, PurePosixPath

import torch

from ctt.data import IMAGE_SUFFIXES
from ctt.data.dataset import Dataset
from ctt.data.faults import Fault
from ctt.data.seeding import generator
from ctt.errors import UserError
from ctt.files import atomic_write, expanded
from ctt.text import BYTE_OF_A_NAME, BYTES_AS_THEY_ARE

NO_MASK = "None"  # as the mask of an unlabelled image is written in some lists
NO_UTF_8 = " The line is no UTF-8: save the list as UTF-8, if its names are."
PAIRING = " Own images may have masks of any names: see `pairs` in docs/data.md."
UNLABELED_ALONE = "`split_unlabeled` needs `split_labeled` beside it."
# first bytes of pickles (protocols 2 to 5), .npy and .npz or .pt
BINARY = (b"\x80", b"\x93NUMPY", b"PK\x03\x04")
PICKLE_SUFFIXES = (".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth")


def parse_ratio(text: str, total: int, counts: Mapping[Fraction, int] | None = None) -> int:
    """Return how many of `total` images `1/20`, `0.05` or `50` asks to be labelled.

    Args:
        counts: for ratios whose count is not the rounded one.

    Raises:
        UserError: not a ratio, none or more than there are.
    """
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"`ratio` {text} is no ratio. Give a fraction such as 1/20, a share such as 0.05, or "
            f"a number of images such as 50."
        ) from None
    is_count = "/" not in text and "." not in text and "e" not in text.lower()
    if is_count or value > 1:
        if value.denominator != 1 or not 1 <= value <= total:
            raise UserError(
                f"`ratio` {text}: the number of labelled images must be in 1..{total}, "
                f"because there are {total} training images."
            )
        return int(value)
    if value <= 0:
        raise UserError(f"`ratio` {text}: the labelled share must be above 0.")
    return (counts or {}).get(value, max(1, round(value * total)))


def draw_split(ids: list[str], labeled: int, seed: int | str) -> tuple[list[str], list[str]]:
    """Return `labeled` names drawn from the sorted `ids`, and the rest; both sorted."""
    ids = sorted(ids)
    order = torch.randperm(len(ids), generator=generator("split", seed)).tolist()
    chosen = set(order[:labeled])
    return (
        [name for i, name in enumerate(ids) if i in chosen],
        [name for i, name in enumerate(ids) if i not in chosen],
    )


def with_all_classes(
    part: list[str], rest: list[str], shown: Mapping[str, Collection[int]]
) -> tuple[list[str], list[str]]:
    """Exchange images of two parts until the first shows every class that both can show.

    Args:
        shown: the classes in each image.

    Returns:
        as many names as before; no class that a part shows is lost to it.
    """
    part, rest = sorted(part), sorted(rest)
    total = Counter(c for names in (part, rest) for name in names for c in shown[name])
    for wanted in sorted(total, key=lambda c: (total[c], c)):
        counts = [Counter(c for name in names for c in shown[name]) for names in (part, rest)]
        if counts[0][wanted]:
            continue
        for new, old in product([name for name in rest if wanted in shown[name]], part):
            gained, lost = set(shown[new]), set(shown[old])
            part_keeps = all(counts[0][c] > 1 for c in lost - gained)
            rest_keeps = all(counts[1][c] > 1 for c in gained - lost)
            if part_keeps and rest_keeps:
                part[part.index(old)], rest[rest.index(new)] = new, old
                break
    return sorted(part), sorted(rest)


def read_lines(path: Path) -> dict[int, str]:
    """Return the lines of a list that are not empty, by their numbers from 1 on.

    Raises:
        UserError: the file cannot be read, is empty or is no text.
    """
    try:
        data = expanded(path, "the list").read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the split list cannot be read ({error.strerror}).") from None
    if data.startswith(BINARY) or path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(
            f"{path}: the split list cannot be read, because it is no text but a pickle or an "
            f"array. Pickles can run any program when they are read, and the numbers in them count "
            f"images in the order of one machine's folder. Give a text file with one image name a "
            f"line; `ctt-data split` writes one."
        )
    text = data.decode("utf-8-sig", BYTES_AS_THEY_ARE)
    # not splitlines: names may hold what that takes for the end of a line
    lines = {
        number: line.removesuffix("\r")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    }
    if not lines:
        raise UserError(f"{path}: the split list is empty. It must hold one image name a line.")
    return lines


def resolve(
    line: str,
    find: Callable[[str], str | None],
    is_mask: Callable[[str, str], bool | None] = lambda name, mask: None,
) -> tuple[str, str] | None:
    """Return the name and the mask ("" where the line has none) of a line of a split list.

    A line is a bare name, the path of an image, or an image and its mask with a space or a tab
    between them; paths may start with a slash or have backslashes. File names may contain spaces,
    so every way to split the line is tried until `find` knows the image. Beside a mask the image
    must have its ending, or `IMG (1).jpg` would also be the image IMG and a mask.

    Args:
        is_mask: whether the file of this path is the mask of the image of this name; None where
            there is no such file, so that its name decides if no reading names a file.

    Returns:
        None where no reading is an image that `find` knows.

    Raises:
        UserError: the mask is that of another image.
    """
    pairs = []
    for image, mask in readings(line):
        name = find(image)
        if name is None:
            continue
        if mask in ("", NO_MASK):
            return name, mask
        ending = PurePosixPath(name).suffix
        if ending.lower() not in IMAGE_SUFFIXES or image.endswith(ending):
            pairs.append((image, name, mask, is_mask(name, mask)))
    likely = [pair for pair in pairs if pair[-1] is not None] or pairs
    for image, name, mask, known in likely:
        if mask_fits_name(mask, image) if known is None else known:
            return name, mask
    if likely:
        image, _, mask, _ = likely[0]
        raise UserError(f"{image} is listed with {mask}, which is not its mask.{PAIRING}")
    if "\\" in line:  # a list that was written on Windows
        return resolve(line.replace("\\", "/"), find, is_mask)
    return None


def readings(line: str) -> Iterator[tuple[str, str]]:
    """Return what a line can mean, likeliest first: image and mask, "" for none."""
    whole = line.strip().lstrip("/")
    if line.strip() != line:
        yield line, ""
    yield whole, ""
    separator = "\t" if "\t" in whole else " "
    at = whole.find(separator)
    while at >= 0:
        yield whole[:at].rstrip(), whole[at:].strip().lstrip("/")
        at = whole.find(separator, at + 1)


def mask_fits_name(mask: str, image: str) -> bool:
    """Return whether a mask's file name begins with the image's (Cityscapes' suffix aside)."""
    stem = PurePosixPath(image).stem.removesuffix("_leftImg8bit")
    return PurePosixPath(mask).name.startswith(stem)


def examine_list(path: Path, dataset: Dataset, *, labeled: bool) -> tuple[list[str], list[Fault]]:
    """Return names in a split list of any form that `resolve` reads, and all that is wrong with it.

    Raises:
        UserError: it cannot be read or is empty.
    """
    labelable = set(dataset.train_ids())
    evaluation, test = set(dataset.eval_ids()), set(dataset.test_ids())
    example = next(iter([*dataset.train_ids(), *dataset.eval_ids()]), "none")
    lines_of: dict[str, int] = {}
    faults = []
    for number, line in read_lines(path).items():
        name, fault = "", ""
        try:
            name, mask = resolve(line, dataset.find, dataset.is_mask) or ("", "")
        except UserError as error:
            fault = str(error)
        else:
            if not name:
                fault = (
                    f"{line.strip()} is no training image of this dataset, whose images have "
                    f"names such as {example}."
                    f"{NO_UTF_8 if BYTE_OF_A_NAME.search(line) else ''}"
                )
            elif name in evaluation:
                fault = f"{name} is an image to evaluate on."
            elif name in test:
                fault = f"{name} is a test image of the benchmark."
            elif name in lines_of:
                fault = f"{name} stands in the list more than once (line {lines_of[name]})."
            elif labeled and (name not in labelable or mask == NO_MASK):
                fault = (
                    f"{name} is to be labelled, but it is one of the unlabelled images of this "
                    f"dataset, or has no mask in this line."
                )
        if fault:
            text = f"{path}, line {number}: {fault}"
            faults.append(Fault(text, f"line {number}", (name, line.strip(), example)))
        else:
            lines_of[name] = number
    return list(lines_of), faults


def read_list(path: Path, dataset: Dataset, *, labeled: bool) -> list[str]:
    """Return names of the images in a split list of any form that `resolve` reads.

    Raises:
        UserError: it cannot be read, is empty, repeats a name, or names an image that may not be
            labelled, or not be trained on, in this dataset.
    """
    names, faults = examine_list(path, dataset, labeled=labeled)
    if faults:
        more = f" {len(faults)} lines of the list are wrong in all." if len(faults) > 1 else ""
        raise UserError(f"{faults[0].text} Take it out of the list, or correct it.{more}")
    return names


def write_list(path: Path, lines: Iterable[str]) -> None:
    with atomic_write(path) as part:
        text = "".join(f"{line}\n" for line in lines)
        part.write_text(text, "utf-8", BYTES_AS_THEY_ARE, "\n")


def path_lines(images: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a list of images and their masks, with a space between the two, or with
    a tab if a name among them holds a space.

    Raises:
        UserError: a name holds a tab, so that nothing would tell the two apart.
    """
    listed = [*images]
    for name in (text for texts in listed for text in texts if "\t" in text):
        raise UserError(
            f"The name of {name!r} holds a tab, so that a line with image and mask could not be "
            f"read again. Rename it, or give `form` names."
        )
    spaces = any(" " in text for texts in listed for text in texts)
    return ["\t".join(texts) if spaces else " ".join(texts) for texts in listed]


def make_split(
    dataset: Dataset, ratio: str, seed: int, labeled_list: Path | None, unlabeled_list: Path | None
) -> tuple[list[str], list[str]]:
    """Return the labelled and the unlabelled names.

    Raises:
        UserError: no image may be labelled, or a list names an image that is not there.
    """
    if labeled_list is None:
        if unlabeled_list is not None:
            raise UserError(UNLABELED_ALONE)
        ids = dataset.train_ids()
        if not ids:
            raise UserError(f"The dataset {dataset.info.name} has no image that may be labelled.")
        labeled, rest = draw_split(ids, parse_ratio(ratio, len(ids), dataset.paper_counts), seed)
        return labeled, sorted(rest + dataset.unlabeled_ids())
    labeled = read_list(labeled_list, dataset, labeled=True)
    if unlabeled_list is None:
        return labeled, all_others(dataset, labeled)
    unlabeled = read_list(unlabeled_list, dataset, labeled=False)
    return labeled, without_labeled(dataset, labeled, unlabeled)


def all_others(dataset: Dataset, labeled: list[str]) -> list[str]:
    """Return the training images that are not labelled, sorted."""
    return sorted({*dataset.train_ids(), *dataset.unlabeled_ids()} - set(labeled))


def without_labeled(dataset: Dataset, labeled: list[str], unlabeled: list[str]) -> list[str]:
    """Return the unlabelled names that are not labelled too, as in some published lists.

    Such names become one of the notes of `dataset`.
    """
    both = sorted(set(labeled) & set(unlabeled))
    if both:
        dataset.notes += (
            f"{len(both)} of the images are in the list of labelled and in that of unlabelled "
            f"images, such as {both[0]}: they are labelled ones.",
        )
    return [name for name in unlabeled if name not in set(both)]
