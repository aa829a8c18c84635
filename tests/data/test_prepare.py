import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ctt import data
from ctt.data import prepare
from ctt.data.digits import Digits
from ctt.data.options import DatasetOptions
from ctt.data.prepare import Prepared, resize_image, resize_label
from ctt.errors import UserError
from tests.data import trees


def test_resize_comes_before_all_else(tmp_path: Path) -> None:
    dataset = data.open_dataset("cityscapes", trees.write_cityscapes(tmp_path), DatasetOptions())
    small = Prepared(dataset, (16, 32), None)
    for name in dataset.train_ids():
        image, label = small.pair(name)
        assert torch.equal(image, resize_image(dataset.image(name), (16, 32)))
        assert torch.equal(label, resize_label(dataset.label(name), (16, 32)))
        assert set(label.unique().tolist()) <= set(dataset.label(name).unique().tolist())
        assert torch.equal(small.image(name), image)


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 4), (3, 2), (20, 30)])
def test_bytes_are_resized_as_numbers_are(size: tuple[int, int]) -> None:
    for shape in ((3, 12, 9), (3, 7, 1), (1, 1, 8), (4, 2, 2)):
        image = torch.randint(256, shape, dtype=torch.uint8)
        exact = F.interpolate(image[None].double(), size, mode="bilinear", antialias=True)[0]
        found = resize_image(image, size)
        assert found.dtype == torch.uint8
        torch.testing.assert_close(found.double(), exact, atol=1.5, rtol=0)


@pytest.mark.parametrize("size", [None, (20, 30)])
def test_a_cache_gives_what_the_files_hold(tmp_path: Path, size: tuple[int, int] | None) -> None:
    dataset = data.open_dataset("voc", trees.write_voc(tmp_path / "data"), DatasetOptions())
    plain, kept = Prepared(dataset, size, None), Prepared(dataset, size, tmp_path / "new" / "cache")
    for _ in range(2):
        for name in dataset.train_ids():
            for one, other in zip(plain.pair(name), kept.pair(name), strict=True):
                assert torch.equal(one, other)
    files = sorted((tmp_path / "new" / "cache").iterdir())
    assert len(files) == 2 * len(dataset.train_ids())
    (tmp_path / "own").touch()
    assert {file.stat().st_mode for file in files} == {(tmp_path / "own").stat().st_mode}
    height, width = size or (40, 50)
    pixels = len(dataset.train_ids()) * height * width
    assert 4 * pixels <= sum(file.stat().st_size for file in files) <= 4 * pixels + 128 * len(files)


def test_a_cache_reads_no_file_twice_and_notices_a_change(tmp_path: Path) -> None:
    folder = trees.write_voc(tmp_path / "data")
    dataset = data.open_dataset("voc", folder, DatasetOptions())
    kept = Prepared(dataset, None, tmp_path / "cache")
    name = dataset.train_ids()[0]
    before = kept.image(name)
    path = dataset.files(name, labeled=False)[0]
    state = path.stat()
    path.write_bytes(b"x" * state.st_size)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert torch.equal(kept.image(name), before)
    trees.save_image(path, trees.picture((30, 60), (3,), 5)[0])
    assert kept.image(name).shape == (3, 30, 60)
    with pytest.raises(UserError, match=r"the mask has 50x40 pixels, but its image .* has 60x30"):
        kept.pair(name)


def test_a_cache_of_another_version_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = data.open_dataset("voc", trees.write_voc(tmp_path / "data"), DatasetOptions())
    kept = Prepared(dataset, None, tmp_path / "cache")
    name = dataset.train_ids()[0]
    kept.pair(name)
    count = len(list((tmp_path / "cache").iterdir()))
    kept.pair(name)
    assert len(list((tmp_path / "cache").iterdir())) == count
    monkeypatch.setattr(prepare, "__version__", "0.0.0")
    kept.pair(name)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * count


def test_a_torn_file_of_the_cache_is_read_anew(tmp_path: Path) -> None:
    dataset = data.open_dataset("voc", trees.write_voc(tmp_path / "data"), DatasetOptions())
    kept = Prepared(dataset, None, tmp_path / "cache")
    name = dataset.train_ids()[0]
    before = kept.image(name).clone()
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(kept.image(name), before)


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    dataset = data.open_dataset("voc", trees.write_voc(tmp_path / "data"), DatasetOptions())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"`data\.cache` .* cannot be written .*, or None"):
        Prepared(dataset, None, tmp_path / "file").image(dataset.train_ids()[0])


def test_a_file_that_another_process_wrote_and_reads_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows replaces no file that is mapped into memory."""
    dataset = data.open_dataset("voc", trees.write_voc(tmp_path / "data"), DatasetOptions())
    kept, name = Prepared(dataset, None, tmp_path / "cache"), dataset.train_ids()[0]
    replace = Path.replace

    def race(part: Path, path: Path) -> None:
        replace(part, path)
        part.touch()
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(Path, "replace", race)
    assert torch.equal(kept.image(name), dataset.image(name))
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npy"]


def test_a_label_in_the_cache_follows_its_image(tmp_path: Path) -> None:
    """Where an image of bands has no data, its label is 255."""
    pytest.importorskip("rasterio")
    from tests.data.rasters import save, scene

    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "dataset.yaml").write_text("classes: [a, b]\nbands: [1, 2]\nrange: [0, 3000]\n")
    image, mask = scene((30, 40), 0)
    image = image[:2] + 1
    for name in ("one", "two"):
        save(tmp_path / "images" / f"{name}.tif", image, nodata=0)
        trees.save_image(tmp_path / "masks" / f"{name}.png", mask)
    dataset = data.open_dataset("folder", tmp_path, DatasetOptions())
    kept, name = Prepared(dataset, None, tmp_path / "cache"), dataset.train_ids()[0]
    assert not (kept.label(name) == 255).any()
    image[:, :4] = 0
    save(dataset.files(name, labeled=False)[0], image, nodata=0)
    assert (kept.label(name)[:4] == 255).all()


def test_images_in_memory_are_not_cached(tmp_path: Path) -> None:
    dataset = Digits(3, 1)
    kept = Prepared(dataset, None, tmp_path / "cache")
    assert torch.equal(kept.image("train-0"), dataset.image("train-0"))
    assert not (tmp_path / "cache").exists()
