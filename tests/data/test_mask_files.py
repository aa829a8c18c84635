"""Kinds of files that masks come in: what viewers show of them, and what they have lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctt.data.dataset import Dataset
from ctt.data.external_masks import ExternalMasks
from ctt.data.folder import Folder
from ctt.data.masks import read_mask
from ctt.data.options import DatasetOptions
from ctt.data.tiles import cut
from ctt.errors import UserError
from tests.data.rasters import save

DARK_OR_BRIGHT = np.kron(np.array([[0, 1], [1, 0]], np.uint8), np.ones((8, 8), np.uint8))
LABEL = torch.from_numpy(DARK_OR_BRIGHT)
THRESHOLD = "classes: [ground, thing]\nthreshold: 128\n"
GREYS = ["1 bit", "1 bit, TIFF", "white first", "2 bits", "4 bits", "palette", "8 bits"]


def write_folder(root: Path, text: str = THRESHOLD) -> Path:
    """Write a folder whose two images have no mask yet."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", LABEL.shape[::-1]).save(root / "images" / f"{name}.png")
    (root / "dataset.yaml").write_text(text, "utf-8")
    return root


def write_mask(folder: Path, kind: str) -> Path:
    """Write a mask that viewers show as black and white."""
    picture = Image.fromarray(DARK_OR_BRIGHT * 255)
    path = folder / ("a.tif" if kind in ("1 bit, TIFF", "white first") else "a.png")
    if kind.startswith("1 bit"):
        picture.convert("1").save(path)
    elif kind == "white first":
        save(path, 3 - DARK_OR_BRIGHT[None] * 3, nbits=2, photometric="MINISWHITE")
    elif kind in ("2 bits", "4 bits"):
        bits = int(kind[0])
        save(path, DARK_OR_BRIGHT[None] * (2**bits - 1), driver="PNG", nbits=bits)
    elif kind == "palette":
        picture = Image.fromarray(1 - DARK_OR_BRIGHT, mode="P")
        picture.putpalette([250, 250, 250, 3, 3, 3])
        picture.save(path)
    else:
        picture.save(path)
    return path


def opened(root: Path) -> Folder:
    return Folder(root, DatasetOptions())


