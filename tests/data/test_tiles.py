"""Folders of large images cut into pieces."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt.cli import data as program
from ctt.data import open_dataset
from ctt.data.check import check_all
from ctt.data.folder import Folder
from ctt.data.options import DatasetOptions
from ctt.data.pictures import read_image
from ctt.data.rasters import read_bands
from ctt.data.tiles import Cut, cut, windows
from ctt.data.voc import bit_palette
from ctt.errors import UserError
from tests.data.rasters import LAYOUTS, ORIGIN, PIXEL, save, save_layout, write_rasters
from tests.data.trees import write_folder


def folder(root: Path, **options: float) -> Folder:
    dataset = open_dataset("folder", root, DatasetOptions(**options))  # type: ignore[arg-type]
    assert isinstance(dataset, Folder)
    return dataset


def together(root: Path, name: str, size: tuple[int, int], side: int) -> tuple[np.ndarray, ...]:
    """Image (3, H, W) and label (H, W) from the pieces of an image."""
    dataset, path = folder(root), Path(name)
    image, label = np.zeros((3, *size), np.uint8), np.zeros(size, np.uint8)
    for rows, columns in windows(*size, side):
        (piece,) = root.glob(f"{path.parent}/{path.stem}_{rows.start}_{columns.start}*")
        pair = dataset.pair(str(piece.relative_to(root)))
        image[:, rows, columns], label[rows, columns] = (part.numpy() for part in pair)
    return image, label


def test_pieces_are_of_nearly_one_size_and_cover_the_image() -> None:
    seen = np.zeros((50, 33), int)
    sizes = set()
    for rows, columns in windows(50, 33, 20):
        seen[rows, columns] += 1
        sizes.add((rows.stop - rows.start, columns.stop - columns.start))
    assert (seen == 1).all()
    assert sizes == {(17, 16), (17, 17), (16, 16), (16, 17)}
    assert [*windows(7, 9, 9)] == [(slice(0, 7), slice(0, 9))]


def test_rasters_keep_their_values_and_their_places(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    root = write_rasters(tmp_path / "d", labeled=2, unlabeled=1)
    with (root / "dataset.yaml").open("a") as file:
        file.write("bands: [1, 2, 3, 4]\nmask_suffix: _m\n")
    for path in (root / "masks").iterdir():
        path.rename(path.with_stem(f"{path.stem}_m"))
    assert cut(root, tmp_path / "t", 20) == Cut(labeled=18, unlabeled=9)
    for name in ("images/tile 1", "unlabeled/tile 2", "masks/tile 1"):
        end = "_m" if name.startswith("masks") else ""
        whole = read_bands(root / f"{name}{end}.tif")[0]
        for rows, columns in windows(48, 48, 20):
            path = tmp_path / "t" / f"{name}_{rows.start}_{columns.start}{end}.tif"
            assert np.array_equal(read_bands(path)[0], whole[:, rows, columns])
    with rasterio.open(tmp_path / "t" / "images" / "tile 1_16_32.tif") as piece:
        assert piece.crs.to_epsg() == 32633
        assert (piece.transform.c, piece.transform.f) == (
            ORIGIN[0] + (48 + 32) * PIXEL,
            ORIGIN[1] - 16 * PIXEL,
        )
    dataset = folder(tmp_path / "t")
    assert not check_all(dataset, dataset.train_ids(), dataset.unlabeled_ids(), 1, int).faults


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_look_as_their_image(tmp_path: Path, layout: str) -> None:
    """GDAL forgets what a file says of its values."""
    pytest.importorskip("rasterio")
    root = tmp_path / "d"
    save_layout(root / "images" / "a.tif", layout)
    save(root / "masks" / "a.tif", np.zeros((1, 20, 30), np.uint8))
    (root / "dataset.yaml").write_text("classes: [a, b]\n")
    assert cut(root, tmp_path / "t", 20) == Cut(labeled=2)
    whole = read_image(root / "images" / "a.tif")
    pieces = [read_image(tmp_path / "t" / "images" / f"a_0_{x}.tif") for x in (0, 15)]
    assert torch.equal(torch.cat(pieces, dim=2), whole)


def test_pieces_without_data_or_class(tmp_path: Path) -> None:
    """One raster is enough; nothing is held out of it, and no mask is read to do so."""
    pytest.importorskip("rasterio")
    image, mask = np.full((3, 40, 40), 90, np.uint8), np.full((1, 40, 40), 255, np.uint8)
    image[:, :20, :20] = 0
    mask[:, :, 30:], mask[:, 20:, 20:] = 1, 0
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "dataset.yaml").write_text("classes: [a, b]\n")
    for part in ("", "val"):
        place = tmp_path / "d" / part
        save(place / "images" / "x.tif", image, nodata=0, photometric="RGB")
        save(place / "masks" / "x.tif", mask, nodata=0)  # which is the first class as well
    found = cut(tmp_path / "d", tmp_path / "t", 20)
    # of four pieces one has no data, and one no class
    assert found == Cut(labeled=2, unlabeled=1, evaluation=2, without_class=1, left_out=3)
    written = {str(path.relative_to(tmp_path / "t")) for path in (tmp_path / "t").rglob("*.tif")}
    pieces = {f"{part}x_{at}.tif" for part in ("images/", "masks/") for at in ("0_20", "20_20")}
    expected = {*pieces, *(f"val/{piece}" for piece in pieces), "unlabeled/images/x_20_0.tif"}
    assert written == expected
    dataset = folder(tmp_path / "t")
    assert torch.equal(dataset.image("images/x_0_20.tif"), torch.full((3, 20, 20), 90).byte())
    assert not check_all(dataset, dataset.train_ids(), dataset.unlabeled_ids(), 1, int).faults


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_pictures_of_every_form_of_mask(tmp_path: Path, mode: str) -> None:
    palette = [list(colour) for colour in bit_palette(4)]
    said = f"classes: [background, a, b, c]\npalette: {palette}\nignore_color: [224, 224, 192]\n"
    root = write_folder(tmp_path / "d", size=(40, 56), labeled=2, mask_mode=mode, description=said)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = root / "images" / "photo 0.jpg"
    with Image.open(turned) as picture:
        picture.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif, quality=100)
    assert cut(root, tmp_path / "t", 32) == Cut(labeled=8, unlabeled=16, evaluation=8)
    before = folder(root)
    for name in ("images/photo 0.jpg", "val/images/größer/photo 1.jpg"):
        image, label = together(tmp_path / "t", name, (40, 56), 32)
        whole = before.pair(name)
        assert np.array_equal(image, whole[0].numpy())
        assert np.array_equal(label, whole[1].numpy())
        assert 255 in label


def test_masks_of_a_list_of_pairs_get_the_images_names(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d", labeled=2, unlabeled=0)
    (root / "masks" / "photo 0.png").rename(root / "masks" / "a.png")
    (root / "pairs.txt").write_text("images/photo 0.jpg\tmasks/a.png\n")
    with (root / "dataset.yaml").open("a") as file:
        file.write("pairs: pairs.txt\n")
    assert cut(root, tmp_path / "t", 100).labeled == 2
    assert (tmp_path / "t" / "masks" / "photo 0_0_0.png").is_file()
    assert folder(tmp_path / "t").description.info.classes == folder(root).info.classes


def test_the_command_and_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "d", size=(40, 48))
    to = ["--to", str(tmp_path / "t")]
    assert program._main(["tiles", str(root), *to, "--side", "24"]) == 0
    shown = capsys.readouterr().out
    assert "t: 24 pieces with masks, 8 to evaluate on, 16 without masks." in shown
    for arguments, message in (
        ([str(root)], "--to is needed"),
        ([str(root), *to, "--side", "0"], "must be at least 1"),
        ([str(root), *to], "holds something already"),
        ([str(root), "--to", str(root / "t")], "lies in"),
    ):
        with pytest.raises(UserError, match=message):
            program._main(["tiles", *arguments])
    Image.new("L", (9, 9)).save(root / "masks" / "photo 0.png")
    with pytest.raises(UserError, match="the mask has 9x9 pixels, but its image has 48x40"):
        cut(root, tmp_path / "u", 24)
    assert not (tmp_path / "u" / "dataset.yaml").exists()


def test_large_images_are_told_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rasterio")
    monkeypatch.setattr("ctt.data.remarks.LARGE", 2000)
    root = write_rasters(tmp_path / "d")
    with (root / "dataset.yaml").open("a") as file:
        file.write("bands: [1, 2, 3, 4]\n")
    dataset = folder(root)
    (told,) = dataset.remarks(dataset.train_ids())
    assert "have more than 2,000 pixels, such as" in told
    assert "`ctt-data tiles` cuts a folder into pieces" in told


def test_pages_that_are_not_read_are_not_in_the_pieces(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    root = write_folder(tmp_path / "d", size=(40, 48))
    grey = [Image.new("L", (48, 40), value) for value in (50, 120, 250)]
    (root / "images" / "photo 0.jpg").unlink()
    grey[0].save(root / "images" / "photo 0.tif", save_all=True, append_images=grey[1:])
    want = folder(root).image("images/photo 0.tif")
    cut(root, tmp_path / "t", 100)
    assert torch.equal(folder(tmp_path / "t").image("images/photo 0_0_0.tif"), want)


def test_broken_images_are_told(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d", size=(40, 48))
    image = root / "images" / "photo 0.jpg"
    whole = image.read_bytes()
    for some in (b"", whole[: len(whole) // 2]):
        image.write_bytes(some)
        with pytest.raises(UserError, match=r"photo 0.jpg cannot be read as an image"):
            cut(root, tmp_path / f"t{len(some)}", 24)
