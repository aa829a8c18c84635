"""ctt-predict --rank: which images to label next, and their masks for annotation tools."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from ctt.cli.common import BAD_INPUT, check_protocol, check_whole, refuse_without_effect
from ctt.cli.ranking_checks import (
    RESULTS,
    check_copies,
    check_drawn,
    check_names,
    check_places,
    earlier,
    is_drawn,
)
from ctt.errors import LoaderError, UserError
from ctt.settings import EvalSettings
from ctt.text import BYTES_AS_THEY_ARE, say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ctt.cli.predict import Arguments
    from ctt.cli.ratings_file import RatingsFile
    from ctt.data.dataset import Dataset
    from ctt.inference.load import TrainedNetworks
    from ctt.inference.rank import Committee, Place, Rating

K = TypeVar("K")
LABELED = 500  # images with labels, of which the others are told apart
SHEET = 16  # images on the sheet
WITHOUT_EFFECT = {
    "overlay": "it writes no overlays",
    "confidence": "it writes no confidence",
    "tile": "it is of --geotiff",
    "margin": "it is of --geotiff",
    "skip_existing": "an order is of all images at once, and --overwrite replaces one",
    "network": "the teachers of the run rate the images",
}
OF_FOLDERS = {"recursive": "the images are those that the run has without labels"}


@dataclass(frozen=True)
class Entry:
    """An image that may be labelled.

    Attributes:
        name: as it is written into rank.csv.
        place: path of its copy below the folder of images.
        file: None of an image in memory.
    """

    name: str
    place: PurePosixPath
    file: Path | None


def rank(parsed: Arguments, protocol_of: Callable[[EvalSettings], EvalSettings]) -> int:
    """Write the order of the images, and what is needed to label the first ones.

    Args:
        protocol_of: the protocol as the command line changes one.
    """
    from ctt.cli.ratings_file import RatingsFile
    from ctt.device import pick_device
    from ctt.inference.load import load_trained
    from ctt.inference.rank import Committee, order

    check(parsed)
    device = pick_device(parsed.device, "--device")
    trained = load_trained(parsed.weights)
    before = trained.settings.eval
    if before.protocol == "center-crop":
        before = dataclasses.replace(before, protocol="whole")
    protocol = protocol_of(before)
    check_protocol(protocol, before)
    check_whole(protocol)
    dataset, reason = of_run(parsed.weights, trained)
    entries = given(parsed) if parsed.images else unlabeled(parsed.weights, dataset, reason)
    check_places(entries)
    if "cvat" in parsed.annotations:
        check_names(entries)
    check_copies(parsed.out, entries, dataset)
    check_drawn(parsed.out, entries, dataset)
    committee = Committee(trained, device, protocol)
    read = partial(read_entry, dataset, trained)
    file = RatingsFile(parsed.out, committee)
    kept, ratings, failures = rated(committee, entries, read, parsed.workers, file)
    if not kept:  # results of an earlier call stay
        file.remove()
        raise UserError(f"No image can be ranked. {' '.join(failures)}")
    known = labeled(parsed.weights, dataset)
    features = features_of(committee, dataset, known, parsed.workers)
    places = order(ratings, features)
    for line in notes(committee, kept, features, reason):
        say(line)
    for path in earlier(parsed.out):
        path.unlink()
    write_order(parsed, kept, ratings, places)
    file.remove()
    failures += write_first(parsed, committee, [kept[place.image] for place in places], read)
    for failure in failures:
        say(f"ctt-predict: {failure}", sys.stderr)
    return BAD_INPUT if failures else 0


def check(parsed: Arguments) -> None:
    """Refuse options that do not fit, and to write over what is there."""
    if parsed.first < 1:
        raise UserError(f"--first {parsed.first} must be at least 1.")
    if parsed.geotiff:
        raise UserError("--geotiff writes masks, and --rank an order. Leave one of them out.")
    reasons = WITHOUT_EFFECT if parsed.images else WITHOUT_EFFECT | OF_FOLDERS
    refuse_without_effect(parsed, "beside --rank", reasons)
    if parsed.workers < 0:
        raise UserError(f"--workers {parsed.workers} must be at least 0.")
    there = [parsed.out / name for name in RESULTS if (parsed.out / name).exists()]
    if there and not parsed.overwrite:
        raise UserError(f"{there[0]} is there already. Give another --out, or --overwrite.")


def of_run(weights: Path, trained: TrainedNetworks) -> tuple[Dataset | None, str]:
    """Return the dataset of a run, or None and a sentence on why it is not at hand."""
    from ctt import run

    if not weights.is_dir():
        return None, "Give the folder of a run, which has the lists of its images."
    if not (weights / run.LABELED_LIST).is_file():
        return None, f"There is no {weights / run.LABELED_LIST}."
    try:
        dataset = trained.settings.open_dataset()
        if dataset.info.bands != trained.info.bands:
            return None, "The dataset of the run has other channels by now."
        dataset.take_scale_of(trained.info)
    except UserError as error:
        return None, str(error)
    return dataset, ""


def names_of(path: Path, dataset: Dataset) -> list[str]:
    """Return the images in a list of a run that are still there, and say how many are not.

    The lists of the run count, whatever has come to the dataset since.
    """
    from ctt import run

    listed = run.read_names(path)
    found = [name for line in listed if (name := dataset.find(line)) is not None]
    if gone := len(listed) - len(found):
        say(
            f"{gone} of the {len(listed)} images in {path} are no longer there, or were moved, and "
            f"are left out."
        )
    return found


def labeled(weights: Path, dataset: Dataset | None) -> list[str]:
    """Return up to `LABELED` of the labelled images of a run that are at hand."""
    from ctt import run

    names = [] if dataset is None else names_of(weights / run.LABELED_LIST, dataset)
    return names[:: max(1, math.ceil(len(names) / LABELED))]


def unlabeled(weights: Path, dataset: Dataset | None, reason: str = "") -> list[Entry]:
    """Return the images that a run has without labels.

    Args:
        reason: why the dataset of the run is not at hand.

    Raises:
        UserError: there are none, or the dataset of the run is not at hand.
    """
    from ctt import run

    path = weights / run.UNLABELED_LIST
    if dataset is None or not path.is_file():
        raise UserError(
            f"{weights}: the dataset of the run is not at hand. {reason or f'There is no {path}.'} "
            f"Give images, folders or patterns after the weights."
        )
    names = names_of(path, dataset)
    if not names:
        raise UserError(f"{weights}: the run has no unlabelled images. Give some after the run.")
    entries = []
    for name in names:
        files = dataset.files(name, labeled=False)
        place, ending = PurePosixPath(name.removeprefix("unlabeled/")), ".png"
        if files:  # else made in memory
            ending = files[0].suffix
        if place.suffix != ending:  # names of some datasets have none
            place = place.with_name(f"{place.name}{ending}")
        entries.append(Entry(name, place, files[0] if files else None))
    return entries


def given(parsed: Arguments) -> list[Entry]:
    """Return the images on the command line."""
    from ctt.cli.predict import find_jobs

    jobs = find_jobs(parsed.images, parsed.out, parsed.recursive)
    if not jobs:
        raise UserError(f"No image found in {', '.join(parsed.images)}.")
    entries = []
    for job in jobs:
        place = PurePosixPath(job.stem.relative_to(parsed.out).as_posix())
        place = place.with_name(f"{place.name}{job.file.suffix}")
        entries.append(Entry(str(job.file), place, job.file))
    return entries


def read_entry(dataset: Dataset | None, trained: TrainedNetworks, entry: Entry) -> Tensor:
    """Return an image as networks take it."""
    from ctt.data.rasters import read_as

    if entry.file is not None:
        return read_as(entry.file, trained.info)
    assert dataset is not None
    return dataset.image(entry.name)


def read_name(dataset: Dataset, name: str) -> Tensor:
    return dataset.image(name)


def images_of(
    read: Callable[[K], Tensor], keys: Sequence[K], workers: int
) -> Iterator[Tensor | UserError]:
    """Yield images; of one that cannot be read, why.

    Raises:
        LoaderError: the processes that read have ended.
    """
    from ctt.data.loader import read_in_order

    for image in read_in_order(read, keys, workers):
        if isinstance(image, LoaderError):
            raise image
        yield image


def rated(
    committee: Committee,
    entries: list[Entry],
    read: Callable[[Entry], Tensor],
    workers: int,
    file: RatingsFile,
) -> tuple[list[Entry], list[Rating], list[str]]:
    """Return the images that can be read and rated, their ratings, and messages about the others.

    Args:
        file: ratings of an interrupted call, to which the new ones are added.

    Raises:
        LoaderError: the processes that read have ended before the first one.
    """
    from rich.progress import Progress

    failures = []
    ratings = {entry: known for entry in entries if (known := file.get(entry)) is not None}
    if ratings:
        say(f"{len(ratings)} of {len(entries)} images were rated before an interruption.")
    others = [entry for entry in entries if entry not in ratings]
    with Progress(transient=True) as bar, file.opened() as opened:
        task = bar.add_task("looking", total=len(entries), completed=len(ratings))
        try:
            for entry, image in zip(others, images_of(read, others, workers), strict=True):
                bar.advance(task)
                try:
                    if isinstance(image, UserError):
                        raise image
                    ratings[entry] = committee.rate(image)
                except UserError as error:
                    failures.append(told(entry, error))
                else:
                    file.add(opened, entry, ratings[entry])
        except LoaderError as error:  # what was rated may have taken hours
            if not ratings:
                raise
            failures.append(f"The order is of the images before this: {error}")
        except KeyboardInterrupt:
            say(f"{len(ratings)} of {len(entries)} images are rated; the same command goes on.")
            raise
    kept = [entry for entry in entries if entry in ratings]
    return kept, [ratings[entry] for entry in kept], failures


def told(entry: Entry, error: UserError) -> str:
    """Return the message with the name of the image in it."""
    text = str(error)
    return text if entry.name in text else f"{entry.name}: {text}"


def features_of(
    committee: Committee, dataset: Dataset | None, names: list[str], workers: int
) -> list[Tensor]:
    """Return the features of labelled images, without those that cannot be read any more or do not
    fit into memory."""
    features = []
    images = () if dataset is None else images_of(partial(read_name, dataset), names, workers)
    for image in images:
        if not isinstance(image, UserError):
            with contextlib.suppress(UserError):
                features.append(committee.features(image))
    return features


def notes(
    committee: Committee, kept: list[Entry], features: Sequence[Tensor], reason: str
) -> Iterable[str]:
    """Yield what the user should know of the order.

    Args:
        reason: why the dataset of the run is not at hand.
    """
    yield f"{len(kept)} images are ordered as {', '.join(committee.names)} see them."
    if len(committee.names) == 1:
        yield (
            "One network disagrees with nobody: the order is by its entropy and by how far images "
            "are from each other. Give the folder of a run, which holds several."
        )
    if not features:
        yield (
            "No labelled image of the run was found, so the order ignores how similar images are "
            f"to labelled ones. {reason}".rstrip()
        )


def write_order(
    parsed: Arguments, kept: list[Entry], ratings: Sequence[Rating], places: list[Place]
) -> None:
    """Write rank.csv."""
    from ctt.files import atomic_write

    parsed.out.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(parsed.out / "rank.csv") as part,
        part.open("w", newline="", encoding="utf-8", errors=BYTES_AS_THEY_ARE) as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["place", "image", "score", "disagreement", "entropy", "distance", "copy"])
        for number, place in enumerate(places, 1):
            entry, rating = kept[place.image], ratings[place.image]
            numbers = (place.score, rating.disagreement, rating.entropy, place.distance)
            cells = ("" if not math.isfinite(x) else f"{x:.5g}" for x in numbers)
            copied = entry.place if number <= parsed.first else ""
            writer.writerow([number, entry.name, *cells, copied])


def write_first(
    parsed: Arguments, committee: Committee, kept: list[Entry], read: Callable[[Entry], Tensor]
) -> list[str]:
    """Write rank.png, and the first images with their masks.

    Returns:
        messages about those that cannot be read any more.
    """
    from ctt.inference.annotations import write
    from ctt.inference.figures import draw_disagreement, reduced

    folder = parsed.out / "images"
    folder.mkdir(exist_ok=True)
    masks: dict[str, Tensor] = {}
    drawn: list[Path] = []
    shown: list[tuple[str, Tensor, Tensor, Tensor]] = []
    failures = []
    for entry in kept[: parsed.first]:
        try:
            image = read(entry)
            label, disagreement, _ = committee.look(image)
        except UserError as error:
            failures.append(told(entry, error))
            continue
        masks[str(entry.place)] = label
        if len(shown) < SHEET:
            shown.append((entry.name, *reduced(image, label, disagreement)))
        if is_drawn(folder / entry.place):
            drawn.append((folder / entry.place).with_suffix(".json"))
        else:
            copy(entry, image, folder / entry.place)
    if shown:
        draw_disagreement(parsed.out / "rank.png", shown, committee.info)
    for form in parsed.annotations:
        path = write(form, parsed.out, folder, masks, committee.info)
        say(f"The masks of the first {len(masks)} images as {form}: {path}")
    if drawn:
        say(
            f"Files changed in LabelMe: {len(drawn)}, such as {drawn[0]}. They and their images "
            f"stay as they are."
        )
    say(f"The order: {parsed.out / 'rank.csv'}; the first ones: {parsed.out / 'rank.png'}")
    return failures


def copy(entry: Entry, image: torch.Tensor, target: Path) -> None:
    """Put an image where it is labelled."""
    from PIL import Image

    from ctt.files import atomic_write
    from ctt.inference.render import save_png

    target.parent.mkdir(parents=True, exist_ok=True)
    if entry.file is not None:
        with atomic_write(target) as part:
            shutil.copyfile(entry.file, part)
    else:
        save_png(Image.fromarray(image.permute(1, 2, 0).numpy()), target)
