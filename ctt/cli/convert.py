"""ctt-data convert: an export of an annotation tool becomes a folder to train on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ctt.errors import UserError
from ctt.ranges import AT_LEAST_0
from ctt.text import say

if TYPE_CHECKING:
    from ctt.data.convert import Result
    from ctt.data.exports.base import Export


SHOWN = 5  # images named in a message


@dataclass(frozen=True)
class Convert:
    """Turn what an annotation tool exports into a folder for --dataset folder: COCO (polygons and
    both run-length codes), YOLO's outlines, LabelMe, CVAT for images 1.1, and coloured masks with a
    table of their colours.

    Images without annotation become unlabelled ones, and those of a part named val become val/. No
    file is ever overwritten, and a call that was stopped goes on when it is given again. To a
    folder that is there, images are added; its classes keep their numbers.
    """

    source: Path
    """The export: its folder, unpacked, or one of its files."""
    to: Path | None = None
    """New folder, or one with a dataset.yaml to which the images are added."""
    form: Literal["auto", "coco", "yolo", "labelme", "cvat", "masks"] = "auto"
    """What the export is; auto: as its files show."""
    images: Path | None = None
    """Folder of the images, if they are not in that of the export."""
    unlabeled: tuple[Path, ...] = ()
    """Folders of more images without annotation."""
    masks: Path | None = None
    """masks: folder of the masks; by default SegmentationClass/, masks/ or the folder itself."""
    table: Path | None = None
    """masks: file of the colours, or numbers, of the classes: lines such as `cat:128,0,0::`,
    `128 0 0 cat`, `cat,128,0,0` or `1, cat`; by default labelmap.txt, dataset_meta.json,
    class_dict.csv, label_colors.txt or _classes.csv."""
    tolerance: Annotated[int, AT_LEAST_0] = 0
    """masks: by how much each channel may differ from a colour of the table. Above 0 JPEG masks are
    read too."""
    classes: tuple[str, ...] = ()
    """The classes in the order of their numbers, the background first. Pixels of other ones are
    ignored, and so are pixels in no shape if no class is called background. By default those of the
    folder --to, or all with the background in front."""
    empty: Literal["unlabeled", "background"] = "unlabeled"
    """What an image is that the export lists without any shape: not annotated, or annotated as
    background alone."""
    crowd: Literal["class", "ignore"] = "class"
    """coco: whether the pixels of crowds belong to their class or are ignored."""
    link: bool = False
    """Make symbolic links to the images in place of copies."""
    threads: Annotated[int, AT_LEAST_0] = 0
    """Images converted at a time; 0: one for each core."""
    show: Annotated[int, AT_LEAST_0] = 20
    """Of more unusable files than this, the first of each kind is printed, for so many kinds; 0:
    every single file."""


def convert(command: Convert) -> int:
    """Write the folder and tell what was not used.

    Raises:
        UserError: nothing can be converted, or some images could not.
    """
    from rich.progress import Progress

    from ctt.console import plain_console
    from ctt.data import convert as work
    from ctt.data.exports import read_export
    from ctt.data.exports.base import Request
    from ctt.data.faults import Fault, grouped

    if command.to is None:
        raise UserError("--to is needed: the new folder, such as --to mine.")
    for folder in command.unlabeled:
        if not folder.exists():
            raise UserError(f"--unlabeled {folder}: there is no such folder.")
    if not 0 <= command.tolerance <= 255:
        raise UserError(f"--tolerance must be in 0..255, got {command.tolerance}.")
    request = Request(
        command.source,
        command.to,
        command.images,
        command.masks,
        command.table,
        classes=command.classes or work.classes_of(command.to),
        closed=not command.classes and work.classes_of(command.to) != (),
        empty=command.empty,
        crowd=command.crowd,
        tolerance=command.tolerance,
    )
    export = read_export(request, command.form)
    with Progress(console=plain_console(), transient=True) as progress:
        bar = progress.add_task("converting", total=len(export.items))
        result = work.convert(
            export,
            command.to,
            command.unlabeled,
            link=command.link,
            threads=command.threads,
            advance=lambda: progress.advance(bar),
        )
    for line in report(export, result, command.to):
        say(line)
    if texts := result.faults:
        if 0 < command.show < len(texts):
            texts = grouped(Fault(text, "") for text in texts)[: command.show]
        for text in texts:
            say(text)
        hidden = ", and with --show 0 every one" if len(texts) < len(result.faults) else ""
        raise UserError(
            f"{len(result.faults):,} file{'s' * (len(result.faults) > 1)} could not be used, see "
            f"above{hidden}; all others are converted. Mend them and give the command again."
        )
    return 0


def report(export: Export, result: Result, target: Path) -> list[str]:
    """Return what was written, what was decided, and what was left out, a line each."""
    evaluation = f", {result.evaluation:,} to evaluate on" if result.evaluation else ""
    lines = [
        f"{target}: {result.labeled:,} images with masks{evaluation}, {result.unlabeled:,} without "
        f"(unlabeled/), from {export.form}.",
        f"{len(export.classes)} classes, from 0 on: {', '.join(export.classes)}.",
    ]
    if export.order:  # its annotation is shapes
        lines.append(f"Pixels in no shape: {_outside(export)}.")
    if result.present:
        lines.append(f"{result.present:,} of the images were there already and are left alone.")
    if result.clashes:
        lines.append(
            f"Overlaps: {sum(result.clashes):,} pixels of {len(result.clashes):,} images lie in "
            f"shapes of several classes; {export.order}."
        )
    if result.unmatched:
        share = sum(result.unmatched) / result.pixels
        example = f", such as {result.example}" if result.example else ""
        lines.append(
            f"No class: {sum(result.unmatched):,} pixels ({share:.2%}) of "
            f"{len(result.unmatched):,} images match no class{example}; they are 255 in the masks, "
            f"which is ignored."
        )
    if export.ignored:
        lines.append(f"Ignored: pixels of {', '.join(export.ignored)} are 255 in the masks.")
    if result.turned:
        lines.append(
            f"Turned: {result.turned:,} photographs were annotated as they are stored; their masks "
            f"are turned as viewers turn them (EXIF)."
        )
    if result.unsure:
        named = ", ".join(map(str, result.unsure[:SHOWN]))
        more = ", ..." if len(result.unsure) > SHOWN else ""
        lines.append(
            f"Unsure: viewers turn or mirror {len(result.unsure):,} of the photographs (EXIF), and "
            f"no size in the export tells whether the annotation tool did: {named}{more}. They "
            f"count as annotated in the turned view. If their masks do not fit, take the note out "
            f"of the images (`exiftool -Orientation= FILE`) and convert them into a new folder."
        )
    lines += [f"Left out: {count:,} {reason}." for reason, count in result.left_out.items()]
    quoted = shlex.quote(str(target))
    return [*lines, f"Next: ctt-data check --dataset folder --data-root {quoted}"]


def _outside(export: Export) -> str:
    from ctt.data.dataset import IGNORE

    if export.outside == IGNORE:
        return f"{IGNORE}, which is ignored; a class called background would take them"
    return f"{export.outside}, {export.classes[export.outside]}"
