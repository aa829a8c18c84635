"""Teachers: networks that follow students by an exponential moving average."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ctt.methods.base import Networks
from ctt.ops import ema_update_

if TYPE_CHECKING:
    from ctt.settings import EmaSettings


def copies(networks: Iterable[nn.Module]) -> Networks:
    """Return a copy of each network that is never trained, in evaluation mode."""
    return Networks(copy.deepcopy(net).requires_grad_(False) for net in networks).eval()


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Keep the network in evaluation mode within the context."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class EmaUpdate:
    """The teachers' update; the lists of tensors are made once, for all teachers together."""

    def __init__(
        self, teachers: Iterable[nn.Module], students: Iterable[nn.Module], settings: EmaSettings
    ) -> None:
        self.settings = settings
        self.averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
        # by their dtype, as a GPU copies many at once of one dtype only
        self.copied: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for teacher, student in zip(teachers, students, strict=True):
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                self._add(self.averaged, t.data, s.data)
            for mean, own in zip(teacher.buffers(), student.buffers(), strict=True):
                average = settings.buffers == "average" and mean.is_floating_point()
                copied = self.copied.setdefault(mean.dtype, ([], []))
                self._add(self.averaged if average else copied, mean, own)

    @staticmethod
    def _add(lists: tuple[list[Tensor], list[Tensor]], teacher: Tensor, student: Tensor) -> None:
        lists[0].append(teacher)
        lists[1].append(student)

    def decay(self, iteration: int) -> float:
        """Return the decay of the update after a step that has `iteration` steps before it."""
        return min(1 - 1 / (iteration + 2), self.settings.decay)

    def step(self, decay: float | Tensor) -> None:
        """Let the teachers follow their students."""
        ema_update_(*self.averaged, decay)
        for teachers, students in self.copied.values():
            if teachers:
                torch._foreach_copy_(teachers, students)
