"""ctt-eval on datasets in files: weights from elsewhere, protocols, splits, submissions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt import checkpoint, data, models
from ctt.cli import evaluate
from ctt.cli.common import BAD_INPUT
from ctt.data import cityscapes, voc
from ctt.data.dataset import DatasetInfo
from ctt.data.options import DatasetOptions
from tests.cli.test_evaluate_predict import call
from tests.data import trees


def weights(path: Path, info: DatasetInfo) -> Path:
    torch.manual_seed(0)
    network = models.build("small", len(info.classes), features=8, width=4)
    checkpoint.save_network(path, network.eval(), info, "fresh weights")
    return path


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Cityscapes with two test images."""
    return trees.write_cityscapes(tmp_path / "data", test=2)


def test_weights_find_their_data_set_by_data_root(
    street: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = weights(tmp_path / "street.safetensors", cityscapes.INFO)
    assert call(evaluate.main, [str(path)], monkeypatch) == BAD_INPUT
    assert "--data-root: the dataset cityscapes needs" in capsys.readouterr().err
    scores = {}
    for protocol, options in {
        "half": [],
        "sliding": ["--eval.window", "20", "24"],
        "center-crop": ["--eval.window", "16", "16"],
    }.items():
        out = tmp_path / protocol
        arguments = [str(path), "--data-root", str(street), "--workers", "0", "--out", str(out)]
        chosen = ["--eval.protocol", protocol, *options]
        assert call(evaluate.main, [*arguments, *chosen], monkeypatch) == 0
        scores[protocol] = json.loads((out / "summary.json").read_text())
    assert scores["half"]["protocol"]["name"] == "half"
    assert scores["half"]["images"] == 2
    assert "absent" in capsys.readouterr().out
    assert scores["center-crop"]["pixel_accuracy"] != scores["half"]["pixel_accuracy"]
    wrong = [str(path), "--dataset", "digits"]
    assert call(evaluate.main, wrong, monkeypatch) == BAD_INPUT
    assert "class 0 is 'road' to the network" in " ".join(capsys.readouterr().err.split())


def test_classic_voc_is_enough_for_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.write_voc(tmp_path / "data", aug_folder="")
    path = weights(tmp_path / "voc.safetensors", voc.INFO)
    arguments = [str(path), "--data-root", str(tmp_path / "data"), "--workers", "0"]
    assert call(evaluate.main, arguments, monkeypatch) == 0
    assert "2 images of voc/val" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "folder", "folder without val"])
def test_nothing_is_tuned_on_training_images(
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = {"voc": trees.write_voc, "cityscapes": trees.write_cityscapes}
    if dataset == "folder without val":
        trees.write_folder(tmp_path / "data", evaluation=0)
    else:
        write.get(dataset, trees.write_folder)(tmp_path / "data")
    name = dataset.split()[0]
    info = data.open_dataset(name, tmp_path / "data", DatasetOptions()).info
    path = weights(tmp_path / "net.safetensors", info)
    arguments = [str(path), "--data-root", str(tmp_path / "data"), "--workers", "0"]
    held_out = dataset == "folder without val"
    code = call(evaluate.main, [*arguments, "--split", "tune"], monkeypatch)
    shown = capsys.readouterr()
    assert code == (0 if held_out else BAD_INPUT)
    assert ("trained with those images" in " ".join(shown.err.split())) != held_out


def test_submission_of_cityscapes_holds_its_own_numbers(
    street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = weights(tmp_path / "street.safetensors", cityscapes.INFO), tmp_path / "out"
    arguments = [str(path), "--data-root", str(street), "--submission", str(out)]
    assert call(evaluate.main, arguments, monkeypatch) == 0
    names = [f"berlin_{number:06}_000019_labelIds.png" for number in range(2)]
    assert sorted(file.name for file in out.iterdir()) == names
    numbers = {number for number, _ in cityscapes.CLASSES.values()}
    for name in names:
        with Image.open(out / name) as mask:
            assert (mask.mode, mask.size) == ("L", (64, 32))
            assert set(np.unique(np.array(mask)).tolist()) <= numbers
    assert call(evaluate.main, arguments, monkeypatch) == BAD_INPUT  # it is there already


def test_submission_of_voc_has_its_palette(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trees.write_voc(tmp_path / "data", size=(33, 47))
    names = (folder / voc.LISTS / "val.txt").read_text("utf-8")
    (folder / voc.LISTS / "test.txt").write_text(names, "utf-8")
    path, out = weights(tmp_path / "voc.safetensors", voc.INFO), tmp_path / "out"
    arguments = [str(path), "--data-root", str(tmp_path / "data"), "--submission", str(out)]
    assert call(evaluate.main, arguments, monkeypatch) == 0
    assert sorted(file.stem for file in out.iterdir()) == sorted(names.split("\n")[:-1])
    with Image.open(next(out.iterdir())) as mask:
        assert (mask.mode, mask.size) == ("P", (47, 33))
        assert mask.getpalette()[3:6] == [128, 0, 0]


def test_what_cannot_be_submitted(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = trees.write_cityscapes(tmp_path / "data")
    path, out = weights(tmp_path / "street.safetensors", cityscapes.INFO), tmp_path / "out"
    street = [str(path), "--data-root", str(root), "--submission", str(out)]
    for arguments, text in (
        ([str(folder), "--submission", str(out)], "no server that evaluates digits"),
        (street, "so that leftImg8bit/test is there"),
        ([*street, "--split", "val"], "leave out --split and --out"),
        ([*street, "--network", "a", "b"], "of one network"),
        ([*street, "--eval.protocol", "center-crop"], "a mask is made of the whole image"),
    ):
        assert call(evaluate.main, arguments, monkeypatch) == BAD_INPUT
        assert text in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
