"""DMT (Feng et al., Pattern Recognition 130, 2022, arXiv 2004.08514): dynamic mutual training.

Two students of different first weights learn from the labelled images. Then they take turns: one
labels all unlabelled images, keeping the surest pixels of each class, and the other learns from
them and goes on from its own weights. A pixel counts by the learner's probability of the label: to
the power gamma where both say the same, gamma_other where the labeler was surer, and not at all
where the learner is surer of another class.

The paper starts the two from weights of COCO and of ImageNet, which --model.weights can name for
each; where both start from the same or from none, their heads alone or their seeds differ. The
program labels with the network that is best on the validation images, this one with the last, and
its sampling of different labelled images for 1/106 is left out. Confidences are kept in steps of
1/255. As in DST-CBC, the program's images are only scaled, cropped and mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.errors import UserError
from ctt.methods.base import Batch, Labeler, Networks, Round, Setup
from ctt.methods.dst_cbc import DstCbc, DstCbcOptions, class_thresholds, log_probability
from ctt.models.base import upsample
from ctt.ranges import AT_LEAST_0
from ctt.settings import EvalSettings


@dataclass(frozen=True)
class DmtOptions(DstCbcOptions):
    gamma: Annotated[float, AT_LEAST_0] = 5.0
    """Power of the probability where labeler and learner agree (the program's for VOC 1/20; 3 on
    Cityscapes)."""
    gamma_other: Annotated[float, AT_LEAST_0] = 5.0
    """Power of the probability where they do not, and the labeler is surer."""


class Dmt(DstCbc):
    """Two students that label for each other in turns."""

    options: DmtOptions
    find_unused = True

    def __init__(self, setup: Setup) -> None:
        if setup.pairs != 2:
            raise UserError(f"`pairs` {setup.pairs}: dmt has two students. Leave it out.")
        super().__init__(setup)

    def rounds(self) -> Sequence[Round]:
        first, turns = self.options.first, 2 * self.options.count
        return [Round(first, "none"), *[Round((1 - first) / turns, "kept")] * turns]

    @property
    def learning(self) -> Sequence[int]:
        return [(self.round - 1) % 2] if self.round else [0, 1]

    def begin_round(self, labeler: Labeler) -> None:
        (learner,) = self.learning
        teacher = Networks([self.students[1 - learner]])
        ratio = (self.round + 1) // 2 / self.options.count
        threshold = class_thresholds(teacher, labeler, ratio, self.setup.classes)
        names = labeler.unlabeled
        for name, (probability,) in labeler.probabilities(list(teacher), names, EvalSettings()):
            confidence, label = probability.max(dim=0)
            kept = confidence >= threshold[label]
            labeler.keep(name, label.masked_fill(~kept, IGNORE), confidence)
        labeler.use(names)

    def unlabeled_loss(self, k: int, logits: Tensor, b: Batch) -> Tensor:
        label, grid = b["trusted 0"], self.students[k].grid
        log_p = log_probability(logits, grid, label)
        size = (label.shape[-2], label.shape[-1])
        own, answer = upsample(logits.detach(), size, grid).softmax(dim=1).max(dim=1)
        p, same = log_p.detach().exp(), answer == label
        weight = (p**self.options.gamma_other).masked_fill(own > b["confidence 0"], 0)
        weight = (p**self.options.gamma).where(same, weight)
        return -(weight * log_p).sum() / b["both"]
