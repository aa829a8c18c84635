"""Figures of what networks predict: samples.png, the confusion matrix."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctt.data.source import DatasetInfo, Source
from ctt.files import atomic_write
from ctt.inference.predict import predictor
from ctt.inference.render import colorize, visible
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings


@torch.no_grad()
def draw_samples(
    path: Path,
    network: SegmentationModel,
    source: Source,
    ids: list[str],
    device: torch.device,
    settings: EvalSettings,
    title: str,
) -> None:
    """Draw a sheet of image, label, prediction and confidence of some evaluation images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = ("image", "label", "prediction", "confidence")
    figure, axes = plt.subplots(
        len(rows), len(ids), figsize=(1.1 * len(ids) + 0.8, 1.1 * len(rows) + 0.5), squeeze=False
    )
    training = network.training
    network.eval()
    predict = predictor(network, source.info, settings)
    for column, name in enumerate(ids):
        image, label = source.image(name), source.label(name)
        probability = predict(image[None].to(device))[0]
        confidence, predicted = probability.cpu().max(dim=0)
        shown = (
            visible(image, source.info).permute(1, 2, 0),
            colorize(label, source.info),
            colorize(predicted, source.info),
        )
        for row, picture in enumerate(shown):
            axes[row, column].imshow(picture.numpy(), interpolation="nearest")
        axes[3, column].imshow(confidence.numpy(), vmin=0, vmax=1, cmap="viridis")
    network.train(training)
    for row, text in enumerate(rows):
        axes[row, 0].set_ylabel(text)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)


def write_confusion(path: Path, confusion: Tensor, info: DatasetInfo) -> None:
    """Write a confusion matrix (C, C) of pixel counts as CSV, labels in rows."""
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *info.classes])
        for name, row in zip(info.classes, confusion.tolist(), strict=True):
            writer.writerow([name, *row])


def draw_confusion(path: Path, confusion: Tensor, info: DatasetInfo, title: str) -> None:
    """Draw a confusion matrix (C, C), every row in percent of its label's pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = confusion.cpu().double()
    share = (100 * counts / counts.sum(dim=1, keepdim=True)).nan_to_num()  # of absent labels: 0
    classes = len(info.classes)
    side = 2.5 + 0.38 * classes
    figure, axis = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    picture = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    for row in range(classes):
        for column in range(classes):
            value = float(share[row, column])
            if value >= 0.5:
                colour = "white" if value > 50 else "black"
                axis.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7
                )
    axis.set_xticks(range(classes), info.classes, rotation=90, parse_math=False)
    axis.set_yticks(range(classes), info.classes, parse_math=False)
    axis.set(xlabel="predicted", ylabel="label", title=f"{title}: % of the label's pixels")
    figure.colorbar(picture, shrink=0.7)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Save a figure of matplotlib as a PNG, and close it."""
    from matplotlib import pyplot as plt

    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)
