"""All random numbers of a step, made on the CPU before it, from the seed and the iteration alone.

So they are the same on every device, for any number of processes (each takes the numbers of its
own images), after a resume, and for a captured graph that is replayed with others.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ctt.data.seeding import generator
from ctt.data.views import PhotometricView
from ctt.train.settings import Settings


class StepDraws(NamedTuple):
    """Uniform random numbers in 0..1 for the B labelled and B unlabelled images of a process.

    Attributes:
        mix: (4, B) boxes of CutMix, (B, C) tickets of ClassMix, or (0,).
        labeled, unlabeled: (7, B) for each student; empty where there is no strong view.
        bank: (K, P, C, top_k), tickets of P pushes into each bank; the same for all processes.
    """

    mix: Tensor
    labeled: list[Tensor]
    unlabeled: list[Tensor]
    bank: Tensor


class Draws:
    """Makes the numbers of a step as one tensor, and tells its parts.

    Args:
        images: B, labelled images of a step and process.
        unlabeled: whether as many unlabelled ones come with them.
        pushes: P, into each bank and step; 0: no banks.
    """

    def __init__(
        self,
        settings: Settings,
        pairs: int,
        classes: int,
        images: int,
        unlabeled: bool,
        pushes: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        views = settings.views
        self.seed, self.images, self.first, self.pairs = (
            settings.seed,
            images,
            rank * images,
            pairs,
        )
        whole = world * images
        # purpose, shape for the images of all processes, and which axis counts the images
        self.plan: list[tuple[str, tuple[int, ...], int | None]] = []
        rule = views.mix if unlabeled else "none"
        self.plan.append(
            {
                "none": ("mix", (0,), None),
                "cutmix": ("mix", (4, whole), 1),
                "classmix": ("mix", (whole, classes), 0),
            }[rule]
        )
        self.kinds = ["labeled"] * views.strong_labeled + ["unlabeled"] * unlabeled
        self.strong = [f"strong-{k}" for k in range(pairs)] if views.per_student else ["strong"]
        for purpose in self.strong:
            self.plan += [(purpose, (PhotometricView.DRAWS, whole), 1) for _ in self.kinds]
        self.plan.append(("bank", (pairs, pushes, classes, settings.bank.top_k), None))
        self.shapes = [
            tuple(images if i == axis else n for i, n in enumerate(shape))
            for _, shape, axis in self.plan
        ]

    def __call__(self, iteration: int) -> Tensor:
        """All numbers of that step, (n,) float32 on the CPU."""
        parts, purpose, rng = [], "", torch.Generator()
        for name, shape, axis in self.plan:
            if name != purpose:
                purpose, rng = name, generator(name, self.seed, iteration)
            numbers = torch.rand(shape, generator=rng)
            if axis is not None:
                numbers = numbers.narrow(axis, self.first, self.images)
            parts.append(numbers.flatten())
        return torch.cat(parts)

    def split(self, numbers: Tensor) -> StepDraws:
        """The parts of what a call gave, as views on its device."""
        flat = numbers.split_with_sizes([math.prod(shape) for shape in self.shapes])
        mix, *views, bank = (x.view(s) for x, s in zip(flat, self.shapes, strict=True))
        of_kind: dict[str, list[Tensor]] = {"labeled": [], "unlabeled": []}
        for i, view in enumerate(views):
            of_kind[self.kinds[i % len(self.kinds)]].append(view)
        times = self.pairs // len(self.strong)
        return StepDraws(mix, of_kind["labeled"] * times, of_kind["unlabeled"] * times, bank)
