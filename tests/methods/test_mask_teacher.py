"""Masks of another model as one more teacher, against the formula of their term."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ctt.data.digits import Digits
from ctt.methods.mask_settings import MaskSettings
from ctt.methods.mask_teacher import MaskTeacher
from ctt.run import read_settings
from ctt.settings import Settings, update
from ctt.train.dry_run import dry_run
from ctt.train.loop import train
from tests.data.test_external_masks import write_masks, write_sure
from tests.methods.objectives import objective, odd_batch, scores
from tests.methods.test_labeled import same, train_exactly
from tests.train.processes import finish, shown, start


def with_masks(tiny: Settings, name: str, change: dict[str, object]) -> Settings:
    masks = {"masks": {"folder": "somewhere", **change}}
    views = {"mix": "none", "jitter": 0, "blur_probability": 0, "strong_labeled": False}
    return update(tiny.with_method(name), {**masks, "views": views}, "test")


@pytest.mark.parametrize("name", ["mean-teacher", "cross-teacher"])
def test_the_term_equals_its_formula(tiny: Settings, name: str) -> None:
    settings = with_masks(tiny, name, {"threshold": 0.3, "weight": 0.7})
    b = odd_batch()
    rng = torch.Generator().manual_seed(5)
    external = torch.randint(0, 11, b["label"].shape, generator=rng)
    external[0, :9] = 255
    sure = torch.rand(b["label"].shape, generator=rng, dtype=torch.float64)
    external[b["padding"]] = 255
    sure[b["padding"]] = 0
    engine, terms = objective(settings, b | {"external": external, "external confidence": sure})
    expected = torch.zeros((), dtype=torch.float64)
    for student in engine.method.students:
        # batch norm sees labelled and unlabelled images together
        both = scores(student, torch.cat([b["images"], b["unlabeled"]]))[len(b["images"]) :]
        log_p = both.log_softmax(dim=1)
        total, pixels = 0.0, 0
        for i, y, x in (external != 255).nonzero().tolist():
            if sure[i, y, x] >= 0.3:
                total -= float(sure[i, y, x] * log_p[i, external[i, y, x], y, x].detach())
                pixels += 1
        expected += total / pixels
    torch.testing.assert_close(terms["masks"], expected)


@pytest.mark.parametrize("name", ["unimatch", "unimatch-v2"])
def test_both_views_learn_them(tiny: Settings, name: str) -> None:
    settings = with_masks(tiny, name, {})
    b = odd_batch()
    external = torch.full(b["label"].shape, 3)
    given = b | {"external": external, "external confidence": torch.ones(external.shape).double()}
    _, terms = objective(settings, given)
    assert terms["masks"] > 1  # random weights
    given["external"] = torch.full_like(external, 255)
    _, terms = objective(settings, given)
    assert terms["masks"] == 0


@pytest.mark.parametrize("name", ["cross-teacher", "unimatch-v2"])
def test_two_processes_and_two_parts_equal_the_batch(
    tiny: Settings, tmp_path: Path, name: str
) -> None:
    change = {"masks": {"folder": "somewhere", "fade": 0.9}, "data": {"batch_size": 4}}
    off = {"loss": {"hc": 0, "lc": 0}, "train": {"iterations": 20}}
    settings = update(update(tiny.with_method(name), change, "test"), off, "test")
    both = start(2, tmp_path / "log", train_exactly, settings, 4, tmp_path / "two")
    train_exactly(settings, 4, tmp_path / "one")
    train_exactly(update(settings, {"train": {"accumulate": 2}}, "test"), 4, tmp_path / "parts")
    assert finish(both) == [0, 0], shown(tmp_path / "log")
    expected = torch.load(tmp_path / "one-0.pt")
    assert all(step["masks"] > 0 for step in expected["seen"])
    for file in ("two-0", "two-1", "parts-0"):
        same(torch.load(tmp_path / f"{file}.pt"), expected)


def test_the_weight_fades() -> None:
    kept = MaskTeacher(MaskSettings(weight=0.5), 100)
    assert [kept.weight(i) for i in (0, 50, 99)] == [0.5, 0.5, 0.5]
    fading = MaskTeacher(MaskSettings(weight=0.5, fade=0.4), 100)
    assert [fading.weight(i) for i in (0, 20, 40, 99)] == pytest.approx([0.5, 0.25, 0, 0])


def test_ignored_masks_give_0_not_nan() -> None:
    logits = torch.randn(1, 3, 2, 2)
    b = {"external label 0": torch.full((1, 2, 2), 255), "external sure 0": torch.zeros(1, 2, 2)}
    b["external pixels 0"] = torch.ones(())
    from ctt.models.base import Grid

    assert MaskTeacher(MaskSettings(), 1).loss(logits, Grid(1), b) == 0
    assert F.cross_entropy(logits, b["external label 0"], ignore_index=255).isnan()


def test_a_run_learns_from_masks_and_resumes(tiny: Settings, out: Path, tmp_path: Path) -> None:
    dataset = Digits(24, 6)
    write_masks(tmp_path / "m", dataset, dataset.train_ids())
    write_sure(tmp_path / "s", dataset, dataset.train_ids())
    change = {
        "masks": {"folder": tmp_path / "m", "confidence": tmp_path / "s", "fade": 0.5},
        "train": {"iterations": 4, "eval_every": 4, "log_every": 1, "checkpoint_every": 2},
    }
    settings = update(tiny, change, "test")
    train(settings, out=out)
    rows = list(csv.DictReader((out / "metrics.csv").open(encoding="utf-8")))
    losses = [float(row["loss_masks"]) for row in rows if row["loss_masks"]]
    assert len(losses) == 4
    assert min(losses) > 0
    copy = shutil.copytree(tmp_path / "m", tmp_path / "b" / "copy")
    assert settings.hash() == update(settings, {"masks": {"folder": copy}}, "test").hash()


@pytest.mark.parametrize("name", ["classmix", "u2pl", "self-training", "supervised"])
def test_masks_and_a_teacher_of_another_method_are_left_out(
    tiny: Settings, out: Path, tmp_path: Path, name: str
) -> None:
    """As in the config.yaml of a run that is given with another method."""
    write_masks(tmp_path / "m", Digits(24, 6), Digits(24, 6).train_ids())
    quick = {"train": {"iterations": 4, "eval_every": 4, "log_every": 1}}
    settings = update(tiny.with_method(name), quick, "test")
    left = {"masks": {"folder": tmp_path / "m"}, "teacher": tmp_path / "gone"}
    train(update(settings, left, "test"), out=out)
    assert "loss_masks" not in (out / "metrics.csv").read_text()
    assert read_settings(out).masks.folder == tmp_path / "m"  # as it was asked for
    dry_run(update(settings, {"masks": {"folder": tmp_path / "gone"}}, "test"))
