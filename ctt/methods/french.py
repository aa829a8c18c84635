"""Mask-based consistency (French et al., BMVC 2020, arXiv 1906.01916), as in its program.

The student sees images that are mixed by a mask, and matches the teacher's probabilities of
the unmixed ones, mixed by the same mask: squared difference, summed over the classes, its mean over
all pixels times the share of pixels of which the teacher is sure. CutMix pastes a box of half the
area, CowMix (the paper's first version) blobs; Cutout erases a box, where nothing is learnt.

The program's Adam (--optim.name adamw --optim.weight-decay 0), its frozen batch norms
(--model.freeze-batch-norm) and the colours of its later version (--views.jitter 0.4
--views.grey-probability 0.2 --views.blur-probability 0) are settings of the run here. Its EMA does
not warm up, and its Cutout erases the box after the colours have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ctt.data import mixing
from ctt.data.views import constant
from ctt.methods.base import Batch, Setup, Step
from ctt.methods.soft_labels import SureOptions, SureSoftLabels

RULES = {"cutmix": "half-area", "cowmix": "cowmix", "cutout": "none"}


@dataclass(frozen=True)
class FrenchOptions(SureOptions):
    mask: Literal["cutmix", "cutout", "cowmix"] = "cutmix"
    """What the mask does."""


class French(SureSoftLabels):
    """Each student matches its teacher on images mixed by a mask."""

    options: FrenchOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mix = RULES[self.options.mask]
        self.mean = setup.info.mean

    def change(
        self, probability: list[Tensor], b: Batch, step: Step
    ) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
        if self.options.mask != "cutout":
            return super().change(probability, b, step)
        padding = b["padding"]
        size = (padding.shape[-2], padding.shape[-1])
        keep = mixing.cutout_mask(size, step.rand("cutout", (4, len(padding)), 1))
        mean = constant(self.mean, padding.device)[:, None, None]  # 0, once it is normalised
        erased = torch.where(keep[:, None], b["unlabeled"], mean)
        return erased, lambda values: values, keep & ~padding
