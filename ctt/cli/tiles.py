"""ctt-data tiles: images that are too large for training are cut into pieces."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ctt.errors import UserError
from ctt.text import say


@dataclass(frozen=True)
class Tiles:
    """Cut the images and masks of a folder into pieces, and write them as a new folder.

    Training reads an image whole for each crop of it, which takes seconds and gigabytes for rasters
    of satellites and scanned slides. Pieces of TIFF files are GeoTIFFs that lie where they lie in
    the raster, and are read and written one by one, so that a raster of any size needs megabytes;
    pieces of other images are PNG files. Pieces without data are left out, and those whose mask
    shows no class become unlabelled images.
    """

    source: Path
    """Folder with images/, masks/ and dataset.yaml, as --dataset folder takes it."""
    to: Path | None = None
    """New folder."""
    side: int = 1024
    """Most rows and columns of a piece; those of one image are of nearly the same size."""


def tiles(command: Tiles) -> int:
    """Write the folder, and tell what is in it.

    Raises:
        UserError: an image or mask that cannot be read, or a target with files in it.
    """
    from rich.progress import Progress

    from ctt.console import plain_console
    from ctt.data.tiles import cut

    if command.to is None:
        raise UserError("--to is needed: the new folder, such as --to tiles.")
    if command.side < 1:
        raise UserError(f"--side {command.side} must be at least 1.")
    with Progress(console=plain_console(), transient=True) as progress:
        bar = progress.add_task("cutting", total=1.0)
        found = cut(
            command.source,
            command.to,
            command.side,
            lambda share: progress.advance(bar, share),
        )
    without = (
        f" ({found.without_class:,} of them from images with masks, which show no class there)"
        if found.without_class
        else ""
    )
    say(
        f"{command.to}: {found.labeled:,} pieces with masks, {found.evaluation:,} to evaluate on, "
        f"{found.unlabeled:,} without masks{without}."
    )
    if found.left_out:
        say(f"Left out: {found.left_out:,} pieces without data, or without a class to evaluate on.")
    say(f"Next: ctt-data check --dataset folder --data-root {shlex.quote(str(command.to))}")
    return 0
