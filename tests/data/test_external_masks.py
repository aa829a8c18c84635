"""Masks of unlabelled images that another model made."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt.cli.data import _main as data_program
from ctt.cli.train import _main as train_program
from ctt.configure import refuse_unused
from ctt.data import open_dataset
from ctt.data.dataset import Dataset
from ctt.data.digits import INFO, Digits
from ctt.data.external_masks import ExternalMasks, WithMasks
from ctt.data.options import DatasetOptions
from ctt.data.packed import pack, unpack
from ctt.data.pictures import ORIENTATION
from ctt.data.views import GeometricView
from ctt.errors import UserError
from ctt.settings import Settings
from tests.data import trees

SMALL = (
    "--ratio 6 --data.labeled-pool 12 --data.eval-images 2 --data.batch-size 2 --data.crop 24 24 "
    "--model.width 4 --model.features 8 --train.threads 1 --train.iterations 1"
)


def write_masks(folder: Path, dataset: Dataset, names: Iterable[str], end: str = "") -> Path:
    """Write the true labels as masks."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        trees.save_mask(folder / f"{name}{end}.png", dataset.label(name).numpy(), "L")
    return folder


def write_sure(folder: Path, dataset: Dataset, names: Iterable[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        size = dataset.label(name).shape
        values = np.random.default_rng(i).integers(0, 256, size).astype(np.uint8)
        Image.fromarray(values, "L").save(folder / f"{name}_confidence.png")
    return folder


@pytest.fixture(scope="module")
def dataset() -> Digits:
    return Digits(12, 2)


@pytest.mark.parametrize("end", ["", "_mask"])
def test_masks_and_their_confidence_are_read(dataset: Digits, tmp_path: Path, end: str) -> None:
    name = dataset.train_ids()[3]
    folder = write_masks(tmp_path, dataset, [name], end)
    plain = ExternalMasks(dataset, folder, None)
    label, sure = unpack(plain.pair(name)[1])
    assert torch.equal(label, dataset.label(name).long())
    assert (sure == 1).all()
    write_sure(folder, dataset, [name])
    stored = np.asarray(Image.open(folder / f"{name}_confidence.png"))
    label, sure = unpack(ExternalMasks(dataset, folder, folder).pair(name)[1])
    assert torch.equal(label, dataset.label(name).long())
    torch.testing.assert_close(sure, torch.from_numpy(stored / 255).float())
    (folder / f"{name}_confidence.png").unlink()
    with pytest.raises(UserError, match="must hold a map of confidence"):
        ExternalMasks(dataset, folder, folder).pair(name)  # not the mask itself


def test_masks_are_found_by_the_name_of_the_image_file(tmp_path: Path) -> None:
    root = trees.write_cityscapes(tmp_path / "city")
    city = open_dataset("cityscapes", root, DatasetOptions())
    name = city.train_ids()[0]
    stem = city.files(name, labeled=False)[0].stem
    trees.save_mask(tmp_path / "m" / f"{stem}_mask.png", city.label(name).numpy(), "P")
    assert ExternalMasks(city, tmp_path / "m", None).path(name).name == f"{stem}_mask.png"


@pytest.mark.parametrize("given", ["mine", "mine/unlabeled", "mine/unlabeled/a"])
def test_what_ctt_predict_writes_is_found(tmp_path: Path, given: str) -> None:
    """It names a mask by what comes below the folder that it was given."""
    root = trees.write_folder(tmp_path / "mine", unlabeled=1)
    trees.save_image(root / "unlabeled" / "a" / "1.jpg", np.zeros((8, 8, 3), np.uint8))
    dataset = open_dataset("folder", root, DatasetOptions())
    below = (root / "unlabeled" / "a").relative_to(tmp_path / given)
    trees.save_mask(tmp_path / "m" / below / "1_mask.png", np.zeros((8, 8), np.uint8), "P")
    trees.save_mask(tmp_path / "m" / below / "1_confidence.png", np.ones((8, 8), np.uint8), "L")
    masks = ExternalMasks(dataset, tmp_path / "m", tmp_path / "m")
    assert masks.path("unlabeled/a/1.jpg").parent == tmp_path / "m" / below
    masks.check(["unlabeled/a/1.jpg"], ["unlabeled/a/1.jpg"])
    with pytest.raises(UserError, match=r"m/unlabeled/photo 0_mask\.png: there is no such file"):
        masks.check(["unlabeled/photo 0.JPG"], [])


def test_a_mask_that_fits_two_images_is_refused(tmp_path: Path) -> None:
    root = trees.write_folder(tmp_path / "mine", unlabeled=1)
    dataset = open_dataset("folder", root, DatasetOptions())
    for place in (tmp_path / "m", tmp_path / "m" / "unlabeled"):
        trees.save_mask(place / "photo 0_mask.png", np.zeros((40, 48), np.uint8), "L")
    masks = ExternalMasks(dataset, tmp_path / "m", None)
    assert masks.path("unlabeled/photo 0.JPG").parent.name == "unlabeled"
    (tmp_path / "m" / "unlabeled" / "photo 0_mask.png").unlink()
    with pytest.raises(UserError, match=r"m/photo 0_mask\.png could belong to images/photo 0\.jpg"):
        masks.path("unlabeled/photo 0.JPG")
    (fault,) = masks.faults(["unlabeled/photo 0.JPG"], lambda: None)
    assert "m/unlabeled/photo 0_mask.png" in fault.text


def test_masks_follow_the_geometry(dataset: Digits, tmp_path: Path) -> None:
    """As labels do, which the tests of views hold to the image."""
    names = dataset.train_ids()[:3]
    masks = ExternalMasks(dataset, write_masks(tmp_path, dataset, names), None)
    view = GeometricView((30, 46), (0.7, 1.4), True, 10.0, 0.1, (0.5, 0.5, 0.5))
    for seed in range(6):
        name = names[seed % 3]
        image, mask = WithMasks(dataset, None, None, masks).pair(name)
        picture, moved = view(image, mask, seed)
        expected, label = view(image, dataset.label(name), seed)
        assert torch.equal(picture, expected)
        assert torch.equal(unpack(moved)[0], label.long())
        padding = view(image, torch.zeros_like(dataset.label(name)), seed)[1] == 255
        assert torch.equal(moved < 0, padding)
        assert padding.any()
    resized = WithMasks(dataset, (20, 24), None, masks).pair(names[0])[1]
    assert resized.shape == (20, 24)
    kept, known = unpack(resized)[0], dataset.label(names[0])
    assert torch.isin(kept, known).all()


@pytest.mark.parametrize("resize", [None, (16, 24)])
@pytest.mark.parametrize("cached", [False, True])
def test_every_mask_is_compared_with_its_image_as_that_is_read(
    tmp_path: Path, resize: tuple[int, int] | None, cached: bool
) -> None:
    own = open_dataset("folder", trees.write_folder(tmp_path / "d", unlabeled=3), DatasetOptions())
    names = own.unlabeled_ids()
    note = Image.Exif()
    note[ORIENTATION] = 6
    with Image.open(tmp_path / "d" / names[2]) as picture:
        picture.save(tmp_path / "d" / names[2], exif=note)  # 48 x 40 pixels from now on
    for name, size in zip(names, ((40, 48), (48, 40), (48, 40)), strict=True):
        trees.save_mask(tmp_path / "m" / f"{name}.png", np.ones(size, np.uint8), "L")
    cache = tmp_path / "cache" if cached else None
    masks = ExternalMasks(own, tmp_path / "m", None)
    for _ in range(2):  # the cache is written, then read
        prepared = WithMasks(own, resize, cache, masks)
        for name, size in ((names[0], (40, 48)), (names[2], (48, 40))):
            image, mask = prepared.pair(name)
            assert image.shape[1:] == mask.shape == (resize or size)
            assert (unpack(mask)[0] == 1).all()
        with pytest.raises(UserError, match="has 40x48 pixels, but its image has 48x40"):
            prepared.pair(names[1])


def test_packed_values_come_back() -> None:
    label = torch.tensor([[0, 3, 255]], dtype=torch.uint8)
    sure = torch.tensor([[255, 0, 51]], dtype=torch.uint8)
    again, level = unpack(pack(label, sure))
    assert again.tolist() == [[0, 3, 255]]
    assert level[0].tolist() == pytest.approx([1, 0, 0.2])
    assert unpack(torch.tensor([-1]))[0].tolist() == [255]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"no such file, but `masks.folder` must hold a mask of every"),
        ("size", r"has 7x5 pixels, but its image has 40x40"),
        ("class", r"holds numbers that are no class: 77"),
        ("sure", r"`masks.confidence` must hold a map of confidence of every"),
        ("deep", r"a map of confidence is a grey image of 8 bits"),
        ("unequal", r"has 7x5 pixels, but its mask has 40x40"),
        ("folder", r"`masks.folder` .*nowhere: there is no such folder"),
    ],
)
def test_what_is_wrong_is_refused_before_training(
    dataset: Digits, tmp_path: Path, what: str, message: str
) -> None:
    folder, sure = tmp_path / "masks", tmp_path / "sure"
    names = dataset.train_ids()
    write_masks(folder, dataset, names)
    write_sure(sure, dataset, names)
    for name in names:
        if what == "missing":
            (folder / f"{name}.png").unlink()
        if what == "size":
            trees.save_mask(folder / f"{name}.png", np.zeros((5, 7), np.uint8), "L")
        if what == "class":
            trees.save_mask(folder / f"{name}.png", np.full((40, 40), 77, np.uint8), "L")
        if what == "sure":
            (sure / f"{name}_confidence.png").unlink()
        if what in ("deep", "unequal"):
            values = np.full((40, 40) if what == "deep" else (5, 7), 9, np.uint16)
            values = values * 1000 if what == "deep" else values.astype(np.uint8)
            Image.fromarray(values).save(sure / f"{name}_confidence.png")
    if what == "folder":
        folder = tmp_path / "nowhere"
    command = [*SMALL.split(), "--masks.folder", str(folder), "--masks.confidence", str(sure)]
    with pytest.raises(UserError, match=message):
        train_program([*command, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_masks_of_two_classes_that_hold_255_for_one_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would teach that everything is background."""
    root = trees.write_folder(
        tmp_path / "data",
        description="classes: [background, leaf]\nid_map: {0: 0, 1: 1, 2: 1, 3: 1}",
    )
    command = ["check", "--dataset", "folder", "--data-root", str(root), "--masks"]
    for leaf in (255, 1):
        dataset = open_dataset("folder", root, DatasetOptions())
        for name in dataset.unlabeled_ids():
            values = np.zeros(dataset.image(name).shape[1:], np.uint8)
            values[:9, :9], values[20:, 20:] = 255, leaf
            trees.save_mask(tmp_path / "m" / f"{name}.png", values, "L")
        names = dataset.unlabeled_ids()
        ExternalMasks(dataset, tmp_path / "m", None).check(names, names)
        text = "shows leaf, but they hold 255"
        assert any(text in note for note in dataset.notes) is (leaf == 255)
        assert data_program([*command, str(tmp_path / "m")]) == 0
        assert (text in capsys.readouterr().out) is (leaf == 255)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--masks.weight 2", "`masks.weight` changes nothing without `masks.folder`"),
        (
            "--masks.folder x --masks.threshold 0.9",
            "`masks.threshold` changes nothing without `masks.confidence`",
        ),
        ("--method supervised --masks.folder x", "`masks.folder` changes nothing with `method`"),
        ("--masks.folder x --masks.fade 2", "`masks.fade` must be in 0..1"),
    ],
)
def test_settings_without_effect_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_program(arguments.split())


def test_a_resumed_run_may_leave_its_masks_out() -> None:
    refuse_unused(Settings(), ["masks.folder", "masks.confidence"])  # which are None then


def test_ctt_data_check_looks_at_all_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = trees.write_folder(tmp_path / "data", unlabeled=3)
    own = open_dataset("folder", root, DatasetOptions())
    names = own.unlabeled_ids()
    for name in names:
        height, width = own.image(name).shape[1:]
        trees.save_mask(tmp_path / "m" / f"{name}.png", np.zeros((height, width), np.uint8), "L")
    command = ["check", "--dataset", "folder", "--data-root", str(root), "--masks"]
    assert data_program([*command, str(tmp_path / "m")]) == 0
    assert "3 images have masks of another model" in capsys.readouterr().out
    trees.save_mask(tmp_path / "m" / f"{names[1]}.png", np.zeros((5, 7), np.uint8), "L")
    with pytest.raises(UserError, match="1 fault found"):
        data_program([*command, str(tmp_path / "m")])
    assert "has 7x5 pixels, but its image has" in re.sub(r"\s+", " ", capsys.readouterr().out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"no mask .* such as .*/empty/unlabeled/größer/photo 1_mask"
    ):
        data_program([*command, str(tmp_path / "empty")])
    assert len(INFO.classes) == 11
