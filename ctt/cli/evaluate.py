"""ctt-eval: mIoU of a run's networks, or of one file of weights."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctt.cli.common import (
    check_protocol,
    check_whole,
    refuse_torchrun,
    refuse_without_effect,
    run_program,
)
from ctt.errors import UserError
from ctt.settings import EvalSettings, Settings, update
from ctt.text import say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ctt.data.dataset import Dataset, DatasetInfo
    from ctt.inference.load import TrainedNetworks
    from ctt.models.base import SegmentationModel


@dataclass(frozen=True)
class Arguments:
    """Evaluate every network of a run, or one file of weights, and print IoU by class."""

    path: Path
    """Folder of a run (all students, teachers and their ensemble), or a best.safetensors."""
    network: tuple[str, ...] = ()
    """Only these of a run's networks: student_1, teacher_2, ensemble. A submission is of one, by
    default of the ensemble."""
    dataset: str = ""
    """Dataset to evaluate on; by default the one that the networks were trained on."""
    data_root: Path | None = None
    """Its folder; by default the run's. If it holds other images than the run's, all that it has to
    evaluate on are scored."""
    split: str = ""
    """Images to evaluate on; by default those of the run, or `val`."""
    out: Path | None = None
    """New folder for summary.json and, for each network, its confusion matrix as CSV and PNG."""
    submission: Path | None = None
    """Instead of an evaluation: new folder for predictions of the benchmark's test images, whose
    labels nobody has, in the form of its server (Cityscapes: labelIds; VOC: palette PNGs)."""
    embedding: Path | None = None
    """Instead of an evaluation: new PNG of where pixels of labelled and unlabelled images lie among
    the features of one network (t-SNE), by default of the first teacher."""
    workers: int = 2
    """Processes that load images; 0 loads in the main process."""
    device: str = "auto"
    eval: EvalSettings = field(default_factory=EvalSettings)
    """The protocol; by default the run's."""


BESIDE_EMBEDDING = {
    "split": "the images are those of the run's own lists",
    "out": "nothing but the picture is written",
    "submission": "give the two in two calls",
    "workers": "the main process reads the images",
}
SHOWN = ("stride", "scales", "flip", "amp", "fit", "batch_pixels")  # how, not which part of images


