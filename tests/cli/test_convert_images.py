"""ctt-data convert: which image an annotation belongs to, and how it was turned when drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ctt.data.folder import Folder
from ctt.data.options import DatasetOptions
from ctt.data.pictures import ORIENTATION, read_image
from tests.cli.conftest import Call

pytest.importorskip("pycocotools")
SIDE = 12


def write_image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)).save(path)


def box(label: str, size: int) -> dict[str, Any]:
    corners = [[0, 0], [size, 0], [size, size], [0, size]]
    return {"label": label, "shape_type": "polygon", "points": corners}


def write_labelme(path: Path, image: str, *shapes: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"shapes": shapes, "imagePath": image}))


def write_coco(path: Path, *names: str, ids: tuple[int, ...] = (), categories: Any = None) -> None:
    """An instance file of images with a cat in the corner, one pixel larger from image to image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = ids or range(len(names))
    images = [
        {"id": i, "file_name": name, "height": SIDE, "width": SIDE}
        for i, name in zip(numbers, names, strict=True)
    ]
    annotations = [
        {
            "id": number,
            "image_id": image["id"],
            "category_id": 1,
            "segmentation": [[0, 0, number, 0, number, number, 0, number]],
        }
        for number, image in enumerate(images, 1)
    ]
    values = {"images": images, "annotations": annotations}
    path.write_text(json.dumps(values | {"categories": categories or [{"id": 1, "name": "cat"}]}))


def drawn(folder: Path) -> dict[str, int]:
    """How many pixels of class 1 each mask holds."""
    return {
        path.relative_to(folder).as_posix(): int((np.asarray(Image.open(path)) == 1).sum())
        for path in sorted(folder.rglob("masks/**/*.png"))
    }


def test_an_image_of_another_folder_is_not_the_one_that_is_missing(
    tmp_path: Path, call: Call
) -> None:
    source, mine = tmp_path / "labelme", tmp_path / "a"
    for name in ("day2/1.png", "day1/2.png", "day3/photos/3.png", "4.png", "old/5.png"):
        write_image(source / name)
    write_labelme(source / "day1" / "1.json", "1.png", box("cat", 2))
    write_labelme(source / "day1" / "2.json", "1.png", box("cat", 3))  # its own name serves
    write_labelme(source / "day3" / "3.json", "3.png", box("cat", 4))
    write_labelme(source / "5.json", "5.png", box("cat", 6))
    write_labelme(source / "4.json", "C:\\work\\4.png", box("cat", 5))
    code, out, _ = call(source, "--to", mine)
    assert (code, "1.png: there is no such image in" in out) == (2, True)
    for name in ("day2/1.png", "old/5.png"):
        assert f"{name} is in another folder; if it is this image, give its folder (--im" in out
    found = {"masks/day1/2.png": 9, "masks/day3/photos/3.png": 16, "masks/4.png": 25}
    assert drawn(mine) == found
    source, mine = tmp_path / "coco", tmp_path / "b"
    for name in ("cam2/1.png", "cam1/2.png", "deep/cam3/3.png"):
        write_image(source / "images" / name)
    entries = ("cam1/1.png", "cam2/1.png", "/data/JPEGImages/cam1/2.png", "cam3/3.png")
    write_coco(source / "annotations" / "instances.json", *entries)
    code, out, err = call(source, "--to", mine)
    assert (code, "1 file could not be used" in err) == (2, True)
    assert "instances.json: cam1/1.png: there is no such image" in out
    assert drawn(mine) == {
        "masks/cam1/2.png": 9,
        "masks/cam2/1.png": 4,
        "masks/deep/cam3/3.png": 16,
    }


