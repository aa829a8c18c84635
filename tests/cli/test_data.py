import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ctt
from ctt import data, models
from ctt.checkpoint import save_network
from ctt.cli import predict
from ctt.data.check import check_quickly, handful
from ctt.data.options import DatasetOptions
from ctt.data.split import draw_split, make_split
from ctt.errors import UserError
from ctt.settings import Settings
from ctt.train.plan import Plan
from tests.cli.conftest import Call
from tests.data import trees


@pytest.fixture
def call(ctt_data: Call) -> Call:
    return ctt_data


def test_a_whole_data_set_passes(tmp_path: Path, call: Call) -> None:
    trees.write_folder(tmp_path)
    code, out, err = call("check", "--dataset", "folder", "--data-root", tmp_path)
    assert (code, err) == (0, "")
    assert "6 images with masks for training, 4 without, 2 for evaluation." in out
    assert re.search(r"red thing +│ +[456] │", out)
    assert "Nothing is wrong." in out


def test_all_that_is_wrong_is_named(tmp_path: Path, call: Call) -> None:
    folder = trees.write_voc(tmp_path)
    images, masks = folder / "JPEGImages", folder / "SegmentationClassAug"
    dataset = data.open_dataset("voc", tmp_path, DatasetOptions())
    truncated, size, label, colours, missing = dataset.train_ids()[:5]
    path = images / f"{truncated}.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    _, values = trees.picture((40, 50), (1,), 0)
    trees.save_mask(masks / f"{size}.png", values[1:])
    shutil.copy(images / f"{colours}.jpg", masks / f"{colours}.png")
    (images / f"{missing}.jpg").unlink()
    values[0, 0], values[1, 0] = 37, 41
    trees.save_mask(masks / f"{label}.png", values)
    code, out, err = call("check", "--dataset", "voc", "--data-root", tmp_path)
    assert code == 2
    assert "5 faults found." in err
    for name, text in (
        (images / f"{truncated}.jpg", "cannot be read as an image"),
        (masks / f"{size}.png", "the mask has 50x39 pixels"),
        (masks / f"{label}.png", "holds numbers that are no class: 37, 41"),
        (masks / f"{colours}.png", "the mask is stored as JPEG, which changes"),
        (images / f"{missing}.jpg", "there is no such"),
    ):
        assert any(str(name) in line and text in line for line in out.splitlines()), text
    code, out, err = call("check", "--dataset", "voc", "--data-root", tmp_path, "--show", 2)
    assert "5 faults found, 3 of them not shown; --show 0 names every one." in err
    assert sum(line.startswith(f"{folder}/") for line in out.splitlines()) == 2


def test_faults_of_lists_are_named_by_line(tmp_path: Path, call: Call) -> None:
    trees.write_voc(tmp_path)
    labeled, unlabeled = tmp_path / "labeled.txt", tmp_path / "unlabeled.txt"
    labeled.write_bytes(b"2007_000032\r\nnobody\r\n2007_000032\r\n")
    unlabeled.write_text("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png")
    options = ("--split-labeled", labeled, "--split-unlabeled", unlabeled)
    code, out, err = call("check", "--dataset", "voc", "--data-root", tmp_path, *options)
    assert (code, "2 faults found" in err) == (2, True)
    assert f"{labeled}, line 2: nobody is no training image" in out
    assert f"{labeled}, line 3: 2007_000032 stands in the list more than once (line 1)" in out
    assert "such as 2007_000032: they are labelled ones." in out
    labeled.write_bytes(b"2007_000032\r\n")
    options = ("--split-labeled", labeled)
    code, out, err = call("check", "--dataset", "voc", "--data-root", tmp_path, *options)
    assert (code, err) == (0, "")
    assert "1 images with masks for training, 7 without, 2 for evaluation" in out
    options = ("--split-unlabeled", labeled)
    code, _, err = call("check", "--dataset", "voc", "--data-root", tmp_path, *options)
    assert (code, "needs --split-labeled" in err) == (2, True)


@pytest.mark.parametrize(
    ("content", "text"), [(b"", "is empty"), (b"\x80\x04K\x01.", "Pickles can run any program")]
)
def test_lists_that_are_none(tmp_path: Path, call: Call, content: bytes, text: str) -> None:
    trees.write_voc(tmp_path)
    (tmp_path / "list").write_bytes(content)
    options = ("--split-labeled", tmp_path / "list")
    code, _, err = call("check", "--dataset", "voc", "--data-root", tmp_path, *options)
    assert (code, text in err) == (2, True)


