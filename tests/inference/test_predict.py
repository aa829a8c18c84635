import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.data.digits import INFO
from ctt.data.views import to_unit
from ctt.inference.predict import (
    Predict,
    best_class,
    for_images,
    multi_scale,
    predictor,
    prepare,
    protocol_text,
    sliding,
    stacks,
    starts,
)
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings

SIZES = [(1, 1), (7, 13), (24, 24), (31, 50), (50, 31)]


class Pointwise(SegmentationModel):
    """1x1 convolutions only: what it sees around a pixel changes nothing."""

    stride = 1

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Conv2d(3, 8, 1)
            self.classifier = nn.Conv2d(8, 5, 1)

    def encode(self, images: Tensor) -> list[Tensor]:
        return [images]

    def decode(self, stages: list[Tensor]) -> Tensor:
        (images,) = stages
        return F.relu(self.body(images))


class Symmetric(Pointwise):
    """Looks left and right alike."""

    def decode(self, stages: list[Tensor]) -> Tensor:
        return F.avg_pool2d(super().decode(stages), (1, 3), 1, (0, 1))


def pictures(size: tuple[int, int], images: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(size[0])
    return torch.randint(0, 256, (images, 3, *size), generator=rng, dtype=torch.uint8)


def probability(network: SegmentationModel, images: Tensor, settings: EvalSettings) -> Tensor:
    with torch.no_grad():
        return predictor(network, INFO, settings)(images)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [(8, 8), (11, 20), (801, 801)])
@pytest.mark.parametrize("stride", [2 / 3, 1.0, 5.0])
def test_sliding_without_context_is_whole(
    size: tuple[int, int], window: tuple[int, int], stride: float
) -> None:
    images = pictures(size)
    settings = EvalSettings(protocol="sliding", window=window, stride=stride, batch_pixels=700)
    expected = probability(Pointwise(), images, EvalSettings())
    torch.testing.assert_close(probability(Pointwise(), images, settings), expected)


@pytest.mark.parametrize("size", SIZES)
def test_probabilities_sum_to_one_under_every_protocol(size: tuple[int, int]) -> None:
    settings = EvalSettings("sliding", (9, 12), 0.5, flip=True, scales=(0.5, 1.0, 1.75))
    found = probability(Pointwise(), pictures(size), settings)
    assert found.shape == (2, 5, *size)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, *size))


def test_flip_changes_only_what_is_not_symmetric() -> None:
    images = pictures((16, 23))
    plain, flip = EvalSettings(), EvalSettings(flip=True)
    network = Symmetric()
    torch.testing.assert_close(
        probability(network, images, flip), probability(network, images, plain)
    )
    network.body = nn.Conv2d(3, 8, 3, padding=1)
    found = probability(network, images, flip)
    mirrored = probability(network, images.flip(-1), flip).flip(-1)
    torch.testing.assert_close(found, mirrored)
    assert not torch.allclose(found, probability(network, images, plain))


@pytest.mark.parametrize("flip", [False, True])
def test_a_large_image_is_normalised_window_by_window(
    flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole it would take eight times the memory of its pixels."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "ctt.inference.predict.to_unit", lambda x: [to_unit(x), seen.append(x.shape)][0]
    )
    settings = EvalSettings(protocol="sliding", window=(16, 16), flip=flip, batch_pixels=512)
    probability(Pointwise(), pictures((100, 90), 1), settings)
    assert {shape[2:] for shape in seen} == {(16, 16)}


def test_windows_average_where_they_overlap() -> None:
    """Windows of three pixels over four: the middle two are seen twice."""
    seen: list[Tensor] = []

    def mean_of_window(windows: Tensor) -> Tensor:
        seen.append(windows)
        return windows.mean(dim=(1, 2, 3), keepdim=True).expand(-1, 1, *windows.shape[-2:])

    row = torch.tensor([0.0, 3.0, 6.0, 12.0]).expand(1, 1, 3, 4)
    found = sliding(mean_of_window, (3, 3), 1.0 / 3, 100, row)
    assert found[0, 0, 0].tolist() == [3.0, 5.0, 5.0, 7.0]
    assert [len(windows) for windows in seen] == [2]  # one batch


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (10, 10, 0.5, [0]),
        (11, 10, 0.5, [0, 1]),
        (20, 10, 0.5, [0, 5, 10]),
        (2048, 801, 2 / 3, [0, 534, 1068, 1247]),
        (20, 8, 7.0, [0, 7, 12]),
        (3, 1, 0.1, [0, 1, 2]),
    ],
)
def test_windows_cover_a_side(length: int, window: int, stride: float, expected: list[int]) -> None:
    assert starts(length, window, stride) == expected


