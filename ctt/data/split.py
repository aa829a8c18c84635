"""Which training images are labelled: by ratio and seed, or by lists."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import torch

from ctt.data.random import generator
from ctt.errors import UserError


def parse_ratio(text: str, total: int) -> int:
    """How many of `total` images `1/20`, `0.05` or `50` asks to be labelled.

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
    return max(1, round(value * total))


def draw_split(ids: list[str], labeled: int, seed: int) -> tuple[list[str], list[str]]:
    """`labeled` names drawn from the sorted `ids`, and the rest; both sorted."""
    ids = sorted(ids)
    order = torch.randperm(len(ids), generator=generator("split", seed)).tolist()
    chosen = set(order[:labeled])
    return (
        [name for i, name in enumerate(ids) if i in chosen],
        [name for i, name in enumerate(ids) if i not in chosen],
    )


def read_list(path: Path) -> list[str]:
    """Names in a list file: one a line; empty lines and a missing last newline do not matter.

    Raises:
        UserError: it cannot be read, is empty or repeats a name.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the split list cannot be read ({error}).") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path}: the split list is empty. It must hold one image name a line.")
    repeated = (
        sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    )
    if repeated:
        raise UserError(f"{path}: {repeated[0]} stands in the list more than once.")
    return names


def write_list(path: Path, names: Iterable[str]) -> None:
    path.write_text("".join(f"{name}\n" for name in names), "utf-8")


def make_split(
    ids: list[str], ratio: str, seed: int, labeled_list: Path | None, unlabeled_list: Path | None
) -> tuple[list[str], list[str]]:
    """The labelled and the unlabelled names.

    Raises:
        UserError: a list names an image that is not there, or one image is in both lists.
    """
    if labeled_list is None:
        if unlabeled_list is not None:
            raise UserError("--split-unlabeled needs --split-labeled beside it.")
        return draw_split(ids, parse_ratio(ratio, len(ids)), seed)
    known = set(ids)
    labeled = read_list(labeled_list)
    _check_known(labeled, known, labeled_list)
    if unlabeled_list is None:
        taken = set(labeled)
        return labeled, [name for name in sorted(ids) if name not in taken]
    unlabeled = read_list(unlabeled_list)
    _check_known(unlabeled, known, unlabeled_list)
    both = sorted(set(labeled) & set(unlabeled))
    if both:
        raise UserError(
            f"{both[0]} stands in {labeled_list} and in {unlabeled_list}: an image is either "
            f"labelled or unlabelled ({len(both)} such)."
        )
    return labeled, unlabeled


def _check_known(names: list[str], known: set[str], path: Path) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(
            f"{path} names {missing[0]}, which is no training image of this data set "
            f"({len(missing)} such names of {len(names)})."
        )
