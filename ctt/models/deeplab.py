"""DeepLabV2 and DeepLabV3+ with features that contrast can work on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctt.models.base import BackboneModel, PooledNorm, conv_bn, scale_up_like
from ctt.models.timm_backbone import Stages

V2_RATES = (6, 12, 18, 24)  # Chen et al., TPAMI 2018 (arXiv 1606.00915), ASPP-L
V3_RATES = (6, 12, 18)  # Chen et al., 2017 (arXiv 1706.05587), at output stride 16; twice at 8
LOW_LEVEL_STRIDE = 4
LOW_LEVEL_CHANNELS = 48  # Chen et al., ECCV 2018 (arXiv 1802.02611), table 1


class DeepLabV2(BackboneModel):
    """Dilated backbone, sum of four dilated 3x3 convolutions, 1x1 classifier.

    The published head (arXiv 1606.00915) sums four dilated convolutions from the backbone to the
    classes. Here they go to D features, of which a 1x1 convolution makes the classes: cross-teacher
    training compares the features before the last classifier. There is no activation in between,
    so that the head is a sum of four dilated convolutions to the classes still: it computes what
    the published one computes (and nothing else, as long as D >= C), from other parameters.

    Args:
        num_classes: C.
        features: D.
        backbone: name of a timm model.
        output_stride: 8 as published.
        drop_path: rate of stochastic depth in the last block of the backbone.
        in_channels: of the images.
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        backbone: str,
        output_stride: int,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.backbone_name, self.stride = backbone, output_stride
        self.backbone = Stages(backbone, output_stride, drop_path, in_channels)
        self.patches = self.backbone.patches
        channels = self.backbone.channels[-1]
        self.stage_channels = (channels,)
        self.aspp = nn.ModuleList(
            nn.Conv2d(channels, features, 3, padding=rate, dilation=rate) for rate in V2_RATES
        )
        self.classifier = nn.Conv2d(features, num_classes, 1)
        for layer in (*self.aspp, self.classifier):
            nn.init.normal_(layer.weight, std=0.01)  # as published
            nn.init.zeros_(layer.bias)

    def encode(self, images: Tensor) -> list[Tensor]:
        return [self.backbone(self.adapted(images))[-1]]  # (B, channels, h, w)

    def decode(self, stages: list[Tensor]) -> Tensor:
        (x,) = stages
        features: Tensor = sum(conv(x) for conv in self.aspp)  # (B, D, h, w)
        return features


class DeepLabV3Plus(BackboneModel):
    """Dilated backbone, ASPP with image pooling, decoder with a skip from stride 4, classifier.

    As arXiv 1802.02611 describes it (table 2: two 3x3 convolutions of 256 channels after the
    skip), with plain instead of separable convolutions, as is common with ResNets. Features, the
    input of the classifier, are at stride 4.

    Args:
        num_classes: C.
        features: D.
        backbone: name of a timm model.
        output_stride: 16 or 8, of the backbone; the dilation rates double at 8.
        drop_path: rate of stochastic depth in the last block of the backbone.
        in_channels: of the images.
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        backbone: str,
        output_stride: int,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.backbone_name, self.stride = backbone, LOW_LEVEL_STRIDE
        self.backbone = Stages(backbone, output_stride, drop_path, in_channels)
        self.patches = self.backbone.patches
        channels, strides = self.backbone.channels, self.backbone.strides
        self.low_level = strides.index(LOW_LEVEL_STRIDE)
        self.stage_channels = (channels[self.low_level], channels[-1])
        self.ratio = output_stride // LOW_LEVEL_STRIDE
        rates = tuple(rate * 16 // output_stride for rate in V3_RATES)
        self.aspp = Aspp(channels[-1], features, rates)
        self.skip = conv_bn(channels[self.low_level], LOW_LEVEL_CHANNELS, kernel=1)
        self.decoder = nn.Sequential(
            conv_bn(features + LOW_LEVEL_CHANNELS, features), conv_bn(features, features)
        )
        self.classifier = nn.Conv2d(features, num_classes, 1)

    def encode(self, images: Tensor) -> list[Tensor]:
        stages = self.backbone(self.adapted(images))
        return [stages[self.low_level], stages[-1]]

    def decode(self, stages: list[Tensor]) -> Tensor:
        fine, coarse = stages
        low = self.skip(fine)  # (B, 48, H/4, W/4)
        # of convolutions: what align_corners gives images of 16 n + 1 pixels, for all sizes
        corners = self.legacy_grid or not self.patches
        high = scale_up_like(self.aspp(coarse), low, self.ratio, corners=corners)  # (B, D, h, w)
        features: Tensor = self.decoder(torch.cat([high, low], dim=1))
        return features


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 and dilated 3x3 convolutions beside the image's mean.

    (B, inputs, h, w) -> (B, outputs, h, w).
    """

    def __init__(self, inputs: int, outputs: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(inputs, outputs, kernel=1)])
        self.branches.extend(conv_bn(inputs, outputs, dilation=rate) for rate in rates)
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            PooledNorm(outputs),
            nn.ReLU(inplace=True),
        )
        self.project = nn.Sequential(
            conv_bn(outputs * (len(rates) + 2), outputs, kernel=1),
            nn.Dropout(0.1),  # of the authors' program
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x).expand(-1, -1, *x.shape[-2:])  # (B, outputs, h, w)
        branches = [branch(x) for branch in self.branches]
        merged: Tensor = self.project(torch.cat([*branches, pooled], dim=1))
        return merged
