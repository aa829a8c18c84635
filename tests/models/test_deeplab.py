from collections.abc import Sequence

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from ctt import models
from ctt.errors import UserError
from ctt.models.base import BackboneModel, scale_up
from ctt.models.deeplab import Aspp, DeepLabV3Plus
from ctt.models.timm_backbone import Stages


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def resnet101() -> int:
    """Parameters of ResNet-101 up to its last stage (He et al., 2016, table 1)."""
    total = 7 * 7 * 3 * 64 + 2 * 64
    inputs = 64
    for middle, blocks in ((64, 3), (128, 4), (256, 23), (512, 3)):
        outputs = 4 * middle
        total += inputs * outputs + 2 * outputs  # shortcut of the first block
        for _ in range(blocks):
            total += inputs * middle + 9 * middle**2 + middle * outputs
            total += 2 * (middle + middle + outputs)  # scale and shift of the norms
            inputs = outputs
    return total


def test_deeplabv2_has_the_published_layers() -> None:
    network = models.build("deeplabv2", 21)
    head = 4 * (9 * 2048 * 256 + 256) + 256 * 21 + 21
    assert resnet101() == 42_500_160
    assert count(network) == resnet101() + head
    assert sum(p.numel() for p in network.head_parameters()) == head
    out = network.eval()(torch.randn(1, 3, 65, 65))
    assert out.features.shape == (1, 256, 9, 9)
    assert out.logits.shape == (1, 21, 9, 9)
    assert network.options["backbone"] == "resnet101"


def test_deeplabv2_head_is_a_sum_of_dilated_convolutions_to_the_classes() -> None:
    """As published: the 1x1 classifier folds into the convolutions before it."""
    network = models.build("deeplabv2", 5, 16, backbone="resnet18").double().eval()
    x = torch.randn(1, 512, 30, 30, dtype=torch.float64)
    weight = network.classifier.weight[:, :, 0, 0]  # (C, D)
    folded = sum(
        nn.functional.conv2d(
            x,
            torch.einsum("cd,dikl->cikl", weight, conv.weight),
            weight @ conv.bias,
            padding=rate,
            dilation=rate,
        )
        for conv, rate in zip(network.aspp, (6, 12, 18, 24), strict=True)
    )
    logits = network.classifier(sum(conv(x) for conv in network.aspp))
    bias = network.classifier.bias[:, None, None]
    torch.testing.assert_close(logits, folded + bias, rtol=1e-10, atol=1e-12)


def test_deeplabv3plus_has_the_published_layers() -> None:
    network = models.build("deeplabv3plus", 21)
    norm = 2 * 256
    aspp = 2048 * 256 + norm + 3 * (9 * 2048 * 256 + norm) + 2048 * 256 + norm
    aspp += 5 * 256 * 256 + norm
    decoder = 256 * 48 + 2 * 48 + 9 * 304 * 256 + norm + 9 * 256 * 256 + norm
    assert count(network) == resnet101() + aspp + decoder + 256 * 21 + 21
    out = network.eval()(torch.randn(1, 3, 65, 65))
    assert out.features.shape == (1, 256, 17, 17)
    assert out.logits.shape == (1, 21, 17, 17)


