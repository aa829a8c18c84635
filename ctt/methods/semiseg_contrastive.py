"""SemiSeg-Contrastive (Alonso et al., ICCV 2021, arXiv 2104.13415): pixels and a class-wise memory.

A teacher labels the unlabelled images; a pixel counts by its confidence to the power 6. Features of
each class, after a projection and a prediction head, are drawn to the memory of the class, which
holds the teacher's projected features of labelled pixels that it classifies rightly and surely. For
each class two selectors weigh the pairs, one by the feature and one by the memory.

Departures: the memory takes the pixels that its selector ranks highest, as the paper says; the
program takes the lowest, and on VOC seven times as many. Its ClassMix pastes a class more, on
VOC never the background, and in a fifth of the steps it mixes labelled images too. Its EMA decay
rises to 1, and its teacher is in training mode. A class takes part with up to `pixels` pixels of a
step, drawn at random. Selectors see normalised features, and have a layer norm in place of a batch
norm, which would mix in empty places. Each image is seen once, not in two views of half as many,
and not scaled and mirrored anew after the teacher has labelled it. The program blurs less
(--views.blur-probability 0.2 --views.blur-sigma 0.1 1.5).
Left out: class weights for Cityscapes, and the return to the weights that were best in validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from ctt.data.dataset import IGNORE
from ctt.methods import followers, losses, ramps
from ctt.methods.base import Batch, Modules, Schedule, Setup, Step, Terms
from ctt.methods.class_memory import ClassMemory
from ctt.methods.dst_cbc import log_probability
from ctt.methods.heads import embed, normed_embedding
from ctt.methods.losses import to_grid
from ctt.methods.mean_teacher import MeanTeacher
from ctt.methods.optim import make_optimizer
from ctt.methods.options import Options
from ctt.methods.pseudo_labels import sometimes
from ctt.methods.sampling import entropy, number_each, sample_of
from ctt.models.base import Output, upsample, wide
from ctt.ranges import AT_LEAST_0, AT_LEAST_1, SHARE


@dataclass(frozen=True)
class ContrastiveOptions(Options):
    """Settings of SemiSeg-Contrastive; the defaults are those of the authors' program."""

    entropy: Annotated[float, AT_LEAST_0] = 0.01
    """Weight of the entropy of the students' answers to unlabelled images, a share of the largest
    possible."""
    contrast: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the contrast of labelled, and that of unlabelled images."""
    power: Annotated[float, AT_LEAST_0] = 6.0
    """Power of the teacher's confidence by which a pixel counts."""
    start: Annotated[float, SHARE] = 0.0133
    """Share of the run in which pseudo-labels gain weight, without mixing and contrast (2,000 of
    150,000 iterations); the memory is filled from its half on."""
    mix: Annotated[float, SHARE] = 0.75
    """Share of the steps whose unlabelled images are mixed by class."""
    sure: Annotated[float, SHARE] = 0.95
    """Probability that a pixel needs from the teacher to enter the memory."""
    capacity: Annotated[int, AT_LEAST_1] = 256
    """Vectors in the memory of a class."""
    pixels: Annotated[int, AT_LEAST_1] = 256
    """Pixels of a class that take part in a step at most (not in the program)."""


