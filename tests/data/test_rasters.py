"""Images of any channels: reading, statistics, views."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt import data
from ctt.data.channel_statistics import lines, statistics
from ctt.data.channels import channels_of
from ctt.data.dataset import IGNORE, Dataset, DatasetInfo
from ctt.data.options import DatasetOptions
from ctt.data.pictures import ORIENTATION
from ctt.data.rasters import Raster, read_as, read_bands, size_of
from ctt.data.views import GeometricView, PhotometricView, normalize
from ctt.errors import UserError
from tests.data.rasters import save, write_rasters
from tests.data.trees import write_folder

rasterio = pytest.importorskip("rasterio")


def of(bands: tuple[int, ...], ranges: tuple[tuple[float, float], ...] = ()) -> DatasetInfo:
    count = len(bands)
    colours = ((0, 0, 0), (255, 255, 255))
    return DatasetInfo(
        "x", ("a", "b"), colours, (0.5,) * count, (0.25,) * count, None, bands, ranges
    )


def folder(root: Path) -> Dataset:
    return data.open_dataset("folder", root, DatasetOptions())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_channels_are_scaled_by_range_or_type(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, (5, 7, 9)).astype(dtype)
    save(tmp_path / "a.tif", values)
    raw, missing = read_bands(tmp_path / "a.tif")
    assert raw.dtype == dtype
    assert np.array_equal(raw, values)
    assert not missing.any()
    read = read_as(tmp_path / "a.tif", of((5, 1), ((0, 100), (-50, 150))))
    expected = np.stack([values[4] / 100, (values[0] + 50.0) / 200]).clip(0, 1)
    assert np.allclose(read, expected, atol=1e-6)
    if dtype.startswith("u"):
        largest = np.iinfo(dtype).max
        assert np.allclose(read_as(tmp_path / "a.tif", of((2,))), values[1:2] / largest)
    else:
        with pytest.raises(UserError, match="without a range of their own"):
            read_as(tmp_path / "a.tif", of((2,)))
    with pytest.raises(UserError, match=r"has 5 channels, and dataset\.yaml asks for channel 6"):
        read_as(tmp_path / "a.tif", of((6,)))


def test_pixels_without_data(tmp_path: Path) -> None:
    values = np.full((2, 4, 5), 100, np.uint16)
    values[:, 0] = 0
    values[0, 1] = 0  # data, as the other channel has some
    save(tmp_path / "a.tif", values, nodata=0)
    image = read_as(tmp_path / "a.tif", of((1, 2)))
    assert image[:, 0].isnan().all()
    assert image[:, 1:].isfinite().all()
    fractions = np.ones((2, 4, 5), np.float32)
    fractions[1, 2, 3] = np.nan
    save(tmp_path / "b.tif", fractions)
    missing = read_as(tmp_path / "b.tif", of((1, 2), ((0, 1), (0, 1)))).isnan()
    assert missing[:, 2, 3].all()
    assert missing.sum() == 2
    save(tmp_path / "c.tif", values)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(tmp_path / "c.tif", "r+") as file,
    ):
        file.write_mask(np.arange(20).reshape(4, 5) < 15)
    missing = read_as(tmp_path / "c.tif", of((1, 2))).isnan()
    assert missing[:, 3].all()
    assert not missing[:, :3].any()
    assert normalize(missing.float().log()[None], of((1, 2))).isfinite().all()


def test_transparency_of_a_tiff_is_a_channel(tmp_path: Path) -> None:
    values = np.zeros((4, 6, 6), np.uint8)
    values[3, 2:] = 7
    save(tmp_path / "a.tif", values, photometric="RGB", alpha="YES")
    image = read_as(tmp_path / "a.tif", of((4, 1)))
    assert image.isfinite().all()
    assert np.allclose(255 * image[0], values[3])


def test_pages_of_one_channel_are_channels(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((6, 8), 100 * i, np.uint16)) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    raw, _ = read_bands(tmp_path / "a.tif", (3, 2))
    assert raw[:, 0, 0].tolist() == [200, 100]
    odd = [pages[0], Image.fromarray(np.zeros((5, 5), np.uint16))]
    odd[0].save(tmp_path / "b.tif", save_all=True, append_images=odd[1:])
    with pytest.raises(UserError, match="holds 2 pages, which are not one channel"):
        read_bands(tmp_path / "b.tif")


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "P"])
def test_other_formats_keep_their_channels(tmp_path: Path, mode: str) -> None:
    count = {"L": 1, "I;16": 1, "P": 3}.get(mode, len(mode))
    kind = np.uint16 if mode == "I;16" else np.uint8
    values = np.random.default_rng(1).integers(0, 2, (6, 8, count)).astype(kind) * 200
    picture = Image.fromarray(values.squeeze(2) if count == 1 else values)
    picture = picture.quantize(8) if mode == "P" else picture
    picture.save(tmp_path / "a.png")
    raw, _ = read_bands(tmp_path / "a.png")
    assert np.array_equal(raw, np.moveaxis(values, 2, 0))


def test_sixteen_bits_of_colours_in_a_png(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 2**16, (3, 6, 8)).astype(np.uint16)
    options = {"driver": "PNG", "height": 6, "width": 8, "count": 3, "dtype": "uint16"}
    with (
        warnings.catch_warnings(action="ignore"),  # it has no coordinates
        rasterio.open(tmp_path / "a.png", "w", **options) as file,
    ):
        file.write(values)
    assert np.array_equal(read_bands(tmp_path / "a.png")[0], values)


def test_what_is_no_raster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tif").write_text('<VRTDataset rasterXSize="4" rasterYSize="4"></VRTDataset>')
    for path in (tmp_path / "a.tif", tmp_path / "none.tif", tmp_path / "none.png"):
        with pytest.raises(UserError, match=r"no such file|cannot be read as an image"):
            read_bands(path)
    save(tmp_path / "b.tif", np.zeros((1, 9, 9), np.uint8))
    monkeypatch.setenv("CTT_MAX_PIXELS", "80")
    with pytest.raises(UserError, match="has 9x9 pixels"):
        read_bands(tmp_path / "b.tif")


@pytest.mark.parametrize("kind", ["jpg", "webp", "bmp"])
def test_other_formats_are_no_rasters(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    Image.new("RGB", (6, 4)).save(file)
    with pytest.raises(UserError, match=r"only TIFF and PNG files are read .*without --geotiff"):
        Raster(file)


@pytest.mark.parametrize("big", [False, True])
def test_rasters_that_viewers_turn_are_refused(tmp_path: Path, big: bool) -> None:
    picture = Image.new("RGB", (6, 4), "red")
    for turn in range(1, 9):
        picture.save(tmp_path / "a.tif", tiffinfo={ORIENTATION: turn}, big_tiff=big)
        if turn == 1:
            assert read_bands(tmp_path / "a.tif")[0].shape == (3, 4, 6)
            continue
        with pytest.raises(UserError, match=rf"orientation {turn}\).*exiftool.*-auto-orient"):
            read_bands(tmp_path / "a.tif")
    # of which the tag cannot be read
    save(tmp_path / "b.tif", np.ones((5, 4, 6), np.uint16), BIGTIFF="YES", ENDIANNESS="BIG")
    assert read_bands(tmp_path / "b.tif")[0].shape == (5, 4, 6)


def test_pngs_that_viewers_turn_are_no_rasters(tmp_path: Path) -> None:
    note = Image.Exif()
    note[ORIENTATION] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png", exif=note)
    with pytest.raises(UserError, match="orientation 6"):
        Raster(tmp_path / "a.png")
    assert read_bands(tmp_path / "a.png")[0].shape == (3, 6, 4)  # turned, by Pillow


def test_a_window_is_a_part_of_the_whole(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 200, (3, 40, 50)).astype(np.uint16)
    save(tmp_path / "a.tif", values, tiled=True, blockxsize=16, blockysize=16)
    assert size_of(tmp_path / "a.tif", turned=True) == (40, 50)
    with Raster(tmp_path / "a.tif") as raster:
        assert raster.has_coordinates
        part, _ = raster.read((2,), rasterio.windows.Window(5, 7, 20, 10))
    assert np.array_equal(part, values[1:2, 7:17, 5:25])


def test_images_are_scaled_as_networks_were_trained(tmp_path: Path) -> None:
    """Whatever the dataset says by now: the active-learning loop computes its statistics anew."""
    root = write_rasters(tmp_path / "d")
    text = (root / "dataset.yaml").read_text()
    found = statistics(folder(root), (0, 100))
    (root / "dataset.yaml").write_text("\n".join([text, *lines(found)]))
    trained = folder(root).info
    expected = folder(root).image("images/tile 0.tif")
    wider = replace(found, ranges=tuple((low, 10 * high) for low, high in found.ranges))
    (root / "dataset.yaml").write_text("\n".join([text, *lines(wider)]))
    dataset = folder(root)
    assert not torch.allclose(dataset.image("images/tile 0.tif"), expected)
    (told,) = dataset.take_scale_of(trained)
    assert told.startswith("Images are read by the ranges")
    assert torch.equal(dataset.image("images/tile 0.tif"), expected)
    assert dataset.info == trained
    assert dataset.take_scale_of(trained) == []
    with pytest.raises(UserError, match=r"take RGB images, but .* has the channels 1, 2, 3, 4"):
        dataset.take_scale_of(replace(trained, bands=(), ranges=()))


def test_statistics_of_a_folder(tmp_path: Path) -> None:
    root = write_rasters(tmp_path / "d")
    with pytest.raises(UserError, match="ctt-data stats"):
        folder(root).image("images/tile 0.tif")
    found = statistics(folder(root), (0, 100))
    dataset = folder(root)
    names = [*dataset.train_ids(), *dataset.unlabeled_ids()]
    raw = np.stack([read_bands(root / name)[0] for name in names], axis=1).reshape(4, -1)
    assert found.pixels == raw.shape[1]
    assert found.low == tuple(raw.min(axis=1))
    assert found.ranges == tuple(zip(raw.min(axis=1), raw.max(axis=1), strict=True))
    unit = (raw - raw.min(axis=1)[:, None]) / np.ptp(raw, axis=1)[:, None]
    assert np.allclose(found.mean, unit.mean(axis=1))
    assert np.allclose(found.std, unit.std(axis=1))
    text = (root / "dataset.yaml").read_text()
    (root / "dataset.yaml").write_text("\n".join([text, *lines(found)]))
    dataset = folder(root)
    images = torch.stack([dataset.image(name) for name in names])
    normal = normalize(images, dataset.info)
    assert normal.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (normal.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3


def test_a_share_of_the_pixels_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_rasters(tmp_path / "d", labeled=2, unlabeled=1, side=64)
    whole = statistics(folder(root), (1, 99))
    monkeypatch.setattr("ctt.data.channel_statistics.SAMPLE", 3 * 4 * 1000)
    monkeypatch.setattr("ctt.data.channel_statistics.SIDE", 24)
    some = statistics(folder(root), (1, 99))
    assert 3000 <= some.pixels < 3100  # of the two that are not held out
    assert some.low == whole.low
    assert np.allclose(some.mean, whole.mean, atol=0.05)


def test_files_of_different_channels(tmp_path: Path) -> None:
    root = write_rasters(tmp_path / "d")
    save(root / "unlabeled" / "odd.tif", np.zeros((3, 8, 8), np.uint16))
    with pytest.raises(UserError, match=r"odd\.tif: the image has 3 channels"):
        statistics(folder(root), (0, 100))


def test_rgb_needs_mean_and_std_alone(tmp_path: Path) -> None:
    found = statistics(folder(write_folder(tmp_path / "d", labeled=3)), (0, 100))
    assert [line.partition(":")[0] for line in lines(found)] == ["mean", "std"]
    assert lines(found, ["mean", "std"]) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"range": [0, 1]}, "Say which channels of the files are read"),
        ({"bands": [0, 1]}, "by their numbers from 1"),
        ({"bands": [1, 1]}, "by their numbers from 1"),
        ({"bands": 4}, "by their numbers from 1"),
        ({"bands": [1, 2], "range": [5, 5]}, "the lowest and the highest value"),
        ({"bands": [1, 2], "range": [[0, 1]]}, "or 2 such pairs"),
        ({"bands": [1, 2], "mean": [0.5]}, "mean must be 2 numbers"),
        ({"bands": [1, 2], "std": [0.5, 0]}, "std must be 2 numbers"),
        ({"bands": [4, 2, 8], "shown": [1, 2, 8]}, "three of the bands"),
        ({"bands": [1], "white": 4095}, r"write `range: \[0, 4095\]`"),
    ],
)
def test_what_cannot_be_meant(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        channels_of(values, Path("dataset.yaml"))


def test_what_is_meant() -> None:
    said = {"bands": [4, 2, 8], "range": [0, 9], "shown": [8, 4, 2], "mean": [0, 0.5, 1]}
    found = channels_of(said, Path("x"))
    assert found.ranges == ((0, 9),) * 3
    assert found.shown == (2, 0, 1)
    assert found.mean == (0, 0.5, 1)
    assert channels_of({"bands": [7]}, Path("x")).shown == (0, 0, 0)


def test_a_crop_leaves_out_what_has_no_data() -> None:
    image = torch.rand(4, 20, 20)
    image[:, :, :10] = torch.nan
    view = GeometricView((20, 20), (1, 1), False, 0, 0, (0.1, 0.2, 0.3, 0.4))
    picture, label = view(image, torch.zeros(20, 20, dtype=torch.uint8), 0)
    assert torch.equal(label[:, :10], torch.full((20, 10), IGNORE, dtype=torch.uint8))
    assert not label[:, 10:].any()
    assert torch.allclose(picture[:, :, 10:], image[:, :, 10:], atol=1e-6)
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
    assert torch.allclose(picture[:, :, :10], mean.expand(4, 20, 10))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_photometric_views_without_colours(channels: int) -> None:
    images = 0.3 + 0.2 * torch.rand(64, channels, 8, 8)
    view = PhotometricView(0.25, 1, 0, (0.1, 1), grey_probability=1, colours=False)
    changed = view(images, torch.rand(view.DRAWS, 64))
    assert changed.shape == images.shape
    assert (changed != images).any()
    ratio = changed.mean(dim=(2, 3)) / images.mean(dim=(2, 3))  # (64, channels)
    assert ((ratio > 0.5) & (ratio < 1.6)).all()
    apart = (ratio.amax(dim=1) - ratio.amin(dim=1)).mean()
    assert apart > 0.05 if channels > 1 else apart == 0
    assert torch.allclose(ratio.mean(dim=0), torch.ones(channels), atol=0.1)


def test_a_label_is_ignored_where_there_is_no_data(tmp_path: Path) -> None:
    root = write_rasters(tmp_path / "d", unlabeled=0)
    values = np.full((4, 48, 48), 900, np.uint16)
    values[:, :5] = 0
    save(root / "images" / "tile 0.tif", values, nodata=0)
    (root / "dataset.yaml").write_text("classes: [a, b]\nbands: [1, 2, 3, 4]\nrange: [0, 3000]\n")
    dataset = folder(root)
    assert any("neither mean nor std" in note for note in dataset.notes)
    label = dataset.pair("images/tile 0.tif")[1]
    assert (label[:5] == IGNORE).all()
    assert (label[5:] != IGNORE).all()