def test_dilated_resnet_is_that_of_torchvision() -> None:
    backbone = Stages("resnet50", 8).double().eval()
    other = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    other.double().eval()
    other.fc = nn.Identity()
    randomize(backbone)
    other.load_state_dict(backbone.net.state_dict())
    images = torch.randn(1, 3, 65, 65, dtype=torch.float64)
    x = other.maxpool(other.relu(other.bn1(other.conv1(images))))
    expected = [x := layer(x) for layer in (other.layer1, other.layer2, other.layer3, other.layer4)]
    for ours, theirs in zip(backbone(images)[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def randomize(network: nn.Module) -> None:
    """Weights and statistics under which every layer shows in the output."""
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(std=0.3)
        elif value.ndim == 1:
            value.uniform_(0.5, 1.5)


def test_aspp_is_that_of_torchvision() -> None:
    ours = Aspp(32, 16, (12, 24, 36)).double().eval()
    theirs = torchvision.models.segmentation.deeplabv3.ASPP(32, [12, 24, 36], 16).double().eval()
    randomize(ours)
    branches = [*ours.branches, list(ours.pool)[1:3]]
    targets = [*theirs.convs[:4], list(theirs.convs[4])[1:3]]
    for mine, target in zip([*branches, ours.project[0]], [*targets, theirs.project], strict=True):
        target[0].load_state_dict(mine[0].state_dict())
        target[1].load_state_dict(mine[1].state_dict())
    x = torch.randn(2, 32, 41, 41, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_deeplabv3plus_is_that_of_segmentation_models_pytorch() -> None:
    """Their separable convolutions become the dense ones that they multiply out to.

    They have one convolution after the pyramid and one after the skip, here are two after the skip:
    what one side has alone is set to the identity.
    """
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = smp.create_model(
        "deeplabv3plus",
        "tu-resnet18",
        encoder_weights=None,
        classes=5,
        upsampling=1,
        decoder_atrous_rates=(6, 12, 18),
    )
    ours = models.build("deeplabv3plus", 5, backbone="resnet18")
    assert isinstance(ours, DeepLabV3Plus)
    randomize(theirs)
    decoder = theirs.decoder
    set_identity(decoder.aspp[1][0], decoder.aspp[2])
    decoder.aspp[1][1].weight.data = torch.eye(256)[:, :, None, None]
    ours.backbone.net.load_state_dict(theirs.encoder.model.state_dict())
    pyramid = decoder.aspp[0]
    for mine, their in zip(ours.aspp.branches, pyramid.convs[:4], strict=True):
        copy_block(mine, their)
    copy_block(list(ours.aspp.pool)[1:3], list(pyramid.convs[4])[1:3])
    copy_block(ours.aspp.project[0], pyramid.project)
    copy_block(ours.skip, decoder.block1)
    copy_block(ours.decoder[0], decoder.block2)
    set_identity(*ours.decoder[1][:2])
    ours.classifier.load_state_dict(theirs.segmentation_head[0].state_dict())
    ours.double().eval()
    theirs.double().eval()
    # theirs takes multiples of 16 alone, and stretches its pyramid as fits multiples and 1
    theirs.decoder.up = Stretch()
    images = torch.randn(1, 3, 160, 320, dtype=torch.float64)
    features = theirs.decoder(theirs.encoder(images))
    out = ours(images)
    assert features.std() > 0.1
    torch.testing.assert_close(out.features, features)
    torch.testing.assert_close(out.logits, theirs(images))


class Stretch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scale_up(x, (4 * x.shape[2], 4 * x.shape[3]), 4, corners=True)


def set_identity(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    weight = torch.zeros_like(conv.weight)
    if conv.groups == 1:
        weight[:, :, 1, 1] = torch.eye(len(weight))
    else:
        weight[:, 0, 1, 1] = 1
    conv.weight.data = weight
    norm.load_state_dict(nn.BatchNorm2d(norm.num_features, eps=norm.eps).state_dict())
    norm.running_var.fill_(1 - norm.eps)


def copy_block(mine: Sequence[nn.Module], theirs: Sequence[nn.Module]) -> None:
    """Convolution and norm."""
    mine[0].weight.data = dense(theirs[0])
    mine[1].load_state_dict(theirs[1].state_dict())


def dense(conv: nn.Module) -> Tensor:
    if isinstance(conv, nn.Conv2d):
        return conv.weight.data.clone()
    depthwise, pointwise = conv[0].weight.data, conv[1].weight.data  # (I, 1, 3, 3), (O, I, 1, 1)
    return pointwise * depthwise[:, 0][None]


@pytest.mark.parametrize("name", ["deeplabv2", "deeplabv3plus"])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "tf_efficientnet_lite0"])
def test_any_size_in_training_alone_in_the_batch(name: str, backbone: str) -> None:
    network = models.build(name, 5, 16, backbone=backbone)
    out = network(torch.randn(1, 3, 33, 50))
    grid = tuple(-(-side // network.stride) for side in (33, 50))
    assert out.features.shape == (1, 16, *grid)
    out.logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_output_stride_8_doubles_the_rates() -> None:
    network = models.build("deeplabv3plus", 5, 16, backbone="resnet18", output_stride=8)
    assert isinstance(network, DeepLabV3Plus)
    assert [branch[0].dilation[0] for branch in network.aspp.branches] == [1, 12, 24, 36]
    assert network.backbone.strides[-1] == 8


def test_frozen_batch_norms_stay() -> None:
    network = models.build("deeplabv3plus", 5, 16, backbone="resnet18")
    assert isinstance(network, BackboneModel)
    network.freeze_batch_norm()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network.train()
    network(torch.randn(2, 3, 65, 65)).logits.square().mean().backward()
    optimizer.step()
    changed = {n for n, value in network.state_dict().items() if not torch.equal(value, before[n])}
    norms = {n for n, m in network.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert not any(name.removeprefix("backbone.").rpartition(".")[0] in norms for name in changed)
    assert "backbone.net.conv1.weight" in changed
    assert "skip.1.running_mean" in changed


@pytest.mark.parametrize(
    ("backbone", "text"),
    [
        ("resnet1O1", r"no such model\. Near: .*resnet101"),
        ("halonet26t", "cannot serve this `model.name`: it takes no images of 65 x 65"),
        ("hf-hub:timm/resnet18", "no such model"),
    ],
)
def test_backbones_that_cannot_serve(backbone: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        models.build("deeplabv2", 5, backbone=backbone)
    assert not timm.is_model("resnet1O1")
