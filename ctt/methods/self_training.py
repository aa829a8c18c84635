"""Self-training: a first network labels the images that a second one learns from.

The paper that this package follows has it in its Table 5, without its settings. Here the first
students learn from the labelled images alone and then label every unlabelled image once, as it is,
with every pixel's class; students that start anew learn from both, the unlabelled images strongly
augmented. Every student has its own share in the mean that labels, and they learn the same labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods import losses
from ctt.methods.base import Batch, Labeler, Round, Schedule, Setup, Step, round_starts
from ctt.methods.options import Options
from ctt.methods.pseudo_labels import PseudoLabels
from ctt.ranges import Range
from ctt.settings import EvalSettings


@dataclass(frozen=True)
class SelfTrainingOptions(Options):
    first: Annotated[float, Range(0, 1, above=True, below=True)] = 0.3
    """Share of the run that the first training takes."""


class SelfTraining(PseudoLabels):
    """Students learn labels that students of a round before have given, once for all.

    Batch of a round with kept labels: that of `PseudoLabels`, made of `kept` and
    `kept confidence`.
    """

    options: SelfTrainingOptions
    logged = ("round",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.setup = dataclasses.replace(setup, initialize=True, origins=[])

    def rounds(self) -> Sequence[Round]:
        return [Round(self.options.first, "none"), Round(1 - self.options.first, "kept")]

    def begin_round(self, labeler: Labeler) -> None:
        self.label(labeler, labeler.unlabeled, EvalSettings())
        labeler.use(labeler.unlabeled)
        self.start_anew()

    def label(self, labeler: Labeler, names: Sequence[str], settings: EvalSettings) -> None:
        """Keep the classes that the mean of the students gives to every pixel."""
        for name, given in labeler.probabilities(list(self.students), names, settings):
            confidence, label = losses.mean_of(given).max(dim=0)
            labeler.keep(name, label.masked_fill(~(confidence > 0), IGNORE), confidence)

    def start_anew(self) -> None:
        """Give the students new weights, as a new run would, and their teachers the same."""
        for k, (student, teacher) in enumerate(zip(self.students, self.teachers, strict=True)):
            weights = self.setup.student(k, attempt=self.round).state_dict()
            student.load_state_dict(weights)
            teacher.load_state_dict(weights)

    def schedules(self) -> dict[str, Schedule]:
        return super().schedules() | {"ramp": lambda iteration: 1.0, "decay": self.decay}

    def decay(self, iteration: int) -> float:
        """Return the decay of the teachers' update. It warms up again whenever `start_anew` was
        called, so that teachers do not keep the random weights of that start."""
        rounds = self.rounds()
        starts = round_starts(rounds, self.settings.train.iterations)[:-1]
        anew = (start for start, r in zip(starts, rounds, strict=True) if r.restart)
        return self.ema.decay(iteration - max(start for start in anew if start <= iteration))

    def prepare(self, b: Batch, step: Step) -> Batch:
        b = b | {"pixels": step.count(b["label"])}
        if "kept" not in b:
            return b | self.draws(b, step, unlabeled=0)
        mixed, mix = self.change(b, step)
        label, confidence = mix(b["kept"]), mix(b["kept confidence"])
        trusted, weight = losses.weigh_pseudo_label(
            label, confidence, self.confidence_weight, self.threshold, step.total
        )
        b = b | {"mixed": mixed} | self.draws(b, step)
        for k in range(len(self.students)):
            b |= {f"label {k}": label, f"confidence {k}": confidence, f"trusted {k}": trusted}
            b[f"pixels {k}"] = self.divisor(trusted, label, step)
            if weight is not None:
                b[f"weight {k}"] = weight
        return b

    def change(self, b: Batch, step: Step) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return what students see of unlabelled images, and what changes their labels alike."""
        shown: list[Tensor] = []
        if self.mix.startswith("classmix"):
            label = b["kept"].masked_fill(b["padding"], 0)
            shown = [F.one_hot(label, self.setup.classes).movedim(-1, 1).to(torch.uint8)]
        mix = step.mixer(shown, b["padding"], self.mix)
        return mix(b["unlabeled"]), mix

    def report(self) -> dict[str, float]:
        return {"round": self.round}