@pytest.mark.parametrize("form", ["names", "paths"])
@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "folder"])
def test_written_lists_are_the_split_of_the_same_seed(
    tmp_path: Path, call: Call, dataset: str, form: str
) -> None:
    {"voc": trees.write_voc, "cityscapes": trees.write_cityscapes, "folder": trees.write_folder}[
        dataset
    ](tmp_path / "data")
    out = tmp_path / "lists"
    base = ("split", "--dataset", dataset, "--data-root", tmp_path / "data", "--ratio", "1/3")
    code, shown, _ = call(*base, "--seed", 5, "--out", out, "--form", form)
    assert code == 0
    images = data.open_dataset(dataset, tmp_path / "data", DatasetOptions())
    drawn = make_split(images, "1/3", 5, None, None)
    assert make_split(images, "1", 0, out / "labeled.txt", out / "unlabeled.txt") == drawn
    assert f"{len(drawn[0])} labelled and {len(drawn[1])} unlabelled" in shown
    if form == "paths":
        for line in (out / "labeled.txt").read_text("utf-8").splitlines():
            parts = line.split("\t")  # names in these trees hold spaces
            assert len(parts) == 2
            for path in parts:
                folder = "data/VOCdevkit/VOC2012" if dataset == "voc" else "data"
                assert (tmp_path / folder / path).is_file()
    before = (out / "labeled.txt").read_bytes()
    code, _, err = call(*base, "--out", out)
    assert (code, "is there already" in err) == (2, True)
    assert (out / "labeled.txt").read_bytes() == before


def test_unlabelled_images_are_listed_without_a_mask(tmp_path: Path, call: Call) -> None:
    """Whatever file has the name that a mask of theirs would have."""
    root = trees.write_folder(tmp_path / "data", unlabeled=0)
    for name in ("a.png", "images/a.png", "masks/a.png", "photo 0.png"):
        trees.save_image(root / "unlabeled" / name, np.zeros((4, 4, 3), np.uint8))
    out = tmp_path / "lists"
    options = ("--dataset", "folder", "--data-root", root, "--ratio", "1/1", "--form", "paths")
    assert call("split", *options, "--out", out)[0] == 0
    lines = (out / "unlabeled.txt").read_text("utf-8").splitlines()
    assert [line.startswith("unlabeled/") for line in lines] == [True] * 4
    assert [line.endswith(".png\tNone") for line in lines] == [True] * 4
    dataset = data.open_dataset("folder", root, DatasetOptions())
    assert len(make_split(dataset, "1", 0, out / "labeled.txt", out / "unlabeled.txt")[1]) == 4
    (root / "unlabeled" / "a.png").rename(root / "unlabeled" / "a\tb.png")
    code, _, err = call("split", *options, "--out", tmp_path / "new")
    assert (code, "holds a tab" in err, (tmp_path / "new").exists()) == (2, True, False)


@pytest.mark.parametrize(
    "text", ["{{classes: [{}]}}", '{{"classes": [{}]}}\n', "classes: [{}]\n...\n"]
)
def test_statistics_are_only_written_where_they_are_read(
    tmp_path: Path, call: Call, text: str
) -> None:
    root = trees.write_folder(tmp_path, description=text.format(", ".join(trees.CLASSES)))
    before = (root / "dataset.yaml").read_bytes()
    code, _, err = call("stats", "--data-root", root, "--write")
    assert (code, (root / "dataset.yaml").read_bytes()) == (2, before)
    values = err[err.index("mean: [") :].strip()
    (root / "dataset.yaml").write_text(f"{{classes: [{', '.join(trees.CLASSES)}], {values}}}")
    assert "says all of it already" in call("stats", "--data-root", root, "--write")[1]


