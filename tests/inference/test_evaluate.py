import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torch import Tensor, nn

from ctt import models
from ctt.data.dataset import Dataset
from ctt.data.digits import INFO, Digits
from ctt.errors import UserError
from ctt.inference.evaluate import Score, as_json, batches, confusions, score, score_table
from ctt.inference.figures import draw_samples
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings


class Fixed(SegmentationModel):
    """Gives each pixel the logits of a table by the colour of its first channel."""

    stride = 1

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.classifier = nn.Identity()
        self.table = torch.randn(8, 9, generator=rng)  # classes 9 and 10 are never predicted

    def encode(self, images: Tensor) -> list[Tensor]:
        return [images]

    def decode(self, stages: list[Tensor]) -> Tensor:
        (images,) = stages
        colour = ((images[:, 0] * INFO.std[0] + INFO.mean[0]) * 7.99).long()
        logits = self.table[colour].permute(0, 3, 1, 2)
        return torch.cat([logits, torch.full_like(logits[:, :2], -20)], dim=1)


def independent_miou(network: Fixed, dataset: Digits) -> float:
    truth, predicted = [], []
    for name in dataset.eval_ids():
        label = dataset.label(name).long()
        image = dataset.image(name)[None] / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in (INFO.mean, INFO.std))
        logits = network((image - mean) / std).logits[0]
        truth.append(label[label != 255].numpy())
        predicted.append(logits.argmax(dim=0)[label != 255].numpy())
    matrix = confusion_matrix(np.concatenate(truth), np.concatenate(predicted), labels=range(11))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    present = union > 0
    return float(100 * (matrix.diagonal()[present] / union[present]).mean())


def test_miou_equals_an_independent_computation() -> None:
    dataset = Digits(2, 9)
    for name in dataset.eval_ids()[::2]:  # ignored pixels, and classes 8 and 9 nowhere
        dataset.label(name)[:7] = 255
    for name in dataset.eval_ids():
        label = dataset.label(name)
        label[(label == 9) | (label == 10)] = 0
    networks = {"student_1": Fixed(0), "teacher_1": Fixed(1)}
    matrices = confusions(dict(networks), dataset, dataset.eval_ids(), torch.device("cpu"))
    scores = {name: score(matrix) for name, matrix in matrices.items()}
    for name, network in networks.items():
        assert scores[name].miou == pytest.approx(independent_miou(network, dataset), abs=1e-9)
    assert math.isnan(scores["student_1"].class_iou[9])
    assert scores["ensemble"].miou == scores["teacher_1"].miou


def test_score_of_a_matrix() -> None:
    result = score(torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]]))
    assert result.class_iou[:2] == pytest.approx((75.0, 50.0))
    assert math.isnan(result.class_iou[2])
    assert result.miou == pytest.approx(62.5)
    assert result.pixel_accuracy == pytest.approx(80.0)
    assert math.isnan(Score((math.nan,), math.nan).miou)
    assert result.miou_of_labeled == result.miou


def test_classes_without_a_label_do_not_choose_the_best_network() -> None:
    careful = score(torch.tensor([[9, 1, 0], [2, 8, 0], [0, 0, 0]]))
    right = score(torch.tensor([[9, 0, 1], [0, 10, 0], [0, 0, 0]]))
    assert right.miou < careful.miou  # for one pixel of a class that nobody labelled
    assert right.miou_of_labeled == pytest.approx(95)
    assert right.miou_of_labeled > careful.miou_of_labeled
    assert (careful.without_label, right.without_label) == ((2,), (2,))
    info = replace(INFO, classes=("a", "b", "rare"))
    caption = score_table({"careful": careful, "right": right}, info).caption
    assert isinstance(caption, str)
    assert "predicted, but labelled nowhere, and 0 in the mean: rare" in caption
    written = as_json({"right": right}, info, EvalSettings())
    assert written["without_label"] == ["rare"]


def test_images_of_one_size_are_stacked() -> None:
    dataset = Digits(2, 5)
    assert [len(images) for images, _ in batches(dataset, dataset.eval_ids(), EvalSettings())] == [
        5
    ]


def test_evaluation_leaves_the_mode_of_networks() -> None:
    dataset = Digits(2, 2)
    network = Fixed(0).train()
    confusions({"student_1": network}, dataset, dataset.eval_ids(), torch.device("cpu"))
    assert network.training


class Random(Dataset):
    """Maps of random classes, sizes and ignored pixels; the image's red channel is its label."""

    def __init__(self, seed: int, present: list[int]) -> None:
        self.info = INFO
        rng = np.random.default_rng(seed)
        self.labels = {}
        for name in "abcde":
            size = rng.integers(1, 20, 2)
            label = rng.choice([*present, 255], size).astype(np.uint8)
            self.labels[name] = torch.from_numpy(label)

    def train_ids(self) -> list[str]:
        return []

    def eval_ids(self) -> list[str]:
        return list(self.labels)

    def image(self, name: str) -> Tensor:
        return self.labels[name].expand(3, -1, -1)

    def label(self, name: str) -> Tensor:
        return self.labels[name]


class Noisy(Fixed):
    """Random classes of the first `known`, fixed by the seed and the image."""

    def __init__(self, seed: int, known: int) -> None:
        super().__init__(seed)
        self.seed, self.known = seed, known

    def decode(self, stages: list[Tensor]) -> Tensor:
        (images,) = stages
        rng = torch.Generator().manual_seed(self.seed + images.numel())
        logits = torch.randn(len(images), len(INFO.classes), *images.shape[-2:], generator=rng)
        logits[:, self.known :] -= 100
        return logits