def test_scales_show_the_network_every_size() -> None:
    seen = []

    def constant(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[-2:]))
        return torch.full((1, 2, *images.shape[-2:]), 0.5)

    found = multi_scale(constant, (0.5, 1.0, 1.5), torch.zeros(1, 3, 7, 10))
    assert seen == [(4, 5), (7, 10), (11, 15)]  # half a pixel counts as a whole one
    torch.testing.assert_close(found, torch.full((1, 2, 7, 10), 0.5))


def test_half_and_centre() -> None:
    label = torch.arange(35, dtype=torch.uint8).reshape(5, 7)
    image = label.expand(3, 5, 7)
    small, small_label = prepare(image, label, EvalSettings("half"))
    assert (small.shape, small_label.shape) == ((3, 3, 4), (3, 4))
    assert set(small_label.flatten().tolist()) <= set(range(35))
    crop, crop_label = prepare(image, label, EvalSettings("center-crop", (3, 9)))
    assert torch.equal(crop[0], crop_label)
    assert torch.equal(crop_label, label[1:4])
    for protocol in ("whole", "sliding"):
        same = prepare(image, label, EvalSettings(protocol))  # type: ignore[arg-type]
        assert torch.equal(same[1], label)


def test_there_is_no_class_where_an_image_has_no_data() -> None:
    images = pictures((5, 6)).float() / 255
    images[1, 2, 3, 4] = torch.nan  # in one band
    found = torch.rand(2, 5, 5, 6).softmax(dim=1)
    confidence, label = best_class(found, images)
    assert (label.dtype, label[1, 3, 4], confidence[1, 3, 4]) == (torch.uint8, 255, 0)
    assert int((label == 255).sum()) == 1
    whole, classes = best_class(found, pictures((5, 6)))  # uint8
    assert torch.equal(whole, found.amax(dim=1))
    assert torch.equal(classes, found.argmax(dim=1).to(torch.uint8))
    assert torch.equal(best_class(found[1], images[1])[1], label[1])


def test_stacks_hold_neighbours_of_one_size() -> None:
    sizes = [(2, 3), (2, 3), (2, 3), (4, 4), (2, 3), (90, 90)]
    found = [list(group) for group in stacks(sizes, lambda size: size, 12)]
    assert found == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:5], sizes[5:]]


def test_mixed_precision_gives_float32() -> None:
    settings = EvalSettings(amp="bf16")
    found = probability(Pointwise(), pictures((9, 9)), settings)
    assert found.dtype == torch.float32
    exact = probability(Pointwise(), pictures((9, 9)), replace(settings, amp="off"))
    assert 0 < float((found - exact).abs().max()) < 0.05


def test_a_protocol_is_stated() -> None:
    assert protocol_text(EvalSettings()) == "whole"
    settings = EvalSettings("sliding", flip=True, scales=(0.75, 1.0), amp="bf16")
    expected = "sliding, window 801x801, stride 0.667 of it, scales 0.75 1, flip, bf16"
    assert protocol_text(settings) == expected
    assert math.isclose(settings.stride * 801, 534)


def test_a_predictor_has_no_memory_of_its_images() -> None:
    predict: Predict = predictor(Pointwise().eval(), INFO, EvalSettings(flip=True))
    images = pictures((8, 8))
    with torch.no_grad():
        torch.testing.assert_close(predict(images)[1:], predict(images[1:]))


def test_half_is_one_size_in_evaluation_and_prediction() -> None:
    """Of 33 rows Python's rounding makes 16 and the ceiling 17."""
    settings = EvalSettings(protocol="half")
    image, label = torch.zeros(3, 33, 30, dtype=torch.uint8), torch.zeros(33, 30, dtype=torch.uint8)
    scored, _ = prepare(image, label, settings)
    seen: list[tuple[int, ...]] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[2:]))
        return images

    multi_scale(predict, for_images(settings).scales, image[None].float())
    assert seen == [(17, 15)] == [tuple(scored.shape[1:])]
