import sys

import pytest
import torch

from ctt import models
from ctt.cli.common import run_program
from ctt.errors import UserError

smp = pytest.importorskip("segmentation_models_pytorch")

OWN_256 = {"deeplabv3", "deeplabv3plus", "segformer", "upernet", "dpt"}


@pytest.mark.parametrize("name", sorted(smp.MODEL_ARCHITECTURES_MAPPING))
def test_every_architecture(name: str) -> None:
    network = models.build(f"smp:{name}", 5, 256 if name in OWN_256 else 8, backbone="resnet18")
    images = torch.randn(1, 3, 129, 160)
    out = network(images)  # in training, with a single image
    features = out.features.shape[1]
    assert out.features.shape[2:] == tuple(-(-side // network.stride) for side in (129, 160))
    assert out.logits.shape == (1, 5, *out.features.shape[2:])
    assert (features == 256) == (name in OWN_256)
    assert isinstance(network.project, torch.nn.Identity) == (name in OWN_256)
    out.logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    small = network.eval()(torch.randn(1, 3, 33, 40)).logits
    assert small.shape[2:] == tuple(-(-side // network.stride) for side in (33, 40))


def test_features_are_what_the_head_reads() -> None:
    network = models.build("smp:deeplabv3", 5, 256, backbone="resnet18").eval()
    theirs = smp.create_model("deeplabv3", "tu-resnet18", encoder_weights=None, classes=5).eval()
    theirs.encoder.load_state_dict(network.backbone.state_dict())
    theirs.decoder.load_state_dict(network.decoder.state_dict())
    theirs.segmentation_head[0].load_state_dict(network.classifier.state_dict())
    images = torch.randn(1, 3, 64, 64)
    up = torch.nn.functional.interpolate(
        network(images).logits, scale_factor=8, mode="bilinear", align_corners=True
    )
    torch.testing.assert_close(up, theirs(images))


def test_encoders_of_the_library_itself() -> None:
    network = models.build("smp:segformer", 5, 256, backbone="mit_b0").eval()
    assert network(torch.randn(1, 3, 70, 50)).features.shape == (1, 256, 18, 13)
    assert "smp:segformer" in models.names()


@pytest.mark.parametrize(
    ("name", "backbone"), [("pspnet", "mit_b0"), ("dpt", "vit_tiny_patch16_224")]
)
def test_what_a_decoder_leaves_unread_is_not_trained(name: str, backbone: str) -> None:
    network = models.build(f"smp:{name}", 5, 8, backbone=backbone)
    network(torch.randn(2, 3, 130, 131)).logits.sum().backward()
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in network.named_parameters() if p.grad is not None}
    assert any(key.startswith("backbone.") for key in trained)


def test_the_library_is_asked_for_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    monkeypatch.delitem(sys.modules, "ctt.models.smp")
    with pytest.raises(SystemExit) as stop:
        run_program("ctt-train", lambda: models.build("smp:unet", 5) and 0)
    assert stop.value.code == 2
    assert "pip install 'ctt[smp]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "backbone", "text"),
    [
        ("smp:unot", "resnet18", "smp:unot: no such architecture. Known: .*smp:unet"),
        ("smp:unet", "mit_b9", "Near: .*mit_b"),
        ("smp:linknet", "mit_b0", "cannot be built on `model.backbone` mit_b0"),
        ("smp:unet", "swin_tiny_patch4_window7_224", "cannot be built on"),
    ],
)
def test_what_does_not_fit(name: str, backbone: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        models.build(name, 5, 8, backbone=backbone)
