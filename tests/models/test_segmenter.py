from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ctt
from ctt import models
from ctt.checkpoint import save_network
from ctt.data.dataset import DatasetInfo
from ctt.data.digits import INFO
from ctt.data.pixels import to_rgb
from ctt.data.views import normalize, to_unit
from ctt.errors import UserError
from ctt.inference.load import load_trained
from ctt.inference.predict import for_images, predictor, whole
from ctt.models.segmenter import Segmenter
from ctt.settings import EvalSettings


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)  # some random networks take every pixel for the same class
    save_network(tmp_path / "net.safetensors", models.build("small", 11, 8, 4), INFO, "a note")
    return tmp_path / "net.safetensors"


def test_a_loaded_network_segments_as_evaluation_does(weights: Path) -> None:
    segmenter = ctt.load(weights)
    assert segmenter.classes == INFO.classes
    assert segmenter.palette == INFO.palette
    assert segmenter.note == "a note"
    assert not segmenter.training
    image = torch.randint(0, 256, (3, 33, 47), dtype=torch.uint8)
    normalized = normalize(to_unit(image[None]), INFO)
    with torch.no_grad():
        expected = whole(segmenter.network, "off", normalized)
    torch.testing.assert_close(segmenter(image[None].float() / 255), expected)
    label = segmenter.predict(image)
    assert label.dtype == torch.uint8
    assert torch.equal(label.long(), expected[0].argmax(dim=0))
    pixels = image.permute(1, 2, 0).numpy()
    assert torch.equal(segmenter.predict(pixels), label)
    assert torch.equal(segmenter.predict(Image.fromarray(pixels)), label)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_precision_predict(weights: Path, kind: torch.dtype) -> None:
    image = torch.randint(0, 256, (3, 40, 33), dtype=torch.uint8)
    expected = ctt.load(weights).predict(image, probabilities=True)
    found = ctt.load(weights).to(kind).predict(image, probabilities=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_pictures_of_any_mode_and_paths(weights: Path, tmp_path: Path, mode: str) -> None:
    segmenter = ctt.load(weights)
    grey = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
    picture = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey)
    picture = picture if mode == "I;16" else picture.convert("RGB").convert(mode)
    assert picture.mode == mode
    expected = segmenter.predict(to_rgb(picture))
    assert torch.equal(segmenter.predict(picture), expected)
    picture.save(tmp_path / "picture.png")
    assert torch.equal(segmenter.predict(tmp_path / "picture.png"), expected)
    assert torch.equal(segmenter.predict(str(tmp_path / "picture.png")), expected)
    with pytest.raises(UserError, match=r"nowhere\.png"):
        segmenter.predict("nowhere.png")


