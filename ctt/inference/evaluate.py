"""mIoU of every network and of their ensemble, each from one confusion matrix of the whole set."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ctt.data.check import histogram
from ctt.data.dataset import IGNORE, Dataset, DatasetInfo
from ctt.data.loader import read_in_order, reraise_user_errors
from ctt.errors import UserError
from ctt.files import atomic_write
from ctt.inference.predict import predictor, prepare, protocol_dict, reraise_out_of_memory, stacks
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings
from ctt.text import BYTES_AS_THEY_ARE

UNLABELED = "no pixel of the evaluation images has a class: all are ignored"
ENSEMBLE = "ensemble"  # the mean of the teachers' probabilities


@dataclass(frozen=True)
class Score:
    """What one network reaches; IoU in percent, NaN for a class neither labelled nor predicted.

    Attributes:
        without_label: numbers of the classes of which no pixel is labelled. Where such a class is
            predicted, its IoU is 0.
    """

    class_iou: tuple[float, ...]
    pixel_accuracy: float
    without_label: tuple[int, ...] = ()

    @property
    def miou(self) -> float:
        """Return the mean over the classes that are labelled or predicted anywhere."""
        present = [value for value in self.class_iou if value == value]
        return sum(present) / len(present) if present else float("nan")

    @property
    def miou_of_labeled(self) -> float:
        """Return the mean over the labelled classes, by which the best network is chosen.

        `miou` would prefer one that never predicts the others.
        """
        values = [v for c, v in enumerate(self.class_iou) if c not in self.without_label]
        return sum(values) / len(values) if values else float("nan")

    def absent(self, info: DatasetInfo) -> list[str]:
        """Return names of the classes that the mean leaves out."""
        named = zip(info.classes, self.class_iou, strict=True)
        return [name for name, value in named if value != value]


def score(confusion: Tensor) -> Score:
    """Return the score of a confusion matrix (C, C) of pixel counts, labels in rows."""
    matrix = confusion.double()
    hits = matrix.diag()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - hits
    iou = 100 * hits / union  # 0/0 is NaN: the class is absent
    accuracy = 100 * hits.sum() / matrix.sum()
    without_label = (matrix.sum(dim=1) == 0).nonzero().flatten().tolist()
    return Score(tuple(iou.tolist()), float(accuracy), tuple(without_label))


@torch.no_grad()
def confusions(
    networks: dict[str, SegmentationModel],
    dataset: Dataset,
    ids: Iterable[str],
    device: torch.device,
    settings: EvalSettings | None = None,
    workers: int = 0,
    trained_on: DatasetInfo | None = None,
    progress: Callable[[int], object] = lambda images: None,
    shown: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return pixel counts (C, C) int64, labels in rows, for each network and `ensemble`.

    Matrices of disjoint parts of a set add up to that of the set. Pixels with label 255 are not
    counted. The ensemble, the mean of the teachers' probabilities, is there if a name begins with
    "teacher".

    Args:
        networks: on `device`; their mode is left as it was.
        settings: the protocol; by default whole images at their own size.
        workers: processes that load images; 0 loads in this one.
        trained_on: the dataset whose normalisation the networks expect; by default `dataset`'s.
        progress: called with the number of images after each batch.
        shown: (C,) int64 on `device`, to which is added how many images show each class.

    Raises:
        UserError: a label that is no class, a file that cannot be read, or too little memory.
    """
    settings = settings or EvalSettings()
    classes = len(dataset.info.classes)
    info = trained_on or dataset.info
    predictors = {name: predictor(net, info, settings) for name, net in networks.items()}
    teachers = [name for name in networks if name.startswith("teacher")]
    names = names_of_scores(networks)
    matrices = {name: torch.zeros(classes, classes, dtype=torch.int64) for name in names}
    matrices = {name: matrix.to(device) for name, matrix in matrices.items()}
    was_training = {name: network.training for name, network in networks.items()}
    try:
        for network in networks.values():
            network.eval()
        for images, label in batches(dataset, ids, settings, workers):
            images, label = images.to(device), label.to(device).long()
            if shown is not None:
                shown += torch.stack([histogram(one, classes)[:-1] > 0 for one in label]).sum(0)
            total: Tensor | None = None  # of the teachers; its largest is that of the mean
            for name, predict in predictors.items():
                with reraise_out_of_memory(settings):
                    probability = predict(images)  # (B, C, H, W)
                # argmax finds the same, but takes up to five times as long on a CPU
                count(matrices[name], probability.max(dim=1).indices, label)
                if name in teachers:
                    total = probability if total is None else total.add_(probability)
            if total is not None:
                count(matrices[ENSEMBLE], total.max(dim=1).indices, label)
            progress(len(images))
    finally:
        for name, network in networks.items():
            network.train(was_training[name])
    return matrices


def names_of_scores(networks: Iterable[str]) -> list[str]:
    """Return the names that `confusions` scores: the networks, and `ensemble` of the teachers."""
    names = list(networks)
    teachers = any(name.startswith("teacher") for name in names)
    return [*names, ENSEMBLE] if teachers else names


