"""AdvSemiSeg as in its program (Hung et al., BMVC 2018, arXiv 1802.07934; hfslyc/AdvSemiSeg).

A discriminator learns to tell masks from predicted class maps, pixel by pixel. The student learns
to pass for a mask, and on unlabelled images its own labels where the discriminator believes them.

As in the program and unlike the paper, the discriminator learns the predictions of the unlabelled
images as well, and the student is to deceive it there too. Unlike the program: labelled and
unlabelled images go through the student in one batch, the masks that the discriminator is shown are
those of the same labelled images, padding counts nowhere, and a step in which no pixel is believed
keeps its adversarial term, which the program loses. The discriminator has a cell for 32 pixels, and
of crops below 64 pixels a single one. With `--train.accumulate` the mean over the believed pixels
is that of each part.

The term `critic` of a healthy run lies between 0.2 and 0.5, says the author (issue 39 of the
program); `believed` is the share of unlabelled pixels above the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.methods import losses
from ctt.methods.base import Batch, Schedule, Setup, Step
from ctt.methods.critics import (
    Adversarial,
    CriticOptions,
    Discriminator,
    counted,
    frozen,
    judged,
    one_hot,
)
from ctt.models.base import upsample
from ctt.ranges import AT_LEAST_0, SHARE


@dataclass(frozen=True)
class AdvSemiSegOptions(CriticOptions):
    """Values of the README's command of hfslyc/AdvSemiSeg."""

    adv: Annotated[float, AT_LEAST_0] = 0.01
    """Weight of passing for a mask on labelled images (the program's default is 0.1)."""
    adv_unlabeled: Annotated[float, AT_LEAST_0] = 0.001
    """Weight of passing for a mask on unlabelled images."""
    semi: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the student's own labels where the discriminator believes them."""
    threshold: Annotated[float, SHARE] = 0.2
    """Probability of being a mask from which a pixel is believed."""
    start: Annotated[float, SHARE] = 0.25
    """Share of the run before own labels are learnt (5,000 of 20,000 iterations)."""


class AdvSemiSeg(Adversarial):
    """Each student has a discriminator of its own."""

    terms = ("sup", "adv", "adv_unlabeled", "semi", "critic")
    logged = ("believed",)
    options: AdvSemiSegOptions

    def new_critic(self, setup: Setup, k: int) -> Discriminator:
        return setup.finish(Discriminator(setup.classes, self.options.critic_width))

    def schedules(self) -> dict[str, Schedule]:
        start = self.options.start * self.settings.train.iterations
        return {"begun": lambda iteration: float(iteration >= start)}

    def weights(self, step: Step) -> dict[str, float | Tensor]:
        o = self.options
        return {
            "sup": self.settings.loss.sup,
            "adv": o.adv,
            "adv_unlabeled": o.adv_unlabeled,
            "semi": o.semi * step["begun"],
            "critic": 1.0,
        }

    def prepare(self, b: Batch, step: Step) -> Batch:
        return counted(b, step)

    def of_student(self, k: int, b: Batch, step: Step) -> dict[str, Tensor]:
        """Return equations (1) to (5) for student k and its discriminator."""
        label, n, student, critic = b["label"], len(b["label"]), self.students[k], self.critics[k]
        valid = torch.cat([label != IGNORE, ~b["padding"]])  # (2B, H, W)
        logits = step.forward(student, torch.cat([b["images"], b["unlabeled"]])).logits
        size = (label.shape[-2], label.shape[-1])
        probability = upsample(logits, size, student.grid).softmax(dim=1)
        fake = probability.detach()
        with step.phase("critics"), step.autocast():
            seen = frozen(critic)(probability)  # as the student is judged
            made, real = critic(fake), critic(one_hot(label, fake))
        believed = valid[n:] & (seen[n:].detach().sigmoid() >= self.options.threshold)
        step.log("believed", believed.sum() / b["seen"] / len(self.students))
        own = fake[n:].max(dim=1).indices.masked_fill(~believed, IGNORE)
        taught = (own, step.count(own) * self.settings.train.accumulate)
        fakes = judged(made, False, valid, b["both"])
        return {
            "sup": self.labeled(logits[:n], student.grid, b, step),
            "adv": judged(seen[:n], True, valid[:n], b["pixels"]),
            "adv_unlabeled": judged(seen[n:], True, valid[n:], b["seen"]),
            "semi": losses.pixel_cross_entropy(logits[n:], student.grid, *taught),
            "critic": (fakes + judged(real, True, valid[:n], b["pixels"])) / 2,
        }
