"""ST and ST++ (Yang et al., CVPR 2022, arXiv 2106.05095): self-training with strong views.

The mean over five sizes and their mirror images labels every pixel of the unlabelled images. In
half of them, a box of 2 to 40 % of the area is filled with noise and its labels are dropped; the
colours of the strong view are those of the run (--views.jitter 0.5 --views.hue 0.25
--views.grey-probability 0.2 are the program's). ST++ first learns from the more reliable half of
the images: those on which two earlier states of the first training agree best with its last.

The program labels with the network that is best on the validation images, this one with the last.
It takes one mean over the labelled and unlabelled images of a joint list, this one has as many of
either in a batch, and adds their means. It changes the colours before the noise, this one after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ctt.data import mixing
from ctt.data.dataset import IGNORE
from ctt.methods import followers
from ctt.methods.base import Batch, Labeler, Round, Setup, Step
from ctt.methods.options import Check
from ctt.methods.self_training import SelfTraining, SelfTrainingOptions
from ctt.ranges import ABOVE_0
from ctt.settings import EvalSettings

SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)  # of an image that is labelled, the program's


@dataclass(frozen=True)
class StOptions(SelfTrainingOptions):
    pass


@dataclass(frozen=True)
class StPlusPlusOptions(SelfTrainingOptions):
    half: Annotated[float, ABOVE_0] = 0.3
    """Share of the run that the training on the reliable half takes."""

    def checks(self) -> list[Check]:
        left = 1 - self.first - self.half
        rule = "must leave a share of the run for the last training"
        return [("options.half", self.half, left > 0, rule)]


class St(SelfTraining):
    """Self-training with the labels and views of ST."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.confidence_weight, self.unlabeled_mean = "none", "kept"
        self.labeling = dataclasses.replace(EvalSettings(), scales=SCALES, flip=True)

    def begin_round(self, labeler: Labeler) -> None:
        self.label(labeler, labeler.unlabeled, self.labeling)
        labeler.use(labeler.unlabeled)
        self.start_anew()

    def change(self, b: Batch, step: Step) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        images, size = b["unlabeled"], (b["kept"].shape[-2], b["kept"].shape[-1])
        mask, numbers = mixing.BOXES["small-box"]
        keep = mask(size, step.rand("cutout", (numbers, len(images)), 1))
        noise = step.rand("cutout noise", tuple(images.shape), 0)

        def drop(values: Tensor) -> Tensor:
            return values.masked_fill(~keep, 0 if values.is_floating_point() else IGNORE)

        return torch.where(keep[:, None], images, noise), drop


class StPlusPlus(St):
    """ST in two steps: the reliable half of the images first, then all."""

    options: StPlusPlusOptions
    following = ("teachers", "snapshots")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.snapshots = followers.copies([*self.students, *self.students])

    def rounds(self) -> Sequence[Round]:
        first, half = self.options.first, self.options.half
        third = [Round(first / 3, "none", restart=r == 0) for r in range(3)]
        return [*third, Round(half, "kept"), Round(1 - first - half, "kept")]

    def begin_round(self, labeler: Labeler) -> None:
        if self.round < 3:  # a third of the first training is done
            first = (self.round - 1) * len(self.students)
            for k, student in enumerate(self.students, first):
                self.snapshots[k].load_state_dict(student.state_dict())
            return
        if self.round == 3:
            chosen = self.reliable_half(labeler)
            self.label(labeler, chosen, self.labeling)
            labeler.use(chosen)
        else:
            known = set(labeler.used)
            others = [name for name in labeler.unlabeled if name not in known]
            self.label(labeler, others, self.labeling)
            labeler.carry(labeler.used)
            labeler.use(labeler.unlabeled)
        self.start_anew()

    def reliable_half(self, labeler: Labeler) -> list[str]:
        """Return the images on which the last students agree best with the earlier ones."""
        names, count = labeler.unlabeled, len(self.students)
        score = torch.zeros(len(names), device=next(self.parameters()).device)
        place = {name: i for i, name in enumerate(names)}
        networks = [*self.snapshots, *self.students]
        for name, given in labeler.probabilities(networks, names, EvalSettings()):
            known = torch.stack([p.amax(dim=0) > 0 for p in given]).all(dim=0)  # not NaN
            label = [p.max(dim=0).indices[known] for p in given]
            agreement = [
                mean_iou(label[j], label[2 * count + j % count], self.setup.classes)
                for j in range(2 * count)
            ]
            score[place[name]] = torch.stack(agreement).mean()
        found = labeler.total(score).tolist()
        order = sorted(names, key=lambda name: (-found[place[name]], name))
        return order[: (len(names) + 1) // 2]


def mean_iou(label: Tensor, other: Tensor, classes: int) -> Tensor:
    """Return the mean over the classes shown of their intersection over union, 0 of no pixels."""
    pairs = torch.bincount((classes * label + other).flatten(), minlength=classes**2)
    matrix = pairs.view(classes, classes).float()
    hits = matrix.diag()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - hits
    return (hits / union.clamp(min=1)).sum() / (union > 0).sum().clamp(min=1)
