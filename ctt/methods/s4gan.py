"""The GAN branch of s4GAN (Mittal et al., TPAMI 2021, arXiv 1908.05724; sud0301/semisup-semseg).

A critic learns to tell masks from the student's predictions on unlabelled images, each seen with
its image. The student learns to give predictions whose features resemble those of masks, and its
own labels on the whole of those unlabelled images that the critic takes for masks.

Left out is the branch of the mean teacher (MLMT), a classifier of images that filters classes at
test time, so no number of the paper with MLMT is this method's. Unlike the program: labelled and
unlabelled images go through the student in one batch; the masks that the critic is shown are those
of the same labelled images; it sees images in 0..1 as they are, not stretched to the range of the
batch; images that are nothing but ignored pixels or padding count nowhere. With
`--train.accumulate` the terms `fm` and `st` are means over the parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ctt.data.dataset import IGNORE
from ctt.methods import losses
from ctt.methods.base import Batch, Schedule, Setup, Step
from ctt.methods.critics import Adversarial, CriticOptions, ImageCritic, frozen, judged, one_hot
from ctt.models.base import upsample
from ctt.ranges import AT_LEAST_0, SHARE


@dataclass(frozen=True)
class S4GanOptions(CriticOptions):
    """Values of train_s4GAN.py of sud0301/semisup-semseg, for VOC; `critic_lr` is 1e-5 on
    Cityscapes."""

    fm: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of feature matching."""
    st: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the student's own labels on images that the critic takes for masks."""
    threshold: Annotated[float, SHARE] = 0.6
    """Probability of being a mask above which an image is learnt (Cityscapes: 0.7)."""


class S4Gan(Adversarial):
    """Each student has a critic of its own."""

    terms = ("sup", "fm", "st", "critic")
    logged = ("images_chosen",)
    options: S4GanOptions

    def new_critic(self, setup: Setup, k: int) -> ImageCritic:
        return setup.finish(
            ImageCritic(setup.classes + setup.info.channels, self.options.critic_width)
        )

    def schedules(self) -> dict[str, Schedule]:
        return {"begun": lambda iteration: float(iteration > 0)}

    def weights(self, step: Step) -> dict[str, float | Tensor]:
        o = self.options
        sup = self.settings.loss.sup
        return {"sup": sup, "fm": o.fm, "st": o.st * step["begun"], "critic": 1.0}

    def prepare(self, b: Batch, step: Step) -> Batch:
        """Count pixels and images, and draw the channels that the critics drop in four passes."""
        real, fake = shows(b["label"] != IGNORE), shows(~b["padding"])
        counts = step.total(torch.stack([real.sum(), fake.sum()])).clamp(min=1)
        b = b | {"pixels": step.count(b["label"]), "masks": counts[0], "fakes": counts[1]}
        channels = ImageCritic.DRAWS * self.options.critic_width
        shapes = [(channels, len(b[name])) for name in ("unlabeled", "images") * 2]
        for k in range(len(self.students)):
            for i, draw in enumerate(step.rand_each(f"dropout-{k}", shapes, 1)):
                b[f"dropout {i} {k}"] = draw.T
        return b

    def of_student(self, k: int, b: Batch, step: Step) -> dict[str, Tensor]:
        label, n, student, critic = b["label"], len(b["label"]), self.students[k], self.critics[k]
        real, fake = shows(label != IGNORE), shows(~b["padding"])  # (B,)
        logits = step.forward(student, torch.cat([b["images"], b["unlabeled"]])).logits
        size = (label.shape[-2], label.shape[-1])
        probability = upsample(logits[n:], size, student.grid).softmax(dim=1)
        made = torch.cat([probability, b["unlabeled"]], dim=1)  # (B, C + 3, H, W)
        mask = torch.cat([one_hot(label, probability), b["images"]], dim=1)
        draws = [b[f"dropout {i} {k}"] for i in range(4)]
        with step.phase("critics"), step.autocast():
            score, features = frozen(critic)(made, draws[0])
            _, wanted = frozen(critic)(mask, draws[1])
            made_score, _ = critic(made.detach(), draws[2])
            mask_score, _ = critic(mask, draws[3])
        chosen = fake & (score.detach().sigmoid() > self.options.threshold)
        step.log("images_chosen", chosen.sum() / b["fakes"] / len(self.students))
        ignored = b["padding"] | ~chosen[:, None, None]
        own = probability.max(dim=1).indices.masked_fill(ignored, IGNORE)
        parts = self.settings.train.accumulate
        taught = (own, step.count(own) * parts)
        fakes = judged(made_score, False, fake, b["fakes"])
        return {
            "sup": self.labeled(logits[:n], student.grid, b, step),
            "fm": feature_matching(wanted, features, real, fake, step) / parts,
            "st": losses.pixel_cross_entropy(logits[n:], student.grid, *taught),
            "critic": (fakes + judged(mask_score, True, real, b["masks"])) / 2,
        }


def shows(pixels: Tensor) -> Tensor:
    """Return which images (B,) have any of the pixels (B, H, W)."""
    return pixels.flatten(1).any(dim=1)


def feature_matching(
    wanted: Tensor, features: Tensor, real: Tensor, fake: Tensor, step: Step
) -> Tensor:
    """Return the mean distance between the mean features of two sets of images, of all processes.

    Args:
        wanted, features: (B, D).
        real, fake: (B,), which of their images count.
    """
    counts = step.total(torch.stack([real.sum(), fake.sum()]))
    (masks, fakes), there = counts.clamp(min=1), counts.min().clamp(max=1)
    apart = (wanted * real[:, None]).sum(dim=0) / masks
    apart = apart - (features * fake[:, None]).sum(dim=0) / fakes  # this process's part
    # |x| is sign(x) x, and the sign is that of the sum over the processes
    distance: Tensor = (step.total(apart.detach()).sign() * apart).mean() * there
    return distance
