"""Virtual adversarial training (Miyato et al., 2018, arXiv 1704.03976), as French's program has it.

Each image is moved in the direction that changes the student's answer most, and the student is
drawn to the teacher's answer to the image as it was: squared difference, summed over the classes,
its mean over the pixels times the share of pixels of which the teacher is sure. The direction is
the gradient of that difference at a small random change, one step of a power iteration, with the
student's batch norms as in evaluation. The length is the share `radius` of the norm of the image's
differences from pixel to pixel.

The program's random change is lost in the rounding of float32; here its deviation is 0.01 of the
range of the image. Images are moved in 0..1, before they are normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctt.methods.base import Batch, Setup, Step
from ctt.methods.followers import evaluating
from ctt.methods.options import Check, at_least_0, shares
from ctt.methods.soft_labels import SoftLabels, SoftOptions
from ctt.models.base import Output, SegmentationModel

NOISE = 0.01  # deviation of the random change


@dataclass(frozen=True)
class VatOptions(SoftOptions):
    weight: float = 0.1
    """Weight of the unlabelled images (the program's)."""
    radius: float = 0.5
    """Length of the change, as a share of the norm of the image's differences (the program's)."""
    threshold: float = 0.97
    """Confidence of a pixel that counts in the share (the program's)."""

    def checks(self) -> list[Check]:
        return [
            *super().checks(),
            *at_least_0(radius=self.radius),
            *shares(threshold=self.threshold),
        ]


class Vat(SoftLabels):
    """Each student is drawn to its average, at images that are made hard for it."""

    options: VatOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mix = "none"

    def prepare(self, b: Batch, step: Step) -> Batch:
        """Prepare the batch, with `moved k` (B, 3, H, W) for each student k."""
        b = super().prepare(b, step)
        images = b["unlabeled"]
        draw = step.rand("noise", tuple(images.shape), 0)
        noise = torch.special.ndtri(draw.clamp(1e-6, 1 - 1e-6))
        for k, student in enumerate(self.students):
            direction = self.hardest(student, images, NOISE * noise, ~b["padding"], step)
            length = self.options.radius * norm(differences(images))
            b[f"moved {k}"] = images + length * direction / norm(direction).clamp(min=1e-20)
        return b

    def hardest(
        self, student: SegmentationModel, images: Tensor, noise: Tensor, valid: Tensor, step: Step
    ) -> Tensor:
        """Return the gradient (B, 3, H, W) of how much the student's answer changes."""
        with evaluating(student):
            answer = step.probability(student, images)
            with torch.enable_grad():
                noise = noise.requires_grad_()
                change = step.probability(student, images + noise) - answer
                distance = change.square().sum(dim=1).masked_fill(~valid, 0).sum()
                # the factor keeps small gradients in float16, and drops out with the length
                gradient: Tensor = torch.autograd.grad(1e4 * distance, noise)[0]
        return gradient

    def factor(self, confidence: Tensor, valid: Tensor, seen: Tensor, step: Step) -> Tensor:
        return step.total((valid & (confidence >= self.options.threshold)).sum()) / seen

    def ask_students(self, b: Batch, step: Step) -> list[Output]:
        moved: Sequence[Tensor] = [b[f"moved {k}"] for k in range(len(self.students))]
        return [
            step.forward(student, torch.cat([self.labeled_view(k, b, step), moved[k]]))
            for k, student in enumerate(self.students)
        ]


def differences(images: Tensor) -> Tensor:
    """Return half the differences of each pixel's neighbours, across and down, side by side."""
    across = (images[..., 2:] - images[..., :-2]).flatten(1)
    down = (images[..., 2:, :] - images[..., :-2, :]).flatten(1)
    return torch.cat([across, down], dim=1) / 2


def norm(values: Tensor) -> Tensor:
    """Return the norm of each of a batch: (B, 1, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return length[:, None, None, None]
