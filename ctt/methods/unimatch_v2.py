"""UniMatch V2 (Yang et al., TPAMI 2025, arXiv 2410.10777), as in its program.

The average of the student labels the weak view, and teaches two strong views whose stages lose
channels in a complementary way: of a channel that one view has twice, the other has nothing. Half
of the images keep all channels.

Departures: a box comes out of the image before in the batch, and not out of the last for the first,
and changes its colours with the image around it, not by itself. One mask serves all stages of an
image, which in the program are of one width; of stages that are not, each takes as much of the mask
as it has channels. The program's average also averages buffers, with a decay of 0.996: --ema.decay
0.996 --ema.buffers average. Its colours are a setting of the run as well: --views.jitter 0.5
--views.hue 0.25 --views.grey-probability 0.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ctt.methods import losses
from ctt.methods.base import Batch, Step, Terms
from ctt.methods.two_views import VIEWS, TwoViews, TwoViewsOptions
from ctt.ranges import AT_LEAST_0


@dataclass(frozen=True)
class UniMatchV2Options(TwoViewsOptions):
    """Settings of UniMatch V2; the defaults are those of the authors' program."""

    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the strong views, of both together."""


class UniMatchV2(TwoViews):
    """Each student is taught by its EMA on two views of complementary channels.

    Batch, besides that of `TwoViews`: for each student k `factor k` (B, channels), 0, 1 or 2 for
    each channel of the first view; the second view has 2 less that.
    """

    terms = ("sup", "strong")
    options: UniMatchV2Options

    def smallest_batch(self, labeled: int, unlabeled: int) -> int:
        return min(labeled, len(VIEWS) * unlabeled)

    def prepare(self, b: Batch, step: Step) -> Batch:
        b, images = super().prepare(b, step), len(b["padding"])
        for k, student in enumerate(self.students):
            draw = step.rand(f"channels {k}", (images, max(student.stage_channels)), 0)
            whole = step.rand(f"whole {k}", (images * step.processes,))
            place = whole.argsort().argsort()[step.rank * images :][:images]
            keep = place < len(whole) // 2  # of all processes together, one half
            b[f"factor {k}"] = torch.where(keep[:, None], 1.0, 2.0 * (draw < 0.5))
        return b

    def losses(self, b: Batch, step: Step) -> Terms:
        sup, strong, external = [], [], []
        for k, student in enumerate(self.students):
            grid = student.grid
            logits = step.forward(student, self.labeled_view(k, b, step)).logits
            sup.append(self.labeled(logits, grid, b, step))
            factor = torch.cat([b[f"factor {k}"], 2 - b[f"factor {k}"]])
            stages = student.scale_channels(
                step.encode(student, self.strong_views(k, b, step)),
                [factor[:, :channels] for channels in student.stage_channels],
            )
            both: tuple[Tensor, ...] = step.decode(student, stages).logits.chunk(len(VIEWS))
            for v, logits in zip(VIEWS, both, strict=True):
                taught = (b[f"label {v} {k}"], b[f"seen {v}"])
                strong.append(losses.pixel_cross_entropy(logits, grid, *taught))
                if self.masks is not None:
                    external.append(self.masks.loss(logits, grid, b, v))
        return {  # both of them halved, as in the program
            "sup": (self.settings.loss.sup / 2, losses.sum_of(sup)),
            "strong": (self.options.weight / 2, losses.sum_of(strong) / len(VIEWS)),
            **self.external_term(external, step),
        }
