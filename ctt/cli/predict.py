"""ctt-predict: masks and overlays of images."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ctt.cli.common import (
    BAD_INPUT,
    check_protocol,
    check_whole,
    refuse_torchrun,
    refuse_without_effect,
    run_program,
)
from ctt.data import IMAGE_SUFFIXES, other_images
from ctt.errors import LoaderError, UnwritableError, UserError
from ctt.files import remove_parts
from ctt.settings import EvalSettings
from ctt.text import say

if TYPE_CHECKING:
    from torch import Tensor

    from ctt.data.dataset import DatasetInfo
    from ctt.inference.load import TrainedNetworks
    from ctt.inference.predict import Predict


@dataclass(frozen=True)
class Arguments:
    """Segment images: for each NAME.jpg, NAME_mask.png (palette PNG) and NAME_overlay.png."""

    weights: Path
    """A best.safetensors, or the folder of a run."""
    images: tuple[str, ...]
    """Images, folders of images, or patterns such as 'photos/*.jpg' and 'photos/**/*.png'."""
    out: Path = Path("predictions")
    """Folder for the results."""
    recursive: bool = False
    """Also the images in the folders' subfolders; results lie in subfolders of the same names."""
    overlay: bool = True
    """Write overlays beside the masks."""
    confidence: bool = False
    """Write NAME_confidence.png: the probability of the predicted class, 255 for 1."""
    geotiff: bool = False
    """Write NAME_mask.tif (and NAME_confidence.tif) with the coordinates of the image, in memory
    that does not grow with it, and no overlays (extra `geo`)."""
    tile: int = 512
    """geotiff: side of the tiles that are read, seen by the network and written one by one; rounded
    up to a multiple of the network's coarsest stride."""
    margin: int = 64
    """geotiff: what the network sees around a tile, in pixels; rounded up likewise."""
    overwrite: bool = False
    """Replace results that are there already."""
    skip_existing: bool = False
    """Leave out images whose results are there already, to go on after a stop."""
    rank: bool = False
    """Rank the images by how much a label of each may help, as the run's teachers rate them: write
    rank.csv, a figure of the first ones (rank.png), and copies of these with their predicted masks.
    If no images are given, those that the run has without labels are ranked."""
    first: int = 20
    """rank: how many images are copied out with their masks, to be labelled."""
    annotations: tuple[Literal["coco", "labelme", "cvat"], ...] = ("coco",)
    """rank: forms of the masks: annotations.json of COCO, LabelMe's files beside the images, or
    cvat.zip, CVAT's "Segmentation mask 1.1"."""
    network: str = "best"
    """Of a run: the best one, or student_1, teacher_2, ensemble as they are in its checkpoint."""
    workers: int = 2
    """Processes that read images, and threads that write results; 0 reads in the main process."""
    device: str = "auto"
    eval: EvalSettings = field(default_factory=EvalSettings)
    """How images are shown to the network; by default as in the evaluations of the run."""


OF_RANK = dict.fromkeys(("first", "annotations"), "all masks are written, and no order")
OF_GEOTIFF = dict.fromkeys(("tile", "margin"), "--eval says what the network sees at a time")
KINDS = ("mask", "overlay", "confidence")  # of results
ENDINGS = (".png", ".tif")  # of their files


class Job(NamedTuple):
    """An image, and the path of its results up to _mask.png, or another ending."""

    file: Path
    stem: Path
    ending: str = ENDINGS[0]

    def targets(self, parsed: Arguments) -> dict[str, Path]:
        overlay = parsed.overlay and not parsed.geotiff
        kinds = ["mask", *["overlay"] * overlay, *["confidence"] * parsed.confidence]
        return {kind: self.target(kind) for kind in kinds}

    def target(self, kind: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}_{kind}{self.ending}")


