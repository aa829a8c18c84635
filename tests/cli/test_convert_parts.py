"""ctt-data convert: what of an export is used: its parts, images without shapes, and the rest."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Call, mask_of
from tests.data import exports

pytest.importorskip("pycocotools")


def test_without_a_background_pixels_in_no_shape_are_ignored(tmp_path: Path, call: Call) -> None:
    """Also in a batch that does not show the class 0, and in one that is added."""
    source, mine = exports.coco(tmp_path / "export"), tmp_path / "mine"
    (path,) = source.glob("annotations/*.json")
    text = path.read_text()
    values = json.loads(text)
    values["annotations"] = [a for a in values["annotations"] if a["image_id"] == 1]
    path.write_text(json.dumps(values))
    assert call(source, "--to", mine, "--classes", "cat", "dog")[0] == 0
    path.write_text(text.replace('"cat"', '"dog"'))
    code, out, _ = call(source, "--to", mine)
    assert (code, "Pixels in no shape: 255, which is ignored" in out) == (0, True)
    for name, numbers in (("photo 0", [255, 0, 1]), ("photo 1", [255, 1, 1])):
        expected = np.array(numbers, np.uint8)[exports.label()]
        assert np.array_equal(mask_of(mine, name), expected)
    options = ("--empty", "background", "--classes", "cat", "dog")
    assert "none of the classes is called background" in call(source, "--to", mine, *options)[2]


def test_images_without_shapes_can_be_background(tmp_path: Path, call: Call) -> None:
    source = exports.cvat(tmp_path / "export")
    code, out, _ = call(source, "--to", tmp_path / "mine", "--empty", "background")
    assert (code, "6 images with masks, 0 without" in out) == (0, True)
    assert not mask_of(tmp_path / "mine", "photo 5").any()


def test_parts_of_an_export(tmp_path: Path, call: Call) -> None:
    """As Roboflow has it: a folder for each part, with its images and its JSON file."""
    whole = exports.coco(tmp_path / "whole")
    text = (whole / "annotations" / "instances_default.json").read_text()
    for part in ("train", "valid", "test"):
        folder = tmp_path / "export" / part
        shutil.copytree(whole / "images", folder)
        for path in folder.iterdir():  # as in a true export, no image is in two parts
            path.rename(folder / path.name.replace("photo", f"{part}"))
        (folder / "_annotations.coco.json").write_text(text.replace("photo", part))
    code, out, _ = call(tmp_path / "export", "--to", tmp_path / "mine")
    assert (code, "4 images with masks, 4 to evaluate on, 4 without" in out) == (0, True)
    assert "Left out: 6 images of the part test." in out
    assert len([*(tmp_path / "mine" / "val" / "masks").rglob("*.png")]) == 4
    shutil.rmtree(tmp_path / "export" / "train")
    shutil.rmtree(tmp_path / "export" / "valid")
    _, _, err = call(tmp_path / "export", "--to", tmp_path / "none")
    assert "no annotated image is found. The part test is left out, 6 images" in err


def test_other_files_beside_those_of_instances(tmp_path: Path, call: Call) -> None:
    """Captions of the same images, as COCO has them, and an instance file that is cut off."""
    source = exports.coco(tmp_path / "export")
    folder = source / "annotations"
    (folder / "captions_default.json").write_text('{"images": [], "annotations": []}')
    whole = (folder / "instances_default.json").read_text()
    (folder / "person_keypoints_default.json").write_text(whole.replace('"cat"', '"person"'))
    exports.write_images(source / "images", 9, 1)
    (folder / "batch 2.json").write_text(whole.replace("photo 0", "photo 9"))
    code, out, _ = call(source, "--to", tmp_path / "a")
    assert (code, "3 classes, from 0 on: background, cat, dog." in out) == (2, True)
    assert "Left out: 1 JSON files that are none of COCO's instances, such as" in out
    assert "Left out: 1 JSON files of images that those of instances have, such as" in out
    assert f"annotated twice, as photo 1.jpg in {folder / 'batch 2.json'} and as" in out
    assert np.array_equal(mask_of(tmp_path / "a", "photo 9"), exports.label())
    (folder / "batch 2.json").unlink()
    (folder / "instances_more.json").write_text('{"images": [')
    code, out, err = call(source, "--to", tmp_path / "b")
    assert (code, "1 file could not be used" in err) == (2, True)
    assert f"{folder / 'instances_more.json'} is no valid JSON" in out
    assert np.array_equal(mask_of(tmp_path / "b"), exports.label())


def test_shapes_without_area_are_left_out(tmp_path: Path, call: Call) -> None:
    source = exports.labelme(tmp_path / "labelme")
    path = source / "photo 0.json"
    values = json.loads(path.read_text())
    line = {"label": "cat", "points": [[1, 1], [9, 9]], "shape_type": "line"}
    ring = {"label": "dog", "points": [[40, 24], [40, 34]], "shape_type": "circle"}
    hidden = {"label": "__ignore__", "points": [[0, 40], [64, 48]], "shape_type": "rectangle"}
    values["shapes"] += [line, ring, hidden]
    path.write_text(json.dumps(values))
    code, out, _ = call(source, "--to", tmp_path / "a")
    assert (code, "Left out: 1 shapes of the kind 'line', which have no area." in out) == (0, True)
    mask = mask_of(tmp_path / "a")
    assert (mask[40:] == 255).all()
    disc = (mask[:40, 28:] == 2).sum()
    assert disc == pytest.approx(np.pi * 10**2, rel=0.05)
    source = exports.cvat(tmp_path / "cvat")
    path = source / "annotations.xml"
    more = (
        '<polyline label="cat" points="1.0,1.0;9.0,9.0" z_order="0"/><tag label="cat"/>'
        '<ellipse label="dog" cx="40.0" cy="24.0" rx="10.0" ry="4.0" rotation="90" z_order="0"/>'
    )
    path.write_text(path.read_text().replace("  </image>", f"{more}</image>", 1))
    code, out, _ = call(source, "--to", tmp_path / "b")
    assert "Left out: 1 polyline annotations, which have no area." in out
    assert "Left out: 1 tag annotations, which have no area." in out
    rows, columns = np.nonzero(mask_of(tmp_path / "b")[:, 28:] == 2)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 8)


def test_yolo_names_a_part_to_evaluate_on(tmp_path: Path, call: Call) -> None:
    source = exports.yolo(tmp_path / "export")
    for kind in ("images", "labels"):
        (source / kind / "held").mkdir()
        for path in (source / kind / "train").glob("photo [01].*"):
            path.rename(source / kind / "held" / path.name)
    path = source / "data.yaml"
    path.write_text(path.read_text().replace("val: images/train", "val: ../images/held"))
    code, out, _ = call(source, "--to", tmp_path / "mine")
    assert (code, "2 images with masks, 2 to evaluate on, 2 without" in out) == (0, True)


def test_yolo_lists_the_images_of_parts(tmp_path: Path, call: Call) -> None:
    source, mine = exports.yolo(tmp_path / "export"), tmp_path / "mine"
    path = source / "data.yaml"
    text = path.read_text().replace("val: images/train", "val: lists/val.txt\ntest: test.txt")
    path.write_text(text.replace("train: images/train", "train: train.txt"))
    _, _, err = call(source, "--to", mine)
    assert "val: the list lists/val.txt is not in" in err
    assert not mine.exists()
    (source / "lists").mkdir()
    (source / "lists" / "val.txt").write_text("\ufeff./images/train/photo 0.jpg\r\n\r\n", "utf-8")
    (source / "test.txt").write_text("D:\\pets\\images\\train\\photo 1.jpg\ntrain/photo 8.jpg\n")
    code, out, _ = call(source, "--to", mine)
    assert (code, "2 images with masks, 1 to evaluate on, 2 without" in out) == (2, True)
    assert "Left out: 1 images of the part test." in out
    assert "test: 1 lines of test.txt are no image. train/photo 8.jpg: there is no" in out
    assert (mine / "val" / "masks" / "photo 0.png").is_file()
    assert not [*mine.rglob("photo 1.*")]


def test_images_without_an_area_are_not_annotated(tmp_path: Path, call: Call) -> None:
    source = exports.yolo(tmp_path / "yolo")
    (source / "labels" / "train" / "photo 0.txt").write_bytes(b"\xef\xbb\xbf\r\n")
    assert "3 images with masks, 3 without" in call(source, "--to", tmp_path / "a")[1]
    source = exports.labelme(tmp_path / "labelme")
    path = source / "photo 0.json"
    values = json.loads(path.read_text())
    for shape in values["shapes"]:
        shape |= {"shape_type": "line", "points": [[1, 1], [9, 9]]}
    path.write_text(json.dumps(values))
    _, out, _ = call(source, "--to", tmp_path / "b")
    assert "3 images with masks, 3 without" in out
    assert "Left out: 1 images, which count as not annotated: lines, points and tags" in out
    _, out, _ = call(source, "--to", tmp_path / "c", "--empty", "background")
    assert "4 images with masks, 2 without" in out
    source = exports.cvat(tmp_path / "cvat")
    path = source / "annotations.xml"
    line = '<polyline label="cat" points="1.0,1.0;9.0,9.0"/></image>'
    first, *rest = path.read_text().rpartition("</image>")
    path.write_text("".join([first, line, rest[-1]]))
    assert (
        "Left out: 1 images, which count as not annotated"
        in call(source, "--to", tmp_path / "d")[1]
    )


def in_folders(paths: list[Path]) -> None:
    """Move the first file into train/, the second into val/ and the third into test/ beside it."""
    for path, part in zip(paths, ("train", "val", "test"), strict=True):
        (path.parent / part).mkdir(exist_ok=True)
        path.rename(path.parent / part / path.name)


@pytest.mark.parametrize("form", ["coco", "labelme", "labelme, JSON files alone", "cvat"])
def test_folders_of_images_are_parts(tmp_path: Path, call: Call, form: str) -> None:
    """Also where one file names the images of all parts."""
    form, _, alone = form.partition(", ")
    source, mine = exports.FORMS[form](tmp_path / "export"), tmp_path / "mine"
    photos = [f"photo {i}" for i in range(3)]
    if not alone:
        in_folders([next(source.rglob(f"{name}.jpg")) for name in photos])
    if form == "labelme":
        in_folders([source / f"{name}.json" for name in photos])
        for path in source.rglob("*.json"):
            path.write_text(path.read_text().replace("..\\\\photos\\\\", ""))
    else:
        (path,) = [*source.rglob("*.json"), *source.rglob("*.xml")]
        text = path.read_text()
        for part, name in zip(("train", "val", "test"), photos, strict=True):
            text = text.replace(f"{name}.jpg", f"{part}/{name}.jpg")
        path.write_text(text)
    code, out, _ = call(source, "--to", mine)
    assert (code, "2 images with masks, 1 to evaluate on" in out) == (0, True)
    assert "Left out: 1 images of the part test." in out
    assert len([*(mine / "val").rglob("photo 1.jpg")]) == 1
    assert not [*mine.rglob("photo 2.*")]


def test_a_part_that_is_named_comes_before_the_folder(tmp_path: Path, call: Call) -> None:
    """CVAT's subset, COCO's file of training, and one file of COCO or LabelMe that is given."""
    source = exports.cvat(tmp_path / "cvat")
    in_folders([source / "images" / f"photo {i}.jpg" for i in range(3)])
    path = source / "annotations.xml"
    text = path.read_text().replace('"photo 2.jpg"', '"test/photo 2.jpg" subset="Train"')
    text = text.replace('"photo 1.jpg"', '"val/photo 1.jpg" subset="default"')
    path.write_text(text.replace('"photo 0.jpg"', '"photo 0.jpg" subset="Test"'))
    code, out, _ = call(source, "--to", tmp_path / "a")
    assert (code, "2 images with masks, 1 to evaluate on" in out) == (0, True)
    assert len([*(tmp_path / "a" / "masks").rglob("photo 2.png")]) == 1
    source = exports.coco(tmp_path / "coco")
    (source / "images").rename(source / "val")
    path = (source / "annotations" / "instances_default.json").rename(source / "train.json")
    assert "4 images with masks, 2 without" in call(source, "--to", tmp_path / "b")[1]
    path = path.rename(source / "all.json")
    assert "4 to evaluate on" in call(source, "--to", tmp_path / "c")[1]
    assert "4 images with masks, 2 without" in call(path, "--to", tmp_path / "d")[1]
    source = exports.labelme(tmp_path / "labelme")
    (source / "test").mkdir()
    for ending in ("jpg", "json"):
        (source / f"photo 0.{ending}").rename(source / "test" / f"photo 0.{ending}")
    given = (source / "test" / "photo 0.json", "--images", source, "--to", tmp_path / "e")
    assert "1 images with masks" in call(*given)[1]


def test_lists_of_parts_beside_masks(tmp_path: Path, call: Call) -> None:
    """As CVAT has them; an image in the list of a test is not learned without its mask either."""
    source, mine = exports.masks(tmp_path / "export"), tmp_path / "mine"
    lists = source / "ImageSets" / "Segmentation"
    (lists / "Train.txt").write_text("photo 0\nphoto 3\nphoto 77\n")
    (lists / "trainval.txt").write_text("photo 0\nphoto 1\n")
    (lists / "Validation.txt").write_text('\ufeff"photo 1"\r\n\r\n', "utf-8")
    (lists / "Test.txt").write_text("photo 2\nphoto 4\nphoto 3\n")
    code, out, _ = call(source, "--to", mine)
    assert (code, "1 images with masks, 1 to evaluate on, 1 without" in out) == (0, True)
    assert "Left out: 3 images of the part test." in out
    assert (mine / "val" / "masks" / "photo 1.png").is_file()
    assert not [*mine.rglob("photo [234].*")]
    given = (source / "SegmentationClass", "--table", source / "labelmap.txt", "--form", "masks")
    options = ("--images", source / "JPEGImages", "--to", tmp_path / "b")
    assert "1 images with masks, 1 to evaluate on, 1 without" in call(*given, *options)[1]
    with (lists / "Test.txt").open("a") as file:
        file.write("photo 99\n")
    code, out, _ = call(source, "--to", mine)
    assert (code, f"{lists / 'Test.txt'}: 1 lines are no image. photo 99: there" in out) == (
        2,
        True,
    )
    (lists / "Test.txt").write_bytes(b"\xff\xfe")
    assert "Test.txt cannot be read" in call(source, "--to", mine)[2]


def test_copies_of_images_of_a_test_are_not_learned(tmp_path: Path, call: Call) -> None:
    source, photos = exports.coco(tmp_path / "export"), tmp_path / "photos"
    in_folders([source / "images" / f"photo {i}.jpg" for i in range(3)])
    path = source / "annotations" / "instances_default.json"
    path.write_text(path.read_text().replace('"photo 2.jpg"', '"test/photo 2.jpg"'))
    exports.write_images(photos, count=7)
    code, out, _ = call(source, "--to", tmp_path / "mine", "--unlabeled", photos)
    assert (code, "Left out: 1 images of the part test." in out) == (0, True)
    assert "Left out: 6 images of --unlabeled that are in the export too." in out
    assert not [*(tmp_path / "mine").rglob("photo 2.*")]


def test_shapes_without_a_pixel_are_counted(tmp_path: Path, call: Call) -> None:
    """Outside of the image, or of no area; their image may look as if it were background."""
    source = exports.coco(tmp_path / "coco")
    (path,) = source.glob("annotations/*.json")
    values = json.loads(path.read_text())
    for i, at in ((0, [500, 500, 520, 500, 520, 520]), (1, [3, 3, 3, 3, 3, 3])):
        values["annotations"][i]["segmentation"] = [at]
    path.write_text(json.dumps(values))
    code, out, _ = call(source, "--to", tmp_path / "a")
    assert (code, "Left out: 2 shapes without a pixel in their image" in out) == (0, True)
    source = exports.labelme(tmp_path / "labelme")
    path = source / "photo 0.json"
    values = json.loads(path.read_text())
    line = {"label": "cat", "points": [[1, 1], [9, 9]], "shape_type": "line"}
    values["shapes"][0]["points"] = [[-9, -9], [-2, -9], [-2, -2]]
    values["shapes"].append(line)
    path.write_text(json.dumps(values))
    _, out, _ = call(source, "--to", tmp_path / "b")
    assert "Left out: 1 shapes without a pixel in their image" in out
    assert "Left out: 1 shapes of the kind 'line'" in out


def test_yolo_refuses_pixels_and_poses(tmp_path: Path, call: Call) -> None:
    source = exports.yolo(tmp_path / "export")
    first, second = (source / "labels" / "train" / f"photo {i}.txt" for i in (0, 1))
    first.write_text("0 4 4 20 4 20 16\n")
    second.write_text("0 1.1 0.5 1.1 -0.2 0.3 0.5\n")  # a little outside, as some tools have it
    code, out, _ = call(source, "--to", tmp_path / "a")
    assert (code, "3 images with masks" in out) == (2, True)
    assert f"{first}, line 1: the coordinate 4 is far outside of the image" in out
    assert "must be shares of its sides, from 0 to 1" in out
    first.write_text("0 32 24 8 8\n")
    assert f"{first}, line 1: the coordinate 32" in call(source, "--to", tmp_path / "a")[1]
    with (source / "data.yaml").open("a") as file:
        file.write("kpt_shape: [4, 3]\n")
    code, _, err = call(source, "--to", tmp_path / "b")
    assert (code, "keypoints have no area" in err) == (2, True)
    assert not (tmp_path / "b").exists()
