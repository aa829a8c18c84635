"""Numbers on what training looks like inside: what they are, and that nothing learns from them."""

import csv
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt import checkpoint, run
from ctt.data.dataset import IGNORE
from ctt.data.digits import INFO, Digits
from ctt.errors import UserError
from ctt.methods.teacher_banks import similarities
from ctt.models.base import SegmentationModel
from ctt.ops import MemoryBank
from ctt.settings import EvalSettings, Settings, update
from ctt.train import measures
from ctt.train.distributed import World
from ctt.train.loop import train
from ctt.train.plan import Plan
from ctt.train.record import read_rows
from tests.data.trees import write_voc


class Says(SegmentationModel):
    """Gives each pixel of class c and column x the logits `table[x % 2]`, whatever it shows."""

    stride = 1

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.classifier = nn.Identity()
        self.table = nn.Parameter(torch.tensor(table))

    def encode(self, images: Tensor) -> list[Tensor]:
        return [images]

    def decode(self, stages: list[Tensor]) -> Tensor:
        batch, _, height, width = stages[0].shape
        rows = self.table[torch.arange(width) % 2]  # (W, C)
        return rows.T[None, :, None].expand(batch, -1, height, -1)


class Two(Digits):
    """Two images, of which the second has a mask that cannot be read."""

    def __init__(self) -> None:
        super().__init__(2, 1)

    def label(self, name: str) -> Tensor:
        if name == self.train_ids()[1]:
            raise UserError("broken")
        label = torch.zeros(40, 40, dtype=torch.uint8)
        label[:, 1::2] = 3
        label[0] = IGNORE
        return label


def row(**values: float) -> list[float]:
    """Return logits of 11 classes, 0 but for those named c0, c1..."""
    return [values.get(f"c{c}", 0.0) for c in range(11)]


def measured(networks: dict[str, list[list[float]]], threshold: float = 0.8) -> dict[str, float]:
    made = {name: Says(table) for name, table in networks.items()}
    dataset = Two()
    found = measures.measure(
        made, dataset, dataset.train_ids(), EvalSettings(), threshold, World(0, 1)
    )
    assert all(network.training for network in made.values())
    assert set(found) <= set(measures.names(networks))
    return found


def test_pixels_without_data_do_not_count() -> None:
    class Bands(Two):
        info = replace(INFO, bands=(1, 2, 3))

        def image(self, name: str) -> Tensor:
            image = super().image(name) / 255
            image[0, :, 1::2] = torch.nan  # the columns of class 3
            return image

    made: measures.Networks = {
        "teacher_1": Says([row(c0=9), row()]),
        "teacher_2": Says([row(c0=9), row(c3=9)]),
    }
    dataset = Bands()
    found = measures.measure(made, dataset, dataset.train_ids(), EvalSettings(), 0.8, World(0, 1))
    assert found == {
        "confident_pixels": 1,
        "pseudo_label_accuracy": 1,
        "confident_accuracy": 1,
        "teachers_agree": 1,
        "teachers_apart": 0,
    }


def test_numbers_of_two_pairs() -> None:
    right, zero = [row(c0=9), row(c3=9)], [row(c0=9), row(c0=1)]
    found = measured(
        {"student_1": right, "student_2": right, "teacher_1": right, "teacher_2": zero}
    )
    assert found["confident_pixels"] == pytest.approx(3 / 4)
    assert found["pseudo_label_accuracy"] == pytest.approx(3 / 4)  # of the image that has a label
    assert found["confident_accuracy"] == 1  # the one that is wrong is unsure
    assert found["teachers_agree"] == pytest.approx(1 / 2)
    assert found["students_agree"] == 1
    p, q = (torch.tensor(x).softmax(0) for x in (right[1], zero[1]))
    assert found["teachers_apart"] == pytest.approx(float((p - q).abs().sum()) / 4, rel=1e-5)
    assert found["weights_apart"] == 0


