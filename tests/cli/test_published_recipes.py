"""The paper's recipes on made-up data in the true layouts, from training to the masks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ctt.cli import evaluate, export, predict, train
from tests.data import trees

# the real network; only what makes it slow is small
SMALL = [
    "--model.weights",
    "none",
    "--train.iterations",
    "2",
    "--train.log-every",
    "1",
    "--train.no-tensorboard",
    "--train.eval-every",
    "2",
    "--data.workers",
    "0",
    "--data.batch-size",
    "2",
]


def run(program: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ctt", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        program()
    return int(stop.value.code or 0)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["voc", "cityscapes"])
def test_trains_evaluates_predicts_and_exports(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out, masks = tmp_path / "data", tmp_path / "run", tmp_path / "masks"
    if dataset == "voc":
        trees.write_voc(root, classic=8, augmented=16, evaluation=3)
        options, images = ["--ratio", "1/50", "--data.crop", 65, 65], 24
        folder = root / "VOCdevkit" / "VOC2012" / "JPEGImages"
    else:
        trees.write_cityscapes(root, train=24, evaluation=3)
        options, images = ["--ratio", "1/30", "--data.resize", 48, 96, "--data.crop", 33, 65], 24
        folder = root / "leftImg8bit" / "val" / "lindau"
    given = ["--dataset", dataset, "--data-root", root, "--out", out, *SMALL, *options]
    assert run(train.main, monkeypatch, *given) == 0
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert (summary["labeled"], summary["unlabeled"]) == (1, images - 1)
    assert set(summary["miou"]) == {"student_1", "student_2", "teacher_1", "teacher_2", "ensemble"}
    assert summary["protocol"]["name"] == ("whole" if dataset == "voc" else "half")

    scores = tmp_path / "scores"
    assert run(evaluate.main, monkeypatch, out, "--out", scores) == 0
    again = json.loads((scores / "summary.json").read_text("utf-8"))
    assert again["miou"] == summary["miou"]
    assert run(predict.main, monkeypatch, out, folder, "--out", masks) == 0
    for image in folder.iterdir():
        with Image.open(image) as photo, Image.open(masks / f"{image.stem}_mask.png") as mask:
            assert (mask.mode, mask.size) == ("P", photo.size)

    graph = tmp_path / "network.onnx"
    assert run(export.main, monkeypatch, out, "--out", graph, "--size", 33, 65) == 0
    assert graph.stat().st_size > 4 * 40_000_000  # ResNet-101 in float32
