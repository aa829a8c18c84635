"""What training looks like inside, seen on a few unlabelled images: numbers that nothing learns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from ctt.data.dataset import IGNORE, Dataset
from ctt.inference.evaluate import read_known
from ctt.inference.predict import predictor
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings
from ctt.train.distributed import World

Networks = Mapping[str, SegmentationModel]


def names(networks: Iterable[str]) -> list[str]:
    """Return the numbers that `measure` gives for networks of these names: columns of metrics.csv.

    confident_pixels: share of pixels of which a teacher is as sure as the threshold asks.
    pseudo_label_accuracy: share of pixels that a teacher classifies well, where the dataset knows
        the labels that are hidden from training.
    confident_accuracy: the same of the confident pixels alone.
    teachers_agree, students_agree: share of pixels to which two of them give one class.
    teachers_apart: half the L1 distance of their probabilities, 0 to 1.
    weights_apart: distance of two students' weights, relative to their length.
    """
    teachers, students = (_of(networks, kind) for kind in ("teacher", "student"))
    found = ["confident_pixels", "pseudo_label_accuracy", "confident_accuracy"]
    if len(teachers) > 1:
        found += ["teachers_agree", "teachers_apart"]
    if len(students) > 1:
        found += ["students_agree", "weights_apart"]
    return found


@torch.no_grad()
def measure(
    networks: Networks,
    dataset: Dataset,
    ids: Sequence[str],
    settings: EvalSettings,
    threshold: float,
    world: World,
) -> dict[str, float]:
    """Return what `names` lists, without the numbers that nothing is known of.

    Pixels without data do not count.

    Args:
        networks: students and teachers, all on one device; students label where there is no
            teacher. Their mode is left as it was.
        ids: unlabelled images, of which every process takes its part; of none there is no number.
        settings: how an image is read.
        threshold: of the confidence.
    """
    if not ids:
        return {}
    device = next(next(iter(networks.values())).parameters()).device
    known = set(dataset.train_ids())  # whose labels the dataset has
    predict = {name: predictor(net, dataset.info, settings) for name, net in networks.items()}
    modes = {name: net.training for name, net in networks.items()}
    sums: dict[str, Tensor] = {}
    try:
        for network in networks.values():
            network.eval()
        for name in ids[world.rank :: world.size]:
            image, label = read_known(dataset, settings, name, hidden=name in known)
            given = {n: p(image[None].to(device))[0] for n, p in predict.items()}  # (C, H, W)
            if image.is_floating_point():
                seen = ~image.isnan().any(dim=0)  # pixels with data
                label = label[seen]
                given = {n: p[:, seen.to(device)] for n, p in given.items()}  # (C, N)
            for key, value in _of_image(given, label.to(device), threshold):
                pair = torch.stack([value.sum(), torch.full_like(value.sum(), value.numel())])
                sums[key] = sums[key] + pair if key in sums else pair
    finally:
        for name, network in networks.items():
            network.train(modes[name])
    keys = [n for n in names(networks) if n != "weights_apart"]
    none = torch.zeros(2, dtype=torch.float64, device=device)
    totals = world.total(torch.stack([sums.get(key, none) for key in keys])).tolist()
    found = {key: part / whole for key, (part, whole) in zip(keys, totals, strict=True) if whole}
    apart = weights_apart([networks[name] for name in _of(networks, "student")])
    return found if apart is None else found | {"weights_apart": apart}


def _of_image(
    given: Mapping[str, Tensor], label: Tensor, threshold: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield numbers whose mean over all pixels and networks is wanted, float64 of any shape.

    Args:
        given: by network, the probabilities (C, ...) of an image's pixels. label: (...).
    """
    teachers, students = _of(given, "teacher"), _of(given, "student")
    answers = {name: p.max(dim=0) for name, p in given.items()}
    for name in teachers or students:
        sure = answers[name].values >= threshold
        yield "confident_pixels", sure.double()
        right = (answers[name].indices == label).double()
        yield "pseudo_label_accuracy", right[label != IGNORE]
        yield "confident_accuracy", right[(label != IGNORE) & sure]
    for kind, group in (("teachers", teachers), ("students", students)):
        for a, b in combinations(group, 2):
            yield f"{kind}_agree", (answers[a].indices == answers[b].indices).double()
    for a, b in combinations(teachers, 2):
        yield "teachers_apart", ((given[a] - given[b]).abs().sum(dim=0) / 2).double()


def weights_apart(networks: Sequence[SegmentationModel]) -> float | None:
    """Return the mean distance of two networks' weights, relative to the mean of their lengths;
    None where there are no two, or they are of different kinds."""
    vectors = [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in networks]
    if len(vectors) < 2 or len({len(v) for v in vectors}) > 1:
        return None
    apart = [2 * (a - b).norm() / (a.norm() + b.norm()) for a, b in combinations(vectors, 2)]
    return float(torch.stack(apart).mean())


def _of(networks: Iterable[str], kind: str) -> list[str]:
    return [name for name in networks if name.startswith(kind)]