class SemiSegContrastive(MeanTeacher):
    """A mean teacher, and a memory of its features to which those of the student are drawn.

    Batch, besides that of `PseudoLabels`: for each student k and for `label` and `more`, the
    labelled and the mixed images, `own label k` and `number label k` (B, h, w): the class of a
    pixel on the grid, and its number among those of the class that take part.
    """

    terms = ("sup", "ct", "entropy", "contrast")
    following = ("teachers", "slow_projections")
    options: ContrastiveOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.confidence_weight, self.unlabeled_mean = "none", "all"
        dims = [student.feature_channels for student in self.students]
        self.drawn = (setup.classes, self.options.pixels)  # classes, and pixels of each
        self.per_class = max(1, round(self.options.capacity / setup.labeled))  # of an image
        with setup.seeded("heads"):
            self.projections, self.predictions = (
                Modules[nn.Module](setup.finish(normed_embedding(dim, 1)) for dim in dims)
                for _ in range(2)
            )
            self.memories = Modules[ClassMemory](
                ClassMemory(setup, self.options.capacity, dim) for dim in dims
            )
        self.slow_projections = followers.copies(self.projections)
        self.ema = followers.EmaUpdate(
            [*self.teachers, *self.slow_projections, *(m.slow[0] for m in self.memories)],
            [*self.students, *self.projections, *(m.of_pixels for m in self.memories)],
            self.settings.ema,
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        selectors = [net for m in self.memories for net in (m.of_pixels, m.of_vectors)]
        extra = (self.projections, self.predictions, selectors)
        return {"students": make_optimizer(self.students, self.settings, *extra)}

    def schedules(self) -> dict[str, Schedule]:
        total, start = self.settings.train.iterations, self.options.start
        return super().schedules() | {
            "ramp": lambda i: ramps.sigmoid(i / total, start),
            "on": lambda i: float(i >= start * total),
        }

    def stage(self, iteration: int) -> int:
        return int(2 * iteration >= self.options.start * self.settings.train.iterations)

    def mixing(
        self, given: Sequence[Tensor], padding: Tensor, step: Step
    ) -> Callable[[Tensor], Tensor]:
        paste = step.mixer(given, padding, "classmix-fewer")
        return sometimes(paste, self.options.mix * step["on"], step)

    def prepare(self, b: Batch, step: Step) -> Batch:
        b = super().prepare(b, step)
        for k, student in enumerate(self.students):
            b[f"seen {k}"] = step.count(b[f"label {k}"])
            for kind, label in (("label", b["label"]), ("more", b[f"label {k}"])):
                own = to_grid(label, student.grid)
                number = number_each(f"{kind} {k}", own, *self.drawn, step)
                b |= {f"own {kind} {k}": own, f"number {kind} {k}": number}
        return b

    def unlabeled_weight(self, step: Step) -> float | Tensor:
        return step["ramp"]

    def unlabeled_loss(self, k: int, logits: Tensor, b: Batch) -> Tensor:
        label, grid = b[f"label {k}"], self.students[k].grid
        weight = b[f"confidence {k}"] ** self.options.power
        return -(weight * log_probability(logits, grid, label)).sum() / b[f"pixels {k}"]

    def losses(self, b: Batch, step: Step) -> Terms:
        out, n, o = self.ask_students(b, step), len(b["images"]), self.options
        terms = self.cross_entropies(out, b, step)
        unsure, contrast = [], []
        for k, maps in enumerate(out):
            label, grid = b[f"label {k}"], self.students[k].grid
            scores = upsample(maps.logits[n:], (label.shape[-2], label.shape[-1]), grid)
            shares = entropy(scores).masked_fill(label == IGNORE, 0)
            unsure.append(shares.sum() / b[f"seen {k}"])
            with step.phase("contrast"):
                contrast.append(self.contrast(k, maps, b, step))
        terms["entropy"] = (o.entropy, losses.sum_of(unsure))
        mean = losses.sum_of(contrast) / self.settings.train.accumulate
        terms["contrast"] = (o.contrast * step["on"], mean)
        return terms

    def contrast(self, k: int, out: Output, b: Batch, step: Step) -> Tensor:
        """Return how far labelled and unlabelled pixels are from the memory of their class."""
        head = nn.Sequential(self.projections[k], self.predictions[k])
        maps, n = embed(head, out.features, step), len(b["images"])
        labeled, more = maps[:n], maps[n:]
        values = []
        for kind, maps in (("label", labeled), ("more", more)):
            own, number = b[f"own {kind} {k}"], b[f"number {kind} {k}"]
            sample = sample_of(maps, own, number, *self.drawn)
            values.append(self.memories[k].distance(*sample, step))
        return losses.sum_of(values)

    def after_step(self, b: Batch, step: Step) -> None:
        super().after_step(b, step)
        if not self.stage(step.iteration):
            return
        for k, teacher in enumerate(self.teachers):
            out = step.forward(teacher, b["images"])
            with step.phase("banks"):
                maps = embed(self.slow_projections[k], out.features, step)
            p, predicted = wide(out.logits).softmax(dim=1).max(dim=1)
            truth = to_grid(b["label"], teacher.grid)
            own = truth.masked_fill((predicted != truth) | ~(p > self.options.sure), IGNORE)
            number = number_each(f"memory {k}", own, *self.drawn, step)
            sample = sample_of(maps, own, number, *self.drawn)
            images = len(b["images"]) * step.processes
            self.memories[k].push(*sample, min(self.options.capacity, images * self.per_class))
