"""ctt-data convert: every form of export becomes a folder that can be trained on."""

import shlex
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctt.cli import predict, train
from ctt.data.voc import bit_palette
from tests.cli.conftest import Call, mask_of
from tests.data import exports

pytest.importorskip("pycocotools")
TRAIN = (
    "--dataset folder --recipe digits --ratio 1/1 --model.width 4 --model.features 8 "
    "--data.crop 24 24 --data.batch-size 2 --train.iterations 2 --train.threads 1 "
    "--train.no-tensorboard"
)


@pytest.mark.parametrize("form", exports.FORMS)
def test_every_form_is_converted_trained_on_and_predicted(
    tmp_path: Path, call: Call, form: str
) -> None:
    source, mine = exports.FORMS[form](tmp_path / "export"), tmp_path / "mine"
    code, out, err = call(source, "--to", mine)
    assert (code, err) == (0, "")
    assert "4 images with masks, 2 without (unlabeled/)" in out
    assert "3 classes, from 0 on: background, cat, dog." in out
    for i in range(exports.ANNOTATED):
        assert np.array_equal(mask_of(mine, f"photo {i}"), exports.label())
    if form != "masks":
        assert "Overlaps: 256 pixels of 4 images lie in shapes of several classes" in out
    assert sorted(p.name for p in mine.iterdir()) == [
        "dataset.yaml",
        "images",
        "masks",
        "unlabeled",
    ]
    run = tmp_path / "run"
    command = [*shlex.split(TRAIN), "--data-root", str(mine), "--out", str(run)]
    assert train._main(command) == 0
    photos = str(mine / "unlabeled")
    assert predict._main([str(run), photos, "--recursive", "--out", str(tmp_path / "out")]) == 0
    assert len([*(tmp_path / "out").rglob("*.png")]) >= 2


def test_coloured_masks_need_no_conversion(tmp_path: Path) -> None:
    source, mine = exports.masks(tmp_path / "export"), tmp_path / "mine"
    mine.mkdir()
    shutil.copytree(source / "JPEGImages", mine / "images")
    shutil.copytree(source / "SegmentationClass", mine / "masks")
    (mine / "unlabeled").mkdir()
    for i in (4, 5):
        (mine / "images" / f"photo {i}.jpg").rename(mine / "unlabeled" / f"photo {i}.jpg")
    palette = [list(colour) for colour in exports.COLOURS.values()]
    (mine / "dataset.yaml").write_text(f"classes: [background, cat, dog]\npalette: {palette}\n")
    run = tmp_path / "run"
    assert train._main([*shlex.split(TRAIN), "--data-root", str(mine), "--out", str(run)]) == 0
    images = str(mine / "unlabeled")
    assert predict._main([str(run), images, "--out", str(tmp_path / "out")]) == 0


