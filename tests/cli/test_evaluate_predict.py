import dataclasses
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctt.cli import evaluate, predict, train
from ctt.data.digits import Digits
from ctt.train import checkpoint
from ctt.train.run import read_settings

Run = Callable[[str], int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    quick = (
        "--ratio 6 --data.labeled-pool 24 --data.eval-images 6 --data.batch-size 2 "
        "--model.width 4 --model.features 8 --train.threads 1 --train.iterations 3"
    )
    assert train._main([*shlex.split(quick), "--out", str(out)]) == 0
    return out


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    source = Digits(2, 3)
    for name in source.eval_ids():
        Image.fromarray(source.image(name).permute(1, 2, 0).numpy()).save(folder / f"{name} ü.png")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (33, 57), np.uint8)).save(folder / "grey.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def call(program: Callable[[], None], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["ctt", *arguments])
    with pytest.raises(SystemExit) as stop:
        program()
    return int(stop.value.code or 0)


def test_evaluation_of_a_run_repeats_its_summary(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores"
    arguments = [str(folder), "--out", str(out), "--workers", "1"]
    assert call(evaluate.main, arguments, monkeypatch) == 0
    scores = json.loads((out / "summary.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("miou", "class_iou", "absent", "pixel_accuracy", "protocol"):
        assert scores[key] == summary[key]
    assert scores["protocol"] == {"name": "whole", "scales": [1.0], "flip": False, "amp": "off"}
    names = "".join(f"{name}\n" for name in Digits(24, 6).eval_ids())
    assert scores["images_sha256"] == hashlib.sha256(names.encode()).hexdigest()
    checkpoint = (folder / "checkpoints" / "last.pt").read_bytes()
    assert scores["weights_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert len(list(out.glob("confusion_*.png"))) == 5
    assert call(evaluate.main, arguments, monkeypatch) == 2  # the folder is not empty


def test_only_the_networks_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores"
    protocol = (
        "--eval.protocol sliding --eval.window 17 20 --eval.stride 0.5 --eval.flip "
        "--eval.scales 0.75 1 --eval.amp bf16 --workers 0"
    )
    chosen = ["--network", "ensemble", "student_2", "--out", str(out), *protocol.split()]
    assert call(evaluate.main, [str(folder), *chosen], monkeypatch) == 0
    scores = json.loads((out / "summary.json").read_text())
    assert list(scores["miou"]) == ["student_2", "ensemble"]
    assert scores["protocol"] == {
        "name": "sliding",
        "window": [17, 20],
        "stride": 0.5,
        "scales": [0.75, 1.0],
        "flip": True,
        "amp": "bf16",
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--split tune", "this run was trained with those digits"),
        ("--network teacher_9", "Networks: student_1, student_2, teacher_1, teacher_2, ensemble."),
        ("--eval.scales 0 1", "--eval.scales must be factors in 0.1..10"),
        ("--eval.window 4 4", "--eval.window must be at least 8 8"),
        ("--eval.stride 900", "--eval.stride must be a share"),
        ("--dataset nope", "no such data set"),
    ],
)
def test_bad_options_of_evaluation(
    arguments: str,
    text: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(evaluate.main, [str(folder), *arguments.split()], monkeypatch) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert text in shown
    assert "Traceback" not in shown


def test_evaluation_of_weights_names_their_origin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(evaluate.main, [str(folder / "best.safetensors")], monkeypatch) == 0
    assert re.search(r"(student|teacher)_[12] after [123] iterations", capsys.readouterr().out)


def test_weights_of_other_classes_or_unknown_data(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network, info, note = checkpoint.load_network(folder / "best.safetensors")
    model = read_settings(folder).model
    other = dataclasses.replace(info, name="moon", classes=("sky", *info.classes[1:]))
    checkpoint.save_network(tmp_path / "moon.safetensors", network, model, other, note)
    for arguments, text in (
        ([], "trained on moon, which is no data set of this installation"),
        (["--dataset", "digits"], "class 0 is 'sky' to the network and 'background' in the data"),
    ):
        paths = [str(tmp_path / "moon.safetensors"), *arguments]
        assert call(evaluate.main, paths, monkeypatch) == 2
        assert text in " ".join(capsys.readouterr().err.split())


def test_masks_and_overlays(
    folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert call(predict.main, [str(folder), str(images), "--out", str(out)], monkeypatch) == 0
    assert len(list(out.iterdir())) == 8
    with Image.open(out / "grey_mask.png") as mask:
        assert mask.mode == "P"
        assert mask.size == (57, 33)
        assert np.array(mask).max() <= 10
        assert mask.getpalette()[3:6] == [230, 25, 75]
    with Image.open(out / "grey_overlay.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (57, 33))
    again = [str(folder / "best.safetensors"), str(images), "--out", str(out)]
    assert call(predict.main, again, monkeypatch) == 2
    assert call(predict.main, [*again, "--overwrite"], monkeypatch) == 0
    (out / "grey_mask.png").unlink()
    only_grey = [str(folder), str(images / "grey.jpg"), "--out", str(out)]
    assert call(predict.main, only_grey, monkeypatch) == 2  # the overlay is still there


@pytest.mark.parametrize("kind", ["missing", "broken", "empty", "twice", "weights"])
def test_bad_input(
    kind: str,
    folder: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights, paths = folder, [images]
    if kind == "missing":
        paths = [tmp_path / "nobody.png"]
    elif kind == "broken":
        whole = (images / "grey.jpg").read_bytes()
        (images / "grey.jpg").write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        paths = [tmp_path / "no images"]
        paths[0].mkdir()
    elif kind == "twice":
        paths = [images, images / "grey.jpg"]
    else:
        weights = images / "notes.txt"
    arguments = [str(weights), *map(str, paths), "--out", str(tmp_path / "out")]
    assert call(predict.main, arguments, monkeypatch) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    expected = {
        "missing": "no such image",
        "broken": "grey.jpg cannot be read as an image",
        "empty": "No image found",
        "twice": "would both be written",
        "weights": "notes.txt is no safetensors file",
    }[kind]
    assert expected in " ".join(shown.split())
