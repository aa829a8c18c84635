"""Small heads beside the classifier, which embed its features for a contrast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods import followers
from ctt.methods.base import Modules, Setup, Step
from ctt.methods.mean_teacher import MeanTeacher
from ctt.methods.optim import make_optimizer
from ctt.models.base import conv_bn, wide


def embedding(features: int, width: int, dim: int) -> nn.Sequential:
    """Return two 1x1 convolutions with a ReLU between them: (B, features, h, w) to (B, dim, h, w).

    Args:
        width: channels between the two.
    """
    return nn.Sequential(nn.Conv2d(features, width, 1), nn.ReLU(), nn.Conv2d(width, dim, 1))


def normed_embedding(dim: int, kernel: int) -> nn.Sequential:
    """Return a convolution with batch norm and ReLU, and a 1x1 convolution, all of `dim`."""
    return nn.Sequential(conv_bn(dim, dim, kernel), nn.Conv2d(dim, dim, 1))


def embed(head: nn.Module, features: Tensor, step: Step) -> Tensor:
    """Return a head's output for features (B, D, h, w), each pixel normalised, in float32."""
    with step.autocast():
        embedded = head(features)
    return F.normalize(wide(embedded), dim=1)


def without_lost(maps: Tensor, logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps (B, D, h, w) with 0 and classes (B, h, w) with 255 where a network gives NaN, so
    that no such pixel is a key or has a part in a mean.

    Args:
        logits: (B, C, h, w), of the same network.
    """
    lost = ~(wide(logits).softmax(dim=1).amax(dim=1) > 0) | maps.isnan().any(dim=1)
    return maps.masked_fill(lost[:, None], 0), own.masked_fill(lost, IGNORE)


class EmbeddingTeacher(MeanTeacher):
    """A mean teacher whose students have a head beside the classifier, which teachers follow too.

    Attributes:
        heads: of the students. head_teachers: of the teachers.
    """

    following = ("teachers", "head_teachers")

    def add_heads(self, setup: Setup, build: Callable[[int], nn.Module]) -> None:
        """Give every student a head of its own random weights.

        Args:
            build: returns a head for features of so many channels.
        """
        with setup.seeded("head"):
            self.heads = Modules[nn.Module](
                setup.finish(build(student.feature_channels)) for student in self.students
            )
        self.head_teachers = followers.copies(self.heads)
        self.ema = followers.EmaUpdate(
            [*self.teachers, *self.head_teachers], [*self.students, *self.heads], self.settings.ema
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"students": make_optimizer(self.students, self.settings, self.heads)}
