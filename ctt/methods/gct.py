"""GCT as in its program (Ke et al., ECCV 2020, arXiv 2008.05258; ZHKKKe/PixelSSL).

Two students see the same images. A flaw detector learns on labelled images how wrong their class
maps are, place by place. Where it holds one student to be less wrong, the other learns from it;
where both are bad, each learns to look flawless to the detector.

Unlike the program: ignored pixels and padding count nowhere, while it takes ignored pixels for
half wrong; a flaw map that nowhere reaches 0.1 is 0, while there its least value is taken away
first; the kernels of the blurs follow the shorter side of the crop. The detector has a cell for 32
pixels or so, and of crops below 92 pixels a single one, with which it tells no places apart. The
numbers that the paper prints are of a centre crop; PixelSSL has the corrected ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.data.views import gaussian_blur
from ctt.errors import UserError
from ctt.methods import losses, ramps
from ctt.methods.base import Batch, Method, Schedule, Setup, Step, Terms
from ctt.methods.critics import CriticOptions, FlawDetector, counted, frozen, make_adam, one_hot
from ctt.models.base import upsample
from ctt.ranges import AT_LEAST_0, SHARE

FLAWLESS = 0.1  # flaws up to which an image is taken to have none
TINY = 1e-9  # so that a map without any difference becomes 0


@dataclass(frozen=True)
class GctOptions(CriticOptions):
    """Values of PixelSSL for semantic segmentation."""

    fc: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of looking flawless where both students are bad."""
    dc: Annotated[float, AT_LEAST_0] = 100.0
    """Final weight of learning from the less flawed student."""
    ramp: Annotated[float, SHARE] = 0.15
    """Share of the run over which that weight rises, along a sigmoid (3 of 20 epochs)."""
    flaw: Annotated[float, AT_LEAST_0] = 10.0
    """Weight of the flaw detector's own error."""
    threshold: Annotated[float, SHARE] = 0.6
    """Flaw, relative to the largest of the image, above which a pixel is bad."""


class Gct(Method):
    """Two students and the detector of their flaws."""

    terms = ("sup", "fc", "dc", "flaw")
    logged = ("both_bad",)
    options: GctOptions

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if setup.pairs != 2:
            raise UserError(
                f"`pairs` {setup.pairs}: GCT compares two networks with each other. Leave it out."
            )
        with setup.seeded("critic"):
            self.detector = setup.finish(
                FlawDetector(setup.classes + setup.info.channels, self.options.critic_width)
            )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        adam = make_adam(self.detector, self.options.critic_lr, self.settings)
        return {**super().optimizers(), "critics": adam}

    def schedules(self) -> dict[str, Schedule]:
        total, length = self.settings.train.iterations, self.options.ramp
        return {"ramp": lambda iteration: ramps.sigmoid(iteration / total, length)}

    def prepare(self, b: Batch, step: Step) -> Batch:
        return counted(b, step)

    def losses(self, b: Batch, step: Step) -> Terms:
        label, n, o = b["label"], len(b["label"]), self.options
        valid = torch.cat([label != IGNORE, ~b["padding"]])  # (2B, H, W)
        images = torch.cat([b["images"], b["unlabeled"]])
        seen, size = step.normalize(images), (label.shape[-2], label.shape[-1])
        sup, own_error, probability, flaws = [], [], [], []
        for student in self.students:
            logits = step.forward(student, images).logits
            sup.append(self.labeled(logits[:n], student.grid, b, step))
            p = upsample(logits, size, student.grid).softmax(dim=1)  # (2B, C, H, W)
            with step.phase("critics"), step.autocast():
                flaws.append(frozen(self.detector)(torch.cat([seen, p], dim=1)))
                predicted = self.detector(torch.cat([seen, p.detach()], dim=1))[:n]
            error = (predicted - flaw_truth(p[:n].detach(), label)).square()
            own_error.append(error.masked_fill(~valid[:n], 0).sum() / b["pixels"])
            probability.append(p)
        targets, bad = choose([p.detach() for p in probability], flaws, o.threshold)
        step.log("both_bad", (bad & valid).sum() / b["both"])
        fc, dc = [], []
        for p, flaw, target in zip(probability, flaws, targets, strict=True):
            fc.append(flaw.square().masked_fill(~(bad & valid), 0).sum() / b["both"])
            apart = (p - target).square().mean(dim=1)
            dc.append(apart.masked_fill(~valid, 0).sum() / b["both"])
        return {
            "sup": (self.settings.loss.sup, losses.sum_of(sup)),
            "fc": (o.fc, losses.sum_of(fc)),
            "dc": (o.dc * step["ramp"], losses.sum_of(dc)),
            "flaw": (o.flaw, losses.sum_of(own_error) / 2),
        }


def flaw_truth(probability: Tensor, label: Tensor) -> Tensor:
    """Return how wrong class maps (B, C, H, W) are, spread over their surroundings, from 0 where
    an image is best to 1 where it is worst: (B, H, W)."""
    apart = (one_hot(label, probability) - probability).abs().sum(dim=1) / 2
    wrong = blur(apart.masked_fill(label == IGNORE, 0), 8)
    return stretched(blur(F.max_pool2d(wrong[:, None], 3, stride=1, padding=1)[:, 0], 4))


def choose(
    probability: list[Tensor], flaws: list[Tensor], threshold: float
) -> tuple[list[Tensor], Tensor]:
    """Return what each of two students should say, (B, C, H, W), and where both are bad.

    Args:
        probability: of each, (B, C, H, W).
        flaws: of each, (B, H, W).
    """
    scaled, bad = [], []
    for flaw in flaws:
        smooth = blur(flaw.detach().clamp(min=0), 16)
        flawed = smooth.amax(dim=(1, 2), keepdim=True) > FLAWLESS
        scaled.append(stretched(smooth) * flawed)
        bad.append(scaled[-1] > threshold)
    (one, other), (p, q) = (
        (s.masked_fill(b, 1) for s, b in zip(scaled, bad, strict=True)),
        probability,
    )
    targets = [
        torch.where((one <= other)[:, None], p, q),
        torch.where((other <= one)[:, None], q, p),
    ]
    return targets, bad[0] & bad[1]


def blur(maps: Tensor, share: int) -> Tensor:
    """Return maps (B, H, W) blurred by a kernel of odd size, a `share`-th of the shorter side."""
    radius = min(maps.shape[-2:]) // share // 2
    sigma = 0.3 * (radius - 1) + 0.8  # OpenCV's choice for a kernel
    return gaussian_blur(maps[:, None], maps.new_full((len(maps),), sigma), radius)[:, 0]


def stretched(maps: Tensor) -> Tensor:
    """Return maps (B, H, W) whose least value is 0 and whose largest is 1; 0 if all are equal."""
    least, most = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - least) / (most - least + TINY)
