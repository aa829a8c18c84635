"""Figures of what networks predict: samples.png, the confusion matrix."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctt.data.dataset import Dataset, DatasetInfo
from ctt.files import atomic_write
from ctt.inference.predict import best_class, predictor, prepare
from ctt.inference.render import colorize, visible
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings
from ctt.text import printable

COLUMNS = 8  # of a sheet
CELL = 512  # pixels of an image that are drawn on it, of which fewer are seen
LETTERS = 24  # of a name on it


@torch.no_grad()
def draw_samples(
    path: Path,
    network: SegmentationModel,
    dataset: Dataset,
    ids: list[str],
    device: torch.device,
    settings: EvalSettings,
    title: str,
) -> None:
    """Draw a sheet of some evaluation images as they are scored, in the part or at the size that
    the protocol says, with label, prediction and confidence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = ("image", "label", "prediction", "confidence")
    figure, axes = plt.subplots(
        len(rows), len(ids), figsize=(1.1 * len(ids) + 0.8, 1.1 * len(rows) + 0.5), squeeze=False
    )
    training = network.training
    network.eval()
    predict = predictor(network, dataset.info, settings)
    for column, name in enumerate(ids):
        image, label = prepare(*dataset.pair(name), settings)
        probability = predict(image[None].to(device))[0]
        confidence, predicted = best_class(probability.cpu(), image)
        shown = (
            visible(image, dataset.info).permute(1, 2, 0),
            colorize(label, dataset.info),
            colorize(predicted, dataset.info),
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


def reduced(image: Tensor, label: Tensor, disagreement: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return every n-th row and column, as many as a sheet shows, in memory of their own."""
    step = -(-max(label.shape) // CELL)
    first, second, third = (x[..., ::step, ::step].clone() for x in (image, label, disagreement))
    return first, second, third


def draw_disagreement(
    path: Path, shown: Sequence[tuple[str, Tensor, Tensor, Tensor]], info: DatasetInfo
) -> None:
    """Draw a sheet of images, what networks see in them, and where they disagree.

    Args:
        shown: name, image (C, H, W), label (H, W) and disagreement (H, W) of each.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(len(shown), COLUMNS)
    blocks = -(-len(shown) // columns)
    kinds = ("image", "prediction", "disagreement")
    figure, axes = plt.subplots(
        len(kinds) * blocks,
        columns,
        figsize=(1.6 * columns + 0.8, 1.7 * len(kinds) * blocks + 0.4),
        squeeze=False,
        layout="constrained",
    )
    largest = max(float(disagreement.max()) for *_, disagreement in shown) or 1.0
    for number, (name, image, label, disagreement) in enumerate(shown):
        block, column = divmod(number, columns)
        cells = axes[len(kinds) * block : len(kinds) * (block + 1), column]
        cells[0].imshow(visible(image, info).permute(1, 2, 0).numpy(), interpolation="nearest")
        cells[1].imshow(colorize(label, info).numpy(), interpolation="nearest")
        cells[2].imshow(disagreement.numpy(), vmin=0, vmax=largest, cmap="magma")
        title = f"{number + 1}  {printable(name.rpartition('/')[2])}"
        cells[0].set_title(title[:LETTERS], fontsize=7, parse_math=False)
    for row, axis in enumerate(axes[:, 0]):
        axis.set_ylabel(kinds[row % len(kinds)], fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(axis.has_data())
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
