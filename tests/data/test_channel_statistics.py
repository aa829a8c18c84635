"""ctt-data stats: what it writes is read by every other command, and fits how images are read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt.cli import data
from ctt.data.folder import Folder
from ctt.data.options import DatasetOptions
from ctt.errors import UserError
from tests.data.rasters import save

pytest.importorskip("rasterio")
RNG = np.random.default_rng(0)
GREY, RGB = (20, 30), (20, 30, 3)


@pytest.fixture(autouse=True)
def same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same values in a test whichever ran before it."""
    monkeypatch.setattr(f"{__name__}.RNG", np.random.default_rng(0))


def write_folder(root: Path, images: dict[str, np.ndarray], text: str = "") -> Path:
    """Write images (H, W) or (H, W, C), to train and to evaluate on."""
    (root / "val" / "images").mkdir(parents=True)
    (root / "images").mkdir()
    for name, values in images.items():
        for part in ("images", "val/images"):
            path = root / part / name
            if path.suffix == ".tif":
                save(path, values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0))
            else:
                Image.fromarray(values).save(path)
            mask = root / part.replace("images", "masks") / f"{path.stem}.png"
            mask.parent.mkdir(exist_ok=True)
            Image.fromarray(np.zeros(GREY, np.uint8)).save(mask)
    (root / "dataset.yaml").write_text(f"classes: [a, b]\n{text}")
    return root


def random(shape: tuple[int, ...], largest: int = 255) -> np.ndarray:
    return RNG.integers(0, largest + 1, shape).astype(np.uint8 if largest == 255 else np.uint16)


def written(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Folder, str]:
    """Return the folder as it is read after stats has written, and what it printed."""
    assert data._main(["stats", "--data-root", str(root), "--write"]) == 0
    return Folder(root, DatasetOptions()), " ".join(capsys.readouterr().out.split())


def is_normal(folder: Folder) -> bool:
    """Whether mean and std are those of the images as training reads them."""
    scale = 1 if folder.info.bands else 255
    pixels = torch.cat(
        [folder.image(name).float().flatten(1) / scale for name in folder.train_ids()], 1
    )
    found = [*pixels.mean(1).tolist(), *pixels.std(1).tolist()]
    return found == pytest.approx([*folder.info.mean, *folder.info.std], rel=0.01)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ({"a.png": random(GREY, 4095), "b.png": random(GREY, 4095)}, "white: 4095\n"),
        ({"a.png": random(RGB), "b.png": random(GREY)}, ""),
        ({"a.png": random(RGB), "b.tif": random(GREY)}, ""),
        ({"a.png": random(RGB), "b.png": random(GREY, 65535)}, ""),
        ({"a.png": random((20, 30, 4)), "b.png": random((20, 30, 4))}, ""),
        ({"a.png": random(GREY), "b.png": random(GREY)}, ""),
    ],
)
def test_images_that_are_read_as_rgb(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    images: dict[str, np.ndarray],
    text: str,
) -> None:
    root = write_folder(tmp_path / "d", images, text)
    folder, _ = written(root, capsys)
    assert (folder.info.bands, folder.info.white) == ((), 4095 if text else None)
    assert is_normal(folder)
    assert "says all of it already" in written(root, capsys)[1]