def main() -> None:
    """Run the program."""
    run_program("ctt-predict", lambda: _main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    from ctt.data.folder import refuse_among_images

    parsed = _parse(arguments, EvalSettings())
    refuse_torchrun("ctt-predict")
    refuse_among_images(parsed.out)
    if parsed.rank:
        from ctt.cli.ranking import rank

        return rank(parsed, lambda protocol: _parse(arguments, protocol).eval)
    refuse_without_effect(parsed, "without --rank", OF_RANK)
    if not parsed.geotiff:
        refuse_without_effect(parsed, "without --geotiff", OF_GEOTIFF)
    jobs = find_jobs(parsed.images, parsed.out, parsed.recursive)
    if not parsed.images:
        raise UserError("Which images? Give files, folders or patterns after the weights.")
    if not jobs:
        raise UserError(
            f"No image found in {', '.join(parsed.images)} ({', '.join(IMAGE_SUFFIXES)})."
        )
    if parsed.geotiff:
        check_tiles(parsed)
        jobs = [job._replace(ending=ENDINGS[1]) for job in jobs]
    found = len(jobs)
    jobs = check_targets(jobs, parsed)
    if parsed.workers < 0:
        raise UserError(f"--workers {parsed.workers} must be at least 0.")
    from ctt.data.remarks import PAGED, of_pages, traits
    from ctt.device import pick_device
    from ctt.inference.load import load_trained
    from ctt.inference.predict import for_images

    device = pick_device(parsed.device, "--device")
    trained = load_trained(parsed.weights, parsed.network)
    protocol = trained.settings.eval
    if protocol.protocol == "center-crop":
        protocol = dataclasses.replace(protocol, protocol="whole")
    parsed = _parse(arguments, protocol)
    check_protocol(parsed.eval, protocol)
    check_whole(parsed.eval)
    predict = trained.predictor(device, for_images(parsed.eval))
    if parsed.geotiff:
        parsed = with_fitted_tiles(parsed, trained)
    for folder in {job.stem.parent for job in jobs}:
        remove_parts(folder)
    run = segment_rasters if parsed.geotiff else segment
    failures = run(jobs, predict, trained.info, parsed)
    done = len(jobs) - len(failures)
    before = f", {present} were there already" if (present := found - len(jobs)) else ""
    say(f"{done} of {len(jobs)} images are segmented in {parsed.out}{before}")
    if not trained.info.bands:  # of which pages may be channels
        paged = [job.file for job in jobs if job.file.suffix.lower() in PAGED]
        for remark in of_pages(traits(paged, pixels=False)):
            say(remark)
    if not parsed.geotiff and (path := first_with_coordinates(jobs)):
        say(f"{path} has coordinates, which PNG files do not keep: --geotiff keeps them.")
    for failure in failures:
        say(f"ctt-predict: {failure}", sys.stderr)
    return BAD_INPUT if failures else 0


def _parse(arguments: list[str], protocol: EvalSettings) -> Arguments:
    import tyro

    default = Arguments(weights=tyro.MISSING, images=tyro.MISSING, eval=protocol)
    config = (tyro.conf.PositionalRequiredArgs,)
    return tyro.cli(Arguments, prog="ctt-predict", args=arguments, default=default, config=config)


def find_jobs(paths: Iterable[str], out: Path, recursive: bool) -> list[Job]:
    """Return the images that `paths` name: files, folders, patterns; each once.

    Raises:
        UserError: there is no such file, or nothing fits a pattern.
    """
    jobs: dict[Path, Job] = {}
    for text in paths:
        for job in _find(text, out, recursive):
            jobs.setdefault(_place(job.file), job)
    return list(jobs.values())


def _place(path: Path) -> Path:
    """The one path of a file; of a link its own, whose results have its own name."""
    return path.parent.resolve() / path.name


def _find(text: str, out: Path, recursive: bool) -> list[Job]:
    path = Path(text)
    if path.is_file():
        return [Job(path, out / _stem(path))]
    if path.is_dir():
        jobs = [
            Job(file, out / file.relative_to(path).with_name(_stem(file)))
            for file in _images_below(path, out, recursive)
        ]
    else:
        files = sorted(_matching(text))
        jobs = [
            Job(file, out / _stem(file))
            for file in files
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        ]
        if not jobs:
            raise UserError(f"{text}: there is no such image or folder.")
    results = {
        _place(job._replace(ending=ending).target(kind))
        for job in jobs
        for kind in KINDS
        for ending in ENDINGS
    }
    return [job for job in jobs if _place(job.file) not in results]  # of an earlier call


def _stem(path: Path) -> str:
    """Return the name without its ending, unless dots are left, which would name a folder."""
    return path.stem if path.stem.strip(".") else path.name


def _matching(pattern: str) -> list[Path]:
    """Return the files that fit a pattern; brackets in names of folders may mean themselves."""
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 (absolute)
    if not found:
        parts = Path(pattern).parts
        there = [n for n in range(len(parts)) if Path(*parts[:n]).is_dir()]
        folder, rest = Path(*parts[: there[-1]]), Path(*parts[there[-1] :])
        literal = Path(glob.escape(str(folder))) / rest
        found = glob.glob(str(literal), recursive=True)  # noqa: PTH207
    return [Path(path) for path in found]


def _images_below(folder: Path, out: Path, recursive: bool) -> list[Path]:
    """Sorted; neither hidden ones nor those in the folder of the results."""
    found, seen = [], []
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        seen += names
        folders[:] = [
            name
            for name in sorted(folders)
            if recursive and not name.startswith(".") and (here / name).resolve() != out.resolve()
        ]
        found += [
            here / name
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    if text := other_images(sorted(seen)):
        say(f"{folder} holds {text}", sys.stderr)
    return found


def check_targets(jobs: list[Job], parsed: Arguments) -> list[Job]:
    """Refuse to write two results to one name, or over a result.

    Returns:
        the images that are left to do.

    Raises:
        UserError: names the files.
    """
    seen: dict[Path, Path] = {}
    for job in jobs:
        if job.stem in seen:
            raise UserError(
                f"{seen[job.stem]} and {job.file} would both be written as {job.target('mask')}. "
                f"Predict them into two folders."
            )
        seen[job.stem] = job.file
    inputs = {job.file.resolve() for job in jobs}
    left = []
    for job in jobs:
        targets = job.targets(parsed).values()
        there = [target.exists() for target in targets]
        if parsed.skip_existing and all(there):
            continue
        left.append(job)
        for target, exists in zip(targets, there, strict=True):
            if target.resolve() in inputs:
                raise UserError(f"{target} is one of the images. Give another --out.")
            if exists and not (parsed.overwrite or parsed.skip_existing):
                raise UserError(
                    f"{target} is there already. Give another --out, --overwrite, or "
                    f"--skip-existing."
                )
    return left


def segment(jobs: list[Job], predict: Predict, info: DatasetInfo, parsed: Arguments) -> list[str]:
    """Write the results of every image that can be read; images of one size go together.

    Returns:
        messages about the others.
    """
    import torch
    from rich.progress import Progress

    from ctt.inference.predict import best_class, reraise_out_of_memory, stacks
    from ctt.inference.render import in_threads

    failures: list[str] = []
    _make_folder(parsed.out)
    with Progress(transient=True) as bar, torch.no_grad(), in_threads(parsed.workers) as call:
        task = bar.add_task("segmenting", total=len(jobs))
        pictures = read_all(jobs, info, parsed.workers, failures)
        for group in stacks(pictures, lambda pair: pair[1].shape[1:], parsed.eval.batch_pixels):
            try:
                with reraise_out_of_memory(parsed.eval):
                    images = torch.stack([image for _, image in group])
                    results = best_class(predict(images), images)
            except UserError as error:
                failures += [f"{job.file}: {error}" for job, _ in group]
                continue
            for (job, image), confidence, label in zip(group, *results, strict=True):
                call(write, job, image, label.cpu(), confidence.cpu(), info, parsed)
            bar.advance(task, len(group))
    return failures


def check_tiles(parsed: Arguments) -> None:
    """Refuse tiles that a GeoTIFF cannot have."""
    from ctt.inference.rasters import MULTIPLE

    if parsed.tile < MULTIPLE or parsed.tile % MULTIPLE:
        raise UserError(f"--tile {parsed.tile} must be a multiple of {MULTIPLE}, such as 512.")
    if parsed.margin < 0:
        raise UserError(f"--margin {parsed.margin} must be at least 0.")


def with_fitted_tiles(parsed: Arguments, trained: TrainedNetworks) -> Arguments:
    """Return the options with tile and margin as the cells of the networks need them."""
    from ctt.inference.predict import for_images
    from ctt.inference.rasters import cells_of, fitted

    cells = cells_of(trained.networks.values(), for_images(parsed.eval))
    tile, margin = fitted(parsed.tile, parsed.margin, cells)
    if (tile, margin) != (parsed.tile, parsed.margin):
        say(
            f"Tiles of {tile} pixels with a margin of {margin}: both are rounded up to multiples "
            f"of {cells}, the network's coarsest stride, so that tiles give the masks of the whole "
            f"image."
        )
    return dataclasses.replace(parsed, tile=tile, margin=margin)


def first_with_coordinates(jobs: list[Job]) -> Path | None:
    """Return the first TIFF if it says where it lies, where rasterio is at hand to look."""
    from ctt.data.pictures import TIFF
    from ctt.data.rasters import Raster

    first = next((job.file for job in jobs if job.file.suffix.lower() in TIFF), None)
    with contextlib.suppress(ModuleNotFoundError, UserError):
        if first is not None:
            with Raster(first) as raster:
                return first if raster.has_coordinates else None
    return None


def segment_rasters(
    jobs: list[Job], predict: Predict, info: DatasetInfo, parsed: Arguments
) -> list[str]:
    """Write the results of every raster that can be read, tile by tile.

    Returns:
        messages about the others.
    """
    from rich.progress import Progress

    from ctt.inference.predict import reraise_out_of_memory
    from ctt.inference.rasters import predict_raster

    failures: list[str] = []
    _make_folder(parsed.out)
    with Progress(transient=True) as bar:
        task = bar.add_task("segmenting", total=len(jobs))

        def advance(share: float) -> None:
            bar.advance(task, share)

        for job in jobs:
            job.stem.parent.mkdir(parents=True, exist_ok=True)
            tiles = (parsed.tile, parsed.margin)
            try:
                with reraise_out_of_memory(parsed.eval):
                    targets = job.targets(parsed)
                    predict_raster(job.file, targets, predict, info, *tiles, advance)
            except UnwritableError:
                raise
            except UserError as error:
                text = str(error)
                failures.append(text if str(job.file) in text else f"{job.file}: {text}")
    return failures


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}).") from None


def read_all(
    jobs: list[Job], info: DatasetInfo, workers: int, failures: list[str]
) -> Iterator[tuple[Job, Tensor]]:
    """Yield each image as networks take it, in order; `failures` gets why others cannot be read."""
    from ctt.data.loader import read_in_order
    from ctt.data.rasters import read_as

    found = read_in_order(partial(read_as, info=info), [job.file for job in jobs], workers)
    for job, image in zip(jobs, found, strict=True):
        if isinstance(image, LoaderError):
            raise image
        if isinstance(image, UserError):
            failures.append(str(image))
        else:
            yield job, image


def write(
    job: Job,
    image: Tensor,
    label: Tensor,
    confidence: Tensor,
    info: DatasetInfo,
    parsed: Arguments,
) -> None:
    """Write the results of one image; the mask last, so that if it exists the others do."""
    from ctt.inference.render import confidence_image, overlay, palette_image, save_png

    job.stem.parent.mkdir(parents=True, exist_ok=True)
    if parsed.overlay:
        save_png(overlay(image, label, info), job.target("overlay"))
    if parsed.confidence:
        save_png(confidence_image(confidence), job.target("confidence"))
    save_png(palette_image(label, info), job.target("mask"))
