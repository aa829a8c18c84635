import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ctt.data.coco_json import decoded_runs, read_coco
from ctt.data.shapes import IGNORED, Shape, from_runs, outline, paint, pixels_of, rectangle
from ctt.errors import UserError

coco = pytest.importorskip("pycocotools.mask")
H, W = 6, 8
SQUARE = [[1, 1, 5, 1, 5, 4, 1, 4]]  # columns 1..4 of rows 1..3


def write(path: Path, *annotations: dict[str, Any], **over: Any) -> Path:
    """One image of H x W, the categories 7 cat and 3 dog."""
    values = {
        "images": [{"id": 5, "file_name": "a.jpg", "height": H, "width": W}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [{"id": i, "image_id": 5, **a} for i, a in enumerate(annotations)],
    }
    path.write_text(json.dumps(values | over))
    return path


def label_of(path: Path, **options: bool) -> list[list[int]]:
    shapes = read_coco(path).shapes(5, **options)
    return paint(shapes, {"cat": 1, "dog": 2}, H, W, by_area=True).label.tolist()


def square() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    expected = np.zeros((H, W), np.uint8)
    expected[1:4, 1:5] = 1
    return expected


def rle(form: str) -> Any:
    compressed = coco.encode(np.asfortranarray(square()))
    if form == "compressed":
        return {"size": [H, W], "counts": compressed["counts"].decode()}
    return {"size": [H, W], "counts": [H + 1, 3, 3, 3, 3, 3, 3, 3, 20]}


@pytest.mark.parametrize("form", ["polygon", "flat", "compressed", "uncompressed"])
def test_every_form_of_a_segmentation_gives_the_same_mask(tmp_path: Path, form: str) -> None:
    forms = {"polygon": SQUARE, "flat": SQUARE[0]}
    drawn = forms.get(form) or rle(form)
    path = write(tmp_path / "a.json", {"category_id": 7, "segmentation": drawn})
    assert label_of(path) == square().tolist()


def test_categories_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    assert list(read_coco(write(tmp_path / "a.json")).categories.values()) == ["dog", "cat"]


def test_small_shapes_lie_on_large_ones_whether_or_not_they_are_crowds(tmp_path: Path) -> None:
    small = {"category_id": 3, "segmentation": [[2, 2, 3, 2, 3, 3, 2, 3]]}
    large = {"category_id": 7, "segmentation": SQUARE}
    path = write(tmp_path / "a.json", small, large)
    expected = square()
    expected[2, 2] = 2
    assert label_of(path) == expected.tolist()
    shapes = read_coco(path).shapes(5)
    assert paint(shapes, {"cat": 1, "dog": 2}, H, W, by_area=True).clashes == 1
    assert paint(shapes, {"cat": 1, "dog": 1}, H, W, by_area=True).clashes == 0
    later = paint(shapes, {"cat": 1, "dog": 2}, H, W, by_area=False)
    assert later.label.tolist() == square().tolist()
    crowd = {"category_id": 3, "iscrowd": 1, "segmentation": rle("uncompressed")}
    path = write(tmp_path / "b.json", large, crowd)
    assert label_of(path) == square().tolist()  # of one size: what stands in the crowd is on top
    path = write(tmp_path / "d.json", small | {"iscrowd": 1}, large)
    assert label_of(path) == expected.tolist()
    path = write(tmp_path / "c.json", crowd)
    assert label_of(path) == (2 * square()).tolist()
    assert label_of(path, crowd=False) == (255 * square()).tolist()


def test_a_box_without_outline_is_ignored_and_strays_are_counted(tmp_path: Path) -> None:
    box = {"category_id": 7, "bbox": [1, 1, 4, 3], "segmentation": []}
    stray = {"category_id": 99, "segmentation": SQUARE}
    path = write(tmp_path / "a.json", box, stray)
    assert label_of(path) == (255 * square()).tolist()
    assert read_coco(path).strays == 1


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 1]], "at least 3 points"),
        ([[1, 1, 5, 1, 4]], "at least 3 points"),
        ([["a", 1, 5, 1, 4, 4]], "at least 3 points"),
        ([[float("nan"), 1, 5, 1, 4, 4]], "at least 3 points"),
        ([[1, 1, 1e9, 1, 5, 4]], "leads far out"),
        ({"size": [H, W], "counts": [1, 2]}, "the sum 6 . 8"),
        ({"size": [H, W], "counts": [-1, 49]}, "the sum 6 . 8"),
        ({"size": [H, W], "counts": [2**63, 1]}, "the sum 6 . 8"),
        ({"size": [H, W], "counts": "P"}, "neither a list of numbers"),
        ({"size": [H, W], "counts": "ooooooooooooooo0"}, "neither a list of numbers"),
        ({"size": [H, W], "counts": None}, "neither a list of numbers"),
        ({"size": [90000, 90000], "counts": [8_100_000_000]}, "the run-length code is of the size"),
        (None, "neither a segmentation nor a box"),
    ],
)
def test_hostile_segmentations_are_refused(tmp_path: Path, segmentation: Any, message: str) -> None:
    path = write(tmp_path / "a.json", {"category_id": 7, "segmentation": segmentation})
    with pytest.raises(UserError, match=message):
        label_of(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text("{"), "is no valid JSON"),
        (lambda path: path.write_text("[" * 100_000), "is no valid JSON .it is nested too deep"),
        (lambda path: path.write_bytes(b"\xff\xfe\xff"), "is no valid JSON"),
        (lambda path: path.write_text("[]"), "is no COCO file of instances"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: write(path, images=[]), "names no images"),
        (lambda path: write(path, images=[7]), "has no file_name"),
        (lambda path: write(path, images=[{"file_name": "a", "height": "x"}]), "has no height"),
        (lambda path: write(path, images=[{"file_name": "a"}]), "has no id"),
        (
            lambda path: write(path, images=[{"file_name": "a", "height": 1e5, "width": 1e5}]),
            "has more than 500,000,000 pixels",
        ),
        (lambda path: write(path, annotations=[7]), "is no annotation"),
    ],
)
def test_files_that_are_none(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    path = write(tmp_path / "a.json")
    change(path)
    with pytest.raises(UserError, match=message):
        read_coco(path)


@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 1)
    )
)
def test_compressed_runs_are_read_as_the_library_writes_them(mask: Any) -> None:
    runs = decoded_runs(coco.encode(np.asfortranarray(mask))["counts"].decode())
    assert np.array_equal(from_runs(runs, *mask.shape, by_columns=True), mask == 1)


def test_long_runs_have_more_than_one_sign() -> None:
    mask = np.zeros((700, 900), np.uint8, order="F")
    mask[300:, 400:] = 1
    runs = decoded_runs(coco.encode(mask)["counts"].decode())
    assert np.array_equal(from_runs(runs, 700, 900, by_columns=True), mask == 1)


def test_what_lies_outside_of_the_image_is_left_out() -> None:
    bitmap = np.ones((4, 4), np.bool_)
    assert pixels_of(Shape("a", bitmap=bitmap, left=-2, top=4), H, W).sum() == 2 * 2
    for left, top in ((20, -9), (W + 1, 0), (0, H + 1), (-9, 0)):  # outside on each side
        assert pixels_of(Shape("a", bitmap=bitmap, left=left, top=top), H, W).sum() == 0
    assert pixels_of(Shape("a", (rectangle(-5, -5, 50, 50),)), H, W).all()
    both = Shape(IGNORED, (outline(SQUARE[0]),), bitmap, left=4, top=2)
    assert pixels_of(both, H, W).sum() == 12 + 16 - 2
