"""Data sets, split lists, geometric and photometric views, mixing. Knows nothing of networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctt.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from ctt.data.source import Source


def names() -> list[str]:
    """The data sets that `open_source` knows."""
    return ["digits"]


def open_source(
    name: str, root: Path | None, train_images: int, eval_images: int, eval_split: str
) -> Source:
    """The data set of that name.

    Args:
        root: its folder; None for the embedded set.
        train_images, eval_images, eval_split: size and evaluation split of the embedded set.

    Raises:
        UserError: no such data set, or a folder given for the embedded one.
    """
    if name == "digits":
        if root is not None:
            raise UserError(
                "--data-root: the embedded data set digits has no folder; leave it out."
            )
        from ctt.data.digits import Digits

        return Digits(train_images, eval_images, eval_split)
    raise UserError(f"--dataset {name}: no such data set. Data sets: {', '.join(names())}.")
