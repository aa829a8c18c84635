"""Masks that annotation tools open."""

import io
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from ctt.data.coco_json import read_coco
from ctt.data.dataset import DatasetInfo
from ctt.data.shapes import paint
from ctt.inference.annotations import Outline, _areas_around, outlines, without_specks, write

COLOURS = ((0, 0, 0), (200, 0, 0), (0, 200, 0))
INFO = DatasetInfo("x", ("background", "dog", "Straße"), COLOURS, (0.5,) * 3, (0.2,) * 3)
NO_BACKGROUND = DatasetInfo("x", ("sky", "dog", "Straße"), COLOURS, (0.5,) * 3, (0.2,) * 3)


@pytest.fixture
def mask() -> torch.Tensor:
    """Blobs, one with a hole that holds background and an area of another class."""
    noise = np.random.default_rng(0).normal(size=(2, 60, 80))
    blobs = ndimage.gaussian_filter(noise, (0, 6, 6))
    label = np.select([blobs[0] > 0.02, blobs[1] > 0.02], [1, 2], 0)
    label[5:40, 10:50] = 1
    label[10:30, 15:35] = 0
    label[15:20, 20:28] = 2
    label[0, 0:3] = 2 - label[1, 0]
    return torch.from_numpy(label.astype(np.uint8))


def drawn(shapes: list[tuple[int, list[list[float]]]], size: tuple[int, int]) -> np.ndarray:
    """Draw polygons in their order, a pixel by where its middle lies."""
    label = np.zeros(size, np.uint8)
    for number, points in shapes:
        picture = Image.new("1", (8 * size[1], 8 * size[0]))
        ImageDraw.Draw(picture).polygon([(8 * x, 8 * y) for x, y in points], fill=1)
        label[np.asarray(picture)[4::8, 4::8]] = number
    return label


@pytest.mark.parametrize("info", [INFO, NO_BACKGROUND])
def test_outlines_drawn_in_order_give_the_mask(mask: torch.Tensor, info: DatasetInfo) -> None:
    found = outlines(mask, info)
    assert [o.area for o in found] == sorted((o.area for o in found), reverse=True)
    again = drawn([(o.label, o.points.tolist()) for o in found], (60, 80))
    assert (again == mask.numpy()).mean() > 0.98
    assert again[12, 17] == 0  # background in the hole
    assert again[17, 24] == 2  # and what lies in it
    if info is INFO:
        assert sum(o.label == 0 for o in found) < 3


@pytest.mark.parametrize("info", [INFO, NO_BACKGROUND])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_masks_come_back_from_the_polygons(tmp_path: Path, info: DatasetInfo, width: float) -> None:
    """Down to structures of a pixel; only specks become what is nearest."""
    pytest.importorskip("pycocotools")
    noise = np.random.default_rng(0).normal(size=(3, 60, 80))
    label = ndimage.gaussian_filter(noise, (0, width, width)).argmax(0).astype(np.uint8)
    smooth = without_specks(label)
    assert (smooth != label).mean() < 0.1 / width
    path = write("coco", tmp_path, tmp_path, {"1.jpg": torch.from_numpy(label)}, info)
    numbers = {name: number for number, name in enumerate(info.classes)}
    shapes = read_coco(path).shapes(1)
    for by_area in (True, False):
        again = paint(shapes, numbers, 60, 80, by_area=by_area).label
        assert np.array_equal(again, smooth)


def test_an_image_of_specks_alone_stays_as_it_is() -> None:
    label = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    assert np.array_equal(without_specks(label), label)


def test_coco_as_its_own_library_reads_it(tmp_path: Path, mask: torch.Tensor) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    images = tmp_path / "images"
    path = write("coco", tmp_path, images, {"a/1.jpg": mask, "2.jpg": mask.flip(1)}, INFO)
    content = coco.COCO(str(path))
    assert {c["name"] for c in content.dataset["categories"]} == set(INFO.classes)
    for image, label in ((1, mask), (2, mask.flip(1))):
        again = np.zeros((60, 80), np.uint8)
        for annotation in content.loadAnns(content.getAnnIds(image)):
            name = content.cats[annotation["category_id"]]["name"]
            again[content.annToMask(annotation) > 0] = INFO.classes.index(name)
        assert (again == label.numpy()).mean() > 0.95


def test_labelme_beside_the_images(tmp_path: Path, mask: torch.Tensor) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    write("labelme", tmp_path, tmp_path / "images", {"a/1.jpg": mask}, INFO)
    content = json.loads((tmp_path / "images" / "a" / "1.json").read_text("utf-8"))
    assert (content["imagePath"], content["imageHeight"], content["imageWidth"]) == (
        "1.jpg",
        60,
        80,
    )
    shapes = [(INFO.classes.index(s["label"]), s["points"]) for s in content["shapes"]]
    assert (drawn(shapes, (60, 80)) == mask.numpy()).mean() > 0.98


def test_cvat_archive(tmp_path: Path, mask: torch.Tensor) -> None:
    with zipfile.ZipFile(write("cvat", tmp_path, tmp_path, {"a/1.jpg": mask}, INFO)) as archive:
        assert archive.read("labelmap.txt").decode().splitlines()[2] == "dog:200,0,0::"
        assert archive.read("ImageSets/Segmentation/default.txt") == b"a/1\n"
        picture = Image.open(io.BytesIO(archive.read("SegmentationClass/a/1.png")))
    assert np.array_equal(np.array(picture), np.array(COLOURS, np.uint8)[mask.numpy()])


def test_thousands_of_areas_take_seconds() -> None:
    """Each hole was compared with each area in Python: 5,000 areas took half a minute."""
    corners = np.stack(np.meshgrid(range(0, 300, 3), range(50), indexing="ij"), -1).reshape(
        -1, 1, 2
    )
    square = np.array([[0.0, 0.0], [2, 0], [2, 2], [0, 2]])
    areas = [Outline(1, corner + square, 4) for corner in corners]
    is_around = _areas_around(areas)
    began = time.process_time()
    inside = [is_around(Outline(0, corner + 1 + square / 4, 1)) for corner in corners]
    beside = [is_around(Outline(0, corner + 1 + square, 1)) for corner in corners[-50:-49]]
    assert time.process_time() - began < 5
    assert all(inside)
    assert not any(beside)
    assert not is_around(Outline(0, corners[0] + 1 + square / 4, 4))
