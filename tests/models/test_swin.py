"""Swin transformers through DeepLab's heads."""

from typing import Any

import pytest
import timm
import torch

from ctt import models
from ctt.errors import UserError
from ctt.models import weights
from ctt.models.base import upsample
from ctt.models.timm_backbone import Stages
from tests.models.tiny import SWIN


def test_stages_are_those_of_timm() -> None:
    backbone = Stages(SWIN, 32).eval()
    assert (backbone.strides, backbone.channels) == ([4, 8, 16, 32], [24, 48, 96, 192])
    assert backbone.patches
    other: Any = timm.create_model(SWIN).eval()
    found = weights.named(backbone.state_dict(), other.state_dict())
    assert found.keys() == backbone.state_dict().keys()
    backbone.load_state_dict({name: other.state_dict()[key] for name, key in found.items()})
    images = torch.randn(2, 3, 64, 64)
    for stage, expected in zip(
        backbone(images), other.forward_intermediates(images)[1], strict=True
    ):
        torch.testing.assert_close(stage, expected)


@pytest.mark.parametrize(("name", "stride"), [("deeplabv2", 32), ("deeplabv3plus", 4)])
def test_images_of_any_size(name: str, stride: int) -> None:
    network = models.build(name, 5, 16, backbone=SWIN).eval()
    assert network.options["output_stride"] == 32
    for size in ((64, 96), (70, 83)):
        out = network(torch.randn(1, 3, *size))
        assert out.features.shape == (1, 16, *(-(-side // stride) for side in size))
        assert upsample(out.logits, size, network.grid).shape == (1, 5, *size)
    out.logits.square().sum().backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None]
    assert missing == []
    rebuilt = models.build(num_classes=5, **network.options)
    rebuilt.load_state_dict(network.state_dict())


def test_stochastic_depth_is_what_is_asked_for() -> None:
    for rate in (0.0, 0.3):
        network = models.build("deeplabv3plus", 5, 16, backbone=SWIN, drop_path=rate)
        rates = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
        assert max(rates, default=0.0) == pytest.approx(rate)


def test_it_cannot_be_dilated() -> None:
    with pytest.raises(UserError, match="gives features at stride 32, not"):
        models.build("deeplabv3plus", 5, backbone=SWIN, output_stride=16)