@pytest.mark.parametrize("kind", GREYS)
def test_a_threshold_is_compared_with_what_viewers_show(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("rasterio")
    root = write_folder(tmp_path / "d")
    write_mask(root / "masks", kind)
    assert torch.equal(opened(root).label("images/a.png"), LABEL)
    (root / "masks" / "b.png").write_bytes((root / "images" / "b.png").read_bytes())
    assert cut(root, tmp_path / "tiles", 8).labeled == 8
    tiles = opened(tmp_path / "tiles")
    for row, column in ((0, 0), (0, 8), (8, 0), (8, 8)):
        ending = ".tif" if kind.endswith("TIFF") or kind == "white first" else ".png"
        assert (tmp_path / "tiles" / "masks" / f"a_{row}_{column}{ending}").is_file()
        assert (tiles.label(f"images/a_{row}_{column}.png") == LABEL[row, column]).all()


def test_a_threshold_and_palettes_that_are_not_grey(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d")
    picture = Image.fromarray(DARK_OR_BRIGHT, mode="P")
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.save(root / "masks" / "a.png")
    with pytest.raises(UserError, match=r"nothing says which class 2 colours mean.*\[200, 0, 0\]"):
        opened(root).label("images/a.png")
    picture = Image.fromarray(DARK_OR_BRIGHT * 255, mode="P")
    picture.putpalette([0, 0, 0] * 21)  # as the palette of PASCAL VOC's classes
    picture.save(root / "masks" / "a.png")
    with pytest.raises(UserError, match="numbers for which its palette has no colour"):
        opened(root).label("images/a.png")


def test_a_threshold_of_masks_of_16_bits(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d")
    values = DARK_OR_BRIGHT.astype(np.uint16) * 65535
    Image.fromarray(values).save(root / "masks" / "a.png")
    with pytest.raises(UserError, match=r"a.png: the mask has 16 bits.* such as 32768"):
        opened(root).label("images/a.png")
    (root / "dataset.yaml").write_text(THRESHOLD.replace("128", "32768"))
    assert torch.equal(opened(root).label("images/a.png"), LABEL)


def test_a_map_of_confidence_of_one_bit_is_black_or_white(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d", "classes: [ground, thing]\n")
    (tmp_path / "m" / "images").mkdir(parents=True)
    Image.fromarray(DARK_OR_BRIGHT).save(tmp_path / "m" / "images" / "a.png")
    sure = Image.fromarray(DARK_OR_BRIGHT * 255).convert("1")
    sure.save(tmp_path / "m" / "images" / "a_confidence.png")
    dataset: Dataset = opened_with_masks(root)
    packed = ExternalMasks(dataset, tmp_path / "m", tmp_path / "m").pair("images/a.png")[1]
    assert sorted(set(packed.flatten().tolist())) == [0, 255 << 8 | 1]


def opened_with_masks(root: Path) -> Folder:
    for name in ("a", "b"):
        Image.fromarray(DARK_OR_BRIGHT).save(root / "masks" / f"{name}.png")
    return opened(root)


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("a.png", {"format": "WEBP"}, "WEBP"),
        ("a.png", {"format": "WEBP", "lossless": True}, "WEBP"),
        ("a.png", {"format": "JPEG2000"}, "JPEG2000"),
        ("a.bmp", {"format": "PPM"}, "PPM"),
        ("a.tif", {"compression": "jpeg"}, "TIFF with jpeg compression"),
    ],
)
def test_files_that_may_have_changed_the_values_are_refused(
    tmp_path: Path, name: str, options: dict[str, Any], kind: str
) -> None:
    Image.fromarray(DARK_OR_BRIGHT).save(tmp_path / name, **options)
    with pytest.raises(UserError, match=rf"{name}: .* is stored as {kind}, .* Save masks as PNG"):
        read_mask(tmp_path / name)
    assert read_mask(tmp_path / name, lossy=True).values.shape[:2] == LABEL.shape


@pytest.mark.parametrize("compression", ["raw", "packbits", "tiff_lzw", "tiff_adobe_deflate"])
def test_tiffs_that_keep_the_values_are_read(tmp_path: Path, compression: str) -> None:
    Image.fromarray(DARK_OR_BRIGHT).save(tmp_path / "a.tif", compression=compression)
    assert np.array_equal(read_mask(tmp_path / "a.tif").values, DARK_OR_BRIGHT)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("int64", {}),
        ("uint64", {"compress": "deflate"}),
        ("float64", {"compress": "lzw"}),
        ("uint8", {"compress": "lerc"}),
        ("uint8", {"bigtiff": "YES", "endianness": "BIG"}),
        ("uint8", {"bigtiff": "YES", "endianness": "BIG", "nbits": 2}),
        ("uint16", {"bigtiff": "YES", "endianness": "BIG"}),
    ],
)
def test_tiffs_that_pillow_does_not_know(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    pytest.importorskip("rasterio")
    root = write_folder(tmp_path / "d", "classes: [ground, thing]\n")
    save(root / "masks" / "a.tif", DARK_OR_BRIGHT[None].astype(kind), **options)
    assert torch.equal(opened(root).label("images/a.png"), LABEL)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ("float64", {"compress": "lerc", "max_z_error": 0.4}, "TIFF with LERC compression"),
        (
            "uint8",
            {"compress": "jpeg", "bigtiff": "YES", "endianness": "BIG"},
            "TIFF with JPEG compression",
        ),
        ("half", {}, "the mask holds fractions"),
        ("complex64", {}, "the mask holds 1 x complex64"),
        ("channels", {}, "the mask holds 2 x int64"),
    ],
)
def test_tiffs_that_pillow_does_not_know_and_that_are_no_masks(
    tmp_path: Path, values: str, options: dict[str, Any], message: str
) -> None:
    pytest.importorskip("rasterio")
    pixels = DARK_OR_BRIGHT[None]
    if values == "half":
        pixels = pixels / np.float64(2)
    elif values == "channels":
        pixels = np.repeat(pixels, 2, 0).astype(np.int64)
    else:
        pixels = pixels.astype(values)
    save(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(UserError, match=rf"a\.tif: (the mask is stored as )?{message}"):
        read_mask(tmp_path / "a.tif")


def test_pieces_of_masks_that_have_lost_their_values(tmp_path: Path) -> None:
    """They are copied by rasterio, in whose files the loss would not show any more."""
    pytest.importorskip("rasterio")
    root = write_folder(tmp_path / "d", "classes: [ground, thing]\n")
    for name in ("a", "b"):
        Image.fromarray(DARK_OR_BRIGHT).save(root / "masks" / f"{name}.tif", compression="jpeg")
    with pytest.raises(UserError, match="the mask is stored as TIFF with JPEG compression"):
        cut(root, tmp_path / "tiles", 8)
