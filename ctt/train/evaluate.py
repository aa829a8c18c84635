"""mIoU of every network and of their ensemble, each from one confusion matrix of the whole set."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from ctt.data.source import IGNORE, DatasetInfo, Source
from ctt.methods.losses import upsample
from ctt.models.base import SegmentationModel
from ctt.train.step import normalize, to_unit

PROTOCOL = "whole"  # whole image, native label size, logits upsampled to it
BATCH_PIXELS = 2**18  # images of one size are evaluated together up to this many pixels


@dataclass(frozen=True)
class Score:
    """What one network reaches; IoU in percent, NaN for a class neither labelled nor predicted."""

    class_iou: tuple[float, ...]
    pixel_accuracy: float

    @property
    def miou(self) -> float:
        """Mean over the classes that are labelled or predicted anywhere."""
        present = [value for value in self.class_iou if value == value]
        return sum(present) / len(present) if present else float("nan")


def score(confusion: Tensor) -> Score:
    """From a confusion matrix (C, C) of pixel counts, labels in rows."""
    matrix = confusion.double()
    hits = matrix.diag()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - hits
    iou = 100 * hits / union  # 0/0 is NaN: the class is absent
    accuracy = 100 * hits.sum() / matrix.sum()
    return Score(tuple(iou.tolist()), float(accuracy))


def predict_probability(network: SegmentationModel, images: Tensor, info: DatasetInfo) -> Tensor:
    """Class probabilities (B, C, H, W) of images (B, 3, H, W) uint8, at their resolution."""
    normalized = normalize(to_unit(images), info)
    return upsample(network(normalized).logits, (images.shape[-2], images.shape[-1])).softmax(dim=1)


@torch.no_grad()
def evaluate(
    networks: dict[str, SegmentationModel],
    source: Source,
    ids: Sequence[str],
    device: torch.device,
) -> dict[str, Score]:
    """Score of each network, and, where there are teachers, of their mean probability (`ensemble`).

    Protocol "whole": the whole image at its own size, 255 left out, one confusion matrix each.
    """
    classes = len(source.info.classes)
    was_training = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval()
    teachers = [name for name in networks if name.startswith("teacher")]
    names = [*networks, "ensemble"] if teachers else list(networks)
    matrices = {
        name: MulticlassConfusionMatrix(classes, ignore_index=IGNORE).to(device) for name in names
    }
    for images, label in batches(source, ids):
        images, label = images.to(device), label.to(device).long()
        probability = {
            name: predict_probability(network, images, source.info)
            for name, network in networks.items()
        }
        if teachers:
            probability["ensemble"] = torch.stack([probability[t] for t in teachers]).mean(dim=0)
        for name in names:
            matrices[name].update(probability[name].argmax(dim=1), label)
    for name, network in networks.items():
        network.train(was_training[name])
    return {name: score(matrix.compute()) for name, matrix in matrices.items()}


def batches(source: Source, ids: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) and labels (B, H, W), neighbours of one size together."""

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for name in ids:
            yield source.image(name), source.label(name)

    for shape, group in groupby(pairs(), key=lambda pair: pair[1].shape):
        limit = max(1, BATCH_PIXELS // shape.numel())
        images: list[Tensor] = []
        labels: list[Tensor] = []
        for image, label in group:
            images.append(image)
            labels.append(label)
            if len(images) == limit:
                yield torch.stack(images), torch.stack(labels)
                images, labels = [], []
        if images:
            yield torch.stack(images), torch.stack(labels)


def as_json(scores: dict[str, Score], info: DatasetInfo) -> dict[str, Any]:
    """`miou`, `class_iou` (null: absent) and `pixel_accuracy` by network, rounded to 0.01."""

    def number(value: float) -> float | None:
        return None if value != value else round(value, 2)

    return {
        "miou": {name: number(s.miou) for name, s in scores.items()},
        "class_iou": {
            name: dict(zip(info.classes, map(number, s.class_iou), strict=True))
            for name, s in scores.items()
        },
        "pixel_accuracy": {name: number(s.pixel_accuracy) for name, s in scores.items()},
        "protocol": PROTOCOL,
    }


def write_json(path: Any, values: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    part.replace(path)