def test_options_are_looked_at(tmp_path: Path, call: Call) -> None:
    trees.write_folder(tmp_path)
    base = ("--dataset", "folder", "--data-root", tmp_path)
    assert "--data.holdout must be between 0 and 1" in call("check", *base, "--data.holdout", 2)[2]
    assert "--ratio 1/0 is no ratio" in call("split", *base, "--ratio", "1/0")[2]
    for command in (("check", *base), ("coco-masks",), ("convert", "boxes.json")):
        code, _, err = call(*command, "--threads", -1)
        assert (code, "--threads must be at least 0, got -1" in err) == (2, True)
    code, _, err = call("fetch", "cityscapes")
    assert (code, "gtFine_trainvaltest.zip" in err) == (2, True)
    code, _, err = call("fetch", "weights", "--backbone", "resnet1000")
    assert (code, "none are published for resnet1000" in err) == (2, True)


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; from ctt.cli.data import main\n"
        "try: main()\n"
        "finally: print('torch loaded' if 'torch' in sys.modules else 'light')"
    )
    command = [sys.executable, "-c", code, "check", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--data.voc-set" in done.stdout
    assert done.stdout.rstrip().endswith("light")


def test_training_ends_with_the_name_of_a_broken_file(tmp_path: Path) -> None:
    """Where a loader process meets it while others are at work."""
    root = trees.write_folder(tmp_path / "data", unlabeled=20)
    broken = root / "unlabeled" / "photo 18.JPG"
    broken.write_bytes(broken.read_bytes()[:-200])
    command = (
        "--dataset folder --recipe digits --ratio 1/1 --model.width 4 --model.features 8 "
        "--data.crop 16 16 --data.batch-size 4 --data.workers 2 --train.threads 1 "
        "--train.iterations 99 --train.eval-every 99"
    )
    code = "from ctt.cli.train import main; main()"
    places = ["--data-root", str(root), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), *places],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    assert f"{broken} cannot be read as an image" in re.sub(r"\s+", " ", done.stderr)
    assert "Traceback" not in done.stderr


def write_two_classes(root: Path, value: int, description: str = "") -> Path:
    """Masks that hold 0 and `value`."""
    trees.write_folder(root, description=f"classes: [ground, thing]\n{description}")
    for path in root.rglob("*.png"):
        mask = np.zeros((40, 48), np.uint8)
        mask[:9] = value
        trees.save_mask(path, mask, "L")
    return root


def test_a_class_that_is_taken_for_the_ignored_pixels_is_refused(
    tmp_path: Path, call: Call
) -> None:
    root = write_two_classes(tmp_path / "a", 255)
    code, out, err = call("check", "--dataset", "folder", "--data-root", root)
    assert (code, "1 fault found" in err) == (2, True)
    assert "The masks hold 0 and 255 only" in out
    assert "`id_map: {0: 0, 255: 1}`" in out
    dataset = data.open_dataset("folder", root, DatasetOptions())
    with pytest.raises(UserError, match="no pixel is left of class 1, thing"):
        check_quickly(dataset, dataset.train_ids(), [])
    mapped = write_two_classes(tmp_path / "b", 255, "id_map: {0: 0, 255: 1}\n")
    code, out, _ = call("check", "--dataset", "folder", "--data-root", mapped)
    assert (code, "Nothing is wrong." in out) == (0, True)


def test_a_class_without_a_pixel_is_told(tmp_path: Path, call: Call) -> None:
    root = write_two_classes(tmp_path, 255, "ignore_index: 255\n")
    code, out, _ = call("check", "--dataset", "folder", "--data-root", root)
    assert (code, "Nothing is wrong." in out) == (0, False)
    assert "Warning: no mask shows thing, so no network can learn it." in out


