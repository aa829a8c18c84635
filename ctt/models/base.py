"""What every network gives: logits and features from one forward."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn


class Output(NamedTuple):
    """Of one forward of images (B, 3, H, W).

    Attributes:
        logits: (B, C, h, w), not upsampled.
        features: (B, D, h, w), the input of the last 1x1 classifier.
    """

    logits: Tensor
    features: Tensor


class SegmentationModel(nn.Module, ABC):
    """A network that gives features (B, D, h, w), and a 1x1 classifier on them.

    Subclasses implement `extract`; `classifier` is the last 1x1 convolution.

    Attributes:
        stride: input pixels for each pixel of the features.
    """

    classifier: nn.Conv2d
    stride: int

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> features (B, D, h, w)."""

    def forward(self, images: Tensor) -> Output:
        features = self.extract(images)
        return Output(self.classifier(features), features)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that the recipe may train with a larger learning rate."""
        return self.classifier.parameters()
