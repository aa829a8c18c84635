"""A folder of 4-band 16-bit GeoTIFFs, from its files to masks with coordinates."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctt.cli import data, predict, train
from ctt.data.remarks import traits
from ctt.errors import UserError
from tests.data.rasters import save, scene, write_rasters

rasterio = pytest.importorskip("rasterio")


def test_pages_are_counted_without_reading_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A raster may not fit into memory."""
    pages = [Image.fromarray(np.full((9, 8), value, np.uint16)) for value in (1, 2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    (read,) = traits([tmp_path / "a.tif"])
    monkeypatch.setattr(Image.Image, "load", None)
    (found,) = traits([tmp_path / "a.tif"], pixels=False)
    assert (read.pages, read.largest) == (found.pages, found.largest + 1) == (2, 1)


def test_from_rasters_to_masks_with_coordinates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_rasters(tmp_path / "d", unlabeled=2)
    image, _ = scene((48, 48), 4)
    image[:, :5] = 0
    save(root / "unlabeled" / "tile 4.tif", image, (0, 4 * 48), nodata=0)
    check = ["check", "--dataset", "folder", "--data-root", str(root), "--threads", "1"]
    with pytest.raises(UserError):
        data._main(check)
    assert "ctt-data stats" in " ".join(capsys.readouterr().out.split())
    assert data._main(["stats", "--data-root", str(root)]) == 0
    assert "bands" not in (root / "dataset.yaml").read_text()
    assert data._main(["stats", "--data-root", str(root), "--write"]) == 0
    assert "bands: [1, 2, 3, 4]\n" in (root / "dataset.yaml").read_text()
    assert data._main(["stats", "--data-root", str(root), "--write"]) == 0
    assert "says all of it already" in capsys.readouterr().out
    assert data._main(check) == 0
    run = tmp_path / "run"
    values = (
        "--dataset folder --recipe digits --ratio 1/1 --pairs 1 --model.width 4 --model.features 8 "
        "--data.crop 16 16 --data.batch-size 2 --train.iterations 2 --train.threads 1 "
        "--train.no-tensorboard --train.measured-images 1"
    )
    assert train._main([*values.split(), "--data-root", str(root), "--out", str(run)]) == 0
    out = tmp_path / "out"
    common = [str(run), str(root / "unlabeled"), "--out", str(out), "--workers", "0"]
    assert predict._main(common) == 0
    assert "--geotiff keeps them" in capsys.readouterr().out
    assert (out / "tile 4_overlay.png").is_file()
    masks = [np.array(Image.open(out / f"tile {i}_mask.png")) for i in (4, 5)]
    assert (masks[0][:5] == 255).all()
    assert not (masks[0][5:] == 255).any()
    assert not (masks[1] == 255).any()
    tiled = [*common, "--geotiff", "--confidence", "--tile", "32", "--margin", "16"]
    loaded: list[object] = []
    with monkeypatch.context() as patched:
        patched.setattr("PIL.TiffImagePlugin.TiffImageFile.load", loaded.append)
        assert predict._main(tiled) == 0
    assert not loaded
    for file in sorted((root / "unlabeled").glob("*.tif")):
        for kind in ("mask", "confidence"):
            given = rasterio.open(file)
            found = rasterio.open(out / f"{file.stem}_{kind}.tif")
            assert found.transform == given.transform
            assert (found.crs, found.shape, found.count) == (given.crs, given.shape, 1)
    with pytest.raises(UserError, match="is there already"):
        predict._main(tiled)
    with pytest.raises(UserError, match="must be a multiple of 16"):
        predict._main([*tiled[:-4], "--tile", "100"])
    (root / "unlabeled" / "broken.tif").write_text("no image")
    Image.new("RGB", (48, 48)).save(root / "unlabeled" / "photo.jpg")
    assert predict._main([*tiled, "--skip-existing"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "broken.tif cannot be read" in told
    assert "photo.jpg: as a raster only TIFF and PNG files are read" in told
    assert not list(out.glob("*.part"))


def test_a_raster_that_was_annotated_moves_to_the_labelled_ones(tmp_path: Path) -> None:
    """Pillow does not know its four channels of 16 bits, so its size is that which GDAL reads."""
    root, copies = write_rasters(tmp_path / "d", labeled=1, unlabeled=1), tmp_path / "copies"
    shutil.copytree(root / "unlabeled", copies)
    points = [[0, 0], [8, 0], [8, 6], [0, 6]]
    shape = {"label": "field", "shape_type": "polygon", "points": points}
    drawn = {"shapes": [shape], "imagePath": "tile 1.tif"}
    (copies / "tile 1.json").write_text(json.dumps(drawn))
    assert data._main(["convert", str(copies), "--to", str(root)]) == 0
    mask = np.array(Image.open(root / "masks" / "tile 1.png"))
    assert mask.shape == (48, 48)
    assert (mask[:6, :8] == 1).all()
    assert mask.sum() == 48
    assert (root / "images" / "tile 1.tif").is_file()
    assert not (root / "unlabeled" / "tile 1.tif").exists()
