"""ctt-data stats: range, mean and deviation of the channels of a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ctt.data.options import DatasetOptions
from ctt.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from ctt.data.channel_statistics import Statistics

OF_RGB = ("white", "mean", "std")  # keys that mean something else once there are bands


@dataclass(frozen=True)
class Stats:
    """Find range, mean and deviation of the channels of a dataset's training images.

    Prints them, and the lines of dataset.yaml by which images of any number of channels, of 8 or 16
    bits or of fractions are read.
    """

    dataset: str = "folder"
    """Name of the dataset; `ctt-train --help` lists them."""
    data_root: Path | None = None
    """Folder of the images, for datasets that have one."""
    write: bool = False
    """folder: add the lines to its dataset.yaml; keys that it has stay as they are. But where bands
    are added, its lines of white, mean and std become comments: those were of RGB images."""
    cut: tuple[float, float] = (0.1, 99.9)
    """Percentiles of each channel that become 0 and 1, where dataset.yaml names no range and the
    images have more than 8 bits; 0 100 cuts nothing off."""
    data: DatasetOptions = field(default_factory=DatasetOptions)


def stats(command: Stats) -> int:
    """Print a table, and print or write the lines."""
    from rich.progress import Progress

    from ctt.cli.data import open_dataset
    from ctt.console import plain_console
    from ctt.data.channel_statistics import adds_bands, append, lines, statistics
    from ctt.data.description import DESCRIPTION
    from ctt.data.folder import Folder
    from ctt.text import from_yaml

    low, high = command.cut
    if not 0 <= low < high <= 100:
        raise UserError(f"--cut {low} {high}: these must be two percentages, the lower first.")
    dataset = open_dataset(command)
    if command.write and not isinstance(dataset, Folder):
        raise UserError(
            f"--write: the dataset {dataset.info.name} has no dataset.yaml. Leave it out."
        )
    console = plain_console()
    with Progress(console=console, transient=True) as progress:
        total = len(dataset.train_ids()) + len(dataset.unlabeled_ids())
        bar = progress.add_task("reading", total=total)
        found = statistics(dataset, command.cut, lambda: progress.advance(bar))
    console.print(channel_table(found))
    console.print(f"{found.pixels:,} pixels of {found.images:,} images were looked at.")
    if not isinstance(dataset, Folder):
        return 0
    path = dataset.root / DESCRIPTION
    known = list(from_yaml(path.read_text("utf-8-sig"), str(path)))
    text = lines(found, known)
    of_rgb = [key for key in OF_RGB if key in known] if adds_bands(found, known) else []
    instead = f", in place of {', '.join(of_rgb)}" if of_rgb else ""
    if not text:
        console.print(f"{path} says all of it already.", soft_wrap=True)
        return 0
    if command.write:
        append(path, text, of_rgb)
    head = f"{path} has these lines now" if command.write else f"Lines that --write adds to {path}"
    console.print(f"{head}{instead}:", *text, sep="\n", soft_wrap=True)
    return 0


def channel_table(found: Statistics) -> Table:
    """Return a row for each channel, in the numbers that `statistics` looked at."""
    from rich.table import Table

    from ctt.data.channel_statistics import PERCENTILES

    table = Table(title="channels; mean and std after range becomes 0..1")
    for column in ("band", "lowest", *(f"{p:g} %" for p in PERCENTILES), "highest", "mean", "std"):
        table.add_column(column, justify="right")
    for c, band in enumerate(found.bands):
        values = (found.low[c], *found.percentiles[c], found.high[c], found.mean[c], found.std[c])
        table.add_row(str(band), *(f"{value:.4g}" for value in values))
    return table
