"""What methods have in common whose students learn the probabilities of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ctt.methods import losses, ramps
from ctt.methods.base import Batch, Schedule, Step
from ctt.methods.mean_teacher import MeanTeacher
from ctt.methods.options import Options
from ctt.ranges import AT_LEAST_0, SHARE


@dataclass(frozen=True)
class SoftOptions(Options):
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the unlabelled images."""
    ramp: Annotated[float, SHARE] = 0.0
    """Share of the run over which that weight rises, along a sigmoid."""


class SoftLabels(MeanTeacher):
    """Each student matches the probabilities that its teacher gives to the weak view.

    Batch, besides what every method has: `mixed` (B, 3, H, W), what the student sees; for each
    student k `soft k` (B, C, H, W), the teacher's probabilities of it, and `valid k` (B, H, W),
    where they count; `seen k` (), the pixels over which the term is a mean, and `factor k` (), by
    which it is multiplied.
    """

    options: SoftOptions

    def schedules(self) -> dict[str, Schedule]:
        total, ramp = self.settings.train.iterations, self.options.ramp
        return super().schedules() | {"ramp": lambda i: ramps.sigmoid(i / total, ramp)}

    def change(
        self, probability: list[Tensor], b: Batch, step: Step
    ) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
        """Return what students see, what mixes the labels of it, and where (B, H, W) it counts."""
        mix = step.mixer(probability, b["padding"], self.mix)
        return mix(b["unlabeled"]), mix, mix(~b["padding"])

    def averaged(self, valid: Tensor) -> Tensor:
        """Return the pixels (B, H, W) over which the term is a mean: where the labels count."""
        return valid

    def factor(self, confidence: Tensor, seen: Tensor, step: Step) -> Tensor:
        """Return the factor of the term, of the teacher's confidence in the mixed images."""
        return seen.new_ones((), dtype=confidence.dtype)

    def prepare(self, b: Batch, step: Step) -> Batch:
        probability = [step.probability(teacher, b["unlabeled"]) for teacher in self.teachers]
        lost = [~(p.amax(dim=1) > 0) for p in probability]  # where the probabilities are NaN
        probability = [
            p.masked_fill(gone[:, None], 0) for p, gone in zip(probability, lost, strict=True)
        ]
        with step.phase("views"):
            mixed, mix, valid = self.change(probability, b, step)
            b = b | {"mixed": mixed, "pixels": step.count(b["label"])}
            b |= self.draws(b, step)
            for k, (p, gone) in enumerate(zip(probability, lost, strict=True)):
                own, soft = valid & ~mix(gone), mix(p)
                seen = step.total(self.averaged(own).sum()).clamp(min=1)
                factor = self.factor(soft.amax(dim=1), seen, step)
                b |= {f"soft {k}": soft, f"valid {k}": own}
                b |= {f"seen {k}": seen, f"factor {k}": factor}
            self.log_lost(lost, b["padding"], step)
        return b

    def unlabeled_weight(self, step: Step) -> float | Tensor:
        return self.options.weight * step["ramp"]

    def unlabeled_loss(self, k: int, logits: Tensor, b: Batch) -> Tensor:
        """Return the squared distance of the probabilities, its mean over pixels."""
        grid = self.students[k].grid
        distance = losses.squared_distance(logits, grid, b[f"soft {k}"], b[f"valid {k}"])
        return distance / b[f"seen {k}"] * b[f"factor {k}"]


@dataclass(frozen=True)
class SureOptions(SoftOptions):
    threshold: Annotated[float, SHARE] = 0.97
    """Confidence of a pixel that counts in the share (the program of French et al.)."""


class SureSoftLabels(SoftLabels):
    """Soft labels whose term is multiplied by the share of pixels that the teacher is sure of.

    Both the term and the share are means over all pixels, as in the program of French et al.: where
    nothing is learnt, a pixel adds 0 to the term.
    """

    options: SureOptions

    def averaged(self, valid: Tensor) -> Tensor:
        return torch.ones_like(valid)

    def factor(self, confidence: Tensor, seen: Tensor, step: Step) -> Tensor:
        return step.total((confidence >= self.options.threshold).sum()) / seen
