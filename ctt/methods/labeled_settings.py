"""Settings of the term of the labelled images, `--labeled.NAME`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ctt.methods.options import Check
from ctt.ranges import AT_LEAST_0, SHARE, SHARE_BELOW_1, Range


@dataclass(frozen=True)
class LabeledSettings:
    """The defaults are the mean cross-entropy over the labelled pixels."""

    class_weights: Literal["none", "inverse", "enet", "effective"] = "none"
    """Weights of the classes, from the labelled images of the run: the inverse of a class's share
    of the pixels; ENet's 1 / ln(1.02 + share); or (1 - beta) / (1 - beta ** n) of the n images that
    show it, the effective number of images. They are written into config.yaml as `weights`."""
    beta: Annotated[float, SHARE_BELOW_1] = 0.999
    """effective: towards 1 the weights are the inverse of the number of images, towards 0 alike."""
    weights: Annotated[tuple[float, ...], AT_LEAST_0] = ()
    """Weights of your own instead, one for each class."""
    ohem: Annotated[float, SHARE] = 0.0
    """Learn only the hard pixels, whose class has at most this probability (online hard example
    mining; 0.7 is usual on Cityscapes); 0: all."""
    ohem_kept: Annotated[int, AT_LEAST_0] = 100_000
    """ohem: that many of the hardest pixels for each image of the step are learnt in any case."""
    focal: Annotated[float, Range(1, or_0=True)] = 0.0
    """Multiply the cross-entropy of a pixel by (1 - p) to this power, p being the probability of
    its class (focal loss; 2 is usual); 0: leave it."""
    dice: Annotated[float, AT_LEAST_0] = 0.0
    """Weight of the dice loss beside the cross-entropy, the mean over each image and each class
    that it shows."""

    @property
    def plain(self) -> bool:
        """Return whether the term is the mean cross-entropy over the labelled pixels."""
        return not (self.weights or self.ohem or self.focal or self.dice)

    def checks(self) -> list[Check]:
        """Return what the values must fulfil beside their ranges."""
        good = not self.weights or sum(self.weights) > 0
        return [("labeled.weights", self.weights, good, "must have one above 0")]
