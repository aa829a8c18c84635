"""PC2Seg (Zhong et al., ICCV 2021, arXiv 2108.09025), our reading: no program is published.

Each student's answer to the weak view of an unlabelled image teaches the strong view: the class
probabilities by 1 - cosine, and a projection of the features by the contrast of the same pixel in
both views with pixels of other classes. The weak view takes no gradient.

Departures: negatives are the surest pixels of other classes in a memory of former weak views, not a
sample of the other images of the batch with chances by class and confidence. The weak view is seen
in evaluation mode. The constants are those that are commonly given, not checked with the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods import losses
from ctt.methods.base import Batch, Modules, Setup, Step, Terms
from ctt.methods.followers import evaluating
from ctt.methods.heads import embedding
from ctt.methods.losses import as_pixels, to_grid
from ctt.methods.mean_teacher import MeanTeacher
from ctt.methods.optim import make_optimizer
from ctt.methods.options import Options
from ctt.models.base import Grid, upsample, wide
from ctt.ops import MemoryBank, pair_info_nce
from ctt.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1


@dataclass(frozen=True)
class Pc2SegOptions(Options):
    """Settings of our reading of PC2Seg."""

    consistency: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of 1 - cosine of the probabilities of both views."""
    contrast: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the contrast of pixels."""
    temperature: Annotated[float, ABOVE_0] = 0.07
    """Temperature of the contrast."""
    dim: Annotated[int, AT_LEAST_1] = 128
    """Length of the projected features."""
    capacity: Annotated[int, AT_LEAST_1] = 200
    """Vectors in the memory of a class (our choice)."""
    pushed: Annotated[int, AT_LEAST_1] = 50
    """Pixels of a class that enter the memory in a step at most (our choice)."""


class Pc2Seg(MeanTeacher):
    """Each student is taught by itself; its teacher (EMA) is only evaluated.

    Batch, besides what every method has: `mixed`, the unlabelled images; `pixels`, `seen` (); for
    each student k `soft k` (B, C, H, W), probabilities of the weak view, `valid k` (B, H, W), where
    there are some, and on the grid `weak k` (B, D, h, w), the projected features, `class k` and
    `sure k` (B, h, w), the class and its probability; `seen k` and `held k` (), how many pixels
    count in the image and on the grid.
    """

    terms = ("sup", "consistency", "contrast")
    options: Pc2SegOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        o, dims = self.options, [student.feature_channels for student in self.students]
        with setup.seeded("projections"):
            self.projections = Modules[nn.Module](
                setup.finish(embedding(dim, dim, o.dim)) for dim in dims
            )
        self.banks = Modules[MemoryBank](
            MemoryBank(setup.classes, o.capacity, o.dim) for _ in self.students
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"students": make_optimizer(self.students, self.settings, self.projections)}

    def prepare(self, b: Batch, step: Step) -> Batch:
        padding, all_lost = b["padding"], []
        size = (padding.shape[-2], padding.shape[-1])
        b = b | {"mixed": b["unlabeled"], "pixels": step.count(b["label"])}
        b |= self.draws(b, step)
        for k, student in enumerate(self.students):
            with evaluating(student):
                out = step.forward(student, b["unlabeled"])
            with step.autocast():
                weak = self.projections[k](out.features)
            soft = upsample(out.logits, size, student.grid).softmax(dim=1)
            lost = ~(soft.amax(dim=1) > 0)  # where the probabilities are NaN
            sure, own = wide(out.logits).softmax(dim=1).max(dim=1)
            out_of = to_grid((padding | lost).long(), student.grid).bool() | ~(sure > 0)
            own, valid = own.masked_fill(out_of, IGNORE), ~(padding | lost)
            all_lost.append(lost)
            b |= {f"soft {k}": soft.masked_fill(lost[:, None], 0), f"valid {k}": valid}
            b |= {f"weak {k}": wide(weak), f"class {k}": own, f"sure {k}": sure}
            b[f"seen {k}"] = step.total(valid.sum()).clamp(min=1)
            b[f"held {k}"] = step.count(own)
        self.log_lost(all_lost, padding, step)
        return b

    def losses(self, b: Batch, step: Step) -> Terms:
        n, sup, consistency, contrast = len(b["images"]), [], [], []
        for k, out in enumerate(self.ask_students(b, step)):
            grid = self.students[k].grid
            sup.append(self.labeled(out.logits[:n], grid, b, step))
            away = distance(out.logits[n:], grid, b[f"soft {k}"], b[f"valid {k}"])
            consistency.append(away / b[f"seen {k}"])
            with step.phase("contrast"):
                contrast.append(self.contrast(k, out.features[n:], b, step) / b[f"held {k}"])
        o = self.options
        return {
            "sup": (self.settings.loss.sup, losses.sum_of(sup)),
            "consistency": (o.consistency, losses.sum_of(consistency)),
            "contrast": (o.contrast, losses.sum_of(contrast)),
        }

    def contrast(self, k: int, features: Tensor, b: Batch, step: Step) -> Tensor:
        """Return the sum over the pixels of features (B, D, h, w) of the strong view."""
        with step.autocast():
            strong = self.projections[k](features)
        bank, own = self.banks[k], b[f"class {k}"].flatten()
        return pair_info_nce(
            as_pixels(wide(strong)),
            as_pixels(b[f"weak {k}"]),
            own,
            [(bank.keys, bank.count)],
            temperature=self.options.temperature,
            mask=own != IGNORE,
            reduction="none",
        ).sum()

    def after_step(self, b: Batch, step: Step) -> None:
        super().after_step(b, step)
        with step.phase("banks"):
            for k, bank in enumerate(self.banks):
                own, sure = b[f"class {k}"].flatten(), b[f"sure {k}"].flatten()
                known, count = as_pixels(b[f"weak {k}"]), self.options.pushed
                bank.push(known, own, sure, top_k=count, per_class=count)


def distance(logits: Tensor, grid: Grid, soft: Tensor, valid: Tensor) -> Tensor:
    """Return 1 - cosine of the probabilities of logits (B, C, h, w) and of `soft` (B, C, H, W),
    summed over the valid pixels (B, H, W)."""
    p = upsample(logits, (soft.shape[-2], soft.shape[-1]), grid).softmax(dim=1)
    return (1 - F.cosine_similarity(p, soft, dim=1)).masked_fill(~valid, 0).sum()
