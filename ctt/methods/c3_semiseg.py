"""C3-SemiSeg (Zhou et al., ICCV 2021): contrast across labelled and unlabelled images.

Boxes are exchanged between each labelled image and an unlabelled one; what the student answers to
the two is put back in place. Its probabilities are drawn to those of the mean teacher where the
teacher is sure, by a threshold for each class that follows how sure the teacher is of the class.
Embeddings of some pixels of each image and class, half of them pixels that the student has wrong,
are contrasted with embeddings of the same class and of others; of unlabelled images the pixels that
the teacher is sure of.

Departures: in the program boxes are exchanged between any two images of the batch. All keys are the
teacher's embeddings, of pixels drawn at random; in the program those of labelled images are the
student's, and keys are the anchors' pixels. Features are those that the classifier reads, not the
backbone's last. No class is left out of the contrast, as the program leaves out class 0, unless
--options.background says so. Ramps begin at `start`; the program contrasts labelled images from the
first epoch on. Teachers follow from the first step on. The program's colours are --views.jitter 0.5
--views.hue 0.25 --views.jitter-probability 1 --views.blur-probability 0; two more random changes of
an image (RandAugment) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.data.mixing import half_area_mask
from ctt.methods import losses, ramps
from ctt.methods.base import Batch, Schedule, Setup, Step, Terms
from ctt.methods.heads import EmbeddingTeacher, embed, embedding, without_lost
from ctt.methods.image_contrast import ImageContrast
from ctt.methods.losses import to_grid
from ctt.methods.options import Options
from ctt.methods.sampling import class_quantiles
from ctt.models.base import Grid, Output, upsample
from ctt.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE, Range


@dataclass(frozen=True)
class C3Options(Options):
    """Settings of C3-SemiSeg; the defaults are those of the authors' program, unless said."""

    consistency: Annotated[float, AT_LEAST_0] = 50.0
    """Weight of the teacher's probabilities, whose term is a mean over classes and pixels."""
    contrast: Annotated[float, AT_LEAST_0] = 0.15
    """Weight of the contrast (0.1, times the program's factor 0.15 / 0.1)."""
    start: Annotated[float, SHARE] = 0.1
    """Share of the run that learns from labels alone."""
    consistency_ramp: Annotated[float, SHARE] = 0.16
    """Share of the run over which the weight of the probabilities rises, along a sigmoid."""
    contrast_ramp: Annotated[float, SHARE] = 0.01
    """Share of the run over which the weight of the contrast rises, along a sigmoid."""
    threshold: Annotated[float, SHARE] = 0.9
    """Threshold of every class at the start."""
    memory: Annotated[float, SHARE] = 0.9
    """Part of a threshold that stays in a step; the rest is the confidence that `sure` of the
    pixels of the class have."""
    sure: Annotated[float, Range(0, 1, above=True)] = 0.8
    """Share of the pixels of a class that are above its threshold in the long run; not 0, for which
    no finite threshold is high enough."""
    anchors: Annotated[int, AT_LEAST_1] = 20
    """Pixels of an image and class that are contrasted, if it has more than so many."""
    temperature: Annotated[float, ABOVE_0] = 0.15
    dim: Annotated[int, AT_LEAST_1] = 256
    """Length of the embeddings."""
    background: Annotated[int, Range(-1)] = -1
    """Class that takes no part in the contrast; -1: none (0 in the program)."""


