"""What a run leaves behind: metrics.csv, TensorBoard events, curves.png, samples.png."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctt.data.source import DatasetInfo, Source
from ctt.files import told, written
from ctt.methods.base import Method
from ctt.models.base import SegmentationModel
from ctt.train.evaluate import names_of_scores
from ctt.train.inference import predictor
from ctt.train.render import colorize
from ctt.train.settings import EvalSettings


class Recorder:
    """Appends rows to metrics.csv and, if wanted, TensorBoard events in the run folder.

    Going on from a checkpoint drops the rows after `iteration`: they will be written again.
    """

    def __init__(self, folder: Path, method: Method, iteration: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.csv"
        self.columns = [
            "iteration",
            "lr",
            *(f"loss_{term}" for term in (*method.terms, "total")),
            *method.logged,
            "images_per_second",
            "input_wait",
            *(f"miou_{name}" for name in names_of_scores(method.networks())),
        ]
        # a line that a crash cut short has no number
        rows = [row for row in read_rows(self.path) if (row["iteration"] or "").isdecimal()]
        kept = [row for row in rows if int(row["iteration"]) <= iteration]
        with written(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=iteration + 1)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """One row; columns that `values` does not name stay empty."""
        with told(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            row = {name: f"{value:.6g}" for name, value in values.items()}
            csv.DictWriter(file, self.columns).writerow({"iteration": iteration, **row})
        if self.writer is not None:
            for name, value in values.items():
                group, _, rest = name.partition("_")
                tag = f"{group}/{rest}" if group in ("loss", "miou") else f"train/{name}"
                with told(self.path.parent):
                    self.writer.add_scalar(tag, value, iteration)

    def close(self) -> None:
        if self.writer is not None:
            with told(self.path.parent):
                self.writer.close()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_curves(folder: Path) -> None:
    """curves.png: the terms of the objective and the mIoU of every network over the iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_rows(folder / "metrics.csv")
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, prefix, title in (
        (axes[0], "loss_", "loss, summed over the students"),
        (axes[1], "miou_", "mIoU on the evaluation images, %"),
    ):
        for column in (name for name in rows[0] if name.startswith(prefix)):
            points = [(int(r["iteration"]), float(r[column])) for r in rows if r[column]]
            if points:
                x, y = zip(*points, strict=True)
                dashed = "--" if "student" in column else "-"
                axis.plot(x, y, dashed, label=column.removeprefix(prefix), linewidth=1.2)
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    axes[0].set_yscale("symlog", linthresh=0.01)
    save_figure(figure, folder / "curves.png")


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
    """A sheet of image, label, prediction and confidence of some evaluation images."""
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
            image.permute(1, 2, 0),
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
    """A confusion matrix (C, C) of pixel counts as CSV: labels in rows, predictions in columns."""
    with written(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", *info.classes])
        for name, row in zip(info.classes, confusion.tolist(), strict=True):
            writer.writerow([name, *row])


def draw_confusion(path: Path, confusion: Tensor, info: DatasetInfo, title: str) -> None:
    """A confusion matrix (C, C) of pixel counts; every row in percent of its label's pixels."""
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
    axis.set_xticks(range(classes), info.classes, rotation=90)
    axis.set_yticks(range(classes), info.classes)
    axis.set(xlabel="predicted", ylabel="label", title=f"{title}: % of the label's pixels")
    figure.colorbar(picture, shrink=0.7)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """A figure of matplotlib as a PNG; it is closed."""
    from matplotlib import pyplot as plt

    with written(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)