def test_bare_names_belong_to_the_folder_of_their_file(tmp_path: Path, call: Call) -> None:
    """Each part has a JSON file beside its images, which have the same names in all parts."""
    source = tmp_path / "export"
    for name in ("train/1.png", "valid/1.png", "valid/2.png"):
        write_image(source / name, len(name) + int(name[-5]))
    write_coco(source / "train" / "a.json", "1.png", "2.png")
    write_coco(source / "valid" / "a.json", "1.png", "2.png")
    code, out, _ = call(source, "--to", tmp_path / "mine")
    assert (code, f"{source / 'train' / 'a.json'}: 2.png: there is no such image" in out) == (2, 1)
    assert drawn(tmp_path / "mine") == {
        "masks/train/1.png": 1,
        "val/masks/valid/1.png": 1,
        "val/masks/valid/2.png": 4,
    }


def test_two_annotations_of_one_image_are_named_and_not_used(tmp_path: Path, call: Call) -> None:
    source = tmp_path / "export"
    for name in ("cam/1.png", "cam/2.png"):
        write_image(source / name)
    write_coco(source / "i.json", "/a/cam/1.png", "/b/cam/1.png", "cam/2.png")
    code, out, _ = call(source, "--to", tmp_path / "mine")
    file = source / "i.json"
    assert code == 2
    assert f"annotated twice, as /a/cam/1.png in {file} and as /b/cam/1.png in {file}" in out
    assert drawn(tmp_path / "mine") == {"masks/2.png": 9}


def test_ids_of_coco_are_of_one_image_or_category(tmp_path: Path, call: Call) -> None:
    source, to = tmp_path / "export", ("--to", tmp_path / "mine")
    for i in (1, 2):
        write_image(source / f"{i}.png", i)
    write_coco(source / "i.json", "1.png", "2.png", ids=(7, 7))
    assert "the images '1.png' and '2.png' have the same id 7" in call(source, *to)[2]
    both = [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]
    write_coco(source / "i.json", "1.png", categories=both)
    assert "the categories 'cat' and 'dog' have the same id 1" in call(source, *to)[2]
    write_coco(source / "i.json", "1.png", categories=both[:1] * 2)  # which says the same twice
    assert call(source, *to)[0] == 0


def write_turned(root: Path, name: str, turn: int, width: int, stored: bool) -> dict[str, Any]:
    """A picture with a red box, which its entry of COCO outlines as it is stored or shown."""
    pixels = np.zeros((SIDE, width, 3), np.uint8)
    pixels[1:4, 2:9, 0] = 255
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[ORIENTATION] = turn
    if name.endswith(".tif"):
        picture.save(root / name, tiffinfo={ORIENTATION: turn})
    else:
        picture.save(root / name, exif=exif)
    drawn = Image.fromarray(pixels[..., 0])
    drawn.getexif()[ORIENTATION] = turn
    red = np.asarray(drawn if stored else ImageOps.exif_transpose(drawn))
    rows, columns = np.nonzero(red)
    x, y, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    ring = [int(value) for value in (x, y, right, y, right, bottom, x, bottom)]
    return {"name": name, "size": red.shape, "ring": ring}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_images_whose_size_does_not_tell_are_turned_as_others(
    tmp_path: Path, call: Call, stored: bool, told: bool
) -> None:
    """Those turned by 180 degrees or mirrored, and square ones; also TIFFs."""
    source = tmp_path / "export"
    source.mkdir()
    turns = [*range(1, 9)] if told else [2, 3, 4]
    entries = [
        write_turned(source, f"{turn}.{('png', 'tif')[turn % 2]}", turn, SIDE + 4, stored)
        for turn in turns
    ]
    entries += [write_turned(source, "square.png", 6, SIDE, stored)]
    entries += [write_turned(source, "8b.tif", 8, SIDE + 4, stored)] * told
    parts = [
        {
            "images": {"file_name": e["name"], "height": e["size"][0], "width": e["size"][1]},
            "annotations": {"image_id": i, "category_id": 1, "segmentation": [e["ring"]]},
        }
        for i, e in enumerate(entries)
    ]
    values = {key: [{"id": i, **p[key]} for i, p in enumerate(parts)] for key in parts[0]}
    values["categories"] = [{"id": 1, "name": "red"}]
    (source / "i.json").write_text(json.dumps(values))
    code, out, _ = call(source, "--to", tmp_path / "mine")
    sure = "Unsure: viewers turn or mirror 4 of the photographs" not in out
    assert (code, sure, "square.png" not in out) == (0, told, told)
    dataset = Folder(tmp_path / "mine", DatasetOptions())
    names = [*dataset.train_ids(), *dataset.eval_ids()]
    for name in names if told or not stored else []:
        image, label = dataset.pair(name)
        assert ((image[0] > 0) == (label == 1)).all(), name
        assert dataset.size(name) == read_image(tmp_path / "mine" / name).shape[1:]


