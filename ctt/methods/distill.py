"""Distillation (Hinton et al., 2015, arXiv 1503.02531) for segmentation: a finished run teaches.

The ensemble of the run that `--teacher` names, or the one network of a file, gives its
probabilities of every image, labelled or not, as the loader shows it; the student sees the strong
view, mixed as those are, and matches them by the Kullback-Leibler divergence.

Nothing of the teachers is trained. They are in the checkpoints, so that a resumed run goes on with
what it began with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.dataset import IGNORE, DatasetInfo
from ctt.data.views import constant
from ctt.errors import UserError
from ctt.methods import followers, losses
from ctt.methods.base import Batch, Networks, Setup, Step, Terms
from ctt.methods.options import Options
from ctt.methods.pseudo_labels import PseudoLabels
from ctt.models.base import upsample
from ctt.ranges import ABOVE_0, AT_LEAST_0


@dataclass(frozen=True)
class DistillOptions(Options):
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the divergence from the teachers."""
    temperature: Annotated[float, ABOVE_0] = 1.0
    """By which the logits of both sides are divided; above 1 the classes that a teacher finds
    second best count more. The term is multiplied by its square, as in the paper."""


class Distill(PseudoLabels):
    """Each student learns the labels, and the mean probability of the teachers on all images.

    A student's own teacher (its EMA) is only evaluated.

    Batch, besides what every method has: `mixed` (B, 3, H, W); `soft` and `soft labeled`
    (B, C, H, W), the teachers' probabilities of the mixed and of the labelled images; `valid` and
    `valid labeled` (B, H, W), where they count; `seen` (), how many pixels that is.
    """

    terms = ("sup", "distill")
    options: DistillOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if setup.finished_teachers is None:
            raise UserError(
                "`method` distill needs `teacher`, the folder of a finished run, or a file of "
                "weights."
            )
        networks, self.source_info = setup.finished_teachers
        self.sources = Networks(followers.copies(networks))
        self.info = setup.info

    def train(self, mode: bool = True) -> Distill:
        """Set the mode of everything but what is never trained."""
        super().train(mode)
        self.sources.eval()
        return self

    def as_taught(self, images: Tensor) -> Tensor:
        """Return images in 0..1 that become, by the statistics of this run's dataset, what the
        teachers had by those of theirs."""
        own, theirs = self.info, self.source_info
        if (own.mean, own.std) == (theirs.mean, theirs.std):
            return images
        return (images - _channels(theirs, "mean", images)) / _channels(theirs, "std", images) * (
            _channels(own, "std", images)
        ) + _channels(own, "mean", images)

    def soft(self, images: Tensor, step: Step) -> Tensor:
        """Return the mean probabilities (B, C, H, W) of the teachers, at the temperature."""
        seen = self.as_taught(images)
        mean = losses.mean_of([step.probability(net, seen) for net in self.sources])
        if self.options.temperature == 1:
            return mean
        return losses.at_temperature(mean, self.options.temperature)

    def prepare(self, b: Batch, step: Step) -> Batch:
        soft, labeled = (self.soft(b[name], step) for name in ("unlabeled", "images"))
        with step.phase("views"):
            lost = ~(soft.amax(dim=1) > 0)  # where the probabilities are NaN
            mix = self.mixing([soft], b["padding"], step)
            valid = mix(~(b["padding"] | lost))
            own = (b["label"] != IGNORE) & (labeled.amax(dim=1) > 0)
            b = b | {"mixed": mix(b["unlabeled"]), "pixels": step.count(b["label"])}
            b |= {"soft": mix(soft.masked_fill(lost[:, None], 0)), "valid": valid}
            b |= {"soft labeled": labeled.nan_to_num(0), "valid labeled": own}
            b["seen"] = step.total(valid.sum() + own.sum()).clamp(min=1)
            b |= self.draws(b, step)
            self.log_lost([lost], b["padding"], step)
        return b

    def losses(self, b: Batch, step: Step) -> Terms:
        n, sup, apart = len(b["images"]), [], []
        for student, out in zip(self.students, self.ask_students(b, step), strict=True):
            sup.append(self.labeled(out.logits[:n], student.grid, b, step))
            size = (b["label"].shape[-2], b["label"].shape[-1])
            scores = upsample(out.logits, size, student.grid)
            soft = torch.cat([b["soft labeled"], b["soft"]])
            valid = torch.cat([b["valid labeled"], b["valid"]])
            apart.append(self.divergence(scores, soft, valid) / b["seen"])
        return {
            "sup": (self.settings.loss.sup, losses.sum_of(sup)),
            "distill": (self.options.weight, losses.sum_of(apart)),
        }

    def divergence(self, scores: Tensor, soft: Tensor, valid: Tensor) -> Tensor:
        """Return KL(teachers || student), summed over the valid pixels, times T squared.

        Args:
            scores, soft: (B, C, H, W). valid: (B, H, W).
        """
        t = self.options.temperature
        log_p = (scores / t).log_softmax(dim=1)
        apart = F.kl_div(log_p, soft.to(log_p.dtype), reduction="none").sum(dim=1)
        return apart.masked_fill(~valid, 0).sum() * t**2


def _channels(info: DatasetInfo, name: str, images: Tensor) -> Tensor:
    return constant(getattr(info, name), images.device)[:, None, None]
