"""Which training images are labelled: by ratio and seed, or by lists."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path, PurePosixPath

import torch

from ctt.data.random import generator
from ctt.data.source import Source
from ctt.errors import UserError

NO_MASK = "None"  # as the mask of an unlabelled image is written in some lists
# first bytes of pickles (protocols 2 to 5), .npy and .npz or .pt
BINARY = (b"\x80", b"\x93NUMPY", b"PK\x03\x04")
PICKLE_SUFFIXES = (".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth")


def parse_ratio(text: str, total: int, counts: Mapping[Fraction, int] | None = None) -> int:
    """How many of `total` images `1/20`, `0.05` or `50` asks to be labelled.

    Args:
        counts: for ratios whose count is not the rounded one.

    Raises:
        UserError: not a ratio, none or more than there are.
    """
    try:
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"--ratio {text} is no ratio. Give a fraction such as 1/20, a share such as 0.05, or "
            f"a number of images such as 50."
        ) from None
    is_count = "/" not in text and "." not in text and "e" not in text.lower()
    if is_count or value > 1:
        if value.denominator != 1 or not 1 <= value <= total:
            raise UserError(
                f"--ratio {text}: the number of labelled images must be in 1..{total}, "
                f"because there are {total} training images."
            )
        return int(value)
    if value <= 0:
        raise UserError(f"--ratio {text}: the labelled share must be above 0.")
    return (counts or {}).get(value, max(1, round(value * total)))


def draw_split(ids: list[str], labeled: int, seed: int | str) -> tuple[list[str], list[str]]:
    """`labeled` names drawn from the sorted `ids`, and the rest; both sorted."""
    ids = sorted(ids)
    order = torch.randperm(len(ids), generator=generator("split", seed)).tolist()
    chosen = set(order[:labeled])
    return (
        [name for i, name in enumerate(ids) if i in chosen],
        [name for i, name in enumerate(ids) if i not in chosen],
    )


def read_lines(path: Path) -> list[str]:
    """The lines of a list that are not empty, without their ends.

    Raises:
        UserError: the file cannot be read, is empty or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the split list cannot be read ({error.strerror}).") from None
    if data.startswith(BINARY) or path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(
            f"{path}: the split list cannot be read, because it is no text but a pickle or an "
            f"array. Pickles can run any program when they are read, and the numbers in them count "
            f"images in the order of one machine's folder. Give a text file with one image name a "
            f"line; `ctt-data split` writes one."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: the split list cannot be read ({error}). Save it as UTF-8."
        ) from None
    # not splitlines: names may hold what that takes for the end of a line
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path}: the split list is empty. It must hold one image name a line.")
    return lines


def resolve(line: str, find: Callable[[str], str | None]) -> tuple[str, str] | None:
    """The name and the mask ("" where the line has none) of a line of a split list.

    A line is a bare name, the path of an image, or an image and its mask with a space or a tab
    between them; paths may start with a slash. Names may hold spaces: the reading counts that
    `find` knows.

    Returns:
        None where no reading is an image that `find` knows.

    Raises:
        UserError: the mask is that of another image.
    """
    strangers = []
    for image, mask in readings(line):
        name = find(image)
        if name is None:
            continue
        if not mask or mask == NO_MASK or belongs(mask, image):
            return name, mask
        strangers.append((image, mask))
    if strangers:
        image, mask = strangers[0]
        raise UserError(f"{image} stands beside {mask}, which is not its mask.")
    return None


def readings(line: str) -> Iterator[tuple[str, str]]:
    """What a line can mean, likeliest first: image and mask, "" for none."""
    whole = line.strip().lstrip("/")
    if line.strip() != line:
        yield line, ""
    yield whole, ""
    separator = "\t" if "\t" in whole else " "
    at = whole.find(separator)
    while at >= 0:
        yield whole[:at].rstrip(), whole[at:].strip().lstrip("/")
        at = whole.find(separator, at + 1)


def belongs(mask: str, image: str) -> bool:
    stem = PurePosixPath(image).stem.removesuffix("_leftImg8bit")
    return PurePosixPath(mask).name.startswith(stem)


def read_list(path: Path, source: Source, *, labeled: bool) -> list[str]:
    """Names of the images in a split list of any form that `resolve` reads.

    Raises:
        UserError: it cannot be read, is empty, repeats a name, or names an image that may not be
            labelled, or not be trained on, in this data set.
    """
    allowed = set(source.train_ids()) if labeled else None
    forbidden = set(source.eval_ids())
    names: list[str] = []
    unknown: list[str] = []
    for line in read_lines(path):
        try:
            found = resolve(line, source.find)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if found is None:
            unknown.append(line.strip())
            continue
        name, mask = found
        if name in forbidden:
            raise UserError(
                f"{path} names {name}, which is an image to evaluate on. Take it out of the list."
            )
        if allowed is not None and (name not in allowed or mask == NO_MASK):
            raise UserError(
                f"{path} names {name} as labelled, but it is one of the unlabelled images of this "
                f"data set or stands there without a mask. Take it out of the list."
            )
        names.append(name)
    if unknown:
        raise UserError(
            f"{path} names {unknown[0]}, which is no training image of this data set "
            f"({len(unknown)} such names of {len(names) + len(unknown)})."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {twice[0]} stands in the list more than once.")
    return names


def write_list(path: Path, names: Iterable[str]) -> None:
    path.write_text("".join(f"{name}\n" for name in names), "utf-8")


def make_split(
    source: Source, ratio: str, seed: int, labeled_list: Path | None, unlabeled_list: Path | None
) -> tuple[list[str], list[str]]:
    """The labelled and the unlabelled names.

    Raises:
        UserError: a list names an image that is not there, or one image is in both lists.
    """
    if labeled_list is None:
        if unlabeled_list is not None:
            raise UserError("--split-unlabeled needs --split-labeled beside it.")
        ids = source.train_ids()
        labeled, rest = draw_split(ids, parse_ratio(ratio, len(ids), source.paper_counts), seed)
        return labeled, sorted(rest + source.unlabeled_ids())
    labeled = read_list(labeled_list, source, labeled=True)
    if unlabeled_list is None:
        taken = set(labeled)
        pool = source.train_ids() + source.unlabeled_ids()
        return labeled, sorted(name for name in pool if name not in taken)
    unlabeled = read_list(unlabeled_list, source, labeled=False)
    both = sorted(set(labeled) & set(unlabeled))
    if both:
        raise UserError(
            f"{both[0]} stands in {labeled_list} and in {unlabeled_list}: an image is either "
            f"labelled or unlabelled ({len(both)} such)."
        )
    return labeled, unlabeled