def test_one_pair_has_nothing_to_agree_with() -> None:
    table = [row(c3=1), row(c3=1)]
    found = measured({"student_1": table, "teacher_1": table}, threshold=0.1)
    accuracy = dict.fromkeys(("pseudo_label_accuracy", "confident_accuracy"), 0.5)
    assert found == {"confident_pixels": 1.0} | accuracy
    assert measured({"student_1": table}, threshold=0.1) == found
    unsure = measured({"student_1": table}, threshold=1.0)
    assert unsure == {"confident_pixels": 0.0, "pseudo_label_accuracy": 0.5}


def test_distance_of_weights() -> None:
    a, b = Says([row(c0=3), row()]), Says([row(c1=4), row()])
    assert measures.weights_apart([a, b]) == pytest.approx(2 * 5 / 7)
    other = Says([row(c0=3)])
    assert measures.weights_apart([a, other]) is None
    assert measures.weights_apart([a]) is None


def test_nothing_learns_from_hidden_labels(tiny: Settings, tmp_path: Path) -> None:
    ends = []
    for images in (0, 5):
        settings = update(tiny, {"train": {"measured_images": images}}, "test")
        out = tmp_path / str(images)
        train(settings, out=out)
        ends.append(checkpoint.load(out / run.CHECKPOINT))
        rows = list(csv.DictReader((out / "metrics.csv").open()))
        told = [r for r in rows if r.get("pseudo_label_accuracy")]
        assert bool(told) == bool(images)
        assert all(0 < float(r["pseudo_label_accuracy"]) < 1 for r in told)
    assert all(torch.equal(ends[1]["method"][n], x) for n, x in ends[0]["method"].items())


def test_without_measures_no_hidden_label_is_read(
    tiny: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    label = Digits.label

    def spy(dataset: Digits, name: str) -> Tensor:
        asked.add(name)
        return label(dataset, name)

    monkeypatch.setattr(Digits, "label", spy)
    train(update(tiny, {"train": {"measured_images": 0}}, "test"), out=out)
    assert asked
    assert not asked & set(run.read_names(out / run.UNLABELED_LIST))


def test_similarities_of_keys() -> None:
    bank = MemoryBank(4, 3, 5)
    assert [float(x) for x in similarities(bank)] == [0, 0]
    keys = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    held = {0: keys[:3], 1: keys[3:5], 3: keys[5:]}
    for c, some in held.items():
        bank.keys[c, : len(some)], bank.count[c] = some, len(some)
    of_class = [torch.stack([a @ b for a, b in combinations(held[c], 2)]).mean() for c in (0, 1)]
    between = [(held[c] @ held[d].T).mean() for c, d in combinations(held, 2)]
    alike, apart = similarities(bank)
    torch.testing.assert_close(alike, torch.stack(of_class).mean())
    torch.testing.assert_close(apart, torch.stack(between).mean())


def test_a_supervised_run_needs_no_unlabelled_image(
    tiny: Settings, out: Path, tmp_path: Path
) -> None:
    """Neither at its start, nor where it measures what happens on them, nor when it goes on."""
    root = write_voc(tmp_path / "data", classic=2, augmented=3, evaluation=1, size=(24, 30))
    change = {
        "dataset": "voc",
        "data_root": str(root),
        "ratio": "2",
        "method": "supervised",
        "data": {"workers": 0, "batch_size": 2},
        "train": {"iterations": 1, "tensorboard": False},
    }
    settings = update(tiny, change, "test")
    unlabeled = sorted((root / "JPEGImages").glob("*"))
    labeled, others = Plan.of(settings, None).labeled, Plan.of(settings, None).unlabeled
    assert (len(labeled), len(others)) == (2, 3)
    gone = [path for path in unlabeled if path.stem in others]
    gone[0].unlink()
    train(settings, out=out)
    row = read_rows(out / "metrics.csv")[-1]
    assert float(row["pseudo_label_accuracy"]) >= 0  # of the two that are left
    gone[1].unlink()
    names = out / run.UNLABELED_LIST
    names.write_text(f"{names.read_text()}2012_000001\n")  # not even in the dataset
    again = update(settings, {"train": {"iterations": 2}}, "test")
    assert train(again, resume=out)["iterations"] == 2
