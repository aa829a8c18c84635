"""PseudoSeg (Zou et al., ICLR 2021, arXiv 2010.09713), as in its program.

A classifier of whole images says which classes there are, and its class activation maps say where.
Attention over the encoder's features refines these maps to a second prediction. The mean of it and
of the decoder's prediction for the weak view, both scaled alike and sharpened, teaches the strong
view: softly, and at every pixel but those of an erased box.

Departures: features are the last two stages that the decoder reads, averaged to the grid of the
last one (of one network for one stage, that one); in the program they are the last two of the
backbone. The box has the same share of the crop's sides as the program's 100 of 513 pixels. What is
ignored in a mask is padding to the attention; in the program, what will be erased is as well. The
scale of the predictions is that of all processes together. The program's colours are --views.jitter
0.5 --views.hue 0.25 --views.jitter-probability 1 --views.blur-probability 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data import mixing
from ctt.data.dataset import IGNORE
from ctt.data.views import constant
from ctt.methods import losses
from ctt.methods.activation_maps import Refiner, on_grid, read
from ctt.methods.base import Batch, Modules, Setup, Step, Terms
from ctt.methods.followers import evaluating
from ctt.methods.losses import to_grid
from ctt.methods.mean_teacher import MeanTeacher
from ctt.methods.optim import make_optimizer
from ctt.methods.options import Options
from ctt.models.base import upsample
from ctt.ranges import ABOVE_0, AT_LEAST_0, SHARE, Range


@dataclass(frozen=True)
class PseudoSegOptions(Options):
    """Settings of PseudoSeg; the defaults are those of the authors' program."""

    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the unlabelled images."""
    temperature: Annotated[float, ABOVE_0] = 0.5
    """Pseudo-labels are sharpened to p ** (1 / temperature), over the sum of the classes."""
    cutout: Annotated[float, SHARE] = 0.195
    """Sides of the erased box, as a share of the crop's; parts of it may be outside."""
    background: Annotated[int, Range(-1)] = 0
    """Class of the background, which the classifier of images leaves out; -1: there is none."""


class PseudoSeg(MeanTeacher):
    """Decoder and refined activation maps together label the weak view for the strong one.

    Batch, besides what every method has: `pixels` (); `keep` (B, H, W), which pixels are not
    erased; `objects` (B, C - 1), which classes labelled images show, and `labeled` (), how many
    show any; for each student k `soft k` (B, C, h, w), `valid k` (B, h, w) and `cells k` (), the
    pseudo-label on its grid and where it counts, and the numbers `draw k` of its strong view.
    """

    terms = ("sup", "refined", "presence", "consistency")
    options: PseudoSegOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        background, self.mean = self.options.background, setup.info.mean
        self.objects = setup.foreground(background)
        with setup.seeded("refiner"):
            self.refiners = Modules[Refiner](
                setup.finish(Refiner(net, setup.classes, background)) for net in self.students
            )

    def smallest_batch(self, labeled: int, unlabeled: int) -> int:
        return min(labeled, unlabeled)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"students": make_optimizer(self.students, self.settings, self.refiners)}

    def prepare(self, b: Batch, step: Step) -> Batch:
        label, padding, images = b["label"], b["padding"], b["unlabeled"]
        size = (padding.shape[-2], padding.shape[-1])
        objects = constant(self.objects, label.device)[:, None, None]
        centre = step.rand("cutout", (2, len(padding)), 1) - self.options.cutout / 2
        side = torch.full_like(centre[0], self.options.cutout)
        b = b | {"pixels": step.count(label), "keep": mixing.outside(size, side, side, *centre)}
        b |= self.draws(b, step)
        b["objects"] = (label[:, None] == objects).flatten(2).any(dim=2)
        b["labeled"] = step.total((label != IGNORE).flatten(1).any(dim=1).sum()).clamp(min=1)
        for k, (student, refiner) in enumerate(zip(self.students, self.refiners, strict=True)):
            with evaluating(student):
                stages = read(student, step.encode(student, images))
            present = refiner.presence(stages) >= 0
            refined = refiner(stages, present, ~on_grid(padding, stages[-1], student))
            decoded = step.forward(student, images).logits.to(refined.dtype)
            distance = student.stage_stride(stages[-1], size) / student.grid.distance
            cells = student.grid_of(round(distance))
            refined = upsample(refined, (decoded.shape[-2], decoded.shape[-1]), cells)
            soft = self.sharpened([decoded, refined], step)
            lost = ~(soft.amax(dim=1) > 0)  # where the probabilities are NaN
            unseen = to_grid(padding, student.grid)
            b[f"valid {k}"] = to_grid(b["keep"], student.grid) & ~unseen & ~lost
            b[f"soft {k}"] = soft.masked_fill(lost[:, None], 0)
            b[f"cells {k}"] = step.total(b[f"valid {k}"].sum()).clamp(min=1)
            shown = step.total((~unseen).sum()).clamp(min=1)
            step.log("lost_pixels", (lost & ~unseen).sum() / shown / len(self.students))
        return b

    def sharpened(self, logits: list[Tensor], step: Step) -> Tensor:
        """Return the mean of the probabilities (B, C, h, w), sharpened; the logits are divided by
        the root of the mean of all their squares."""
        squares = step.total(torch.stack([x.square().sum() for x in logits]).sum())
        count = step.processes * sum(x.numel() for x in logits)
        scale = (squares / count + 1e-8).rsqrt()
        mean = losses.mean_of([(scale * x).softmax(dim=1) for x in logits])
        return losses.at_temperature(mean, self.options.temperature)

    def losses(self, b: Batch, step: Step) -> Terms:
        terms: dict[str, list[Tensor]] = {name: [] for name in self.terms}
        label, size = b["label"], (b["label"].shape[-2], b["label"].shape[-1])
        any_label = (label != IGNORE).flatten(1).any(dim=1)[:, None]
        mean = constant(self.mean, label.device)[:, None, None]
        for k, (student, refiner) in enumerate(zip(self.students, self.refiners, strict=True)):
            encoded = step.encode(student, self.labeled_view(k, b, step))
            logits, stages = step.decode(student, encoded).logits, read(student, encoded)
            terms["sup"].append(self.labeled(logits, student.grid, b, step))
            said = refiner.presence(stages)
            wrong = F.binary_cross_entropy_with_logits(
                said, b["objects"].to(said.dtype), reduction="none"
            )
            wrong = wrong.masked_fill(~any_label, 0).sum()
            terms["presence"].append(wrong / (b["labeled"] * len(self.objects)))
            valid = ~on_grid(label == IGNORE, stages[-1], student)
            refined = refiner(stages, b["objects"], valid)
            grid = student.grid_of(student.stage_stride(stages[-1], size))
            terms["refined"].append(losses.pixel_cross_entropy(refined, grid, label, b["pixels"]))
            strong = step.strong(b["unlabeled"], b[f"draw {k}"][:, -1])
            strong = torch.where(b["keep"][:, None], strong, mean)
            logits = step.forward(student, strong).logits.to(said.dtype)
            distance = -(b[f"soft {k}"] * logits.log_softmax(dim=1)).sum(dim=1)
            distance = distance.masked_fill(~b[f"valid {k}"], 0).sum()
            terms["consistency"].append(distance / b[f"cells {k}"])
        weights = (self.settings.loss.sup, 1.0, 1.0, self.options.weight)
        sums = map(losses.sum_of, terms.values())
        return dict(zip(self.terms, zip(weights, sums, strict=True), strict=True))