def test_twelve_bits_in_sixteen_are_told_and_can_be_stated(tmp_path: Path, call: Call) -> None:
    description = "classes: [ground, thing]\nignore_index: 255\n"
    root = write_two_classes(tmp_path, 1, "ignore_index: 255\n")
    grey = np.linspace(0, 4000, 40 * 48).reshape(40, 48).astype(np.uint16)
    for i, path in enumerate(sorted(root.rglob("*.[jJ][pP][gG]"))):
        grey[0, 0] = i
        Image.fromarray(grey).save(path.with_suffix(".png"))
        path.unlink()
    _, out, _ = call("check", "--dataset", "folder", "--data-root", root)
    assert "Warning: the images of 16 bits hold values up to 4000 only" in out
    assert "such as `white: 4095`" in out
    dataset = data.open_dataset("folder", root, DatasetOptions())
    check_quickly(dataset, dataset.train_ids(), [])
    assert dataset.notes[-1].startswith("Warning: the images of 16 bits")
    (root / "dataset.yaml").write_text(f"{description}white: 4095\n", "utf-8")
    _, out, _ = call("check", "--dataset", "folder", "--data-root", root)
    assert "Nothing is wrong." in out
    stated = data.open_dataset("folder", root, DatasetOptions())
    image = stated.image(stated.train_ids()[0])
    assert image.max() == round(4000 / 4095 * 255)
    network = models.build("small", len(stated.info.classes), width=4, features=8)
    save_network(tmp_path / "w.safetensors", network, stated.info, "")
    trained = ctt.load(tmp_path / "w.safetensors")
    file = root / stated.train_ids()[0]
    assert torch.equal(trained.predict(file), trained.predict(image))
    assert torch.equal(trained.predict(Image.open(file)), trained.predict(image))
    failures: list[str] = []
    job = predict.Job(file, tmp_path / "out")
    found = list(predict.read_all([job], stated.info, 0, failures))
    assert torch.equal(found[0][1], image)


def test_the_same_file_in_two_parts_is_told(tmp_path: Path, call: Call) -> None:
    root = trees.write_folder(tmp_path)
    copied, linked = root / "val" / "images" / "photo 0.jpg", root / "unlabeled" / "link.jpg"
    shutil.copy(root / "images" / "photo 0.jpg", copied)
    linked.symlink_to(root / "val" / "images" / "größer" / "photo 1.jpg")
    _, out, _ = call("check", "--dataset", "folder", "--data-root", root)
    assert "Warning: 1 of the images to evaluate on are also images with masks, such as " in out
    assert f"{root / 'images' / 'photo 0.jpg'} and {copied}" in out
    assert "Warning: 1 of the images to evaluate on are also images without masks" in out
    dataset = data.open_dataset("folder", root, DatasetOptions())
    check_quickly(dataset, *make_split(dataset, "1/1", 0, None, None))
    assert [str(linked) in note for note in dataset.notes] == [True]  # copies would take too long


def test_what_is_unusual_in_images_is_told(tmp_path: Path, call: Call) -> None:
    root = write_two_classes(tmp_path, 1, "ignore_index: 255\n")
    turned, pages, clear, bands = sorted((root / "images").rglob("*.jpg"))[:4]
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(turned) as picture:
        picture.resize((48, 48)).save(turned, exif=exif)
        mask = root / "masks" / turned.relative_to(root / "images").with_suffix(".png")
        trees.save_mask(mask, np.eye(48, dtype=np.uint8))
        picture = picture.convert("RGB")
    frames = [picture, Image.new("RGB", picture.size, "red")]
    frames[0].save(pages.with_suffix(".tif"), save_all=True, append_images=frames[1:])
    picture.putalpha(7)
    picture.save(clear.with_suffix(".png"))
    picture.save(bands.with_suffix(".tif"))
    for path in (pages, clear, bands):
        path.unlink()
    expected = (
        f"are turned as the camera's note in the file (EXIF) says, such as {turned}",
        f"are files of several pages, such as {pages.with_suffix('.tif')}: only the first page",
        f"have transparent pixels, such as {clear.with_suffix('.png')}: they are shown on white",
        f"have a fourth channel, such as {bands.with_suffix('.tif')}: only the first three",
    )
    code, out, _ = call("check", "--dataset", "folder", "--data-root", root)
    assert code == 0
    assert all(f"1 of the 12 images looked at {text}" in out for text in expected)
    assert "Nothing else is wrong." in out
    dataset = data.open_dataset("folder", root, DatasetOptions())
    check_quickly(dataset, dataset.train_ids()[:5], [])
    assert sum(text in note for note in dataset.notes for text in expected) == 4


def test_a_mask_of_an_image_that_is_turned(tmp_path: Path, call: Call) -> None:
    root = trees.write_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "images" / "photo 0.jpg"
    with Image.open(path) as picture:
        picture.save(path, exif=exif)
    code, out, _ = call("check", "--dataset", "folder", "--data-root", root)
    assert code == 2
    assert (
        "has 40x48. Both must be of one size. The camera's note in the image (EXIF) turns it" in out
    )


