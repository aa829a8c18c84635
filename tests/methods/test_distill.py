"""Distillation against its formula; a run teaches another one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ctt import checkpoint
from ctt import run as runs
from ctt.cli.train import _main as train_program
from ctt.data.digits import INFO
from ctt.errors import UserError
from ctt.methods.distill import Distill
from ctt.settings import Settings, update
from ctt.train.loop import train
from ctt.train.plan import teachers_of_run
from tests.methods.objectives import has_gradient, normal, objective, odd_batch, scores
from tests.train.steps import student

PLAIN = {"mix": "none", "jitter": 0, "blur_probability": 0, "strong_labeled": False}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_objective_equals_its_formula(tiny: Settings, temperature: float) -> None:
    change = {"views": PLAIN, "options": {"temperature": temperature, "weight": 0.6}}
    b = odd_batch()
    engine, terms = objective(update(tiny.with_method("distill"), change, "test"), b)
    method = engine.method
    assert isinstance(method, Distill)
    (source,) = method.sources
    assert not source.training
    both = torch.cat([b["images"], b["unlabeled"]])
    valid = torch.cat([b["label"] != 255, ~b["padding"]])
    with torch.no_grad():
        told = torch.cat([scores(source, images) for images in (b["images"], b["unlabeled"])])
    log_t = (told / temperature).log_softmax(dim=1)
    own = scores(method.students[0], both)
    log_s = (own / temperature).log_softmax(dim=1)
    apart = (log_t.exp() * (log_t - log_s)).sum(dim=1)[valid].mean() * temperature**2
    labeled = b["label"] != 255
    log_p = own[: len(labeled)].log_softmax(dim=1)
    label = b["label"].masked_fill(~labeled, 0)
    sup = -log_p.gather(1, label[:, None])[:, 0][labeled].mean()
    torch.testing.assert_close(terms["distill"], apart.detach())
    torch.testing.assert_close(terms["sup"], sup.detach())
    has_gradient(method.students, sup + 0.6 * apart)
    assert all(p.grad is None for p in method.sources.parameters())


def test_teachers_see_images_as_they_were_trained(tiny: Settings) -> None:
    engine, _ = objective(tiny.with_method("distill"), odd_batch())
    method = engine.method
    assert isinstance(method, Distill)
    images = odd_batch()["images"]
    assert method.as_taught(images) is images
    theirs = dataclasses.replace(INFO, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    method.source_info = theirs
    mean, std = (torch.tensor(v)[:, None, None].double() for v in (theirs.mean, theirs.std))
    seen = normal(method.as_taught(images))  # by the statistics of the run
    torch.testing.assert_close(seen, (images.double() - mean) / std, rtol=1e-4, atol=1e-4)


BANDS = {"bands": (1, 2, 3), "ranges": ((0.0, 1e4),) * 3}
FOUR = {"bands": (1, 2, 3, 4), "mean": (0.5,) * 4, "std": (0.25,) * 4}


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        (BANDS, BANDS | {"ranges": ((0.0, 4e3),) * 3}, "ranges is"),
        (BANDS, {}, "bands is"),
        ({}, FOUR, "bands is"),
        ({}, {"mean": (0.5,) * 4, "std": (0.25,) * 4}, "mean is"),
        ({"white": 4095.0}, {}, "white is"),
    ],
)
def test_teachers_of_other_inputs_are_refused(
    tiny: Settings, tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], told: str
) -> None:
    settings = tiny.with_method("distill")
    path = tmp_path / "teacher.safetensors"
    trained = dataclasses.replace(INFO, **theirs)
    checkpoint.save_network(path, student(settings), trained, "for the tests")
    settings = update(settings, {"teacher": path}, "test")
    with pytest.raises(UserError, match=f"see other images than this run reads: {told}"):
        teachers_of_run(settings, dataclasses.replace(INFO, **ours))
    other = {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)}
    found = teachers_of_run(settings, dataclasses.replace(trained, **other))
    assert found is not None
    assert found[1] == trained


def test_a_run_teaches_a_smaller_network(tiny: Settings, tmp_path: Path) -> None:
    quick = {"train": {"iterations": 2, "eval_every": 2, "tensorboard": False}}
    train(update(tiny, quick, "test"), out=tmp_path / "large")
    small = {"model": {"width": 3, "features": 5}, "teacher": tmp_path / "large", **quick}
    settings = update(tiny.with_method("distill"), small, "test")
    summary = train(settings, out=tmp_path / "small")
    assert set(summary["miou"]) == {"student_1", "teacher_1", "ensemble"}
    text = (tmp_path / "small" / "metrics.csv").read_text().splitlines()
    assert "loss_distill" in text[0]
    begun = runs.read_settings(tmp_path / "small")
    assert begun.teacher == tmp_path / "large"
    further = update(begun, {"train": {"iterations": 3}}, "test")
    assert train(further, resume=tmp_path / "small")["iterations"] == 3
    best = update(settings, {"teacher": tmp_path / "large" / "best.safetensors"}, "test")
    train(best, out=tmp_path / "by-file")
    assert json.loads((tmp_path / "by-file" / "summary.json").read_text())["iterations"] == 2
    fewer = {"dataset": "folder", "data_root": _two_classes(tmp_path / "two"), "ratio": "1/1"}
    with pytest.raises(UserError, match="know the 11 classes of digits, and folder has 4 of its"):
        train(update(settings, fewer, "test"), out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "large").rename(tmp_path / "moved")
    further = update(further, {"train": {"iterations": 4}}, "test")
    with pytest.raises(UserError, match="If it was moved, a resumed run takes its new path"):
        train(further, resume=tmp_path / "small")
    further = update(further, {"teacher": tmp_path / "moved"}, "test")
    assert train(further, resume=tmp_path / "small")["iterations"] == 4


def _two_classes(root: Path) -> Path:
    from tests.data import trees

    return trees.write_folder(root, unlabeled=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method distill", "`method` distill needs `teacher`"),
        ("--method distill --teacher nowhere", "`teacher` nowhere: it is not there"),
        ("--method supervised --teacher x", "`teacher` changes nothing with `method` supervised"),
        ("--method distill --options.temperature 0", "`options.temperature` must be above 0"),
    ],
)
def test_bad_arguments_are_told(arguments: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_program([*arguments.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
