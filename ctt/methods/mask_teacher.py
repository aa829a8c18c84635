"""A folder of masks that another model made of the unlabelled images, as one more teacher.

Such a model may know what no labelled image says: SAM, an open-vocabulary one, or a large one
trained elsewhere. Its weight may fall to 0 over the run, as the guidance of SemiVL does (Hoyer et
al., ECCV 2024), when the networks have become better than it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods.mask_settings import MaskSettings
from ctt.models.base import Grid, upsample

if TYPE_CHECKING:
    from ctt.methods.base import Batch, Step

TERM = "masks"


class MaskTeacher:
    """The term of such masks, which take part in every mix of the images.

    The batch holds `external` (B, H, W), the mask, 255 where there is none, and
    `external confidence` (B, H, W).

    Args:
        total: iterations of the run.
    """

    def __init__(self, settings: MaskSettings, total: int) -> None:
        self.settings, self.total = settings, total

    def weight(self, iteration: int) -> float:
        """Return the weight of the term after so many steps."""
        s = self.settings
        left = 1 - iteration / (s.fade * self.total) if s.fade else 1.0
        return s.weight * max(0.0, left)

    def mixed(
        self, b: Batch, mix: Callable[[Tensor], Tensor], step: Step, view: object = 0
    ) -> Batch:
        """Return the masks (B, H, W) of the mixed images of a view, with their confidence, 0 where
        nothing is learnt, and how many pixels of all processes have one: ()."""
        label, sure = mix(b["external"]), mix(b["external confidence"])
        label = label.masked_fill(sure < self.settings.threshold, IGNORE)
        sure = sure.masked_fill(label == IGNORE, 0)
        named = {"label": label, "sure": sure, "pixels": step.count(label)}
        return {f"external {name} {view}": value for name, value in named.items()}

    def loss(self, logits: Tensor, grid: Grid, b: Batch, view: object = 0) -> Tensor:
        """Return the cross-entropy times the confidence, its mean over the pixels of all masks.

        Args:
            logits: (B, C, h, w), on this grid.
        """
        label, sure, pixels = (b[f"external {n} {view}"] for n in ("label", "sure", "pixels"))
        scores = upsample(logits, (label.shape[-2], label.shape[-1]), grid)
        entropy = F.cross_entropy(scores, label, ignore_index=IGNORE, reduction="none")
        return (entropy * sure).sum() / pixels
