"""Networks for images of other channels than red, green and blue."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ctt import models
from ctt.models.weights import start_from


@pytest.mark.parametrize("channels", [1, 4, 7])
@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("small", ""),
        ("deeplabv2", "resnet18"),
        ("deeplabv3plus", "resnet18"),
        ("vit", "vit_tiny_patch16_224"),
        ("dpt", "vit_tiny_patch16_224"),
        ("smp:unet", "resnet18"),
        ("smp:fpn", "mobilenet_v2"),
    ],
)
def test_networks_take_any_channels(name: str, backbone: str, channels: int) -> None:
    if name.startswith("smp:"):
        pytest.importorskip("segmentation_models_pytorch")
    network = models.build(name, 3, 8, 4, backbone, channels=channels).eval()
    images = torch.rand(1, channels, 40, 48)
    with torch.no_grad():
        stages = network.encode(images)
        assert [stage.shape[1] for stage in stages] == list(network.stage_channels)
        assert network(images).logits.shape[1] == 3
    shown = stages[: network.first_map]
    assert all(torch.equal(stage, images) for stage in shown)
    again = models.build(num_classes=3, **network.options)
    again.load_state_dict(network.state_dict())


@pytest.mark.parametrize("channels", [1, 4])
def test_published_weights_are_adapted(tmp_path: Path, channels: int) -> None:
    donor = timm.create_model("resnet18")
    save_file(donor.state_dict(), tmp_path / "net.safetensors")
    network = models.build("deeplabv2", 3, 8, backbone="resnet18", channels=channels)
    shown = start_from(network, str(tmp_path / "net.safetensors"))
    assert f"is adapted from 3 channels to {channels}" in shown
    assert "Warning" not in shown
    timms = timm.create_model("resnet18", in_chans=channels)
    expected = timm.models.adapt_input_conv(channels, donor.conv1.weight)
    assert expected.shape == timms.conv1.weight.shape
    first = network.get_submodule("backbone.net.conv1")
    assert isinstance(first, nn.Conv2d)
    assert torch.equal(first.weight, expected)
    # grey images mean to one channel what they meant to three
    if channels == 1:
        grey = torch.rand(1, 1, 32, 32)
        assert torch.allclose(first(grey), donor.conv1(grey.expand(1, 3, 32, 32)), atol=1e-4)
