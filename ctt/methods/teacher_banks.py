"""Banks of keys for contrast: for each pair, pixels that its teacher classifies well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ctt.methods import losses
from ctt.methods.base import Batch, Modules, Networks, Setup, Step
from ctt.methods.losses import to_grid
from ctt.ops import MemoryBank
from ctt.settings import Settings


class TeacherBanks(Modules[MemoryBank]):
    """A bank of queues of keys for each pair, one queue a class."""

    LOGGED = ("queues_full", "keys_alike", "keys_apart")

    def __init__(self, setup: Setup, width: int) -> None:
        """Make empty banks.

        Args:
            width: D, length of a key.
        """
        self.settings = settings = setup.settings.bank
        self.every = images_between(setup.settings)
        super().__init__(
            MemoryBank(setup.classes, settings.capacity, width) for _ in range(setup.pairs)
        )
        self.per_class = settings.per_class or max(1, settings.capacity // setup.labeled)

    def fill(
        self,
        b: Batch,
        teachers: Networks,
        projections: Iterable[nn.Module],
        step: Step,
    ) -> None:
        """Push teacher k's features of well classified labelled pixels into bank k.

        Args:
            projections: of teacher k, which take its features (B, D, h, w) to the width of keys.
        """
        settings = self.settings
        images, label = (b[name][:: self.every] for name in ("images", "label"))
        pushes = list(self.pushes(len(images), step))
        drawn = settings.random_choice and settings.top_k > self.per_class
        if drawn:
            shape = (len(self), len(pushes), self[0].num_classes, settings.top_k)
            tickets = step.rand("bank", shape)
        each = zip(teachers, self, projections, strict=True)
        for k, (teacher, bank, project) in enumerate(each):
            out = step.forward(teacher, images)
            with step.phase("banks"):
                truth = to_grid(label, teacher.grid)
                with step.autocast():
                    features = project(out.features)
                confidence, predicted = out.logits.float().softmax(dim=1).max(dim=1)
                valid = (predicted == truth) & (confidence >= settings.min_confidence)
                for i, part in enumerate(pushes):
                    bank.push(
                        losses.as_pixels(features[part]),
                        truth[part].flatten(),
                        confidence[part].flatten(),
                        valid=valid[part].flatten(),
                        top_k=settings.top_k if settings.random_choice else self.per_class,
                        per_class=self.per_class,
                        ticket=tickets[k, i] if drawn else None,
                    )

    def pushes(self, images: int, step: Step) -> Iterator[slice]:
        """Yield which of its images a process gives to each push: all, or one of one process."""
        if not self.settings.per_image:
            yield slice(None)
            return
        for i in range(images * step.processes):
            rank, image = divmod(i, images)
            yield slice(image, image + 1) if rank == step.rank else slice(0, 0)

    def report(self) -> dict[str, float]:
        """Return how full the queues are, and how similar their keys, means over the banks."""
        full = torch.stack([bank.full.float().mean() for bank in self]).mean()
        similar = torch.stack([torch.stack(similarities(bank)) for bank in self]).mean(dim=0)
        return dict(zip(self.LOGGED, [float(full), *similar.tolist()], strict=True))


def images_between(settings: Settings) -> int:
    """Return N, where every N-th labelled image of a batch fills the banks.

    N divides the batch, so that each process fills the banks from as many images of its own.
    """
    images = settings.data.batch_size
    return max(n for n in range(1, settings.bank.every + 1) if images % n == 0)


def similarities(bank: MemoryBank) -> tuple[Tensor, Tensor]:
    """Return the mean cosine of two keys of one class, and of two classes; 0 if there are none."""
    sums = bank.keys.sum(dim=1)  # (C, D); places that hold no key are 0
    count = bank.count.to(sums.dtype)
    pairs = count * (count - 1)
    within = ((sums.square().sum(dim=1) - count) / pairs.clamp(min=1))[pairs > 0]
    means = sums[bank.count > 0] / count[bank.count > 0, None]
    between = means @ means.T
    others = len(means) * (len(means) - 1)
    apart = (between.sum() - between.diagonal().sum()) / max(1, others)
    return within.sum() / max(1, len(within)), apart
