"""ctt-eval --embedding and ctt-report --embeddings: where features lie, as pictures."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ctt import models
from ctt.cli import evaluate, report
from ctt.data.digits import INFO, Digits
from ctt.errors import UserError
from ctt.experiments import results
from ctt.inference import embedding
from ctt.inference.load import load_trained
from ctt.settings import EvalSettings

TABLE = Path(__file__).parents[1] / "experiments" / "shares.csv"  # of made-up runs


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pixels, so that t-SNE takes no time."""
    monkeypatch.setattr(embedding, "IMAGES", 4)
    monkeypatch.setattr(embedding, "PIXELS", 3)


def test_the_features_of_a_run_are_drawn(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "features.png"
    assert evaluate._main([str(folder), "--embedding", str(path), "--device", "cpu"]) == 0
    with Image.open(path) as picture:
        assert picture.width > 300
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 5
    with pytest.raises(UserError, match="this is there already"):
        evaluate._main([str(folder), "--embedding", str(path)])


def test_what_cannot_be_drawn_is_told(folder: Path, tmp_path: Path) -> None:
    two = [str(folder), "--embedding", str(tmp_path / "a.png"), "--network", "student_1"]
    for option in (["--split", "val"], ["--workers", "1"], ["--submission", "a"], ["--eval.flip"]):
        name = option[0].removeprefix("--")
        with pytest.raises(UserError, match=f"{name}.* has no effect beside --embedding"):
            evaluate._main([*two, *option])
    with pytest.raises(UserError, match="--embedding is of one network"):
        evaluate._main([*two, "teacher_1"])
    alone = tmp_path / "weights"
    alone.mkdir()
    shutil.copy(folder / "best.safetensors", alone)
    with pytest.raises(UserError, match="there are no lists of the images"):
        evaluate._main([str(alone / "best.safetensors"), "--embedding", str(tmp_path / "a.png")])


def test_pixels_have_the_classes_of_their_labels(folder: Path) -> None:
    network = load_trained(folder).networks["teacher_1"]
    dataset = Digits(24, 6)
    args = (network, dataset, dataset.train_ids()[:4], torch.device("cpu"), EvalSettings())
    features, classes = embedding.pixels_of(*args)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    shown = {int(c) for name in args[2] for c in dataset.label(name)[::2, ::2].unique()}
    assert set(classes.tolist()) == shown
    assert max(torch.bincount(classes)) == 3
    again, _ = embedding.pixels_of(*args)
    assert torch.equal(features, again)
    none, _ = embedding.pixels_of(network, dataset, [], torch.device("cpu"), EvalSettings())
    assert none.shape == (0, features.shape[1])


def test_pixels_without_data_are_not_shown() -> None:
    class Bands(Digits):
        info = replace(INFO, bands=(1, 2, 3))

        def image(self, name: str) -> Tensor:
            image = super().image(name) / 255
            image[:, ::2] = torch.nan  # in all rows that the network's grid lies on
            return image

    network = models.build("small", len(INFO.classes), 4, 4).eval()
    args = (["val-0"], torch.device("cpu"), EvalSettings())
    assert len(embedding.pixels_of(network, Digits(6, 2), *args)[1])
    assert not len(embedding.pixels_of(network, Bands(6, 2), *args)[1])


def test_two_groups_lie_apart() -> None:
    ways = torch.eye(8)[:2].repeat_interleave(15, dim=0)
    generator = torch.Generator().manual_seed(0)
    features = ways + 0.1 * torch.rand(ways.shape, generator=generator)
    places = embedding.in_two_dimensions(features)
    apart = torch.cdist(places, places)
    inside = apart[:15, :15].max(), apart[15:, 15:].max()
    assert apart[:15, 15:].min() > max(inside)
    assert torch.equal(places, embedding.in_two_dimensions(features))


def test_a_report_shows_the_runs_that_are_there(folder: Path, tmp_path: Path) -> None:
    rows = [row for row in results.read(TABLE) if row["status"] == "done"][:2]
    results.write(tmp_path / "shares.csv", rows, results.COLUMNS)
    shutil.copytree(folder, tmp_path / "runs" / rows[0]["settings_hash"])
    assert report._main([str(tmp_path), "--embeddings"]) == 0
    page = (tmp_path / "report.html").read_text()
    shown = re.findall(r'<img alt="((?:Predictions|Features): [^"]+)" src="data:image/png', page)
    name = f"{rows[0]['variant']}, --ratio {rows[0]['share']}, seed {rows[0]['seed']}"
    assert shown == [f"Predictions: {name}", f"Features: {name}"]
    assert report._main([str(tmp_path)]) == 0
    assert "Features: " not in (tmp_path / "report.html").read_text()


def test_a_report_tells_of_features_that_cannot_be_drawn(folder: Path, tmp_path: Path) -> None:
    rows = {row["variant"]: row for row in results.read(TABLE) if row["status"] == "done"}
    whole, broken = list(rows.values())[:2]
    results.write(tmp_path / "shares.csv", [broken, whole], results.COLUMNS)
    for row in (whole, broken):
        shutil.copytree(folder, tmp_path / "runs" / row["settings_hash"])
    (tmp_path / "runs" / broken["settings_hash"] / "split" / "labeled.txt").unlink()
    assert report._main([str(tmp_path), "--embeddings"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert re.search(f"Features of {broken['variant']}, .* could not be drawn: .*no lists", page)
    assert f'alt="Features: {whole["variant"]}' in page
