"""Mean teacher (Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780) with its soft labels.

The student matches the teacher's probabilities, by the mean squared difference over classes and
pixels. The teacher sees the weak view and the student the strong one; the unlabelled images alone
take part. Published programs for segmentation differ: the TorchSemiSeg program has the constant
weight 100 and also takes the labelled images; PixelSSL has weight 1 and a sigmoid ramp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from ctt.methods.base import Batch
from ctt.methods.soft_labels import SoftLabels, SoftOptions
from ctt.ranges import AT_LEAST_0


@dataclass(frozen=True)
class MeanTeacherSoftOptions(SoftOptions):
    weight: Annotated[float, AT_LEAST_0] = 100.0
    """Weight of the mean over classes and pixels (TorchSemiSeg)."""


class MeanTeacherSoft(SoftLabels):
    """Each student matches the probabilities of its teacher."""

    def unlabeled_loss(self, k: int, logits: Tensor, b: Batch) -> Tensor:
        return super().unlabeled_loss(k, logits, b) / logits.shape[1]
