"""A residual encoder-decoder for small images, trained from random weights on two cores."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.models.base import SegmentationModel, conv_bn, scale_up_like, subsample


class Small(SegmentationModel):
    """Features at half resolution from three stages (strides 2, 4, 8) and lateral connections.

    Args:
        num_classes: C.
        features: D.
        width: channels of the first stage; 2 and 4 times that follow.
        channels: of the images.
    """

    stride = 2

    def __init__(
        self, num_classes: int, features: int = 64, width: int = 24, channels: int = 3
    ) -> None:
        super().__init__()
        self.stage_channels = (width, 2 * width, 4 * width)
        self.stem = conv_bn(channels, width, stride=2)
        self.stage1 = nn.Sequential(Residual(width, width), Residual(width, width))
        self.stage2 = nn.Sequential(
            Residual(width, 2 * width, stride=2), Residual(2 * width, 2 * width)
        )
        self.stage3 = nn.Sequential(
            Residual(2 * width, 4 * width, stride=2), Residual(4 * width, 4 * width)
        )
        self.merge2 = conv_bn(6 * width, 2 * width)
        self.merge1 = conv_bn(3 * width, features, kernel=3)
        self.classifier = nn.Conv2d(features, num_classes, 1)

    def encode(self, images: Tensor) -> list[Tensor]:
        x1 = self.stage1(self.stem(images))  # (B, w, H/2, W/2)
        x2 = self.stage2(x1)  # (B, 2w, H/4, W/4)
        return [x1, x2, self.stage3(x2)]  # the last: (B, 4w, H/8, W/8)

    def decode(self, stages: list[Tensor]) -> Tensor:
        x1, x2, x3 = stages
        corners = not self.legacy_grid
        x2 = self.merge2(torch.cat([x2, scale_up_like(x3, x2, 2, corners=corners)], dim=1))
        x2 = scale_up_like(x2, x1, 2, corners=corners)
        merged: Tensor = self.merge1(torch.cat([x1, x2], dim=1))
        return merged


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, outputs, stride=stride), conv_bn(outputs, outputs, activate=False)
        )
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv_bn(inputs, outputs, kernel=1, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        # The pixels are picked before the convolution: with a stride of its own, fewer than 16
        # channels of x and channels_last, PyTorch on a CPU writes outside its memory in backward.
        return F.relu(self.body(x) + self.shortcut(subsample(x, self.stride)))