def test_the_held_out_part_shows_every_class_or_it_is_told(tmp_path: Path, call: Call) -> None:
    root = trees.write_folder(tmp_path, labeled=20, evaluation=0)
    rare = ["images/größer/photo 1.jpg", "images/photo 2.jpg"]
    options = DatasetOptions()
    plain = draw_split(data.open_dataset("folder", root, options).train_ids(), 2, "holdout")

    def draw(names: list[str]) -> None:
        for i in range(20):
            name = f"photo {i}" if i % 2 == 0 else f"größer/photo {i}"
            label = np.zeros((40, 48), np.uint8)
            label[:9], label[9:12] = 1, 2
            label[20:30] = 3 * (f"images/{name}.jpg" in names)
            trees.save_mask(root / "masks" / f"{name}.png", label)

    assert not set(rare) & set(plain[0])
    draw(rare)
    dataset = data.open_dataset("folder", root, options)
    assert (
        len(set(rare) & set(dataset.eval_ids())) == len(set(rare) & set(dataset.train_ids())) == 1
    )
    draw(rare[:1])
    code, out, _ = call("check", "--dataset", "folder", "--data-root", root)
    text = (
        "none of the 2 images to evaluate on shows blue thing, so the scores say nothing about it"
    )
    more = "Evaluate on more images (--data.holdout"
    assert (code, f"Warning: {text}. {more}" in out) == (0, True)
    trees.write_voc(tmp_path / "voc")  # of whose own part nothing changes what is evaluated on
    for split in ("val", "tune"):
        place = ("--data-root", tmp_path / "voc", "--data.eval-split", split)
        _, out, _ = call("check", "--dataset", "voc", *place)
        assert "images to evaluate on shows" in out
        assert (more in out) == (split == "tune")
    there = trees.write_folder(tmp_path / "other", labeled=4, evaluation=2)
    for mask in (there / "val/masks").rglob("*.png"):
        trees.save_mask(mask, np.zeros((40, 48), np.uint8))
    _, out, _ = call("check", "--dataset", "folder", "--data-root", there)
    assert "Evaluate on more images (in val/)." in out
    settings = Settings(dataset="folder", data_root=root, ratio="5", method="supervised")
    plan = Plan.of(settings, None)
    assert any(text in warning for warning in plan.warnings())
    assert "`ratio` 5 takes 5 of the 18 training images with masks" in plan.dataset.notes[-1]


def test_equal_faults_are_told_once(tmp_path: Path, call: Call) -> None:
    root = trees.write_folder(tmp_path / "set", labeled=30, evaluation=1)
    masks = sorted((root / "masks").rglob("*.png"))
    for i, path in enumerate(masks[:20]):
        label = np.full((40, 48), 1, np.uint8)
        label[0, : 1 + i % 3] = 40 + np.arange(1 + i % 3) * i
        trees.save_mask(path, label)
    for path in masks[20:22]:
        path.unlink()
    base = ("check", "--dataset", "folder", "--data-root", root)
    code, out, err = call(*base)
    assert (code, "22 faults found of 2 kinds; --show 0 names every one." in err) == (2, True)
    of_values, of_missing = (line for line in out.splitlines() if line.startswith(f"{root}"))
    assert of_values.startswith(f"{masks[0]}: the mask holds numbers that are no class: 40. Exp")
    places = ", ".join(map(str, masks[1:4]))
    assert of_values.endswith(f" The same holds for 19 more: {places}, ...")
    assert of_missing.startswith(f"{masks[20]}: there is no such file.")
    assert of_missing.endswith(f" The same holds for 1 more: {masks[21]}.")
    _, out, err = call(*base, "--show", 0)
    assert sum(line.startswith(f"{root}/") for line in out.splitlines()) == 22
    assert "22 faults found." in err
    wrong = tmp_path / "list.txt"
    wrong.write_text("nobody\nelse\nimages/photo 0.jpg\nimages/photo 0.jpg\n")
    _, out, err = call(*base, "--split-labeled", wrong)
    assert f"{wrong}, line 1: nobody is no training image" in out
    assert " The same holds for 1 more: line 2." in out


def test_a_handful_is_spread_over_all() -> None:
    """The first ones alone may be frames of one film."""
    assert handful(list("abcdefghij"), 4) == list("acfh")
    assert handful(list("abcdefgh"), 5) == list("abdeg")
    assert handful(list("abc"), 5) == list("abc")
    assert handful([]) == []