def test_what_is_no_image(weights: Path) -> None:
    segmenter = ctt.load(str(weights))
    for bad in (
        np.zeros((5, 5, 2), np.uint8),
        np.zeros((5, 5, 3)),
        torch.zeros(3, 5, 5),
        torch.zeros(1, 4, 5, 5, dtype=torch.uint8),
        [torch.zeros(5, 5, dtype=torch.uint8)],
        np.zeros((0, 5, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="takes RGB images of uint8"):
            segmenter.predict(bad)
    for other in (None, b"picture.png", object()):
        with pytest.raises(ValueError, match=r"takes images .*; got (NoneType|bytes|object)"):
            segmenter.predict(other)


def test_several_images_and_tiles(weights: Path, tmp_path: Path) -> None:
    segmenter = ctt.load(weights)
    images = [torch.randint(0, 256, (3, h, 30), dtype=torch.uint8) for h in (20, 20, 25)]
    alone = [segmenter.predict(image) for image in images]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pictures[2].save(tmp_path / "third.png")
    mixed = (x for x in [images[0], pictures[1], tmp_path / "third.png"])
    assert all(map(torch.equal, segmenter.predict(mixed, batch_pixels=1200), alone))
    batch = torch.stack(images[:2])
    assert all(map(torch.equal, segmenter.predict(batch), alone[:2]))
    assert all(map(torch.equal, segmenter.predict(batch.permute(0, 2, 3, 1).numpy()), alone[:2]))
    assert segmenter.predict([]) == []
    probability = segmenter.predict(images[0], probabilities=True)
    assert probability.shape == (11, 20, 30)
    assert torch.equal(probability.argmax(dim=0), alone[0].long())
    assert torch.equal(segmenter.predict(images[0], tile=64), alone[0])
    tiled = segmenter.predict(images[0], tile=(16, 16))
    assert tiled.shape == alone[0].shape
    assert torch.equal(segmenter.predict(images[0], tile=np.int64(16)), tiled)
    for bad in (0, -5, 16.0, (16,), (16, 0), "16"):
        with pytest.raises(ValueError, match="`tile` must be a whole number of pixels above 0"):
            segmenter.predict(images[0], tile=bad)
    assert 0 < (tiled != alone[0]).sum() < tiled.numel() / 2  # windows see less around them


@pytest.mark.parametrize(
    "protocol",
    [
        EvalSettings(protocol="half", flip=True),
        EvalSettings(protocol="sliding", window=(16, 16), scales=(1, 1.5)),
        EvalSettings(protocol="center-crop", window=(16, 16)),
    ],
)
def test_images_are_shown_as_in_the_evaluations_of_the_run(
    tmp_path: Path, protocol: EvalSettings
) -> None:
    torch.manual_seed(0)
    path, image = tmp_path / "net.safetensors", torch.randint(0, 256, (3, 33, 47)).to(torch.uint8)
    save_network(path, models.build("small", 11, 8, 4), INFO, "", protocol=protocol)
    segmenter = ctt.load(path)
    with torch.no_grad():
        predict = load_trained(path).predictor(torch.device("cpu"), for_images(protocol))
        expected = predict(image[None])[0]
        unchanged = segmenter(image[None] / 255)[0]
    assert torch.equal(segmenter.predict(image, probabilities=True), expected)
    assert torch.allclose(expected, unchanged, atol=1e-5) == (protocol.protocol == "center-crop")
    assert torch.equal(
        segmenter.predict(image, tile=16, probabilities=True),
        _tiled(segmenter, image, protocol),
    )


def _tiled(segmenter: Segmenter, image: Tensor, protocol: EvalSettings) -> Tensor:
    """Return what ctt-predict --eval.protocol sliding gives."""
    tiles = replace(protocol, protocol="sliding", window=(16, 16), stride=2 / 3)
    with torch.no_grad():
        return predictor(segmenter.network, INFO, tiles)(image[None])[0]


def test_grey_and_transparent_arrays_are_read_as_files_are(weights: Path, tmp_path: Path) -> None:
    segmenter = ctt.load(weights)
    rng = np.random.default_rng(0)
    for shape in ((20, 30), (20, 30, 4)):
        array = rng.integers(0, 256, shape, np.uint8)
        Image.fromarray(array).save(tmp_path / "a.png")
        assert torch.equal(segmenter.predict(array), segmenter.predict(tmp_path / "a.png"))


def test_images_of_bands(tmp_path: Path) -> None:
    info = DatasetInfo(
        "x", ("a", "b"), ((0, 0, 0), (9, 9, 9)), (0.5,) * 4, (0.2,) * 4, bands=(1, 2, 3, 4)
    )
    path = tmp_path / "net.safetensors"
    save_network(path, models.build("small", 2, 8, 4, channels=4), info, "")
    segmenter = ctt.load(path)
    assert segmenter.info == info
    values = np.random.default_rng(0).integers(0, 2**16, (20, 30, 4)).astype(np.uint16)
    label = segmenter.predict(values)
    unit = torch.from_numpy(values.astype(np.float32) / 65535).permute(2, 0, 1)
    assert torch.equal(label.long(), segmenter(unit[None])[0].argmax(dim=0))
    assert torch.equal(segmenter.predict(torch.from_numpy(values).permute(2, 0, 1)), label)
    unit[1, 3:5, 6] = torch.nan  # no data; it may not spread
    other = unit.masked_fill(unit.isnan(), 0.5)
    assert torch.equal(segmenter(unit[None]), segmenter(other[None]))
    with pytest.raises(ValueError, match="images of 4 bands"):
        segmenter.predict(values[:, :, :3])
    with pytest.raises(UserError, match="without a range of their own"):
        segmenter.predict(values.astype(np.float32))


def test_what_is_no_network(weights: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        ctt.load(weights.parent / "other.safetensors")
    with pytest.raises(UserError, match="there is none of that name"):
        ctt.load(weights, network="teacher_1")