def main() -> None:
    """Run the program."""
    run_program("ctt-eval", lambda: _main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    from ctt.data.folder import refuse_among_images

    parsed = _parse(arguments, EvalSettings())
    refuse_torchrun("ctt-eval")
    _check_new("--out", parsed.out)
    _check_new("--submission", parsed.submission)
    if parsed.embedding is not None and parsed.embedding.exists():
        raise UserError(f"--embedding {parsed.embedding}: this is there already. Give a new name.")
    if parsed.embedding is not None:
        refuse_among_images(parsed.embedding, "--embedding")
        refuse_without_effect(parsed, "beside --embedding", BESIDE_EMBEDDING)
    if parsed.workers < 0:
        raise UserError(f"--workers {parsed.workers} must be at least 0.")
    from ctt.device import pick_device
    from ctt.inference.load import load_trained

    device = pick_device(parsed.device, "--device")
    trained = load_trained(parsed.path)
    parsed = _parse(arguments, trained.settings.eval)
    check_protocol(parsed.eval, trained.settings.eval)
    dataset, settings = _open_dataset(trained, parsed)
    changed = [n for n in SHOWN if getattr(parsed.eval, n) != getattr(trained.settings.eval, n)]
    if parsed.embedding is not None and changed:
        raise UserError(
            f"`eval.{changed[0]}` has no effect beside --embedding: the network sees an image once."
        )
    if parsed.submission is not None:
        _submit(trained, dataset, device, parsed, parsed.submission)
        return 0
    if parsed.embedding is not None:
        _draw_embedding(trained, dataset, device, parsed, parsed.embedding)
        return 0
    networks = (trained.choose(parsed.network) if parsed.network else trained).networks
    ids = dataset.eval_ids()
    matrices, images = _confusions(networks, trained.info, dataset, ids, device, parsed)
    _report(matrices, images, trained, dataset, ids, settings, parsed)
    return 0


def _parse(arguments: list[str], protocol: EvalSettings) -> Arguments:
    import tyro

    default = Arguments(path=tyro.MISSING, eval=protocol)
    config = (tyro.conf.PositionalRequiredArgs,)
    return tyro.cli(Arguments, prog="ctt-eval", args=arguments, default=default, config=config)


def _check_new(option: str, folder: Path | None) -> None:
    from ctt.data.folder import refuse_among_images

    if folder is None:
        return
    refuse_among_images(folder, option)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{option} {folder}: this is there already. Give a new or an empty folder.")


def _open_dataset(trained: TrainedNetworks, parsed: Arguments) -> tuple[Dataset, Settings]:
    from ctt import data, run
    from ctt.data.dataset import first_difference

    settings = trained.settings
    if parsed.dataset:
        settings = dataclasses.replace(settings, dataset=parsed.dataset, data_root=None)
    if parsed.data_root is not None:
        settings = dataclasses.replace(settings, data_root=parsed.data_root)
    if settings.dataset not in data.names() and not parsed.dataset:
        raise UserError(
            f"{trained.origin}: trained on {settings.dataset}, which is no dataset of this "
            f"installation. Say by --dataset and --data-root what to evaluate on "
            f"({', '.join(data.names())})."
        )
    values = {"data": {"eval_split": parsed.split}} if parsed.split else {}
    settings = update(settings, values, "--split")
    dataset = settings.open_dataset()
    if dataset.info.classes != trained.info.classes:
        raise UserError(
            f"{trained.origin} knows the {len(trained.info.classes)} classes of "
            f"{trained.info.name}, but {settings.dataset} has {len(dataset.info.classes)} of its "
            f"own: {first_difference(trained.info, dataset.info)}. Give the dataset that the "
            f"network was trained on."
        )
    for line in dataset.take_scale_of(trained.info):
        say(line)
    folder = parsed.path if parsed.path.is_dir() else parsed.path.parent
    if settings.dataset == trained.settings.dataset and _is_of_run(folder, dataset, settings):
        run.hold_out(folder, dataset, _is_part_of_run(trained, dataset, settings))
    for line in dataset.notes:
        say(line)
    return dataset, settings


def _is_of_run(folder: Path, dataset: Dataset, settings: Settings) -> bool:
    """Return whether this is the data of the run in `folder`, which may lie elsewhere by now.

    Other data may have images of the same names, such as running numbers.
    """
    from ctt import checkpoint, run
    from ctt.files import expanded
    from ctt.train.same_data import is_of_run

    if settings.data_root is None or not (folder / run.CONFIG).is_file():
        return True
    before = run.read_settings(folder, serve=True).data_root
    roots = [
        expanded(path, "--data-root").resolve() for path in (before, settings.data_root) if path
    ]
    if roots[0] == roots[-1]:
        return True
    try:
        saved = checkpoint.load_last(folder / run.CHECKPOINT)[0]
    except UserError:  # nothing is known of the data
        return True
    if is_of_run(saved.get("data", {}), dataset):
        return True
    say(
        f"{settings.data_root} holds other images than those that the run was trained with: "
        f"evaluated are the images that this folder has to evaluate on."
    )
    return False


def _is_part_of_run(trained: TrainedNetworks, dataset: Dataset, settings: Settings) -> bool:
    """Return whether the images to evaluate on are of the part that the run was evaluated on.

    Raises:
        UserError: they are held out, and the run, which held none out, was trained on them.
    """
    before = trained.settings
    if settings.data.eval_split == before.data.eval_split:
        return True
    as_trained = dataclasses.replace(settings, data=before.data).open_dataset()
    if dataset.eval_ids() == as_trained.eval_ids():  # a folder without val/ holds out always
        return True
    if settings.data.eval_split == "tune":
        raise UserError(
            f"--split tune: the networks of {trained.origin} were trained with those images. "
            f"Train with --data.eval-split tune to hold them out."
        )
    return False


def _submit(
    trained: TrainedNetworks,
    dataset: Dataset,
    device: torch.device,
    parsed: Arguments,
    folder: Path,
) -> None:
    from rich.progress import Progress

    from ctt.inference.predict import for_images, protocol_text
    from ctt.inference.submission import images_to_submit, write_submission

    if parsed.split or parsed.out is not None:
        raise UserError(
            "--submission is of the test images, without scores: leave out --split and --out."
        )
    if trained.settings.eval.protocol != "center-crop":  # else it is the run's, and of no effect
        check_whole(parsed.eval)
    if len(parsed.network) > 1:
        raise UserError("--submission is of one network: give one name to --network.")
    name = parsed.network[0] if parsed.network else trained.names()[-1]
    protocol = for_images(parsed.eval)
    total = len(images_to_submit(dataset)[1])
    with Progress(transient=True) as bar:
        task = bar.add_task("segmenting", total=total)
        write_submission(
            trained.choose([name]).predictor(device, protocol),
            dataset,
            folder,
            protocol,
            parsed.workers,
            lambda images: bar.advance(task, images),
        )
    say(
        f"{trained.origin}: {total} test images of {dataset.info.name} as {name} sees them, "
        f"protocol {protocol_text(protocol)}, are in {folder}"
    )


def _draw_embedding(
    trained: TrainedNetworks, dataset: Dataset, device: torch.device, parsed: Arguments, path: Path
) -> None:
    from ctt.inference.embedding import draw_run

    if len(parsed.network) > 1:
        raise UserError("--embedding is of one network: give one name to --network.")
    name = parsed.network[0] if parsed.network else ""
    shown = draw_run(path, parsed.path, trained, dataset, device, parsed.eval, name)
    say(f"{trained.origin}: the features of {shown} are drawn in {path}")


def _confusions(
    networks: dict[str, SegmentationModel],
    info: DatasetInfo,
    dataset: Dataset,
    ids: list[str],
    device: torch.device,
    parsed: Arguments,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the confusion matrices by network, and how many images show each class."""
    import torch
    from rich.progress import Progress

    from ctt.inference.evaluate import confusions

    shown = torch.zeros(len(dataset.info.classes), dtype=torch.int64, device=device)
    for network in networks.values():
        network.to(device)
    with Progress(transient=True) as bar:
        task = bar.add_task("evaluating", total=len(ids))
        found = confusions(
            networks,
            dataset,
            ids,
            device,
            parsed.eval,
            parsed.workers,
            info,
            lambda images: bar.advance(task, images),
            shown,
        )
    wanted = parsed.network or found
    return {name: matrix for name, matrix in found.items() if name in wanted}, shown


def _report(
    matrices: dict[str, Tensor],
    images: Tensor,
    trained: TrainedNetworks,
    dataset: Dataset,
    ids: list[str],
    settings: Settings,
    parsed: Arguments,
) -> None:
    """Print the tables; write summary.json, classes.csv and the pictures if wanted."""
    from ctt import run
    from ctt.console import plain_console
    from ctt.inference.class_report import class_rows, class_table, classes_as_json, write_classes
    from ctt.inference.evaluate import as_json, hash_of_list, score, score_table, write_json
    from ctt.inference.figures import draw_confusion, write_confusion
    from ctt.inference.predict import protocol_text

    scores = {name: score(matrix) for name, matrix in matrices.items()}
    console = plain_console()
    console.print(score_table(scores, dataset.info))
    classes = {name: class_rows(matrix, images, dataset.info) for name, matrix in matrices.items()}
    last = list(classes)[-1]  # the ensemble, if it is among them
    console.print(class_table(classes[last], last))
    split, root = settings.data.eval_split, settings.data_root
    console.print(
        f"{trained.origin}; protocol {protocol_text(parsed.eval)}; {len(ids)} images of "
        f"{settings.dataset}/{split}{f' in {root}' if root else ''}",
        soft_wrap=True,
    )
    if parsed.out is None:
        return
    result: dict[str, Any] = {
        **as_json(scores, dataset.info, parsed.eval),
        **classes_as_json(classes),
        "dataset": settings.dataset,
        "eval_split": split,
        "images": len(ids),
        "images_sha256": hash_of_list(ids),
        "weights": trained.origin,
        "weights_sha256": trained.sha256,
    }
    parsed.out.mkdir(parents=True, exist_ok=True)
    for name, matrix in matrices.items():
        write_confusion(parsed.out / f"confusion_{name}.csv", matrix, dataset.info)
        draw_confusion(parsed.out / f"confusion_{name}.png", matrix, dataset.info, name)
    write_json(parsed.out / run.SUMMARY, result)
    write_classes(parsed.out / run.CLASSES, classes)
    console.print(f"Everything is in {parsed.out}", soft_wrap=True)
