"""Cross-consistency training (Ouali et al., CVPR 2020, arXiv 2003.09005).

Auxiliary decoders see perturbed features of unlabelled images and learn to say what the main
decoder says of the features as they are. It learns from labels alone, the encoder from both.

The paper's encoder includes pyramid pooling, and its decoders are a 1x1 convolution and upsampling.
Here the encoder is all that comes before the last 1x1 classifier, z (B, D, h, w) is what that
reads, and every decoder is such a classifier. They are compared on the grid of z, where it shows an
image.

Other departures from the authors' program:
- Six of the seven perturbations, 24 of the 30 decoders. Guided cutout is left out: it looks for the
  contours of objects on the CPU, for which a GPU would wait in every step.
- The power iteration of the adversarial noise is exact, in the limit of small steps: of decoders
  that are linear in z the gradient is known. The program's step of 1e-6 is lost in float32.
- The random directions that it starts from are shared by the images of a batch, as the noise is.
- Feature dropout takes the mean of |z|, as not every network's features are rectified. The range of
  its threshold is that of the program's first version (in the paper 0.6 to 0.9).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.methods import losses, ramps
from ctt.methods.base import Batch, Method, Modules, Schedule, Setup, Step, Terms
from ctt.methods.losses import to_grid
from ctt.methods.optim import make_optimizer
from ctt.methods.options import Options
from ctt.ranges import AT_LEAST_0, SHARE, SHARE_BELOW_1, Range

# auxiliary decoders of each kind, of the authors' config.json
ADVERSARIAL, DROPOUT, CONTEXT, OBJECTS, FEATURE_DROPOUT, NOISE = 2, 6, 2, 2, 6, 6
THRESHOLDS = (0.7, 0.9)  # of feature dropout, as shares of the largest attention


@dataclass(frozen=True)
class CctOptions(Options):
    """Settings of CCT; the defaults are those of the authors' config.json."""

    weight: Annotated[float, AT_LEAST_0] = 30.0
    """Final weight of the consistency."""
    ramp: Annotated[float, SHARE] = 0.1
    """Share of the run over which that weight rises, along a sigmoid."""
    radius: Annotated[float, AT_LEAST_0] = 2.0
    """Length of the adversarial noise of an image, over all of its features."""
    dropout: Annotated[float, SHARE_BELOW_1] = 0.5
    """Share of the channels that channel dropout takes."""
    noise: Annotated[float, AT_LEAST_0] = 0.3
    """Largest noise, as a share of a feature."""
    background: Annotated[int, Range(-1)] = 0
    """Class of the background, for the decoders that see objects or their context alone; -1: the
    data has none, and these decoders are left out."""