def test_nothing_is_overwritten_and_a_stopped_call_goes_on(tmp_path: Path, call: Call) -> None:
    source, mine = exports.coco(tmp_path / "export"), tmp_path / "mine"
    assert call(source, "--to", mine)[0] == 0
    kept, gone, half = (mine / "masks" / f"photo {i}.png" for i in range(3))
    kept.write_bytes(b"mine")
    gone.unlink()
    (mine / "images" / "photo 1.jpg").unlink()
    half.unlink()
    other = mine / "images" / "photo 3.jpg"
    other.write_bytes(b"mine")
    code, out, _ = call(source, "--to", mine)
    assert (code, "3 of the images were there already" in out) == (0, True)
    assert "Left out: 1 images, for another one of the same name is there already" in out
    assert kept.read_bytes() == other.read_bytes() == b"mine"
    assert np.array_equal(np.asarray(Image.open(gone)), exports.label())
    assert half.is_file()
    code, _, err = call(source, "--to", mine, "--classes", "background", "dog")
    assert (code, "is there already, with other classes" in err) == (2, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    code, _, err = call(source, "--to", tmp_path / "full")
    assert (code, "holds something already" in err) == (2, True)


def test_an_image_that_was_annotated_meanwhile_is_no_longer_unlabelled(
    tmp_path: Path, call: Call
) -> None:
    source, mine = exports.labelme(tmp_path / "export"), tmp_path / "mine"
    (source / "photo 3.json").rename(tmp_path / "later.json")
    assert "3 images with masks, 3 without" in call(source, "--to", mine)[1]
    (tmp_path / "later.json").rename(source / "photo 3.json")
    assert "4 images with masks, 2 without" in call(source, "--to", mine)[1]
    assert np.array_equal(mask_of(mine, "photo 3"), exports.label())
    names = sorted(path.name for path in (mine / "unlabeled").iterdir())
    assert names == ["photo 4.jpg", "photo 5.jpg"]
    assert (mine / "images" / "photo 3.jpg").is_file()


def test_images_are_added_to_a_folder_whose_classes_keep_their_numbers(
    tmp_path: Path, call: Call
) -> None:
    """The export numbers them otherwise, and has its images in one folder less."""
    source, mine = exports.coco(tmp_path / "export"), tmp_path / "mine"
    (mine / "masks").mkdir(parents=True)
    shutil.copytree(source / "images", mine / "unlabeled" / "zoo")
    (mine / "unlabeled" / "zoo" / "photo 0.jpg").rename(mine / "unlabeled" / "photo 0.jpg")
    (mine / "images").mkdir()
    (mine / "images" / "photo 1.PNG").write_bytes(b"mine")
    (mine / "masks" / "photo 1.png").write_bytes(b"mine")
    (source / "images").rename(source / "zoo")
    (mine / "dataset.yaml").write_text("classes: [dog, background, bird, cat]\n")
    code, out, err = call(source, "--to", mine)
    assert (code, err) == (0, "")
    expected = np.array([1, 3, 0], np.uint8)[exports.label()]
    for i in (0, 2, 3):
        assert np.array_equal(mask_of(mine, f"photo {i}"), expected)
    assert "Left out: 1 images, for another one of the same name" in out
    assert (mine / "masks" / "photo 1.png").read_bytes() == b"mine"
    left = sorted(path.name for path in (mine / "unlabeled").rglob("*.jpg"))
    assert left == ["photo 1.jpg", "photo 4.jpg", "photo 5.jpg"]
    (mine / "dataset.yaml").write_text("classes: [background, cat]\n")
    assert "and the export also dog" in call(source, "--to", mine)[2]
    (mine / "dataset.yaml").write_text("classes: [background, cat, dog]\nmask_suffix: _m\n")
    assert "describes masks with other numbers or names" in call(source, "--to", mine)[2]


def test_classes_can_be_chosen_and_others_are_ignored(tmp_path: Path, call: Call) -> None:
    source = exports.coco(tmp_path / "export")
    code, out, _ = call(source, "--to", tmp_path / "mine", "--classes", "Background", "dog")
    assert (code, "Pixels in no shape: 0, Background." in out) == (0, True)
    expected = np.array([0, 255, 1], np.uint8)[exports.label()]
    assert np.array_equal(mask_of(tmp_path / "mine"), expected)
    assert "No class: 768 pixels (6.25%) of 4 images match no class" in out
    again = ("--to", tmp_path / "b", "--classes", "_Background_", "background")
    assert "names a class twice" in call(source, *again)[2]


def test_more_unlabelled_images_and_links(tmp_path: Path, call: Call) -> None:
    source = exports.coco(tmp_path / "export")
    exports.write_images(tmp_path / "more" / "deep", count=9)
    options = ("--unlabeled", tmp_path / "more", "--link")
    code, out, _ = call(source, "--to", tmp_path / "mine", *options)
    assert (code, "4 images with masks, 5 without" in out) == (0, True)
    assert "Left out: 6 images of --unlabeled that are in the export too." in out
    assert (tmp_path / "mine" / "images" / "photo 0.jpg").is_symlink()


def test_a_table_without_background_gets_none(tmp_path: Path, call: Call) -> None:
    source = exports.masks(tmp_path / "export")
    path = source / "labelmap.txt"
    path.write_text(path.read_text().replace("background:", "ground:"))
    code, out, _ = call(source, "--to", tmp_path / "mine")
    assert (code, "3 classes, from 0 on: ground, cat, dog." in out) == (0, True)
    assert np.array_equal(mask_of(tmp_path / "mine"), exports.label())


@pytest.mark.parametrize(("orientation", "drawn"), [(6, "stored"), (6, "shown"), (3, "shown")])
def test_turned_photographs(tmp_path: Path, call: Call, orientation: int, drawn: str) -> None:
    """Outlines drawn on the stored pixels are turned with the image, others fit already."""
    source = exports.coco(tmp_path / "export")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = source / "images" / "photo 0.jpg"
    with Image.open(path) as picture:
        back = picture.transpose(Image.Transpose.ROTATE_90)  # which viewers turn to its right place
        (picture if drawn == "stored" or orientation == 3 else back).save(path, exif=exif)
    code, out, _ = call(source, "--to", tmp_path / "mine")
    assert code == 0
    turned = np.rot90(exports.label(), -1)
    expected = turned if drawn == "stored" else exports.label()
    assert np.array_equal(mask_of(tmp_path / "mine"), expected)
    assert ("Turned: 1 photographs were annotated as they are stored" in out) == (drawn == "stored")


def test_masks_with_smooth_edges(tmp_path: Path, call: Call) -> None:
    source = exports.masks(tmp_path / "export")
    path = source / "SegmentationClass" / "photo 0.png"
    pixels = np.array(Image.open(path))
    pixels[0, :5] = (249, 51, 49)
    pixels[1, :3] = (99, 99, 99)
    Image.fromarray(pixels).save(path)
    _, out, _ = call(source, "--to", tmp_path / "a")
    assert "No class: 8 pixels (0.07%) of 1 images match no class, such as [249, 51, 49], " in out
    assert ("[99, 99, 99] in photo 0.png; they are 255" in out, "Left out" in out) == (True, False)
    assert mask_of(tmp_path / "a")[:2].tolist() == [[255] * 5 + [0] * 59, [255] * 3 + [0] * 61]
    _, out, _ = call(source, "--to", tmp_path / "b", "--tolerance", 1)
    assert "No class: 3 pixels" in out
    Image.fromarray(pixels).save(path.with_suffix(".jpg"), quality=100)
    path.unlink()
    code, out, _ = call(source, "--to", tmp_path / "c")
    assert (code, "the mask is stored as JPEG" in out) == (2, True)
    assert call(source, "--to", tmp_path / "d", "--tolerance", 40)[0] == 0


@pytest.mark.parametrize(
    ("name", "text", "numbers"),
    [
        ("label_colors.txt", "0 0 0\t\tbackground\n250 50 50\t\tcat\n30 120 250\tdog\n", False),
        ("class_dict.csv", "name,r,g,b\nbackground,0,0,0\ncat,250,50,50\ndog,30,120,250\n", False),
        ("_classes.csv", "Pixel Value, Class\n0, background\n1, cat\n2, dog\n", True),
        (
            "dataset_meta.json",
            '{"label_map": {"0": "background", "1": "cat", "2": "dog"}, '
            '"segmentation_colors": [[0, 0, 0], [250, 50, 50], [30, 120, 250]]}',
            False,
        ),
    ],
)
def test_tables_of_other_programs(
    tmp_path: Path, call: Call, name: str, text: str, numbers: bool
) -> None:
    source = exports.masks(tmp_path / "export")
    (source / "labelmap.txt").unlink()
    (source / name).write_text(text)
    if numbers:  # as Roboflow has it, beside the images
        for path in (source / "SegmentationClass").iterdir():
            target = source / "JPEGImages" / f"{path.stem}_mask.png"
            Image.fromarray(exports.label()).save(target)
        shutil.rmtree(source / "SegmentationClass")
        shutil.rmtree(source / "SegmentationObject")
        (source / "JPEGImages").rename(source / "train")
        (source / name).rename(source / "train" / name)
        source = source / "train"
    code, out, _ = call(source, "--to", tmp_path / "mine")
    assert (code, "4 images with masks, 2 without" in out) == (0, True)
    assert np.array_equal(mask_of(tmp_path / "mine"), exports.label())


def test_masks_of_few_bits_are_of_the_colours_that_viewers_show(tmp_path: Path, call: Call) -> None:
    source = exports.masks(tmp_path / "export")
    (source / "labelmap.txt").write_text("background:0,0,0::\ncat:255,255,255::\n")
    expected = (exports.label() == 1).astype(np.uint8)
    for path in (source / "SegmentationClass").iterdir():
        Image.fromarray(expected * 255).convert("1").save(path)
    code, out, _ = call(source, "--to", tmp_path / "mine")
    assert (code, "No class" in out) == (0, False)
    assert np.array_equal(mask_of(tmp_path / "mine"), expected)


def test_numbers_beyond_a_palette_match_no_class(tmp_path: Path, call: Call) -> None:
    source = exports.masks(tmp_path / "export")
    (source / "labelmap.txt").write_text("background:0,0,0::\ncat:128,0,0::\n")
    expected = (exports.label() == 1).astype(np.uint8)
    expected[0] = 255
    picture = Image.fromarray(expected, mode="P")
    picture.putpalette([channel for colour in bit_palette(21) for channel in colour])
    for path in (source / "SegmentationClass").iterdir():
        picture.save(path)
    for target, tolerance in (("a", 0), ("b", 255)):
        code, out, _ = call(source, "--to", tmp_path / target, "--tolerance", tolerance)
        assert (code, "such as numbers beyond the palette in photo 0.png" in out) == (0, True)
    assert np.array_equal(mask_of(tmp_path / "a"), expected)


def test_void_is_ignored(tmp_path: Path, call: Call) -> None:
    source = exports.masks(tmp_path / "export")
    path = source / "labelmap.txt"
    path.write_text(path.read_text().replace("dog:", "Void:"))
    code, out, _ = call(source, "--to", tmp_path / "mine")
    assert (code, "Ignored: pixels of Void are 255 in the masks." in out) == (0, True)
    assert mask_of(tmp_path / "mine").max() == 255


def test_boxes_of_yolo_are_ignored_pixels(tmp_path: Path, call: Call) -> None:
    source = exports.yolo(tmp_path / "export")
    with (source / "labels" / "train" / "photo 0.txt").open("a") as file:
        file.write("0 0.75 0.5 0.25 0.5\n")
    code, out, _ = call(source, "--to", tmp_path / "mine")
    assert (code, "Left out: 1 lines with a box and no outline" in out) == (0, True)
    assert (mask_of(tmp_path / "mine")[12:36, 40:56] == 255).all()


def test_names_of_yolo_may_be_spelled_in_two_ways(tmp_path: Path, call: Call) -> None:
    source = exports.yolo(tmp_path / "export")
    for kind, form in (("images", "NFD"), ("labels", "NFC")):
        (path,) = (source / kind / "train").glob("photo 0.*")
        path.rename(path.with_stem(unicodedata.normalize(form, "tür")))
    assert "4 images with masks" in call(source, "--to", tmp_path / "mine")[1]


@pytest.mark.parametrize(
    ("form", "file", "old", "new", "message"),
    [
        ("coco", "annotations/*.json", '"photo 0.jpg"', '"../../../etc/passwd"', "no such image"),
        ("coco", "annotations/*.json", '"photo 0.jpg"', '"/etc/hosts.jpg"', "no such image"),
        ("coco", "annotations/*.json", '"height": 48', '"height": 47', "was annotated with 64x47"),
        ("coco", "annotations/*.json", "16.0, 12.0", "16.0, 1e300", "leads far out of the image"),
        ("yolo", "labels/*/photo 0.txt", "0 0.125", "7 0.125", "line 2: there is no class 7"),
        ("yolo", "labels/*/photo 0.txt", "0.125000", "nan", "line 2: an outline must hold"),
        ("yolo", "labels/*/photo 0.txt", "0.125000", "x", "line 2: could not convert"),
        ("labelme", "photo 0.json", "photo 0.jpg", "../../secret.jpg", ""),
        ("labelme", "photo 2.json", '"mask": "iVBO', '"mask": "!!!!', "the mask cannot be read"),
        ("labelme", "photo 0.json", '"shapes"', '"shape"', "it has no list `shapes`"),
        ("labelme", "photo 1.json", "[24, 20]", "[24, 20, 3]", "a rectangle must have two points"),
        ("cvat", "annotations.xml", 'rle="0, 64"', 'rle="0, 65"', "the run lengths must have"),
        ("cvat", "annotations.xml", 'width="8"', 'width="80000"', "or more than the image"),
        ("cvat", "annotations.xml", 'xtl="16.0"', 'xtl="inf"', "xtl must be a number, got inf"),
    ],
)
def test_a_bad_entry_costs_itself_alone(
    tmp_path: Path, call: Call, form: str, file: str, old: str, new: str, message: str
) -> None:
    """All other images are converted, and nothing outside of the export is read."""
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    source = exports.FORMS[form](tmp_path / "deep" / "export")
    (path,) = source.glob(file)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    code, out, err = call(source, "--to", tmp_path / "mine")
    if not message:  # the image of the file's own name serves
        assert code == 0
        return
    assert (code, "1 file could not be used" in err) == (2, True)
    assert message in out
    assert len([*(tmp_path / "mine" / "masks").rglob("*.png")]) == 3
    assert not any(
        p.name in ("passwd", "hosts.jpg", "secret.jpg") for p in tmp_path.rglob("mine/*")
    )


@pytest.mark.parametrize(
    ("form", "file", "text", "message"),
    [
        ("coco", "annotations/*.json", "[" * 99_999, "none of the forms"),
        ("coco", "annotations/*.json", '{"images": 1', "is no valid JSON"),
        ("cvat", "annotations.xml", "<annotations><image>", "is no valid XML"),
        (
            "cvat",
            "annotations.xml",
            '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotations>&c;</annotations>',
            "holds a document type",
        ),
        ("cvat", "annotations.xml", "<annotations><track/></annotations>", "no CVAT for images"),
        ("yolo", "data.yaml", "names: 7\n", "names must be a list"),
        ("yolo", "data.yaml", "names: [&a [*a]]\n", "names must be a list"),
        ("masks", "labelmap.txt", "a:1,2,3::\nb:1,2,3::\n", "have the same colour"),
        ("masks", "labelmap.txt", "a:1,2,3::\n3, b\n", "give all classes colours, or all numbers"),
        ("masks", "labelmap.txt", "a:1,2,999::\n", "is no colour or number"),
        ("masks", "labelmap.txt", "\na\n", "is no class and its colour"),
        ("masks", "labelmap.txt", "#\n", "names no classes"),
    ],
)
def test_a_hostile_export_is_one_paragraph(
    tmp_path: Path, call: Call, form: str, file: str, text: str, message: str
) -> None:
    source = exports.FORMS[form](tmp_path / "export")
    (path,) = source.glob(file)
    path.write_text(text)
    code, _, err = call(source, "--to", tmp_path / "mine")
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "mine").exists()


def test_wrong_calls(tmp_path: Path, call: Call) -> None:
    source = exports.coco(tmp_path / "export")
    (tmp_path / "a.zip").touch()
    (tmp_path / "nothing").mkdir()
    to = ("--to", tmp_path / "mine")
    assert "--to is needed" in call(source)[2]
    assert "there is no such file or folder" in call(tmp_path / "none", *to)[2]
    assert "is an archive: unpack it first" in call(tmp_path / "a.zip", *to)[2]
    assert "none of the forms" in call(tmp_path / "nothing", *to)[2]
    assert "no such folder" in call(source, *to, "--unlabeled", tmp_path / "none")[2]
    assert "--tolerance must be in 0..255" in call(source, *to, "--tolerance", 256)[2]
    assert "--classes names a class twice" in call(source, *to, "--classes", "a", "a")[2]
    assert "There must be 2 to 255 classes" in call(source, *to, "--classes", "a")[2]
    shutil.rmtree(source / "images")
    assert "no annotated image is found" in call(source, *to)[2]


def test_a_missing_library_is_named(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exports.yolo(tmp_path / "export")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    code, _, err = call(source, "--to", tmp_path / "mine")
    assert (code, "pip install 'ctt[convert]'" in err) == (2, True)
