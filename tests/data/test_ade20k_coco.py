"""ADE20K and COCO-81 in their true layouts, with what real trees have."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt import data
from ctt.cli.data import _main as data_program
from ctt.data import ade20k, coco
from ctt.data.options import DatasetOptions
from ctt.data.split import make_split
from ctt.errors import UserError
from tests.data import trees

OPTIONS = DatasetOptions()


def test_the_classes_are_those_of_the_benchmarks() -> None:
    assert len(ade20k.CLASSES) == len(set(ade20k.CLASSES)) == 150
    assert ade20k.CLASSES[:3] == ("wall", "building", "sky")
    assert [ade20k.CLASSES[c] for c in (12, 53, 100, 149)] == ["person", "stairs", "poster", "flag"]
    assert len(coco.CLASSES) == len(set(coco.CLASSES)) == 81
    assert [coco.CLASSES[c] for c in (0, 1, 12, 80)] == [
        "background",
        "person",
        "stop sign",
        "toothbrush",
    ]
    assert all(len(set(s.INFO.palette)) == len(s.CLASSES) for s in (ade20k, coco))


@pytest.mark.parametrize("inside", [True, False])
def test_masks_of_the_archive_are_shifted_by_one(tmp_path: Path, inside: bool) -> None:
    root = trees.write_ade20k(tmp_path)
    dataset = data.open_dataset(
        "ade20k", root / "ADEChallengeData2016" if inside else root, OPTIONS
    )
    assert dataset.train_ids() == [f"ADE_train_{i:08}" for i in range(1, 6)]
    assert dataset.eval_ids() == ["ADE_val_00000001", "ADE_val_00000002"]
    image, label = dataset.pair("ADE_train_00000003")
    stored = np.asarray(Image.open(dataset.files("ADE_train_00000003", labeled=True)[1]))
    assert (stored == 0).any()
    assert torch.equal(label, torch.from_numpy(np.where(stored == 0, 255, stored - 1)).byte())
    assert set(label.unique().tolist()) == {0, 5, 114, 255}
    assert any("0 (other) is ignored" in note for note in dataset.notes)
    assert any("published dataset has 20,210" in note for note in dataset.notes)
    grey = dataset.image("ADE_train_00000002")
    assert grey.shape == image.shape == (3, 40, 48)


def test_shifted_masks_are_told(tmp_path: Path) -> None:
    dataset = data.open_dataset("ade20k", trees.write_ade20k(tmp_path, shifted=True), OPTIONS)
    label = dataset.label("ADE_train_00000003")
    assert set(label.unique().tolist()) == {0, 5, 114, 255}
    assert any("are shifted" in note for note in dataset.notes)


def test_a_shifted_mask_among_those_of_the_archive_is_an_error(tmp_path: Path) -> None:
    root = trees.write_ade20k(tmp_path, train=3)
    path = root / "ADEChallengeData2016" / "annotations" / "training" / "ADE_train_00000001.png"
    trees.save_mask(path, np.full((40, 48), 150, np.uint8), "L")  # flag: no shifted mask has it
    dataset = data.open_dataset("ade20k", root, OPTIONS)
    assert dataset.label("ADE_train_00000001").unique().tolist() == [149]
    broken = path.with_name("ADE_train_00000002.png")
    trees.save_mask(broken, np.full((40, 48), 255, np.uint8), "L")
    with pytest.raises(UserError, match="255"):
        dataset.label("ADE_train_00000002")


def test_the_lists_of_unimatch_are_read_as_they_are(tmp_path: Path) -> None:
    root = trees.write_ade20k(tmp_path / "ade")
    lines = [
        f"images/training/{n}.jpg annotations/training/{n}.png"
        for n in ("ADE_train_00000004", "ADE_train_00000002")
    ]
    labeled = tmp_path / "labeled.txt"
    labeled.write_text("\n".join(lines))
    dataset = data.open_dataset("ade20k", root, OPTIONS)
    names, rest = make_split(dataset, "1/2", 0, labeled, None)
    assert names == ["ADE_train_00000004", "ADE_train_00000002"]
    assert len(rest) == 3
    mixed = tmp_path / "wrong.txt"
    mixed.write_text("images/training/ADE_train_00000004.jpg annotations/training/ADE_train_1.png")
    with pytest.raises(UserError, match="is not its mask"):
        make_split(dataset, "1/2", 0, mixed, None)


@pytest.mark.parametrize(("name", "needs"), [("ade20k", "images/training"), ("coco", "train2017")])
def test_an_incomplete_layout_is_told(tmp_path: Path, name: str, needs: str) -> None:
    with pytest.raises(UserError, match=f"there is no folder {needs}"):
        data.open_dataset(name, tmp_path, OPTIONS)
    (tmp_path / needs).mkdir(parents=True)
    (tmp_path / "images" / "validation").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=r"there are no images\. Unpack"):
        data.open_dataset(name, tmp_path, OPTIONS)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    pytest.importorskip("pycocotools")
    return trees.write_coco(tmp_path / "coco")


def test_masks_of_coco_are_made_of_the_annotations(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="ctt-data coco-masks --data-root"):
        data.open_dataset("coco", tree, OPTIONS)
    command = ["coco-masks", "--data-root", str(tree), "--threads", "2"]
    assert data_program(command) == 0
    assert "8 masks are written" in capsys.readouterr().out
    dataset = data.open_dataset("coco", tree, OPTIONS)
    assert dataset.train_ids() == [f"{i:012}" for i in (1, 2, 3, 4)]
    assert dataset.eval_ids() == [f"{i:012}" for i in (101, 102, 103, 104)]
    dog, brush = coco.CLASSES.index("dog"), coco.CLASSES.index("toothbrush")
    label = dataset.label("000000000001")
    assert label[12, 22] == dog  # the smaller one, though it comes first in the file
    assert label[7, 12] == label[28, 38] == brush
    assert label[0, 0] == 0
    chair, person = coco.CLASSES.index("chair"), 1
    label = dataset.label("000000000002")
    expected = torch.zeros(40, 48, dtype=torch.uint8)
    expected[10:30, 5:40] = chair  # a crowd belongs to its class
    expected[15:20, 10:16] = person
    assert torch.equal(label, expected)
    assert dataset.label("000000000003").unique().tolist() == [0]
    parts = dataset.label("000000000004")
    assert parts[4, 4] == parts[25, 33] == coco.CLASSES.index("stop sign")
    assert dataset.image("000000000002").shape == (3, 40, 48)
    before = {path: path.stat().st_mtime_ns for path in (tree / "masks").rglob("*.png")}
    assert data_program(command) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "0 masks are written. 8 were there already" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert data_program(["check", "--dataset", "coco", "--data-root", str(tree)]) == 0


def test_masks_of_other_programs_are_read(tree: Path, tmp_path: Path) -> None:
    for i in (1, 2, 3, 4, 101, 102, 103, 104):
        label = np.full((40, 48), i % 81, np.uint8)
        trees.save_mask(tree / "masks" / f"{i:012}.png", label, "P")
    dataset = data.open_dataset("coco", tree, OPTIONS)
    assert dataset.label("000000000104").unique().tolist() == [23]
    labeled = tmp_path / "labeled.txt"
    labeled.write_text("train2017/000000000002.jpg masks/000000000002.png\n")
    assert make_split(dataset, "1", 0, labeled, None)[0] == ["000000000002"]
    trees.save_mask(tree / "masks" / "000000000001.png", np.full((40, 48), 90, np.uint8), "L")
    with pytest.raises(UserError, match="90"):  # an id of a category, not a class
        dataset.label("000000000001")


def test_annotations_of_other_classes_are_refused(tree: Path) -> None:
    path = tree / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace('"toothbrush"', '"my class"'))
    with pytest.raises(UserError, match="its categories are not the 80 of COCO"):
        data_program(["coco-masks", "--data-root", str(tree)])
    path.unlink()
    with pytest.raises(UserError, match=r"Unpack annotations_trainval2017\.zip"):
        data_program(["coco-masks", "--data-root", str(tree)])


@pytest.mark.parametrize("name", ["ade20k", "coco"])
def test_fetch_says_where_to_take_them(name: str) -> None:
    with pytest.raises(UserError, match="--data-root"):
        data_program(["fetch", name])
    assert dataclasses.is_dataclass(OPTIONS)