def count(matrix: Tensor, predicted: Tensor, label: Tensor) -> None:
    """Add pixels, predicted and label int64 of one shape, to a matrix (C, C) in place.

    Not torchmetrics: with deterministic algorithms it needs C**2 numbers for each pixel.
    """
    classes = len(matrix)
    pairs = torch.where(label != IGNORE, classes * label + predicted, classes**2)
    counts = torch.bincount(pairs.flatten(), minlength=classes**2 + 1)
    matrix += counts[:-1].view(classes, classes)


def read_pair(dataset: Dataset, settings: EvalSettings, name: str) -> tuple[Tensor, Tensor]:
    """Return image (3, H, W) uint8 and label (H, W) uint8 as the protocol needs them.

    Raises:
        UserError: they cannot be read, or hold what is no class.
    """
    image, label = dataset.pair(name)
    check_label(label, name, dataset.info)
    return prepare(image, label, settings)


def sample(ids: Sequence[str], count: int) -> list[str]:
    """Return at most `count` names from all over the list."""
    count = min(count, len(ids))
    return [ids[i * len(ids) // count] for i in range(count)]


def read_known(
    dataset: Dataset, settings: EvalSettings, name: str, hidden: bool
) -> tuple[Tensor, Tensor]:
    """Return image (3, H, W) uint8 and label (H, W) int64 of a training image.

    Args:
        hidden: the dataset has its label, though training may not see it. Where it has none, or
            one that cannot be read, the label is 255 everywhere.
    """
    if hidden:
        try:
            image, label = read_pair(dataset, settings, name)
            return image, label.long()
        except UserError:
            pass  # a mask that training never reads must not end it
    image = dataset.image(name)
    nothing = torch.full(image.shape[1:], IGNORE, dtype=torch.uint8)
    image, label = prepare(image, nothing, settings)
    return image, label.long()


def check_label(label: Tensor, name: str, info: DatasetInfo) -> None:
    """Refuse labels that are neither a class nor 255.

    Raises:
        UserError: names the image and the value.
    """
    wrong = label[(label >= len(info.classes)) & (label != IGNORE)]
    if len(wrong):
        raise UserError(
            f"The label of {name} holds the value {int(wrong[0])}, but {info.name} has the classes "
            f"0..{len(info.classes) - 1} and {IGNORE} for ignored pixels. Correct the mask, or the "
            f"list of classes."
        )


def batches(
    dataset: Dataset, ids: Iterable[str], settings: EvalSettings, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (B, 3, H, W) and labels (B, H, W), neighbours of one size together."""
    pairs = reraise_user_errors(
        read_in_order(partial(read_pair, dataset, settings), list(ids), workers)
    )
    for group in stacks(pairs, lambda pair: pair[1].shape, settings.batch_pixels):
        images, labels = zip(*group, strict=True)
        yield torch.stack(images), torch.stack(labels)


def number(value: float) -> float | None:
    """Return a score as JSON has it: rounded to 0.01, or null for NaN, which JSON does not know."""
    return None if value != value else round(value, 2)


def as_json(scores: dict[str, Score], info: DatasetInfo, settings: EvalSettings) -> dict[str, Any]:
    """Return `miou`, `class_iou` (null: absent), `absent`, `pixel_accuracy` by network; `protocol`.

    Percent, rounded to 0.01.
    """

    return {
        "miou": {name: number(s.miou) for name, s in scores.items()},
        "class_iou": {
            name: dict(zip(info.classes, map(number, s.class_iou), strict=True))
            for name, s in scores.items()
        },
        "absent": {name: s.absent(info) for name, s in scores.items()},
        "without_label": [info.classes[c] for c in next(iter(scores.values())).without_label],
        "pixel_accuracy": {name: number(s.pixel_accuracy) for name, s in scores.items()},
        "protocol": protocol_dict(settings),
    }


def score_table(scores: dict[str, Score], info: DatasetInfo) -> Table:
    """Return IoU by class (rows) and network (columns), with the mean first."""
    captions = []
    if any(score.absent(info) for score in scores.values()):
        captions.append("absent: neither labelled nor predicted, left out of the mean")
    if predicted := [
        name
        for c, name in enumerate(info.classes)
        if any(c in s.without_label and s.class_iou[c] == 0 for s in scores.values())
    ]:
        names = ", ".join(predicted)
        captions.append(f"predicted, but labelled nowhere, and 0 in the mean: {names}")
    if all(len(score.without_label) == len(info.classes) for score in scores.values()):
        captions.append(f"{UNLABELED}, so these numbers say nothing")
    table = Table(title="IoU, %", caption="\n".join(captions) or None)
    table.add_column("class")
    for name in scores:
        table.add_column(name, justify="right")
    table.add_row("mean", *(f"{score.miou:.2f}" for score in scores.values()), style="bold")
    for c, name in enumerate(info.classes):
        values = [score.class_iou[c] for score in scores.values()]
        table.add_row(name, *("absent" if v != v else f"{v:.2f}" for v in values))
    accuracies = (f"{score.pixel_accuracy:.2f}" for score in scores.values())
    table.add_section()
    table.add_row("pixel accuracy", *accuracies)
    return table


def hash_of_list(ids: Iterable[str]) -> str:
    """Return the SHA-256 of the names, one a line, in order: that of the list as a text file."""
    text = "".join(f"{name}\n" for name in ids)
    return hashlib.sha256(text.encode("utf-8", BYTES_AS_THEY_ARE)).hexdigest()


def write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
