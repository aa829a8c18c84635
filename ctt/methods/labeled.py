"""What students learn from labelled images: cross-entropy, and what may take part in it.

Weights of classes (ENet: Paszke et al., 2016; effective number: Cui et al., CVPR 2019), hard pixels
(Shrivastava et al., CVPR 2016), the focal factor (Lin et al., ICCV 2017) and dice (Milletari et
al., 3DV 2016). Every mean is over the images of all processes and all parts of a step, but for hard
pixels: which they are is not known before a part has gone through the student, so with
`--train.accumulate` the term is the mean over the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.errors import UserError
from ctt.methods.losses import pixel_cross_entropy
from ctt.models.base import Grid, upsample

if TYPE_CHECKING:
    from ctt.methods.base import Batch, Step
    from ctt.methods.labeled_settings import LabeledSettings

SMOOTH = 1.0  # pixel, so that the dice of a few pixels is no jump
DIGITS = 6  # after the point, of weights in config.yaml


def class_weights(
    rule: str, pixels: Sequence[int], images: Sequence[int], beta: float
) -> tuple[float, ...]:
    """Return a weight for each class; 1 for a class that no labelled image shows.

    Args:
        rule: "inverse", "enet" or "effective".
        pixels, images: of each class, among the labelled images.
        beta: of the effective number.
    """
    total, shown = sum(pixels), [c for c, n in enumerate(pixels) if n > 0]
    found = {
        "inverse": lambda c: total / pixels[c],
        "enet": lambda c: 1 / math.log(1.02 + pixels[c] / total),
        "effective": lambda c: (1 - beta) / (1 - beta ** images[c]),
    }
    weights = {c: found[rule](c) for c in shown}
    # a factor of all changes nothing, and is easier to read with mean 1
    mean = sum(weights.values()) / max(1, len(weights))
    # rounded to 0, a class that fills nearly all pixels would not be learnt at all
    rounded = {c: max(round(w / mean, DIGITS), 10**-DIGITS) for c, w in weights.items()}
    return tuple(rounded.get(c, 1.0) for c in range(len(pixels)))


class LabeledLoss(nn.Module):
    """The term of the labelled images, as `labeled` says.

    Args:
        classes: C.
        parts: of a step, `train.accumulate`.

    Raises:
        UserError: another number of weights than of classes.
    """

    weights: Tensor

    def __init__(self, settings: LabeledSettings, classes: int, parts: int) -> None:
        super().__init__()
        if settings.weights and len(settings.weights) != classes:
            raise UserError(
                f"`labeled.weights` has {len(settings.weights)} numbers, but the data has "
                f"{classes} classes. Give one for each, in their order."
            )
        self.settings, self.parts = settings, parts
        dtype = torch.get_default_dtype()
        weights = torch.tensor(settings.weights or (1.0,) * classes, dtype=dtype)
        # not in checkpoints: the settings of the run hold them
        self.register_buffer("weights", weights, persistent=False)

    def totals(self, label: Tensor, step: Step) -> Batch:
        """Return what the means of a step divide by: the weight of its labelled pixels, and for
        dice how often an image shows a class, both () and of all processes.

        Args:
            label: (B, H, W), of the whole batch of this process.
        """
        if self.settings.plain:
            return {}
        totals = {"labeled weight": step.total(self.of_pixels(label).sum())}
        if self.settings.dice:
            classes = range(len(self.weights))
            shown = torch.stack([(label == c).flatten(1).any(dim=1) for c in classes])
            totals["labeled shown"] = step.total(shown.sum())
        return totals

    def forward(self, logits: Tensor, grid: Grid, b: Batch, step: Step) -> Tensor:
        """Return the loss () of labelled images, this process's and this part's share of the mean.

        Args:
            logits: (B, C, h, w), on this grid.
            b: a part of the batch, with `pixels`, the labelled pixels of the step as `step.count`
                gives them.
        """
        label, s = b["label"], self.settings
        if s.plain:
            return pixel_cross_entropy(logits, grid, label, b["pixels"])
        scores = upsample(logits, (label.shape[-2], label.shape[-1]), grid)
        # summed here, because on CUDA the reduced form has no deterministic algorithm
        entropy = F.cross_entropy(scores, label, ignore_index=IGNORE, reduction="none")
        weight, divisor = self.of_pixels(label).to(entropy.dtype), b["labeled weight"]
        if s.ohem:
            weight = weight * self.hard(entropy.detach(), label, step)
            divisor = step.total(weight.sum()) * self.parts
        if s.focal:
            weight = weight * (-torch.expm1(-entropy)) ** s.focal
        # without a labelled pixel both are 0
        loss = (weight * entropy).sum() / divisor.clamp(min=torch.finfo(weight.dtype).tiny)
        return loss + s.dice * self.dice(scores, label, b["labeled shown"]) if s.dice else loss

    def of_pixels(self, label: Tensor) -> Tensor:
        """Return the weight of each pixel of a label (B, H, W), 0 where it is 255."""
        valid = label != IGNORE
        return self.weights[label.masked_fill(~valid, 0)] * valid

    def hard(self, entropy: Tensor, label: Tensor, step: Step) -> Tensor:
        """Return which pixels are learnt (B, H, W) bool: those of at most the probability `ohem`,
        or, if these are fewer, as many of the hardest of all processes as `ohem_kept` says.

        Args:
            entropy: cross-entropy of each pixel (B, H, W).
        """
        threshold: Tensor | float = self.settings.ohem
        valid = label != IGNORE
        probability = torch.where(valid, torch.exp(-entropy), torch.inf)
        wanted = self.settings.ohem_kept * len(label)  # of this process
        if wanted:
            count = wanted * step.processes  # of all, which may all be here
            hardest = lowest(probability.flatten(), count)
            if not step.alone:
                gathered = hardest.new_zeros(step.processes, len(hardest))
                gathered[step.rank] = hardest
                hardest = lowest(step.total(gathered).flatten(), count)
            # with fewer valid pixels than that all are kept
            threshold = hardest[-1].clamp(min=threshold) if len(hardest) == count else math.inf
        return valid & (probability <= threshold)

    def dice(self, scores: Tensor, label: Tensor, shown: Tensor) -> Tensor:
        """Return the sum of 1 - dice over images and the classes that they show, by `shown` ().

        Args:
            scores: (B, C, H, W).
            label: (B, H, W).
        """
        valid = (label != IGNORE)[:, None]
        probability = scores.softmax(dim=1) * valid  # (B, C, H, W)
        classes = torch.arange(scores.shape[1], device=label.device)[:, None, None]
        member = label[:, None] == classes
        size = member.sum(dim=(2, 3))  # (B, C)
        common = (probability * member).sum(dim=(2, 3))
        dice = (2 * common + SMOOTH) / (probability.sum(dim=(2, 3)) + size + SMOOTH)
        return ((1 - dice) * (size > 0)).sum() / shown.clamp(min=1)


def lowest(values: Tensor, count: int) -> Tensor:
    """Return the `count` lowest of values (N,), in rising order; all if they are fewer."""
    return values.topk(min(count, len(values)), largest=False).values
