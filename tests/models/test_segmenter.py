from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ctt
from ctt import models
from ctt.checkpoint import save_network
from ctt.data.digits import INFO
from ctt.data.pixels import to_rgb
from ctt.data.views import normalize, to_unit
from ctt.errors import UserError
from ctt.inference.predict import whole


@pytest.fixture
def weights(tmp_path: Path) -> Path:
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
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        torch.zeros(3, 5, 5),
        torch.zeros(1, 3, 5, 5, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="takes an RGB image of uint8"):
            segmenter.predict(bad)


def test_what_is_no_network(weights: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        ctt.load(weights.parent / "other.safetensors")
    with pytest.raises(UserError, match="there is none of that name"):
        ctt.load(weights, network="teacher_1")
