"""Crops of labelled images drawn so that rare classes appear."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from ctt.data.seeding import derive_seed

TEMPERATURE = 0.01  # of the draw of a class (Hoyer et al., DAFormer, CVPR 2022)


class RareClasses:
    """Which draws of labelled images are made for a class, the rarer the more often.

    A class of the share f of the pixels is drawn with a chance proportional to exp((1 - f) / T),
    then one of the images that show it, as in DAFormer.

    Args:
        pixels: (N, C), as `class_pixels` returns them.
        share: of the draws that are made for a class.
        seed: of the run.
    """

    def __init__(self, pixels: Tensor, share: float, seed: int) -> None:
        self.share, self.seed = share, seed
        frequency = pixels.sum(dim=0).double() / pixels.sum().clamp(min=1)
        chance = ((1 - frequency) / TEMPERATURE).masked_fill(frequency == 0, -torch.inf)
        self.chance: list[float] = chance.softmax(dim=0).tolist() if pixels.any() else []
        self.images = [(pixels[:, c] > 0).nonzero().flatten().tolist() for c in range(len(chance))]

    def __call__(self, draw: int) -> tuple[int, int] | None:
        """Return the index of an image and the class that this draw is for; None: for no class."""
        rng = random.Random(derive_seed("rare class", self.seed, draw))
        if rng.random() >= self.share or not self.chance:
            return None
        wanted = rng.choices(range(len(self.chance)), self.chance)[0]
        return rng.choice(self.images[wanted]), wanted


def pixel_of(label: Tensor, wanted: int, seed: int) -> tuple[int, int] | None:
    """Return row and column of a random pixel of a class in a label (H, W); None: it has none."""
    places = (label == wanted).nonzero()
    if not len(places):
        return None
    row, column = places[random.Random(seed).randrange(len(places))].tolist()
    return row, column
