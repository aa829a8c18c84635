"""Settings of the term of the labelled images, `--labeled.NAME`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctt.methods.options import Check


@dataclass(frozen=True)
class LabeledSettings:
    """The defaults are the mean cross-entropy over the labelled pixels."""

    class_weights: Literal["none", "inverse", "enet", "effective"] = "none"
    """Weights of the classes, from the labelled images of the run: the inverse of a class's share
    of the pixels; ENet's 1 / ln(1.02 + share); or (1 - beta) / (1 - beta ** n) of the n images that
    show it, the effective number of images. They are written into config.yaml as `weights`."""
    beta: float = 0.999
    """effective: towards 1 the weights are the inverse of the number of images, towards 0 alike."""
    weights: tuple[float, ...] = ()
    """Weights of your own instead, one for each class."""
    ohem: float = 0.0
    """Learn only the hard pixels, whose class has at most this probability (online hard example
    mining; 0.7 is usual on Cityscapes); 0: all."""
    ohem_kept: int = 100_000
    """ohem: that many of the hardest pixels for each image of the step are learnt in any case."""
    focal: float = 0.0
    """Multiply the cross-entropy of a pixel by (1 - p) to this power, p being the probability of
    its class (focal loss; 2 is usual); 0: leave it."""
    dice: float = 0.0
    """Weight of the dice loss beside the cross-entropy, the mean over each image and each class
    that it shows."""

    @property
    def plain(self) -> bool:
        """Return whether the term is the mean cross-entropy over the labelled pixels."""
        return not (self.weights or self.ohem or self.focal or self.dice)

    def checks(self) -> list[Check]:
        """Return what the values must fulfil."""
        good = all(w >= 0 for w in self.weights) and (not self.weights or sum(self.weights) > 0)
        return [
            ("--labeled.beta", self.beta, 0 <= self.beta < 1, "must be in 0..1, below 1"),
            (
                "--labeled.weights",
                self.weights,
                good,
                "must be at least 0, and one of them above it",
            ),
            ("--labeled.ohem", self.ohem, 0 <= self.ohem <= 1, "must be in 0..1"),
            ("--labeled.ohem-kept", self.ohem_kept, self.ohem_kept >= 0, "must be at least 0"),
            (
                "--labeled.focal",
                self.focal,
                self.focal == 0 or self.focal >= 1,
                "must be 0 or at least 1",
            ),
            ("--labeled.dice", self.dice, self.dice >= 0, "must be at least 0"),
        ]
