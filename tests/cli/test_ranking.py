"""ctt-predict --rank."""

import csv
import json
import os
import runpy
import shutil
import sys
import zipfile
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctt.cli import data, predict, ranking, train
from ctt.cli.ranking import Entry, unlabeled
from ctt.cli.ranking_checks import check_drawn, check_places
from ctt.data import open_dataset
from ctt.data.options import DatasetOptions
from ctt.errors import LoaderError, UserError
from ctt.inference.annotations import without_specks
from ctt.inference.rank import Committee, Rating
from ctt.settings import Settings
from tests.data.trees import picture, save_image, save_mask, write_folder, write_voc

TINY = (
    "--dataset folder --recipe digits --ratio 1/1 --model.width 4 --model.features 8 "
    "--data.crop 16 16 --data.batch-size 2 --train.iterations 1 --train.threads 1 "
    "--train.no-tensorboard --train.measured-images 0"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rank")
    tree = write_folder(root / "data", labeled=3, unlabeled=4, evaluation=1, size=(20, 24))
    assert train._main([*TINY.split(), "--data-root", str(tree), "--out", str(root / "run")]) == 0
    return root / "run"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_unlabelled_images_of_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "next"
    forms = ["--annotations", "coco", "labelme", "cvat"]
    arguments = [str(run), "--rank", "--out", str(out), "--first", "3", "--workers", "0"]
    assert predict._main([*arguments, *forms]) == 0
    said = capsys.readouterr().out
    assert "4 images are ordered as teacher_1, teacher_2 see them" in said
    found = rows(out / "rank.csv")
    assert [row["place"] for row in found] == ["1", "2", "3", "4"]
    names = [f"unlabeled/{name}" for name in ("größer/photo 1.JPG", "größer/photo 3.JPG")]
    assert {row["image"] for row in found} > set(names)
    assert all(0 <= float(row["disagreement"]) <= float(row["entropy"]) <= 1 for row in found)
    assert all(float(row["distance"]) > 0 for row in found)
    first = [row["image"].removeprefix("unlabeled/") for row in found[:3]]
    copies = {str(p.relative_to(out / "images")) for p in (out / "images").rglob("*.JPG")}
    assert copies == set(first)
    content = json.loads((out / "annotations.json").read_text("utf-8"))
    assert [image["file_name"] for image in content["images"]] == first
    assert len(list((out / "images").rglob("*.json"))) == 3
    assert (out / "cvat.zip").is_file()
    assert Image.open(out / "rank.png").width > 300
    with pytest.raises(UserError, match=r"rank\.csv is there already"):
        predict._main(arguments)


def test_masks_of_the_first_images_come_back(run: Path, tmp_path: Path) -> None:
    """Each form becomes labelled images of the folder they come from, with its classes' numbers."""
    pytest.importorskip("pycocotools")
    out, forms = tmp_path / "next", ("coco", "labelme", "cvat")
    arguments = [str(run), "--rank", "--out", str(out), "--workers", "0"]
    assert predict._main([*arguments, "--first", "2", "--annotations", *forms]) == 0
    zipfile.ZipFile(out / "cvat.zip").extractall(out / "cvat")
    first = [row["image"].removeprefix("unlabeled/") for row in rows(out / "rank.csv")[:2]]
    found = {}
    for form, dataset in (("coco", "annotations.json"), ("labelme", "images"), ("cvat", "cvat")):
        mine = tmp_path / form
        shutil.copytree(run.parent / "data" / "unlabeled", mine / "unlabeled")
        shutil.copy(run.parent / "data" / "dataset.yaml", mine)
        command = [
            "convert",
            str(out / dataset),
            "--to",
            str(mine),
            "--images",
            str(out / "images"),
        ]
        assert data._main(command) == 0
        left = mine / "unlabeled"
        kept = {path.relative_to(left).as_posix() for path in left.rglob("*.JPG")}
        assert kept.isdisjoint(first)
        found[form] = [np.array(Image.open(p)) for p in sorted(mine.glob("masks/**/*.png"))]
    assert len(found["coco"]) == 2
    for coco, labelme, whole in zip(*found.values(), strict=True):
        assert np.array_equal(coco, labelme)
        assert np.array_equal(coco, without_specks(whole))


def test_images_that_are_given_and_one_network(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "photos"
    shutil.copytree(run.parent / "data" / "unlabeled", images)
    (images / "broken.jpg").write_text("no image")
    weights = str(run / "best.safetensors")
    arguments = [weights, str(images), "--recursive", "--rank", "--workers", "0"]
    assert predict._main([*arguments, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert "One network disagrees with nobody" in shown.out
    assert "No labelled image of the run was found" in shown.out
    assert "broken.jpg" in shown.err
    found = rows(tmp_path / "out" / "rank.csv")
    assert len(found) == 4
    assert found[0]["distance"] == ""  # nothing stands before it


def test_where_no_image_can_be_read_the_order_before_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("no image")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rank.csv").write_text("place,image,copy\n")
    options = ["--rank", "--out", str(tmp_path / "out"), "--workers", "0", "--overwrite"]
    with pytest.raises(UserError, match=r"No image can be ranked\. .*broken\.jpg cannot be read"):
        predict._main([str(run), str(tmp_path / "broken.jpg"), *options])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rank.csv"]
    assert (tmp_path / "out" / "rank.csv").read_text() == "place,image,copy\n"


def test_another_order_leaves_nothing_of_the_one_before(run: Path, tmp_path: Path) -> None:
    """But what somebody has drawn on a copy is kept."""
    images, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(run.parent / "data" / "unlabeled" / "größer", images)
    arguments = [str(run), str(images), "--rank", "--out", str(out), "--workers", "0"]
    assert predict._main([*arguments, "--annotations", "labelme", "cvat"]) == 0
    before = sorted(path.name for path in (out / "images").iterdir())
    assert before == ["photo 1.JPG", "photo 1.json", "photo 3.JPG", "photo 3.json"]
    mine = out / "images" / "photo 3.json"
    mine.write_text(mine.read_text().replace('"version": "5.0.0"', '"version": "5.5.0"'))
    for path in images.iterdir():
        path.rename(images / f"new {path.name}")
    arguments += ["--overwrite", "--first", "1"]
    assert predict._main(arguments) == 0
    (first, second) = rows(out / "rank.csv")
    assert second["copy"] == ""
    kept = [first["copy"], "photo 3.JPG", "photo 3.json"]
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(kept)
    assert not (out / "cvat.zip").exists()


@pytest.mark.parametrize("table", [True, False])
def test_masks_that_were_changed_in_labelme_stay_on_images_that_come_first_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], table: bool
) -> None:
    images, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(run.parent / "data" / "unlabeled" / "größer", images)
    arguments = [str(run), str(images), "--rank", "--out", str(out), "--workers", "0"]
    arguments += ["--annotations", "labelme"]
    assert predict._main(arguments) == 0
    mine, other = out / "images" / "photo 3.json", out / "images" / "photo 1.json"
    drawn = mine.read_text().replace('"version": "5.0.0"', '"version": "5.5.0"')
    mine.write_text(drawn)
    other.write_text(other.read_text().replace('"flags": {}', '"flags": {"old": true}', 1))
    if not table:
        (out / "rank.csv").unlink()
    capsys.readouterr()
    assert predict._main([*arguments, "--overwrite"]) == 0
    assert mine.read_text() == drawn
    assert "old" not in other.read_text()
    assert "Files changed in LabelMe: 1, such as" in capsys.readouterr().out
    Image.new("RGB", (24, 20)).save(images / "photo 3.JPG")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"photo 3\.JPG.* is not the image that it was drawn on"):
        predict._main([*arguments, "--overwrite"])
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_copy_of_an_image_in_memory_is_known_again(tmp_path: Path) -> None:
    dataset = Settings(dataset="digits").open_dataset()
    name, other = dataset.train_ids()[:2]
    entry = Entry(name, PurePosixPath("1.png"), None)
    copied = tmp_path / "images" / "1.png"
    ranking.copy(entry, dataset.image(name), copied)
    copied.with_suffix(".json").write_text("{}")
    check_drawn(tmp_path, [entry], dataset)
    with pytest.raises(UserError, match="is not the image"):
        check_drawn(tmp_path, [Entry(other, entry.place, None)], dataset)
    copied.unlink()
    with pytest.raises(UserError, match=r"1\.png, on which it was drawn, is gone"):
        check_drawn(tmp_path, [entry], dataset)


def test_an_image_too_large_for_the_memory_is_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Committee.features

    def features(self: Committee, image: torch.Tensor) -> torch.Tensor:
        if image.shape[-1] > 24:
            raise UserError("There is not enough memory for images of this size.")
        return whole(self, image)

    monkeypatch.setattr(Committee, "features", features)
    images, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(run.parent / "data" / "unlabeled" / "größer", images)
    Image.new("RGB", (30, 20)).save(images / "large.png")
    arguments = [str(run), str(images), "--rank", "--out", str(out), "--workers", "0"]
    assert predict._main(arguments) == 2
    assert "large.png: There is not enough memory" in " ".join(capsys.readouterr().err.split())
    assert [Path(row["image"]).name for row in rows(out / "rank.csv")] != []
    assert len(rows(out / "rank.csv")) == 2


@pytest.mark.parametrize("seen", ["rating", "writing"])
def test_the_order_is_kept_when_something_ends_later(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    """Rating a folder may take hours."""
    out = tmp_path / "out"
    arguments = [str(run), "--rank", "--out", str(out), "--workers", "0"]
    if seen == "writing":
        monkeypatch.setattr("ctt.cli.ranking.copy", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict._main(arguments)
        assert len(rows(out / "rank.csv")) == 4
        return
    whole = ranking.images_of

    def images_of(read: Any, keys: Any, workers: int) -> Iterator[Any]:
        yield from whole(read, keys[:2], workers)
        raise LoaderError("A process that reads images has ended.")

    monkeypatch.setattr(ranking, "features_of", lambda *_: [])
    monkeypatch.setattr(ranking, "images_of", images_of)
    assert predict._main(arguments) == 2
    assert len(rows(out / "rank.csv")) == 2


def test_the_same_command_goes_on_after_an_interruption(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out, whole = (tmp_path / name for name in ("photos", "out", "whole"))
    photos.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(noise).save(photos / f"{i}.png")
    arguments = [str(run), str(photos), "--rank", "--workers", "0", "--out"]
    assert predict._main([*arguments, str(whole)]) == 0
    rate = Committee.rate
    asked: list[Tensor] = []

    def stopped(committee: Committee, image: Tensor, after: int) -> Rating:
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append(image)
        return rate(committee, image)

    monkeypatch.setattr(Committee, "rate", partialmethod(stopped, after=3))
    with pytest.raises(KeyboardInterrupt):
        predict._main([*arguments, str(out)])
    assert "3 of 4 images are rated; the same command goes on" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["ratings.jsonl"]
    ratings = out / "ratings.jsonl"
    ratings.write_text(ratings.read_text()[:-9])  # cut short while it was written
    Image.new("RGB", (24, 20)).save(photos / "1.png")  # another image by now
    asked.clear()
    monkeypatch.setattr(Committee, "rate", partialmethod(stopped, after=99))
    assert predict._main([*arguments, str(out)]) == 0
    assert "1 of 4 images were rated before" in capsys.readouterr().out
    assert len(asked) == 3
    assert not ratings.exists()
    assert predict._main([*arguments, str(whole), "--overwrite"]) == 0
    assert (out / "rank.csv").read_bytes() == (whole / "rank.csv").read_bytes()


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are text there")
def test_names_that_are_no_utf_8(run: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "photos", tmp_path / "out"
    images.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (24, 20)).save(images / name)
    arguments = [str(run), str(images), "--rank", "--out", str(out), "--workers", "0"]
    with pytest.raises(UserError, match="is not in UTF-8"):
        predict._main([*arguments, "--annotations", "cvat"])
    assert predict._main([*arguments, "--annotations", "coco", "labelme"]) == 0
    assert (out / "images" / name).is_file()


def test_a_run_whose_folder_has_changed_since_is_ranked_by_its_own_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without val/ would hold out images that the run was trained with."""
    root, out = tmp_path / "data", str(tmp_path / "run")
    write_folder(root, labeled=10, unlabeled=4, evaluation=0, size=(20, 24))
    assert train._main([*TINY.split(), "--data-root", str(root), "--out", out]) == 0
    learned = set((tmp_path / "run" / "split" / "labeled.txt").read_text("utf-8").splitlines())
    for i in range(200):
        image, label = picture((20, 24), (1, 2), i)
        save_image(root / "images" / f"later {i}.jpg", image)
        save_mask(root / "masks" / f"later {i}.png", label)
        if learned & {*open_dataset("folder", root, DatasetOptions()).eval_ids()}:
            break
    shutil.move(root / "unlabeled" / "photo 2.JPG", root / "images" / "labelled now.JPG")
    save_mask(root / "masks" / "labelled now.png", label)
    (root / "images" / "photo 0.jpg").unlink(missing_ok=True)
    capsys.readouterr()
    for images in ([], [str(root / "unlabeled"), "--recursive"]):
        more = ["--workers", "0", "--out", str(tmp_path / str(len(images)))]
        assert predict._main([out, *images, "--rank", *more]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "No labelled image of the run was found" not in said
        assert ("1 of the 4 images in" in said) == (images == [])
        assert ("images/photo 0.jpg" in learned) == ("labeled.txt are no longer there" in said)
        assert len(rows(tmp_path / str(len(images)) / "rank.csv")) == 3
    shutil.move(root, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"not at hand\. `data_root` .*: there is no such folder"):
        predict._main([out, "--rank", "--out", str(tmp_path / "none")])


def test_what_cannot_be_ranked(run: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    for more, message in (
        (["--first", "0"], "--first 0"),
        (["--geotiff"], "Leave one of them out"),
        (["--no-overlay"], "--no-overlay has no effect beside --rank: it writes no overlays"),
        (["--skip-existing"], "--skip-existing has no effect"),
        (["--network", "student_1"], "--network has no effect"),
        (["--recursive"], "--recursive has no effect"),
        (["--eval.protocol", "center-crop"], "a mask is made of the whole image"),
        (["--eval.stride", "0.5"], "`eval.stride` changes nothing with `eval.protocol` whole"),
    ):
        with pytest.raises(UserError, match=message):
            predict._main([str(run), "--rank", *out, *more])
    with pytest.raises(UserError, match="dataset of the run is not at hand"):
        predict._main([str(run / "best.safetensors"), "--rank", *out])
    for option in ("--first", "--tile"):
        with pytest.raises(UserError, match=f"{option} has no effect without"):
            predict._main([str(run), str(run.parent), *out, option, "3"])


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        ("photos", [], "images is there already"),
        ("mine/images", [], "images is there already"),
        ("mine/images", ["--overwrite"], "1.png is one of the images"),
        (None, ["--overwrite"], "images/photo 0.jpg is one of the images"),
    ],
)
def test_images_of_the_user_are_never_written_over(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    images: str | None,
    more: list[str],
    message: str,
) -> None:
    """`--out` is a training folder; without images on the command line that of the run."""
    mine = tmp_path / "mine"
    given = [str(tmp_path / images)] if images else []
    weights = run
    for folder in (tmp_path / "photos", mine / "images"):
        folder.mkdir(parents=True)
        Image.new("RGB", (24, 20), (len(folder.name), 9, 9)).save(folder / "1.png")
    if images is None:  # an unlabelled image has the name of a labelled one
        weights = tmp_path / "run"
        shutil.copytree(run, weights)
        shutil.copytree(run.parent / "data", mine, dirs_exist_ok=True)
        (mine / "images" / "1.png").unlink()
        (mine / "unlabeled" / "photo 0.JPG").rename(mine / "unlabeled" / "photo 0.jpg")
        config = weights / "config.yaml"
        config.write_text(config.read_text("utf-8").replace(str(run.parent / "data"), str(mine)))
        names = weights / "split" / "unlabeled.txt"
        names.write_text(names.read_text("utf-8").replace("/photo 0.JPG", "/photo 0.jpg"), "utf-8")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    arguments = [str(weights), *given, "--rank", "--out", str(mine), "--workers", "0", *more]
    monkeypatch.setattr("sys.argv", ["ctt-predict", *arguments])
    with pytest.raises(SystemExit) as ended:
        predict.main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert before == {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}


def test_images_with_one_stem_are_refused(run: Path, tmp_path: Path) -> None:
    """LabelMe's files and CVAT's masks of both would have one name."""
    images, out = tmp_path / "photos", tmp_path / "out"
    images.mkdir()
    for name in ("x.jpg", "x.png"):
        Image.new("RGB", (24, 20)).save(images / name)
    arguments = [str(run), str(images), "--rank", "--out", str(out), "--workers", "0"]
    with pytest.raises(UserError, match=r"x\.jpg and .*x\.png: the masks of both would be named x"):
        predict._main([*arguments, "--annotations", "labelme", "cvat"])
    assert not out.exists()
    names = ("images/a.jpg", "unlabeled/images/a.jpg")
    entries = [
        Entry(name, PurePosixPath(name.removeprefix("unlabeled/")), Path(name)) for name in names
    ]
    with pytest.raises(UserError, match=r"images/a\.jpg and unlabeled/images/a\.jpg"):
        check_places(entries)


def test_copies_have_the_endings_of_their_files(tmp_path: Path) -> None:
    """The names of some datasets have none."""
    root = write_voc(tmp_path / "data", classic=1, augmented=1, evaluation=1, size=(20, 24))
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "unlabeled.txt").write_text("2007_000039\n")
    dataset = Settings(dataset="voc", data_root=root).open_dataset()
    (entry,) = unlabeled(tmp_path, dataset)
    assert (entry.name, entry.place.name) == ("2007_000039", "2007_000039.jpg")


def test_the_loop_of_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "active_learning.py"
    out = tmp_path / "active"
    arguments = (
        f"--seeds 5 --rounds 1 --labels 4 --pool 12 --evaluated 3 --iterations 1 --threads 1 "
        f"--out {out} --set model.width=4 model.features=8 data.batch_size=2"
    )
    monkeypatch.setattr("sys.argv", [str(path), *arguments.split()])
    runpy.run_path(str(path), run_name="__main__")
    found = [(row["choice"], row["labels"]) for row in rows(out / "scores.csv")]
    assert found == [("first", "4"), ("rank", "8"), ("random", "8")]
    first, *later = (
        {*(out / f"5-{name}.txt").read_text().split()} for name in ("first", "rank-1", "random-1")
    )
    assert all(first < names and len(names) == 8 for names in later)
