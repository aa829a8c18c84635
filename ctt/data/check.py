"""Checks of a data set's files: a quick one before every training, and one of everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ctt.data.source import Source
from ctt.errors import UserError

HANDFUL = 5  # pairs read by the quick check, of the labelled and of the evaluation images


def check_quickly(source: Source, labeled: list[str], unlabeled: list[str]) -> None:
    """All files are there, and a handful of images and masks can be read.

    Raises:
        UserError: names the first missing file, or the broken one.
    """
    evaluation = source.eval_ids()
    missing = list(missing_files(source, [*labeled, *evaluation], unlabeled))
    if missing:
        more = f" {len(missing)} files are missing in all." if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: there is no such file, but the data set needs it.{more} Complete the "
            f"data set, or train with lists of the images that are there (--split-labeled, "
            f"--split-unlabeled). Images without a mask can only be unlabelled ones."
        )
    for names in (labeled, evaluation):
        for name in names[:: max(1, len(names) // HANDFUL)][:HANDFUL]:
            source.pair(name)
    for name in unlabeled[:1]:
        source.image(name)


def missing_files(source: Source, labeled: list[str], unlabeled: list[str]) -> Iterator[Path]:
    for names, has_mask in ((labeled, True), (unlabeled, False)):
        for name in names:
            for path in source.files(name, has_mask):
                if not path.is_file():
                    yield path