@pytest.mark.parametrize(
    ("images", "text", "bands", "comments"),
    [
        ({"a.tif": random((20, 30, 4), 4095)}, "mean: [0.5, 0.5, 0.5]\n", 4, ["mean"]),
        (
            {"a.tif": random((20, 30, 4))},
            "mean:\n- 0.5\n- 0.5\n- 0.5\n# kept\nstd: [0.2, 0.2,\n  0.2]\n",
            4,
            ["mean", "std"],
        ),
        ({"a.tif": random((20, 30, 2), 4095)}, "white: 4095 # of 12 bits\n", 2, ["white"]),
        ({"a.png": random(GREY, 4095)}, "", 1, []),
        ({"a.tif": random(GREY)}, "", 1, []),
    ],
)
def test_images_of_bands(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    images: dict[str, np.ndarray],
    text: str,
    bands: int,
    comments: list[str],
) -> None:
    root = write_folder(tmp_path / "d", images, text)
    folder, shown = written(root, capsys)
    assert len(folder.info.bands) == bands
    assert (folder.info.ranges[0][1] == 4095) == ("white" in comments)
    assert is_normal(folder)
    after = (root / "dataset.yaml").read_text()
    before = "".join(f"{'' if '# kept' in row else '# '}{row}\n" for row in text.splitlines())
    assert after.startswith(f"classes: [a, b]\n{before}bands: [1")
    assert (f"in place of {', '.join(comments)}:" in shown) == bool(comments)
    assert "says all of it already" in written(root, capsys)[1]


def test_images_without_bands_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice in the message holds."""
    images = {"a.tif": random((20, 30, 4), 4095), "b.tif": random((20, 30, 2), 4095)}
    root = write_folder(tmp_path / "d", images)
    with pytest.raises(UserError, match=r"such as `bands: \[1, 2\]`, or take one"):
        written(root, capsys)
    with (root / "dataset.yaml").open("a") as file:
        file.write("bands: [1, 2]\n")
    assert is_normal(written(root, capsys)[0])


def test_nothing_is_written_into_braces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "d", {"a.tif": random((20, 30, 4), 4095)})
    text = "{classes: [a, b], mean: [0.5, 0.5, 0.5]}"
    (root / "dataset.yaml").write_text(text)
    with pytest.raises(UserError, match=r"nothing is written.* by hand in place of mean: bands"):
        written(root, capsys)
    assert (root / "dataset.yaml").read_text() == text


@pytest.mark.parametrize("by", ["nodata", "mask"])
def test_pixels_without_data_of_colours_are_told_and_then_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    import rasterio

    root = write_folder(tmp_path / "d", {"a.png": random(RGB)})
    values = RNG.integers(1, 256, (3, 20, 30)).astype(np.uint8)
    values[:, :10] = 0  # a collar, as around orthophotos
    for part in ("images", "val/images"):
        (root / part / "a.png").unlink()
        path = root / part / "a.tif"
        options = {"photometric": "RGB", **({"nodata": 0} if by == "nodata" else {})}
        save(path, values, **options)
        if by == "mask":
            with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
                file.write_mask((values[0] > 0) * np.uint8(255))
    before = Folder(root, DatasetOptions())
    (told,) = before.remarks(before.train_ids())
    assert "1 of the 1 images looked at have pixels without data" in told
    folder, _ = written(root, capsys)
    assert folder.info.bands == (1, 2, 3)
    _, label = folder.pair("images/a.tif")
    assert (label[:10] == 255).all()
    assert (label[10:] != 255).all()
    assert folder.remarks(folder.train_ids()) == []


def test_images_of_two_depths_have_no_range_in_common(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {"a.tif": random((20, 30, 4)), "b.tif": random((20, 30, 4), 9000)}
    root = write_folder(tmp_path / "d", images)
    with pytest.raises(UserError, match=r"b.tif holds uint16, and .*a.tif uint8"):
        written(root, capsys)


def test_colours_of_16_bits_and_pixels_that_are_no_number_are_told(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d", {"a.tif": random(RGB, 4095)})
    save(root / "images" / "a.tif", random((3, 20, 30), 4095), photometric="RGB")
    folder = Folder(root, DatasetOptions())
    (told,) = folder.remarks(folder.train_ids())
    assert "have colours of 16 bits" in told
    assert "only the upper 8 bits are used" in told
    fractions = RNG.random(GREY).astype(np.float32)
    fractions[:3] = np.nan
    root = write_folder(tmp_path / "e", {"a.tif": fractions}, "white: 1\n")
    with pytest.raises(UserError, match=r"a.tif: the image has pixels that are no number"):
        Folder(root, DatasetOptions()).pair("images/a.tif")
