"""ctt-data coco-masks: the masks of COCO-81 from the official annotations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ctt.ranges import AT_LEAST_0
from ctt.text import say


@dataclass(frozen=True)
class CocoMasks:
    """Make the masks of --dataset coco, in masks/train2017 and masks/val2017, of the annotations of
    COCO 2017 (annotations/instances_train2017.json and instances_val2017.json).

    Background is 0, and the 80 classes are numbered from 1 on by the ids of their categories. Of
    overlapping instances the smaller lies on top; crowds belong to their class. Masks that are
    there are left alone, so a call that was stopped goes on when it is given again.
    """

    data_root: Path = Path("data")
    """Folder that holds train2017, val2017 and annotations."""
    threads: Annotated[int, AT_LEAST_0] = 0
    """Images painted at a time; 0: one for each core."""


def coco_masks(command: CocoMasks) -> int:
    """Write the masks.

    Raises:
        UserError: a file that is missing or wrong.
    """
    from rich.progress import Progress

    from ctt.console import plain_console
    from ctt.data.coco import write_masks

    with Progress(console=plain_console(), transient=True) as progress:
        bar = progress.add_task("reading annotations", total=None)
        new, present = write_masks(
            command.data_root,
            command.threads,
            lambda part, images: progress.reset(bar, total=images, description=part),
            lambda: progress.advance(bar),
        )
    there = f" {present:,} were there already and are left alone." if present else ""
    say(
        f"{new:,} masks are written.{there} Check them with: ctt-data check --dataset coco "
        f"--data-root {command.data_root}"
    )
    return 0
