"""Networks in two halves: the stages of an image, and the features of stages."""

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctt import models
from ctt.models.base import SegmentationModel

SMALL = ("small", "", (8, 16, 32))
RESNET18 = (64, 64, 128, 256, 512)
CASES = [
    SMALL,
    ("deeplabv2", "resnet18", (512,)),
    ("deeplabv3plus", "resnet18", (64, 512)),
    ("deeplabv3plus", "test_convnext", (24, 64)),
    ("vit", "vit_tiny_patch16_224", (3, 192, 192, 192, 192)),
    ("dpt", "test_vit", (3, 64, 64, 64, 64)),
]
if importlib.util.find_spec("segmentation_models_pytorch"):
    CASES += [
        (name, "resnet18", (3, *RESNET18[: 3 if name == "smp:pspnet" else 5]))
        for name in models.names()
        if name.startswith("smp:") and name != "smp:dpt"
    ]
    CASES += [
        ("smp:segformer", "mit_b0", (3, 0, 32, 64, 160, 256)),
        ("smp:unet", "vgg11", (3, 64, 128, 256, 512, 512, 512)),
        ("smp:dpt", "vit_tiny_patch16_224", (3, *[2 * 192] * 4)),  # beside the class token
    ]
NAMES = [f"{name} {backbone}".rstrip() for name, backbone, _ in CASES]


def make(name: str, backbone: str) -> SegmentationModel:
    torch.manual_seed(0)
    return models.build(name, 5, 16, 8, backbone)


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "backbone", "channels"), CASES, ids=NAMES)
def test_features_are_those_of_the_stages(
    name: str, backbone: str, channels: tuple[int, ...]
) -> None:
    network = make(name, backbone)
    assert network.stage_channels == channels
    for mode, size in ((True, (70, 83)), (False, (70, 83)), (False, (64, 96))):
        network.train(mode)
        torch.manual_seed(2)  # of dropout
        out = network(images(*size))
        torch.manual_seed(2)
        stages = network.encode(images(*size))
        features = network.decode(stages)
        assert tuple(stage.shape[1] for stage in stages) == channels
        heights = [stage.shape[2] for stage in stages[channels[0] == 3 :]]
        assert heights == sorted(heights, reverse=True)
        cells = (len(network.grid.pixels(side, features.device)) for side in size)
        assert features.shape == (2, 16, *cells)
        assert torch.equal(features, out.features)
        assert torch.equal(network.classifier(features), out.logits)


@pytest.mark.parametrize(("name", "backbone", "channels"), CASES, ids=NAMES)
def test_perturbed_stages_are_decoded_and_teach(
    name: str, backbone: str, channels: tuple[int, ...]
) -> None:
    network = make(name, backbone)
    stages = network.encode(images(70, 83))
    clean = network.decode(stages)
    torch.manual_seed(2)
    features = network.decode([F.dropout2d(stage, 0.5) for stage in stages])
    assert features.shape == clean.shape
    assert not torch.equal(features, clean)
    features.square().sum().backward()
    trained = [p for p in network.parameters() if p.requires_grad]
    missing = [p for p in trained if p.grad is None]
    assert missing == [*network.classifier.parameters()]
    first = next(p for p in trained)  # the gradient comes down to the first layer
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "backbone", "channels"), CASES, ids=NAMES)
def test_channels_are_scaled_but_for_those_of_the_images(
    name: str, backbone: str, channels: tuple[int, ...]
) -> None:
    network = make(name, backbone).eval()
    stages = network.encode(images(64, 64))
    factors = [torch.rand(2, n) for n in channels]
    scaled = network.scale_channels(stages, factors)
    for i, (stage, factor, found) in enumerate(zip(stages, factors, scaled, strict=True)):
        kept = i == 0 and channels[0] == 3
        assert torch.equal(found, stage if kept else stage * factor[:, :, None, None])
    half = network.scale_channels([x.bfloat16() for x in stages], factors)
    assert {x.dtype for x in half} == {torch.bfloat16}
    assert network.finish(scaled).logits.shape == network.finish(stages).logits.shape


@pytest.mark.parametrize("name", ["small", "deeplabv3plus"])
def test_compiled_networks_are_split_too(name: str) -> None:
    network = make(name, "resnet18" if name != "small" else "").eval()
    with torch.no_grad():
        expected = network(images(40, 40)).logits
        network.compile(
            dynamic=False, backend="aot_eager"
        )  # what it compiles to is tested elsewhere
        torch.testing.assert_close(network(images(40, 40)).logits, expected)
        features = network.decode(network.encode(images(40, 40)))
        torch.testing.assert_close(network.classifier(features), expected)