class Cct(Method):
    """Decoders of perturbed features agree with the main decoder.

    Batch, besides what every method has: `pixels` (), for each student k `cells k` (), how many
    cells of its grid show an unlabelled image, and `channels k` (B, 6, D), numbers of the dropout.
    """

    terms = ("sup", "consistency")
    options: CctOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        without = len(setup.foreground(self.options.background)) == setup.classes
        guided = 0 if without else CONTEXT + OBJECTS
        count = ADVERSARIAL + DROPOUT + guided + FEATURE_DROPOUT + NOISE
        with setup.seeded("decoders"):
            self.decoders = Modules[nn.ModuleList](
                nn.ModuleList(
                    nn.Conv2d(student.feature_channels, setup.classes, 1) for _ in range(count)
                )
                for student in self.students
            )

    def schedules(self) -> dict[str, Schedule]:
        total, length = self.settings.train.iterations, self.options.ramp
        return {"ramp": lambda iteration: ramps.sigmoid(iteration / total, length)}

    def smallest_batch(self, labeled: int, unlabeled: int) -> int:
        return min(labeled, unlabeled)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"students": make_optimizer(self.students, self.settings, self.decoders)}

    def prepare(self, b: Batch, step: Step) -> Batch:
        b = b | {"pixels": step.count(b["label"])}
        for k, student in enumerate(self.students):
            seen = ~to_grid(b["padding"], student.grid)
            b[f"cells {k}"] = step.total(seen.sum()).clamp(min=1)
            shape = (len(seen), DROPOUT, student.feature_channels)
            b[f"channels {k}"] = step.rand(f"channels {k}", shape, 0)
        return b

    def losses(self, b: Batch, step: Step) -> Terms:
        sup, consistency = [], []
        for k, student in enumerate(self.students):
            logits = step.forward(student, b["images"]).logits
            sup.append(self.labeled(logits, student.grid, b, step))
            # in full precision: half of it would round the adversarial noise away
            dtype = student.classifier.weight.dtype
            main, z = (x.to(dtype) for x in step.forward(student, b["unlabeled"]))
            target = main.detach().softmax(dim=1)
            unseen = to_grid(b["padding"], student.grid)[:, None]
            perturbed = self.perturbations(k, z, target, b, step)
            distance = [
                (decoder(x).softmax(dim=1) - target).square().masked_fill(unseen, 0).sum()
                for decoder, x in zip(self.decoders[k], perturbed, strict=True)
            ]
            values = len(distance) * target.shape[1] * b[f"cells {k}"]
            consistency.append(losses.sum_of(distance) / values)
        return {
            "sup": (self.settings.loss.sup, losses.sum_of(sup)),
            "consistency": (self.options.weight * step["ramp"], losses.sum_of(consistency)),
        }

    def perturbations(
        self, k: int, z: Tensor, target: Tensor, b: Batch, step: Step
    ) -> Iterator[Tensor]:
        """Yield features z (B, D, h, w) of student k as each of its decoders sees them; the main
        one predicts `target` (B, C, h, w)."""
        o, size = self.options, z.shape[1:]
        directions = step.rand(f"direction {k}", (ADVERSARIAL, *size)) - 0.5
        for decoder, direction in zip(self.decoders[k], directions, strict=False):
            yield z + o.radius * worst_direction(z, decoder, direction)
        for draw in b[f"channels {k}"].unbind(dim=1):  # (B, D)
            yield z * ((draw >= o.dropout) / (1 - o.dropout))[:, :, None, None]
        if o.background >= 0:
            objects = (target.max(dim=1).indices != o.background)[:, None]
            yield from [z * objects] * CONTEXT
            yield from [z * ~objects] * OBJECTS
        attention = z.detach().abs().mean(dim=1, keepdim=True)  # (B, 1, h, w)
        peak = attention.amax(dim=(2, 3), keepdim=True)
        low, high = THRESHOLDS
        for draw in step.rand(f"threshold {k}", (FEATURE_DROPOUT,)):
            yield z * (attention < peak * (low + (high - low) * draw))
        for draw in step.rand(f"noise {k}", (NOISE, *size)):
            yield z * (1 + o.noise * (2 * draw - 1))


@torch.no_grad()
def worst_direction(z: Tensor, decoder: nn.Module, direction: Tensor) -> Tensor:
    """Return the direction that changes a decoder's probabilities most, by one power iteration.

    Near z the Kullback-Leibler divergence is d' H d / 2; H d is what the iteration computes.

    Args:
        z: (B, D, h, w).
        decoder: a 1x1 convolution.
        direction: d (D, h, w), to start from.

    Returns:
        (B, D, h, w), of length 1 for each image.
    """
    assert isinstance(decoder, nn.Conv2d)
    p = decoder(z).softmax(dim=1)  # (B, C, h, w)
    change = F.conv2d(direction[None].to(z.dtype), decoder.weight)  # of the logits
    change = p * (change - (p * change).sum(dim=1, keepdim=True))
    worst = F.conv2d(change, decoder.weight.transpose(0, 1))
    length: Tensor = worst.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return worst / (length + 1e-8)
