import pytest
import timm
import torch

from ctt import models
from ctt.errors import UserError
from ctt.models import weights


@pytest.mark.parametrize(
    ("backbone", "stride"), [("vit_tiny_patch16_224", 8), ("vit_small_patch14_dinov2", 7)]
)
@pytest.mark.parametrize("size", [(56, 80), (33, 65)])
def test_images_of_any_size(backbone: str, stride: int, size: tuple[int, int]) -> None:
    network = models.build("vit", 5, 16, backbone=backbone)
    assert network.stride == stride
    out = network(torch.randn(1, 3, *size))
    assert out.features.shape == (1, 16, *(-(-side // stride) for side in size))
    assert torch.equal(out.logits, network.classifier(out.features))
    out.logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_blocks_are_those_of_timm() -> None:
    network = models.build("vit", 5, 16, backbone="vit_tiny_patch16_224").eval()
    other = timm.create_model("vit_tiny_patch16_224").eval()
    found = weights.named(network.state_dict(), other.state_dict())
    assert {name for name in network.state_dict() if name.startswith("backbone.")} <= found.keys()
    network.backbone.load_state_dict(other.state_dict(), strict=False)
    images = torch.randn(1, 3, 224, 224)
    last = network.backbone.forward_intermediates(
        images, indices=network.taken, norm=True, intermediates_only=True
    )[-1]
    tokens = other.forward_features(images)[:, 1:]  # (1, 196, 192)
    torch.testing.assert_close(last.flatten(2).mT, tokens)


def test_convolutions_are_no_transformer() -> None:
    with pytest.raises(UserError, match=r"resnet18 cannot serve this `model\.name`"):
        models.build("vit", 5, backbone="resnet18")
    for backbone in ("swin_tiny_patch4_window7_224", "vit_tiny_r_s16_p8_224"):
        with pytest.raises(UserError, match=rf"{backbone} cannot serve.*no plain vision"):
            models.build("vit", 5, backbone=backbone)
    with pytest.raises(UserError, match="the network vit has a stride of its own"):
        models.build("vit", 5, output_stride=8)
