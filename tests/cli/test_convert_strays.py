"""ctt-data convert: files that belong to nothing, or to two images, cost themselves alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctt.data.exports.masks import _paint
from tests.cli.conftest import Call
from tests.data import exports

pytest.importorskip("pycocotools")


def beside(root: Path, *names: str) -> Path:
    """As Roboflow has it: images and masks with `_mask` in one folder; more masks by name."""
    exports.write_images(root, count=4)
    (root / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n2, dog\n")
    for name in ("photo 0_mask.png", "photo 1_mask.png", *names):
        Image.fromarray(exports.label()).save(root / name)
    return root


def test_masks_beside_images_need_one(tmp_path: Path, call: Call) -> None:
    """A mask is never an image without annotation."""
    names = ("photo 8_mask.png", "photo 2-mask.png")
    source = beside(tmp_path / "export" / "train", *names)
    code, out, _ = call(source.parent, "--to", tmp_path / "mine", "--form", "masks")
    assert (code, "2 images with masks, 2 without" in out) == (2, True)
    assert f"{source / names[0]}: by its end _mask it is a mask, and there is no image" in out
    assert f"{source / names[1]}: it seems to be the mask of train/photo 2, but the others" in out
    left = sorted(path.name for path in (tmp_path / "mine" / "unlabeled").iterdir())
    assert left == ["photo 2.jpg", "photo 3.jpg"]


def test_images_that_are_named_as_masks(tmp_path: Path, call: Call) -> None:
    """Those with a mask of their own are images; what was converted before is no stray."""
    names = ("photo 2-mask.png", "photo 2_mask.png", "photo 9_mask_mask.png")
    source = beside(tmp_path / "export", *names)
    (source / "photo 3.jpg").rename(source / "photo 9_mask.jpg")
    (source / "mine").mkdir()
    (source / "mine" / "dataset.yaml").write_text("classes: [background, cat, dog]\n")
    exports.write_images(source / "mine" / "unlabeled", 7, 1)
    (source / "mine/unlabeled/photo 7.jpg").rename(source / "mine/unlabeled/photo 7_mask.jpg")
    code, out, _ = call(source, "--to", source / "mine", "--form", "masks")
    assert (code, "4 images with masks, 1 without" in out) == (0, True)
    assert (source / "mine" / "masks" / "photo 9_mask.png").is_file()


@pytest.mark.parametrize("form", ["masks", "yolo"])
def test_an_annotation_of_two_images_is_of_neither(tmp_path: Path, call: Call, form: str) -> None:
    source, mine = exports.FORMS[form](tmp_path / "export"), tmp_path / "mine"
    image = next(source.rglob("photo 0.jpg"))
    exports.write_images(tmp_path / "more", 9, 1)
    other = image.with_suffix(".png")
    Image.open(tmp_path / "more" / "photo 9.jpg").save(other)
    code, out, _ = call(source, "--to", mine)
    assert (code, "3 images with masks, 2 without" in out) == (2, True)
    annotation = next(p for p in source.rglob("photo 0.*") if p not in (image, other))
    if form == "masks":
        annotation = source / "SegmentationClass" / "photo 0.png"
    assert f"{annotation} may be of {image} or of {other}; neither is used." in out
    assert not [*mine.rglob("photo 0.*")]


def test_links_that_lead_nowhere_cost_themselves_alone(tmp_path: Path, call: Call) -> None:
    source, photos = exports.coco(tmp_path / "export"), tmp_path / "photos"
    exports.write_images(photos, 8, 1)
    gone = [source / "images" / f"photo {i}.jpg" for i in (0, 5)]  # with and without annotation
    for path in gone:
        path.unlink()
    for path in (*gone, photos / "old.jpg"):
        path.symlink_to("nowhere.jpg")
    code, out, err = call(source, "--to", tmp_path / "mine", "--unlabeled", photos)
    assert (code, "3 images with masks, 2 without" in out) == (2, True)
    for path in (*gone, photos / "old.jpg"):
        assert f"{path}: the link leads to nowhere.jpg, which is not there." in out
    assert "3 files could not be used" in err
    source = exports.masks(tmp_path / "masks")
    path = source / "SegmentationClass" / "photo 0.png"
    path.unlink()
    path.symlink_to("nowhere.png")
    code, out, _ = call(source, "--to", tmp_path / "b")
    assert (code, "3 images with masks" in out) == (2, True)
    assert str(path) in out


def test_many_faults_are_told_once_for_each_kind(tmp_path: Path, call: Call) -> None:
    source, photos = exports.coco(tmp_path / "export"), tmp_path / "photos"
    (source / "images" / "photo 0.jpg").write_bytes(b"")
    photos.mkdir()
    for i in range(30):
        (photos / f"old {i}.jpg").symlink_to("nowhere.jpg")
    more = ("--unlabeled", photos)
    code, out, err = call(source, "--to", tmp_path / "a", *more)
    assert (code, out.count("which is not there"), "photo 0.jpg" in out) == (2, 1, True)
    assert "The same holds for 29 more." in out
    assert "31 files could not be used, see above, and with --show 0 every one;" in err
    assert call(source, "--to", tmp_path / "a", *more, "--show", 1)[1].count("which is not") == 1
    _, out, err = call(source, "--to", tmp_path / "a", *more, "--show", 0)
    assert (out.count("which is not there"), "31 files could not be used, see above;" in err) == (
        30,
        True,
    )


def test_files_of_other_programs_beside_those_of_cvat(tmp_path: Path, call: Call) -> None:
    """GDAL writes statistics beside each image that it opens."""
    source = exports.cvat(tmp_path / "export")
    (source / "images" / "photo 0.jpg.aux.xml").write_text("<PAMDataset>\n</PAMDataset>\n")
    for form in ("auto", "cvat"):
        code, out, _ = call(source, "--to", tmp_path / form, "--form", form)
        assert (code, "4 images with masks" in out) == (0, True)
    (source / "annotations.xml").unlink()
    _, _, err = call(source, "--to", tmp_path / "none", "--form", "cvat")
    assert "there is no .xml file with <annotations>, as CVAT for images 1.1 has it" in err


@pytest.mark.parametrize("form", exports.FORMS)
def test_hidden_files_are_left_out(tmp_path: Path, call: Call, form: str) -> None:
    """macOS writes one beside each file on disks of other systems."""
    source = exports.FORMS[form](tmp_path / "export")
    for path in [path for path in source.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7<annotations\xff\xfe")
    if form == "yolo":
        (source / "data.yaml").rename(source / "dataset.yaml")
        (source / "._data.yaml").unlink()
        (source / "._dataset.yaml").write_bytes(b"\xff\xfe")
    code, out, _ = call(source, "--to", tmp_path / "mine")
    assert (code, "4 images with masks, 2 without" in out) == (0, True)


def test_colours_are_counted_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy sorts the rows of an array ten times slower than numbers."""
    colours = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 1]], np.uint8)
    drawn = np.random.default_rng(0).integers(0, 3, (20, 30))
    path = tmp_path / "a.png"
    Image.fromarray(colours[drawn]).save(path)
    sort = np.unique

    def unique(values: np.ndarray, axis: None = None, **options: bool) -> tuple[np.ndarray, ...]:
        assert axis is None
        return sort(values, **options)

    monkeypatch.setattr(np, "unique", unique)
    painted = _paint(path, {(0, 0, 0): 0, (128, 0, 0): 1}, 0, path, 20, 30)
    assert painted.unmatched == (drawn == 2).sum()
    assert np.array_equal(painted.label, np.array([0, 1, 255], np.uint8)[drawn])
    assert (painted.example, dict(painted.dropped)) == ("[0, 128, 1] in a.png", {})


@pytest.mark.parametrize("step", [1, 300])
def test_greys_are_colours_of_equal_channels(tmp_path: Path, step: int) -> None:
    """Also those of 16 bits, which are no colour of a table unless they are small."""
    path = tmp_path / "a.png"
    values = np.array([[0, 7, 200], [7, 0, 0]], np.uint8 if step == 1 else np.uint16)
    Image.fromarray(values * step).save(path)
    painted = _paint(path, {(0, 0, 0): 4, (7, 7, 7): 5}, 0, path, 2, 3)
    seven = 5 if step == 1 else 255
    assert painted.label.tolist() == [[4, seven, 255], [seven, 4, 4]]