class C3SemiSeg(EmbeddingTeacher):
    """A mean teacher whose student sees boxes of labelled and unlabelled images exchanged.

    Batch, besides what every method has: `keep` (B, H, W), false in the boxes that are exchanged;
    for each student k `soft k` (B, C, H, W), the teacher's probabilities, `sure k` (B, H, W), where
    they count, and `count k` (), how often; and what `ImageContrast.prepare` gives, with a k.
    """

    terms = ("sup", "consistency", "contrast")
    options: C3Options
    thresholds: Tensor

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        o = self.options
        self.classes = setup.classes
        setup.foreground(o.background)  # raises if there is no such class
        self.images = ImageContrast(setup.classes, o.background, o.anchors, o.temperature)
        self.add_heads(setup, lambda dim: embedding(dim, o.dim, o.dim))
        self.register_buffer("thresholds", torch.full((setup.pairs, setup.classes), o.threshold))

    def schedules(self) -> dict[str, Schedule]:
        total, o = self.settings.train.iterations, self.options

        def risen(i: int, length: float) -> float:
            return ramps.sigmoid(i / total - o.start, length) if i >= o.start * total else 0.0

        return super().schedules() | {
            "on": lambda i: float(i >= o.start * total),
            "consistency": lambda i: o.consistency * risen(i, o.consistency_ramp),
            "contrast": lambda i: o.contrast * risen(i, o.contrast_ramp),
        }

    def prepare(self, b: Batch, step: Step) -> Batch:
        padding, n = b["padding"], len(b["images"])
        size = (padding.shape[-2], padding.shape[-1])
        off = self.thresholds.new_zeros(()) >= step["on"]
        keep = half_area_mask(size, step.rand("boxes", (3, n), 1)) | off
        b = b | {"keep": keep, "mixed": b["unlabeled"], **self.draws(b, step)}
        b["pixels"] = step.count(b["label"])
        all_lost: list[Tensor] = []
        for k, teacher in enumerate(self.teachers):
            out = step.forward(teacher, torch.cat([b["images"], b["unlabeled"]]))
            p = upsample(out.logits[n:], size, teacher.grid).softmax(dim=1)
            lost = ~(p.amax(dim=1) > 0)  # where the probabilities are NaN
            p, all_lost = p.masked_fill(lost[:, None], 0), [*all_lost, lost]
            confidence, label = p.max(dim=1)
            label = label.masked_fill(padding | lost, IGNORE)
            self.follow(k, confidence, label.masked_fill(off, IGNORE), step)
            sure = confidence >= self.thresholds[k][label.clamp(max=self.classes - 1)]
            sure &= label != IGNORE
            label = label.masked_fill(~sure, IGNORE)
            b |= {f"soft {k}": p, f"sure {k}": sure}
            b[f"count {k}"] = step.total(sure.sum()).clamp(min=1)
            maps = embed(self.head_teachers[k], out.features, step)
            own = torch.cat([to_grid(x, teacher.grid) for x in (b["label"], label)])
            maps, own = without_lost(maps, out.logits, own)
            own, maps = (torch.stack(x.chunk(2), dim=1) for x in (own, maps))
            ticket = step.rand(f"anchors {k}", tuple(own.shape), 0)
            chosen = self.images.prepare(maps, own, ticket, step)
            b |= {f"{name} {k}": value for name, value in chosen.items()}
        self.log_lost(all_lost, padding, step)
        return b

    def follow(self, k: int, confidence: Tensor, label: Tensor, step: Step) -> None:
        """Let the thresholds follow the confidence that a teacher has in its labels (B, H, W)."""
        share, stays = 1 - self.options.sure, self.options.memory
        level, seen = class_quantiles(confidence, label, self.classes, share, step)
        changed = stays * self.thresholds[k] + (1 - stays) * level
        self.thresholds[k] = torch.where(seen, changed, self.thresholds[k])

    def losses(self, b: Batch, step: Step) -> Terms:
        sup, consistency, contrast, keep = [], [], [], b["keep"]
        size = (keep.shape[-2], keep.shape[-1])
        for k, student in enumerate(self.students):
            views = torch.cat([self.labeled_view(k, b, step), self.unlabeled_view(k, b, step)])
            out = step.forward(student, torch.cat(exchanged(views, keep)))
            labeled, unlabeled = exchanged(upsample(out.logits, size, student.grid), keep)
            sup.append(self.labeled(labeled, Grid(1), b, step))
            away = -(b[f"soft {k}"] * unlabeled.log_softmax(dim=1)).mean(dim=1)
            away = away.masked_fill(~b[f"sure {k}"], 0).sum()
            consistency.append(away / b[f"count {k}"])
            with step.phase("contrast"):
                contrast.append(self.contrast(k, out, b, step))
        return {
            "sup": (self.settings.loss.sup, losses.sum_of(sup)),
            "consistency": (step["consistency"], losses.sum_of(consistency)),
            "contrast": (step["contrast"], losses.sum_of(contrast)),
        }

    def contrast(self, k: int, out: Output, b: Batch, step: Step) -> Tensor:
        """Return the contrast of what the student gives for the exchanged images."""
        keep = to_grid(b["keep"], self.students[k].grid)
        maps = (embed(self.heads[k], out.features, step), out.logits)
        features, scores = (torch.stack(exchanged(x, keep), dim=1) for x in maps)
        own = {name: b[f"{name} {k}"] for name in ("class", "ticket", "keys", "held", "anchors")}
        return self.images.loss(features, scores.argmax(dim=2), own)


def exchanged(maps: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return both halves of maps (2B, D, H, W), each with the other's pixels where `keep`
    (B, H, W) is false; done twice, it gives the halves as they were."""
    one, other = maps.chunk(2)
    keep = keep[:, None]
    return torch.where(keep, one, other), torch.where(keep, other, one)
