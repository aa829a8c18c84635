"""Where pixels of labelled and unlabelled images lie among a network's features, as a picture.

As in the paper's Figure 7: features of one class should lie together, whether their image is
labelled or not. What the network was trained with shows in how far classes lie apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt import run
from ctt.data.dataset import IGNORE, Dataset
from ctt.data.views import normalize, to_unit
from ctt.errors import UserError
from ctt.inference.evaluate import read_known, sample
from ctt.inference.figures import save_figure
from ctt.inference.load import TrainedNetworks
from ctt.inference.predict import best_class
from ctt.methods.losses import as_pixels, to_grid
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings

IMAGES = 48  # of each kind that are looked at
PIXELS = 40  # of each class and kind that are shown
PERPLEXITY = 30.0  # of t-SNE: about how many neighbours a pixel has


def draw_run(
    path: Path,
    folder: Path,
    trained: TrainedNetworks,
    dataset: Dataset,
    device: torch.device,
    settings: EvalSettings,
    name: str = "",
) -> str:
    """Draw the features of a network of a run, on images of the run's own lists.

    Args:
        path: the PNG that is written.
        folder: of the run.
        trained: its networks.
        dataset: the dataset that it was trained on.
        name: of the network; by default the first teacher, or the first student where there is
            none.

    Returns:
        the name of the network.

    Raises:
        UserError: there is no such network, or no list of the run's images.
    """
    shown = name or next((n for n in trained.networks if n.startswith("teacher")), "")
    network = trained.choose([shown]).only() if shown else next(iter(trained.networks.values()))
    shown = shown or next(iter(trained.networks))
    lists = [folder / own for own in (run.LABELED_LIST, run.UNLABELED_LIST)]
    if not all(file.is_file() for file in lists):
        raise UserError(
            f"{folder}: there are no lists of the images that were trained on ({lists[0].name}, "
            f"{lists[1].name}). Give the folder of a run."
        )
    labeled, unlabeled = (
        [found for n in run.read_names(file) if (found := dataset.find(n)) is not None]
        for file in lists
    )
    title = f"{shown} of {folder.name}"
    draw_embedding(path, network, dataset, labeled, unlabeled, device, settings, title)
    return shown


def draw_embedding(
    path: Path,
    network: SegmentationModel,
    dataset: Dataset,
    labeled: Sequence[str],
    unlabeled: Sequence[str],
    device: torch.device,
    settings: EvalSettings,
    title: str,
) -> None:
    """Draw features of some pixels in two dimensions, found by t-SNE on their cosines.

    A colour is a class: the labelled one or, where nobody knows it, the one the network predicts.

    Args:
        path: the PNG that is written.
        network: it is left in the mode it had.
        labeled: images to show pixels of as discs.
        unlabeled: images to show pixels of as crosses.
        settings: how an image is read.

    Raises:
        UserError: there are fewer than four pixels to show.
    """
    training = network.training
    network.to(device).eval()
    kinds = {
        "labelled": pixels_of(network, dataset, sample(labeled, IMAGES), device, settings),
        "unlabelled": pixels_of(network, dataset, sample(unlabeled, IMAGES), device, settings),
    }
    network.train(training)
    features = torch.cat([own for own, _ in kinds.values()])
    if len(features) < 4:
        raise UserError(
            f"{path}: only {len(features)} pixels of the images have a class. There is nothing to "
            f"draw an embedding of."
        )
    counts = [len(classes) for _, classes in kinds.values()]
    places = in_two_dimensions(features).split_with_sizes(counts)
    shown = {name: (xy, kinds[name][1]) for name, xy in zip(kinds, places, strict=True)}
    _draw(path, shown, dataset, title)


@torch.no_grad()
def pixels_of(
    network: SegmentationModel,
    dataset: Dataset,
    ids: Sequence[str],
    device: torch.device,
    settings: EvalSettings,
) -> tuple[Tensor, Tensor]:
    """Return features (N, D) of length 1 and classes (N,) of some pixels of each class."""
    found = list(_pixels(network, dataset, ids, device, settings))
    if not found:
        return torch.zeros(0, network.classifier.in_channels), torch.zeros(0, dtype=torch.int64)
    features, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for c in range(len(dataset.info.classes)):
        own = (classes == c).nonzero().flatten()
        chosen.append(own[torch.randperm(len(own), generator=generator)[:PIXELS]])
    index = torch.cat(chosen)
    return F.normalize(features[index], dim=1), classes[index]


def _pixels(
    network: SegmentationModel,
    dataset: Dataset,
    ids: Sequence[str],
    device: torch.device,
    settings: EvalSettings,
) -> Iterator[tuple[Tensor, Tensor]]:
    known = set(dataset.train_ids())
    for name in ids:
        image, label = read_known(dataset, settings, name, hidden=name in known)
        out = network(normalize(to_unit(image[None].to(device)), dataset.info))
        classes = to_grid(label[None], network.grid).cpu()
        if bool((label == IGNORE).all()):
            seen = to_grid(image, network.grid)  # (C, h, w), the bands in the place of a batch
            classes = best_class(out.logits[0].cpu(), seen)[1].long()
        valid = classes.flatten() != IGNORE
        yield as_pixels(out.features).float().cpu()[valid], classes.flatten()[valid]


def in_two_dimensions(features: Tensor) -> Tensor:
    """Return places (N, 2) of features (N, D), at least four; the same for the same features."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    tsne = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=0)
    return torch.from_numpy(tsne.fit_transform(features.numpy()))


def _draw(
    path: Path, shown: dict[str, tuple[Tensor, Tensor]], dataset: Dataset, title: str
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    marks = {"labelled": ("o", 14), "unlabelled": ("x", 10)}
    colours = torch.tensor(dataset.info.palette, dtype=torch.float32) / 255
    present = sorted({c for _, classes in shown.values() for c in classes.tolist()})
    for name, (xy, classes) in shown.items():
        mark, size = marks[name]
        points = (xy[:, 0].numpy(), xy[:, 1].numpy())
        axes.scatter(*points, c=colours[classes].numpy(), marker=mark, s=size, linewidths=0.8)
    handles = [
        Line2D([], [], color="0.3", marker=mark, linestyle="", label=name)
        for name, (mark, _) in marks.items()
    ]
    handles += [
        Line2D([], [], color=tuple(colours[c].tolist()), marker="s", linestyle="", label=text)
        for c, text in ((c, dataset.info.classes[c]) for c in present)
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    axes.set(title=title, xticks=[], yticks=[])
    save_figure(figure, path)
