"""What UniMatch and UniMatch V2 have in common: a weak view labels two strong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.methods import losses
from ctt.methods.base import Batch, Setup, Step, Terms
from ctt.methods.mask_teacher import TERM
from ctt.methods.mean_teacher import MeanTeacher
from ctt.methods.options import Options
from ctt.ranges import SHARE

VIEWS = (0, 1)


@dataclass(frozen=True)
class TwoViewsOptions(Options):
    threshold: Annotated[float, SHARE] = 0.95
    """Confidence of a pseudo-label that counts (the authors' configs for VOC)."""


class TwoViews(MeanTeacher):
    """Students see two strong views of each unlabelled image, mixed and coloured by themselves.

    Half of the views have a box out of the image before. Means are over the pixels that show an
    image, confident or not.

    Batch, besides what every method has: `pixels` (); `seen` (), how many pixels of the unlabelled
    images are no padding; for each view v `mixed v` (B, 3, H, W) and its `seen v` (); for each
    student k `label v k` (B, H, W), the pseudo-label, 255 where there is none or it is not sure,
    and the numbers `draw k` of both views.
    """

    options: TwoViewsOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.threshold = self.options.threshold

    def ask_labelers(self, b: Batch, step: Step) -> list[Tensor]:
        """Return the probabilities (B, C, H, W) that label the unlabelled images, by student."""
        return [step.probability(teacher, b["unlabeled"]) for teacher in self.teachers]

    def prepare(self, b: Batch, step: Step) -> Batch:
        probability, padding = self.ask_labelers(b, step), b["padding"]
        with step.phase("views"):
            b = b | {"pixels": step.count(b["label"])} | self.draws(b, step, len(VIEWS))
            b["seen"] = step.total((~padding).sum()).clamp(min=1)
            label = [self.confident(p, padding) for p in probability]
            for v in VIEWS:
                mix = self.mixer(v, b, step)
                b[f"mixed {v}"] = mix(b["unlabeled"])
                b[f"seen {v}"] = step.total(mix(~padding).sum()).clamp(min=1)
                b |= {f"label {v} {k}": mix(x) for k, x in enumerate(label)}
                if self.masks is not None:
                    b |= self.masks.mixed(b, mix, step, v)
            self.log_lost([~(p.amax(dim=1) > 0) for p in probability], padding, step)
        return b

    def mixer(self, v: int, b: Batch, step: Step) -> Callable[[Tensor], Tensor]:
        """Return what mixes the unlabelled images for view v."""
        return step.mixer([], b["padding"], "small-box", f"mix {v}")

    def confident(self, probability: Tensor, padding: Tensor) -> Tensor:
        """Return the class (B, H, W) of confident pixels, else (also for NaN) 255."""
        confidence, label = probability.max(dim=1)
        sure = (confidence > 0) & (confidence >= self.threshold)
        return label.masked_fill(padding | ~sure, IGNORE)

    def external_term(self, values: list[Tensor], step: Step) -> Terms:
        """Return the term of external masks, the mean over both views, halved as the others are."""
        if not values:
            return {}
        return {TERM: (step[TERM] / 2, losses.sum_of(values) / len(VIEWS))}

    def strong_views(self, k: int, b: Batch, step: Step) -> Tensor:
        """Return both views (2B, 3, H, W) as student k sees them."""
        draw = b[f"draw {k}"]
        return torch.cat([step.strong(b[f"mixed {v}"], draw[:, v - len(VIEWS)]) for v in VIEWS])