@given(
    seed=st.integers(0, 2**16),
    present=st.lists(st.integers(0, 10), max_size=4, unique=True),
    known=st.integers(1, 11),
)
@settings(max_examples=25)
def test_scores_equal_an_independent_computation(seed: int, present: list[int], known: int) -> None:
    dataset, network, cpu = Random(seed, present), Noisy(seed, known), torch.device("cpu")
    protocol = EvalSettings(batch_pixels=1)
    matrix = confusions({"network": network}, dataset, dataset.eval_ids(), cpu, protocol)["network"]
    truth = np.concatenate([label.numpy().ravel() for label in dataset.labels.values()])
    predicted = np.concatenate(
        [network(dataset.image(n)[None]).logits.argmax(1).numpy().ravel() for n in dataset.labels]
    )
    valid = truth != 255
    if not valid.any():
        assert matrix.sum() == 0
        return
    truth, predicted = truth[valid], predicted[valid]
    assert np.array_equal(matrix, confusion_matrix(truth, predicted, labels=range(11)))
    used = np.union1d(truth, predicted)
    result = score(matrix)
    iou = jaccard_score(truth, predicted, labels=used, average=None)
    assert result.miou == pytest.approx(100 * iou.mean())
    assert result.pixel_accuracy == pytest.approx(100 * accuracy_score(truth, predicted))
    absent = [name for c, name in enumerate(INFO.classes) if c not in used]
    assert result.absent(INFO) == absent


def test_matrices_of_parts_add_up() -> None:
    dataset, cpu = Random(3, [0, 1, 2]), torch.device("cpu")
    networks = {"student_1": Noisy(0, 4), "teacher_1": Noisy(1, 4), "teacher_2": Noisy(2, 4)}
    one = EvalSettings(batch_pixels=1)
    whole = confusions(dict(networks), dataset, "abcde", cpu, one)
    parts = [confusions(dict(networks), dataset, ids, cpu, one) for ids in ("ace", "bd")]
    assert list(whole) == ["student_1", "teacher_1", "teacher_2", "ensemble"]
    for name, matrix in whole.items():
        assert torch.equal(matrix, parts[0][name] + parts[1][name])


def test_the_ensemble_is_the_mean_of_the_teachers_probabilities() -> None:
    """Two teachers outvote one that is surer, unless they are hardly sure."""
    dataset, cpu = Random(3, [0]), torch.device("cpu")

    class Sure(Fixed):
        def __init__(self, logits: list[float]) -> None:
            super().__init__(0)
            self.logits = torch.tensor([*logits, *[-30.0] * 8])

        def decode(self, stages: list[Tensor]) -> Tensor:
            (images,) = stages
            size = (len(images), -1, *images.shape[-2:])
            return self.logits[None, :, None, None].expand(size)

    networks = {f"teacher_{k}": Sure(v) for k, v in enumerate([[3, 0, 0], [3, 0, 0], [0, 0, 9]])}
    matrices = confusions(dict(networks), dataset, "abcde", cpu)
    valid = sum(int((label != 255).sum()) for label in dataset.labels.values())
    assert int(matrices["teacher_1"][0, 0]) == valid
    assert int(matrices["ensemble"][0, 0]) == valid
    networks["teacher_1"] = Sure([0.1, 0, 0])
    networks["teacher_0"] = Sure([0.1, 0, 0])
    assert int(confusions(dict(networks), dataset, "abcde", cpu)["ensemble"][0, 2]) == valid


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_that_is_no_class_is_named(workers: int) -> None:
    dataset = Random(0, [0, 1])
    dataset.labels["c"][0] = 77
    with pytest.raises(UserError, match=r"^The label of c holds the value 77, but digits has"):
        confusions({"n": Fixed(0)}, dataset, "abcde", torch.device("cpu"), workers=workers)


def test_evaluation_with_loader_processes_draws_nothing_from_the_global_generator() -> None:
    dataset, cpu = Digits(2, 3), torch.device("cpu")
    before = torch.get_rng_state()
    ids = dataset.eval_ids()
    counts = [confusions({"n": Fixed(0)}, dataset, ids, cpu, workers=w)["n"] for w in (0, 1)]
    assert torch.equal(*counts)
    assert torch.equal(before, torch.get_rng_state())


def test_absent_classes_are_named_in_the_table() -> None:
    table = score_table({"n": Score((50.0, *[math.nan] * 10), 50.0)}, INFO)
    assert list(table.columns[1].cells) == ["50.00", "50.00", *["absent"] * 10, "50.00"]
    assert "left out of the mean" in str(table.caption)


@pytest.mark.parametrize(("protocol", "seen"), [("half", (20, 20)), ("center-crop", (24, 32))])
def test_the_sheet_of_a_run_shows_what_is_scored(
    tmp_path: Path, protocol: Literal["half", "center-crop"], seen: tuple[int, int]
) -> None:
    dataset, cpu = Digits(2, 2), torch.device("cpu")
    network = models.build("small", 11, 8, 8).eval()
    sizes: list[tuple[int, ...]] = []
    network.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[2:]))
    shown, ids = EvalSettings(protocol=protocol, window=(24, 32)), dataset.eval_ids()[:1]
    confusions({"student_1": network}, dataset, ids, cpu, shown)
    draw_samples(tmp_path / "samples.png", network, dataset, ids, cpu, shown, "x")
    assert sizes == [seen, seen]
