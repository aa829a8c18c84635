"""A folder as people have it: names, endings, forms and faults of every kind, side by side."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt.cli import data as program
from ctt.cli.predict import find_jobs
from ctt.data import open_dataset
from ctt.data.options import DatasetOptions
from ctt.errors import UserError
from tests.data.trees import picture

NAMES = ("Straße 1.JPG", "grün.jpeg", "a b.PNG", "klar.png", "gedreht.jpg", "grau.jpg")
SIZES = ((40, 48), (32, 60), (48, 40), (40, 40), (36, 52), (40, 48))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images with masks, four without; one of these is cut off, two are of other forms."""
    root = tmp_path / "meine Bilder"
    for part in ("images", "masks", "unlabeled"):
        (root / part).mkdir(parents=True)
    for i, (name, size) in enumerate(zip(NAMES, SIZES, strict=True)):
        pixels, label = picture(size, (1, 2), i)
        label[label == 255] = 0
        image, mask = Image.fromarray(pixels), Image.fromarray(label)
        options = {}
        if name == "klar.png":
            image.putalpha(200)
        elif name == "gedreht.jpg":
            image, options["exif"] = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
            options["exif"][0x0112] = 6
        elif name == "grau.jpg":
            image = image.convert("L")
        image.save(root / "images" / name, **options)
        ending = ".PNG" if name == "a b.PNG" else ".png"
        mask = Image.merge("RGB", [mask] * 3) if i == 0 else mask
        mask.save(root / "masks" / f"{Path(name).stem}{ending}")
        shutil.copy(root / "images" / name, root / "unlabeled" / f"Übung {i}{Path(name).suffix}")
    whole = (root / "unlabeled" / "Übung 0.JPG").read_bytes()
    (root / "unlabeled" / "kaputt.jpg").write_bytes(whole[: len(whole) // 2])
    for name in ("IMG_1.HEIC", "IMG_2.heic", "Thumbs.db", "._Übung 0.JPG"):
        (root / "unlabeled" / name).write_bytes(b"x")
    (root / "dataset.yaml").write_text("classes: [background, rot, blau]\n", "utf-8")
    return root


def test_each_image_meets_its_mask(root: Path) -> None:
    dataset = open_dataset("folder", root, DatasetOptions())
    assert len(dataset.unlabeled_ids()) == 7
    names = [*dataset.train_ids(), *dataset.eval_ids()]
    assert {Path(name).name for name in names} == set(NAMES)
    for name in names:
        image, label = dataset.pair(name)
        i = NAMES.index(Path(name).name)
        assert image.shape == (3, *SIZES[i])
        expected = picture(SIZES[i], (1, 2), i)[1] % 255
        assert torch.equal(label, torch.from_numpy(expected.astype(np.uint8)))


def test_what_is_wrong_or_not_read_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = root / "masks" / "grau.png"
    Image.open(mask).convert("RGB").save(mask.with_suffix(".jpg"))
    mask.unlink()
    with pytest.raises(UserError, match="2 faults found"):
        program._main(["check", "--dataset", "folder", "--data-root", str(root)])
    shown = capsys.readouterr().out
    for text in (
        "grau.jpg: the mask is stored as JPEG",
        "kaputt.jpg cannot be read as an image",
        "2 files in a format that is not read, such as unlabeled/IMG_1.HEIC: convert",
        "have transparent pixels, such as",
        "are turned as the camera's note in the file (EXIF) says",
    ):
        assert text in shown
    mask.with_suffix(".jpg").unlink()
    dataset = open_dataset("folder", root, DatasetOptions())
    with pytest.raises(UserError, match="Move images without masks to unlabeled/"):
        dataset.label("images/grau.jpg")


def test_images_to_predict_that_are_not_read_are_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(find_jobs([str(root / "unlabeled")], tmp_path / "out", False)) == 7
    assert "unlabeled holds 2 files in a format that is not read" in capsys.readouterr().err
    for path in (root / "images").iterdir():
        path.rename(path.with_suffix(".heif"))
    with pytest.raises(UserError, match=r"there are no images .* holds 6 files in a format"):
        open_dataset("folder", root, DatasetOptions())
