"""Small heads beside the classifier, which embed its features for a contrast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ctt.methods import followers
from ctt.methods.base import Modules, Setup
from ctt.methods.mean_teacher import MeanTeacher
from ctt.methods.optim import make_sgd


def embedding(features: int, width: int, dim: int) -> nn.Sequential:
    """Return two 1x1 convolutions with a ReLU between them: (B, features, h, w) to (B, dim, h, w).

    Args:
        width: channels between the two.
    """
    return nn.Sequential(nn.Conv2d(features, width, 1), nn.ReLU(), nn.Conv2d(width, dim, 1))


class EmbeddingTeacher(MeanTeacher):
    """A mean teacher whose students have a head beside the classifier, which teachers follow too.

    Attributes:
        heads: of the students. head_teachers: of the teachers.
    """

    following = ("teachers", "head_teachers")

    def add_heads(self, setup: Setup, build: Callable[[], nn.Module]) -> None:
        """Give every student a head of its own random weights."""
        with setup.seeded("head"):
            self.heads = Modules[nn.Module](setup.finish(build()) for _ in self.students)
        self.head_teachers = followers.copies(self.heads)
        self.ema = followers.EmaUpdate(
            [*self.teachers, *self.head_teachers], [*self.students, *self.heads], self.settings.ema
        )

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"students": make_sgd(self.students, self.settings.optim, extra=self.heads)}
