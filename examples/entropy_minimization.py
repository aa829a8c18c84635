"""Entropy minimisation (Grandvalet and Bengio, NeurIPS 2004): a training method of one's own.

    ctt-train --method examples/entropy_minimization.py:EntropyMinimization --options.weight 0.1

The student learns to be confident on unlabelled images, whatever class it predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from ctt.methods import About, losses
from ctt.methods.base import Batch, Method, Step, Terms
from ctt.methods.options import Options
from ctt.models.base import upsample
from ctt.ranges import AT_LEAST_0


@dataclass(frozen=True)
class EntropyOptions(Options):
    weight: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the entropy of the unlabelled pixels."""


class EntropyMinimization(Method):
    about = About(
        "Grandvalet and Bengio, 2004",
        uses=(
            "loss.sup",
            "labeled",
        ),
        options=EntropyOptions,
    )
    terms = ("sup", "entropy")
    options: EntropyOptions

    def prepare(self, b: Batch, step: Step) -> Batch:
        """Count the pixels of all processes, by which the means divide."""
        seen = step.total((~b["padding"]).sum()).clamp(min=1)
        return b | {"pixels": step.count(b["label"]), "seen": seen}

    def losses(self, b: Batch, step: Step) -> Terms:
        sup, entropy, n = [], [], len(b["images"])
        for net in self.students:
            logits = step.forward(net, torch.cat([b["images"], b["unlabeled"]])).logits
            sup.append(self.labeled(logits[:n], net.grid, b, step))
            size = (b["label"].shape[-2], b["label"].shape[-1])
            log_p = upsample(logits[n:], size, net.grid).log_softmax(dim=1)
            unsure = -(log_p.exp() * log_p).sum(dim=1).masked_fill(b["padding"], 0)
            entropy.append(unsure.sum() / b["seen"])
        return {
            "sup": (self.settings.loss.sup, losses.sum_of(sup)),
            "entropy": (self.options.weight, losses.sum_of(entropy)),
        }
