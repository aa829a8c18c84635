"""Virtual adversarial training (Miyato et al., TPAMI 2018, arXiv 1704.03976), as in the program of
French et al. (BMVC 2020, arXiv 1906.01916).

The student sees an unlabelled image plus the small change that misleads its teacher most, and
matches the teacher's prediction for the unchanged one: Kullback-Leibler divergence, its mean over
all pixels, times the share of pixels of which the teacher is sure. One power iteration finds the
direction of the change: the gradient of that divergence near the image. Its length is that of the
differences between neighbouring pixels, so that images with little texture change less.

Departures from that program:
- The step of the power iteration is larger, and its network runs in full precision. The program's
  step, about 2e-7 for each number of a crop of 321, is lost in float32.
- The random directions that it starts from are shared by the images of a batch.
- Pixels without image, or where the teacher gives NaN, do not count in the direction.
- The EMA warms up, as in every method here. Adam (--optim.name adamw --optim.weight-decay 0),
  frozen batch norms (--model.freeze-batch-norm) and colours (--views.jitter 0.4
  --views.grey-probability 0.2 --views.blur-probability 0) are settings of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.views import constant
from ctt.methods.base import Batch, Setup, Step
from ctt.methods.soft_labels import SureOptions, SureSoftLabels
from ctt.models.base import Grid, upsample
from ctt.ranges import AT_LEAST_0

# Root mean square over an image, of normalised colours. The cosine to the exact direction was
# measured as 0.96 to 1.00, in float32 and in TF32; in bfloat16 it needs ten times this step.
STEP = 0.01


@dataclass(frozen=True)
class VatOptions(SureOptions):
    """Settings of VAT; the defaults are those of the program's run_pascal_aug_experiments.sh."""

    weight: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the unlabelled images."""
    radius: Annotated[float, AT_LEAST_0] = 1.0
    """Length of the change, as a multiple of the length of the image's gradient."""


class Vat(SureSoftLabels):
    """Each student matches its teacher on adversarially perturbed images."""

    options: VatOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mix = "none"
        self.deviation = setup.info.std

    def unlabeled_view(self, k: int, b: Batch, step: Step) -> Tensor:
        view = super().unlabeled_view(k, b, step)
        with step.phase("teachers"):
            x = step.normalize(view)
            change = self.options.radius * texture(x) * self.worst_direction(k, x, b, step)
            return view + change * constant(self.deviation, x.device)[:, None, None]

    def worst_direction(self, k: int, x: Tensor, b: Batch, step: Step) -> Tensor:
        """Return the direction (B, 3, H, W) from normalised views x in which the probabilities of
        teacher k leave those of the weak views soonest."""
        teacher, valid = self.teachers[k], b[f"valid {k}"]
        with torch.no_grad():
            logits = teacher(step.normalize(b["mixed"])).logits
            soft = upsample(logits, (x.shape[2], x.shape[3]), teacher.grid).softmax(dim=1)
        start = unit(step.rand(f"direction {k}", x.shape[1:]) - 0.5)
        near = (x + STEP * start.numel() ** 0.5 * start).requires_grad_()
        distance = divergence(teacher(near).logits, teacher.grid, soft, valid)
        (gradient,) = torch.autograd.grad(distance, near)
        return unit(gradient.nan_to_num(0, 0, 0))

    def unlabeled_loss(self, k: int, logits: Tensor, b: Batch) -> Tensor:
        grid = self.students[k].grid
        distance = divergence(logits, grid, b[f"soft {k}"], b[f"valid {k}"])
        return distance / b[f"seen {k}"] * b[f"factor {k}"]


def unit(x: Tensor) -> Tensor:
    """Return x (..., 3, H, W) with length 1 for each image."""
    length: Tensor = x.square().sum(dim=(-3, -2, -1), keepdim=True).sqrt()
    return x / (length + 1e-12)


def texture(x: Tensor) -> Tensor:
    """Return the length (B, 1, 1, 1) of the central differences of images (B, 3, H, W)."""
    rows, columns = x[:, :, 2:] - x[:, :, :-2], x[..., 2:] - x[..., :-2]
    squares = [d.square().sum(dim=(1, 2, 3), keepdim=True) for d in (rows, columns)]
    length: Tensor = 0.5 * (squares[0] + squares[1]).sqrt()
    return length


def divergence(logits: Tensor, grid: Grid, soft: Tensor, valid: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence from probabilities, summed over the valid pixels.

    Args:
        logits: (B, C, h, w), on this grid.
        soft: (B, C, H, W).
        valid: (B, H, W) bool.
    """
    log_p = upsample(logits, (soft.shape[-2], soft.shape[-1]), grid).log_softmax(dim=1)
    distance = F.kl_div(log_p, soft, reduction="none").sum(dim=1)
    return distance.masked_fill(~valid, 0).sum()
