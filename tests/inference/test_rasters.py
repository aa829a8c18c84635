"""Predictions of rasters, tile by tile."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctt import models
from ctt.data.dataset import DatasetInfo
from ctt.data.pictures import read_image
from ctt.data.rasters import Raster, read_as
from ctt.data.views import to_unit
from ctt.errors import UserError
from ctt.inference.predict import predictor
from ctt.inference.rasters import cells_of, fitted, for_network, predict_raster, windows
from ctt.settings import EvalSettings
from tests.data.rasters import LAYOUTS, save, save_layout, scene

rasterio = pytest.importorskip("rasterio")

RANGE = (0.0, 3000.0)
COLOURS = ((10, 20, 30), (255, 0, 0))
BANDS = DatasetInfo(
    "x",
    ("soil", "Grün"),
    COLOURS,
    (0.3,) * 4,
    (0.2,) * 4,
    bands=(4, 1, 2, 3),
    ranges=((0, 3e3),) * 4,
)
RGB = DatasetInfo("x", ("soil", "Grün"), COLOURS, (0.5,) * 3, (0.2,) * 3)


def test_windows_cover_every_pixel_once() -> None:
    seen = np.zeros((70, 53), int)
    for own, around in windows(70, 53, 16, 5):
        seen[own] += 1
        for side, wide, end in zip(own, around, seen.shape, strict=True):
            assert wide.start == max(0, side.start - 5)
            assert wide.stop == min(end, side.stop + 5)
    assert (seen == 1).all()


def test_tiles_give_what_the_whole_image_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image, _ = scene((100, 141), 0)
    image[:, 3:9, 20:40] = 0
    save(tmp_path / "a.tif", image, (50, 60), nodata=0)
    predict = predictor(models.build("small", 2, 4, 4, channels=4).eval(), BANDS, EvalSettings())
    targets = {"mask": tmp_path / "m.tif", "confidence": tmp_path / "c.tif"}
    done: list[float] = []
    # the margin is more than the network sees around a pixel
    predict_raster(tmp_path / "a.tif", targets, predict, BANDS, 32, 96, done.append)
    assert sum(done) == pytest.approx(1)
    with torch.no_grad():
        whole = read_as(tmp_path / "a.tif", BANDS)
        confidence, label = predict(whole[None])[0].max(dim=0)
    label[3:9, 20:40], confidence[3:9, 20:40] = 255, 0
    with rasterio.open(tmp_path / "a.tif") as given, rasterio.open(tmp_path / "m.tif") as mask:
        assert mask.transform == given.transform
        assert mask.crs == given.crs
        assert mask.nodata == 255
        assert mask.colormap(1)[1] == (255, 0, 0, 255)
        assert json.loads(mask.tags()["classes"]) == ["soil", "Grün"]
        assert np.array_equal(mask.read(1), label.numpy())
    with rasterio.open(tmp_path / "c.tif") as sure:
        assert np.abs(sure.read(1) - 255 * confidence.numpy()).max() <= 1


@pytest.mark.parametrize(
    ("name", "backbone", "cells"),
    [
        ("small", "", 8),
        ("deeplabv3plus", "test_resnet", 16),
        ("vit", "test_vit", 16),
        ("smp:unet", "resnet18", 32),
    ],
)
def test_cells_are_those_of_the_coarsest_map(name: str, backbone: str, cells: int) -> None:
    network = models.build(name, 2, 8, 4, backbone=backbone, channels=3).eval()
    assert cells_of([network], EvalSettings()) == cells
    assert cells_of([network], EvalSettings(scales=(0.5, 1, 1.5))) == 2 * cells
    assert fitted(512, 64, cells) == (512, 64)


@pytest.mark.parametrize(("scale", "margin"), [(1.0, 101), (0.5, 197)])
def test_any_margin_is_rounded_up_to_what_gives_the_whole_image(
    tmp_path: Path, scale: float, margin: int
) -> None:
    torch.manual_seed(0)
    save(tmp_path / "a.tif", scene((200, 304), 0)[0])
    network, protocol = models.build("small", 2, 4, 4, channels=4).eval(), EvalSettings()
    protocol = replace(protocol, scales=(scale,))
    predict = predictor(network, BANDS, protocol)
    tile, rounded = fitted(72, margin, cells_of([network], protocol))
    assert 0 < rounded - margin < 16
    targets = {"mask": tmp_path / "m.tif", "confidence": tmp_path / "c.tif"}
    predict_raster(tmp_path / "a.tif", targets, predict, BANDS, tile, rounded)
    with torch.no_grad():
        confidence = predict(read_as(tmp_path / "a.tif", BANDS)[None])[0].amax(dim=0)
    with rasterio.open(tmp_path / "c.tif") as sure:
        assert np.abs(sure.read(1) - 255 * confidence.numpy()).max() <= 1


def test_a_full_disk_keeps_the_old_mask(
    tmp_path: Path, no_room: Callable[[], AbstractContextManager[None]]
) -> None:
    """GDAL writes what is left when it closes a file, and says nothing if there is no room."""
    save(tmp_path / "a.tif", scene((300, 300), 0)[0])
    target = tmp_path / "m.tif"
    target.write_bytes(b"old")

    def noise(images: Tensor) -> Tensor:
        return torch.rand(len(images), 2, *images.shape[2:]).softmax(dim=1)

    with no_room(), pytest.raises(UserError, match=r"m\.tif cannot be written"):
        predict_raster(tmp_path / "a.tif", {"mask": target}, noise, BANDS, 64, 16)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "m.tif"]


def test_a_new_mask_has_no_overviews_of_the_old_one(tmp_path: Path) -> None:
    image, targets = tmp_path / "a.tif", {"mask": tmp_path / "m.tif"}
    save(image, scene((300, 300), 0)[0])
    for label in (0, 1):
        chosen = torch.eye(2)[label][:, None, None]
        predict_raster(image, targets, lambda x, p=chosen: p.expand(len(x), 2, *x.shape[2:]), BANDS)
        with rasterio.open(tmp_path / "m.tif") as mask:
            assert set(np.unique(mask.read(1, out_shape=(30, 30)))) <= {label, 255}
        with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(tmp_path / "m.tif", "r+") as mask:
            mask.build_overviews([2, 4, 8])
        (tmp_path / "m.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")
        assert (tmp_path / "m.tif.ovr").is_file()


@pytest.mark.parametrize("kind", ["rgb", "rgb and infrared", "grey", "grey 16", "palette"])
def test_rgb_networks_read_rasters_as_they_read_files(tmp_path: Path, kind: str) -> None:
    count = {"rgb": 3, "rgb and infrared": 4}.get(kind, 1)
    values = np.random.default_rng(0).integers(0, 250, (count, 20, 30)).astype(np.uint8)
    if kind == "palette":
        picture = Image.fromarray(values[0] % 7).convert("P")
        picture.putpalette(list(range(21)))
        picture.save(tmp_path / "a.tif")
    else:
        values = values.astype(np.uint16) * 200 if kind == "grey 16" else values
        save(tmp_path / "a.tif", values)
    window = rasterio.windows.Window(4, 2, 20, 10)
    with Raster(tmp_path / "a.tif") as raster:
        part = for_network(raster, window, RGB)
    whole = read_image(tmp_path / "a.tif").float() / 255
    assert torch.allclose(part, whole[:, 2:12, 4:24])


def save_png(path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (20, 30, 4)).astype(np.uint8)
    if kind == "opacity":
        Image.fromarray(values).save(path)
    elif kind == "grey and opacity":
        Image.fromarray(values[..., :2].copy(), "LA").save(path)
    elif kind == "one clear colour":
        values[:10, :, :3] = 1, 2, 3
        Image.fromarray(values[..., :3].copy()).save(path, transparency=(1, 2, 3))
    elif kind == "palette":
        picture = Image.fromarray(values[..., 0] % 4).convert("P")
        picture.putpalette([*range(0, 120, 10)])
        picture.save(path, transparency=b"\0\x64")
    elif kind == "1 bit":
        Image.fromarray(values[..., 0] > 99).save(path)
    else:
        deep = rng.integers(0, 2**16, (4, 20, 30)).astype(np.uint16)
        count = {"16 bits": 1, "colours of 16 bits": 4}[kind]
        save(path, deep[:count], driver="PNG")


@pytest.mark.parametrize("info", [RGB, replace(RGB, bands=(1,))], ids=["rgb", "channels"])
@pytest.mark.parametrize(
    "kind",
    [
        *LAYOUTS,
        "opacity",
        "grey and opacity",
        "one clear colour",
        "palette",
        "1 bit",
        "16 bits",
        "colours of 16 bits",
    ],
)
def test_unusual_files_are_read_in_windows_as_whole(
    tmp_path: Path, kind: str, info: DatasetInfo
) -> None:
    path = tmp_path / ("a.tif" if kind in LAYOUTS else "a.png")
    save_layout(path, kind) if kind in LAYOUTS else save_png(path, kind)
    whole = to_unit(read_as(path, info))[:, 2:12, 4:24]
    with Raster(path) as raster:
        part = for_network(raster, rasterio.windows.Window(4, 2, 20, 10), info)
    torch.testing.assert_close(part, whole)


def test_an_rgb_network_sees_the_first_page(tmp_path: Path) -> None:
    """Pages of one channel each are channels for a network of channels alone."""
    pages = [Image.new("L", (9, 8), value) for value in (10, 20, 30)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with Raster(tmp_path / "a.tif") as raster:
        assert (for_network(raster, None, RGB) == 10 / 255).all()


def test_what_reading_in_windows_would_change_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "lab.tif", np.zeros((3, 8, 8), np.uint8), photometric="CIELAB")
    save(tmp_path / "deep.tif", np.zeros((3, 8, 8), np.uint16), photometric="RGB")
    with Raster(tmp_path / "lab.tif") as raster, pytest.raises(UserError, match="CIELAB"):
        for_network(raster, None, RGB)
    with Raster(tmp_path / "deep.tif") as raster, pytest.raises(UserError, match="`white` is for"):
        for_network(raster, None, replace(RGB, white=4095))


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0)])
def test_rgb_networks_see_the_mean_where_a_raster_has_no_data(
    tmp_path: Path, scales: tuple[float, ...]
) -> None:
    """NaN would spread over all that the network sees around it."""
    image, _ = scene((40, 60), 0)
    image = (image[:3] // 20).astype(np.uint8) + 1
    image[:, 3:9, 20:40] = 0
    save(tmp_path / "a.tif", image, nodata=0)
    network = models.build("small", 2, 4, 4).eval()
    found = predictor(network, RGB, EvalSettings(scales=scales))
    filled = torch.from_numpy(image).float() / 255
    filled[:, 3:9, 20:40] = 0.5
    with Raster(tmp_path / "a.tif") as raster, torch.no_grad():
        torch.testing.assert_close(found(for_network(raster, None, RGB)[None]), found(filled[None]))


def test_rasters_of_other_numbers_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.tif", np.zeros((3, 8, 8), np.float32))
    with Raster(tmp_path / "a.tif") as raster, pytest.raises(UserError, match="holds float32"):
        for_network(raster, None, RGB)
    save(tmp_path / "b.tif", np.zeros((4, 8, 8), np.complex64))
    with pytest.raises(UserError, match="holds complex numbers"):
        read_as(tmp_path / "b.tif", BANDS)


def bright(images: Tensor) -> Tensor:
    """Class 1 where the first channel is bright: a network that takes no time."""
    first = images[:, :1]
    return torch.cat([1 - first, first], dim=1)


def peak(side: int, folder: Path) -> int:
    """MiB that a process takes at most to predict a raster of that side."""
    file = folder / f"{side}.tif"
    options = {"tiled": True, "blockxsize": 256, "blockysize": 256, "SPARSE_OK": True}
    with rasterio.open(
        file, "w", driver="GTiff", height=side, width=side, count=4, dtype="uint16", **options
    ) as raster:
        raster.write(np.full((1, 64, 64), 2900, np.uint16)[0], 1, window=((0, 64), (0, 64)))
    code = (
        "import sys; from pathlib import Path; from tests.inference.test_rasters import *;"
        "predict_raster(Path(sys.argv[1]), {'mask': Path(sys.argv[1] + '.mask')}, bright, BANDS);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(file)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    return int(done.stdout) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads what Linux tells")
@pytest.mark.filterwarnings("ignore")
def test_memory_does_not_grow_with_the_raster(tmp_path: Path) -> None:
    """The second one has 16 times the pixels of the first, 151 MB as the network takes them."""
    small, large = peak(768, tmp_path), peak(3072, tmp_path)
    assert large - small < 90  # GDAL's blocks, at most `CACHE`