def test_images_that_are_there_are_found_in_other_folders(tmp_path: Path, call: Call) -> None:
    """The part of the paths that all images of an export share is left out of the names."""
    source, mine = tmp_path / "export", tmp_path / "mine"
    for number, name in enumerate(("a/1.png", "b/2.png", "b/3.png")):
        write_image(source / "images" / name, number)
    write_coco(source / "train.json", "a/1.png")
    assert call(source, "--to", mine)[0] == 0
    write_coco(source / "train.json", "a/1.png", "b/2.png")
    code, out, _ = call(source, "--to", mine)
    assert (code, "1 of the images were there already" in out) == (0, True)
    assert drawn(mine) == {"masks/1.png": 1, "masks/b/2.png": 4}
    write_coco(source / "train.json", "b/3.png")  # which was in unlabeled/b before
    code, out, _ = call(source / "train.json", "--images", source / "images" / "b", "--to", mine)
    assert code == 0
    found = {"masks/1.png": 1, "masks/b/2.png": 4, "masks/3.png": 1}
    assert drawn(mine) == found
    assert not [*mine.rglob("unlabeled/**/*.png")]
    (source / "train.json").rename(source / "val.json")
    code, out, _ = call(source, "--to", mine)
    assert (code, drawn(mine)) == (0, found)
    assert "Left out: 1 changes between images/ and val/: images stay in the part" in out
    (source / "val.json").unlink()
    write_image(source / "images" / "1.png", 7)
    write_image(source / "images" / "c" / "2.png", 1)  # equal to b/2.png
    write_coco(source / "train.json", "1.png", "a/1.png", "b/2.png", "c/2.png")
    code, out, _ = call(source, "--to", mine)
    assert (code, "Left out: 1 images, for another one of the same name" in out) == (0, True)
    assert drawn(mine) == found | {"masks/c/2.png": 16}


def test_masks_that_are_added_have_the_palette_of_the_folder(tmp_path: Path, call: Call) -> None:
    source, mine = tmp_path / "export", tmp_path / "mine"
    write_image(source / "1.png")
    shapes = (box("cat", 6), box("dog", 3), box("__ignore__", 1))
    write_labelme(source / "1.json", "1.png", *shapes)
    mine.mkdir()
    (mine / "dataset.yaml").write_text(
        "classes: [background, dog, cat]\npalette: [[0, 0, 0], [0, 128, 0], [128, 0, 0]]\n"
        "ignore_color: [9, 9, 9]\n"
    )
    assert call(source, "--to", mine)[0] == 0
    colours = np.asarray(Image.open(mine / "masks" / "1.png").convert("RGB"))
    found = [colours[at, at].tolist() for at in (0, 1, 4, 8)]
    assert found == [[9, 9, 9], [0, 128, 0], [128, 0, 0], [0, 0, 0]]
    label = np.asarray(Image.open(mine / "masks" / "1.png"))
    assert [label[at, at] for at in (0, 1, 4, 8)] == [255, 1, 2, 0]


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, call: Call) -> None:
    source, mine = tmp_path / "export", tmp_path / "mine"
    for i in (1, 2):
        write_image(source / f"{i}.png", i)
    write_coco(source / "i.json", "1.png", "2.png")
    assert call(source, "--to", mine, "--link")[0] == 0
    source = source.rename(tmp_path / "moved")
    (mine / "images" / "2.png").unlink()
    code, out, _ = call(source, "--to", mine, "--link")
    assert (code, f"{mine / 'images' / '1.png'}: the link leads to" in out) == (2, True)
    assert (mine / "images" / "2.png").is_file()
