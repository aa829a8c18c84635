"""UniMatch (Yang et al., CVPR 2023, arXiv 2208.09910), as in its program.

The student's own prediction of the weak view teaches two strong views, and the weak view decoded
from stages of the encoder that have lost half of their channels. Boxes of other images in the
strong views have labels that the student gives in evaluation mode.

Departures: a box comes out of the image before in the batch, not out of a second batch, and changes
its colours with the image around it, not by itself. The labelled images are not decoded a second
time, in vain, from perturbed stages. All stages that the decoder reads lose channels, two in the
program's DeepLabV3+. On Cityscapes the program has no threshold (--options.threshold 0). Its
colours are a setting of the run: --views.jitter 0.5 --views.hue 0.25 --views.grey-probability 0.2.
The EMA of the student is only evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ctt.methods import losses
from ctt.methods.base import Batch, Step, Terms
from ctt.methods.followers import evaluating
from ctt.methods.two_views import VIEWS, TwoViews, TwoViewsOptions
from ctt.models.base import upsample
from ctt.ranges import AT_LEAST_0, SHARE_BELOW_1


@dataclass(frozen=True)
class UniMatchOptions(TwoViewsOptions):
    """Settings of UniMatch; the defaults are those of the authors' program."""

    strong: Annotated[float, AT_LEAST_0] = 0.5
    """Weight of the strong views, of both together."""
    features: Annotated[float, AT_LEAST_0] = 0.5
    """Weight of the weak view whose stages lose channels."""
    dropout: Annotated[float, SHARE_BELOW_1] = 0.5
    """Share of the channels that they lose."""


class UniMatch(TwoViews):
    """Each student is taught by itself, on perturbed images and on perturbed features.

    Batch, besides that of `TwoViews`: for each view v `own v` (B, H, W), which pixels show the
    image itself, and for each student k the numbers `channels k` (B, channels) of its dropout.
    """

    terms = ("sup", "strong", "features")
    options: UniMatchOptions

    def smallest_batch(self, labeled: int, unlabeled: int) -> int:
        return min(labeled + unlabeled, len(VIEWS) * unlabeled)

    def ask_labelers(self, b: Batch, step: Step) -> list[Tensor]:
        probability = []
        for student in self.students:
            with evaluating(student):
                probability.append(step.probability(student, b["unlabeled"]))
        return probability

    def prepare(self, b: Batch, step: Step) -> Batch:
        b, images = super().prepare(b, step), len(b["padding"])
        number = torch.arange(images, device=b["padding"].device) + step.rank * images
        number = number[:, None, None].expand(b["padding"].shape)
        b |= {f"own {v}": self.mixer(v, b, step)(number) == number for v in VIEWS}
        for k, student in enumerate(self.students):
            shape = (images, sum(student.stage_channels))
            b[f"channels {k}"] = step.rand(f"channels {k}", shape, 0)
        return b

    def losses(self, b: Batch, step: Step) -> Terms:
        sup, strong, features, external = [], [], [], []
        for k, student in enumerate(self.students):
            grid, size = student.grid, (b["padding"].shape[-2], b["padding"].shape[-1])
            labeled, weak, perturbed = self.weak_views(k, b, step)
            sup.append(self.labeled(labeled, grid, b, step))
            own = upsample(weak.detach(), size, grid).softmax(dim=1)
            label = self.confident(own, b["padding"])
            features.append(losses.pixel_cross_entropy(perturbed, grid, label, b["seen"]))
            both = step.forward(student, self.strong_views(k, b, step)).logits.chunk(len(VIEWS))
            for v, logits in zip(VIEWS, both, strict=True):
                mixed = torch.where(b[f"own {v}"], label, b[f"label {v} {k}"])
                strong.append(losses.pixel_cross_entropy(logits, grid, mixed, b[f"seen {v}"]))
                if self.masks is not None:
                    external.append(self.masks.loss(logits, grid, b, v))
        o = self.options
        return {  # all of them halved, as in the program
            "sup": (self.settings.loss.sup / 2, losses.sum_of(sup)),
            "strong": (o.strong / 2, losses.sum_of(strong) / len(VIEWS)),
            "features": (o.features / 2, losses.sum_of(features)),
            **self.external_term(external, step),
        }

    def weak_views(self, k: int, b: Batch, step: Step) -> tuple[Tensor, ...]:
        """Return logits (B, C, h, w) of the labelled images, of the unlabelled ones, and of these
        from perturbed stages, by student k."""
        student, share, n = self.students[k], self.options.dropout, len(b["images"])
        stages = step.encode(student, torch.cat([self.labeled_view(k, b, step), b["unlabeled"]]))
        factor = (b[f"channels {k}"] >= share) / (1 - share)  # (B, channels of all stages)
        factors = torch.split(factor, list(student.stage_channels), dim=1)
        perturbed = student.scale_channels([x[n:] for x in stages], factors)
        joined = [torch.cat(pair) for pair in zip(stages, perturbed, strict=True)]
        return step.decode(student, joined).logits.tensor_split((n, len(stages[0])))
