"""DST-CBC (Feng et al., 2020, arXiv 2004.08514v1): dynamic self-training, class-balanced.

After a training on the labelled images come rounds that go on from its weights. Before each round
the students label all unlabelled images. Each class has a threshold of its own: the confidence
that a growing share of the pixels predicted as it reach. The label is the class whose probability
is largest in multiples of its threshold, where it reaches it; in the last round, of all pixels, it
is the likeliest class. In training, a pixel counts by the student's present probability of its
label, to the power gamma.

The program starts each round from the network that was best on the validation images so far, this
one from the last. It takes thresholds from every 16th pixel, this one from all, in steps of a 512th
of the doubt, which is 1 minus the confidence. Its images are only scaled, cropped and mirrored:
--views.mix none --views.jitter 0 --views.blur-probability 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.methods import losses
from ctt.methods.base import Batch, Labeler, Networks, Round, Setup, Step, Terms
from ctt.methods.self_training import SelfTraining, SelfTrainingOptions
from ctt.models.base import Grid, upsample
from ctt.ranges import AT_LEAST_0, Range
from ctt.settings import EvalSettings

STEPS = 512  # between a doubt and its double
OCTAVES = 24  # the smallest doubt is 2**-24, that of float32
BINS = OCTAVES * STEPS + 1


@dataclass(frozen=True)
class DstCbcOptions(SelfTrainingOptions):
    gamma: Annotated[float, AT_LEAST_0] = 2.0
    """Power of the probability by which a pixel counts (the program's default; 9 for VOC 1/106)."""
    count: Annotated[int, Range(1, 100)] = 5
    """Rounds after the first training (the paper's); each takes a larger share of the pixels."""


class DstCbc(SelfTraining):
    """Rounds of labels by class thresholds, weighed as the student changes."""

    options: DstCbcOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.confidence_weight = "none"

    def rounds(self) -> Sequence[Round]:
        first, count = self.options.first, self.options.count
        return [Round(first, "none"), *[Round((1 - first) / count, "kept")] * count]

    def decay(self, iteration: int) -> float:
        return self.ema.decay(iteration)  # the students keep their weights between the rounds

    def begin_round(self, labeler: Labeler) -> None:
        ratio = self.round / self.options.count
        threshold = class_thresholds(self.students, labeler, ratio, self.setup.classes)
        names = labeler.unlabeled
        for name, given in labeler.probabilities(list(self.students), names, EvalSettings()):
            probability = losses.mean_of(given)
            multiple, label = (probability / threshold[:, None, None]).max(dim=0)
            confidence = probability.gather(0, label[None])[0]
            labeler.keep(name, label.masked_fill(~(multiple >= 1), IGNORE), confidence)
        labeler.use(names)

    def prepare(self, b: Batch, step: Step) -> Batch:
        """Prepare the batch, with the number of labelled and pseudo-labelled pixels together,
        `both` (), and the share of the labelled ones, `share` ()."""
        b = super().prepare(b, step)
        if "mixed" in b:
            labels = torch.stack([(b[x] != IGNORE).sum() for x in ("label", "trusted 0")])
            labeled, kept = step.total(labels)
            both = (labeled + kept).clamp(min=1)
            b |= {"both": both, "share": labeled / both}
        return b

    def losses(self, b: Batch, step: Step) -> Terms:
        terms = super().losses(b, step)
        if "share" in b:  # one mean over all pixels, whatever `labeled` makes of those with labels
            weight, value = terms["sup"]
            terms["sup"] = (weight * b["share"], value)
        return terms

    def unlabeled_loss(self, k: int, logits: Tensor, b: Batch) -> Tensor:
        label = b["trusted 0"]
        log_p = log_probability(logits, self.students[k].grid, label)
        return -(log_p.detach().exp() ** self.options.gamma * log_p).sum() / b["both"]


def log_probability(logits: Tensor, grid: Grid, label: Tensor) -> Tensor:
    """Return the logarithm of the probability of each label (B, H, W), 0 where there is none."""
    scores = upsample(logits, (label.shape[-2], label.shape[-1]), grid).log_softmax(dim=1)
    there = label != IGNORE
    chosen = scores.gather(1, label.masked_fill(~there, 0)[:, None])[:, 0]
    return chosen.masked_fill(~there, 0)


def class_thresholds(networks: Networks, labeler: Labeler, ratio: float, classes: int) -> Tensor:
    """Return the confidence (C,) that a share of the pixels predicted as each class reach.

    Args:
        networks: whose mean predicts, on all unlabelled images.
        ratio: the share; of 1, all classes have one threshold, which every prediction reaches.
    """
    device = next(networks.parameters()).device
    if ratio >= 1:
        return torch.full((classes,), 1 / BINS, device=device)
    counts = torch.zeros(classes * BINS, dtype=torch.int64, device=device)
    given = labeler.probabilities(list(networks), labeler.unlabeled, EvalSettings())
    for _, probabilities in given:
        confidence, label = losses.mean_of(probabilities).max(dim=0)
        known = confidence > 0  # not NaN, whose largest is at index 0
        counts += torch.bincount(
            label[known] * BINS + level_of(confidence[known]), minlength=len(counts)
        )
    counts = labeler.total(counts).view(classes, BINS)
    reached = counts.cumsum(dim=1)  # pixels at least as sure as each level
    wanted = (ratio * reached[:, -1:]).ceil().clamp(min=1)
    level = (reached < wanted).sum(dim=1)
    seen = level < BINS  # not of a class that is nowhere predicted
    return torch.where(seen, 1 - doubt_below(level + 1), 1.0).clamp(min=1 / BINS)


def level_of(confidence: Tensor) -> Tensor:
    """Return the step (0 for the surest) of confidences; steps are finer, the surer a network is.

    Networks are soon sure of most pixels, which even steps would not tell apart.
    """
    doubt = (1 - confidence.float()).clamp(2.0**-OCTAVES, 1)
    # the bits of a float are its exponent and then 23 digits, of which the first nine stay
    return (doubt.view(torch.int32) >> 14).long() - ((127 - OCTAVES) << 9)


def doubt_below(level: Tensor) -> Tensor:
    """Return the doubt at which a step begins."""
    return ((level + ((127 - OCTAVES) << 9)) << 14).int().view(torch.float32)
