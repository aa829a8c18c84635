"""Batches in an order that is a function of the seed and the step alone."""

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ctt.data.seeding import derive_seed, generator
from ctt.data.source import Source
from ctt.data.views import GeometricView
from ctt.errors import UserError

T = TypeVar("T")
K = TypeVar("K")


class DrawSampler(Sampler[list[tuple[int, int]]]):
    """Endless shuffled epochs, cut into batches; every batch is a list of (index, draw).

    `draw` numbers the images of the whole run and seeds their views. Rank r of W takes the r-th
    share of a batch of W times `batch_size`, so W processes see what one would with that batch.

    Args:
        length: images to choose from. first: draw that the first step begins with, on rank 0.
        steps: how many. purpose: tells this stream of random numbers from others.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        first: int,
        steps: int,
        seed: int,
        purpose: str,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.length, self.batch_size, self.first, self.steps = length, batch_size, first, steps
        self.seed, self.purpose, self.rank, self.world = seed, purpose, rank, world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.steps):
            first = self.first + (step * self.world + self.rank) * self.batch_size
            batch = []
            for draw in range(first, first + self.batch_size):
                if draw // self.length != epoch:
                    epoch = draw // self.length
                    rng = generator("order", self.purpose, self.seed, epoch)
                    order = torch.randperm(self.length, generator=rng)
                batch.append((int(order[draw % self.length]), draw))
            yield batch


class ViewDataset(Dataset[tuple[Tensor, Tensor]]):
    """Weak views: (image (3, h, w) uint8, label (h, w) uint8).

    Without labels the second tensor is 0 where there is image and 255 where there is padding; no
    label is ever asked for.
    """

    def __init__(
        self,
        source: Source,
        ids: list[str],
        view: GeometricView,
        labeled: bool,
        seed: int,
        purpose: str,
    ) -> None:
        self.source, self.ids, self.view, self.labeled = source, ids, view, labeled
        self.seed, self.purpose = seed, purpose

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, draw = key
        name = self.ids[index]
        if self.labeled:
            image, label = self.source.pair(name)
        else:
            image = self.source.image(name)
            label = torch.zeros_like(image[0])
        return self.view(image, label, derive_seed("view", self.purpose, self.seed, draw))

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]] | UserError:
        """A batch at once, as DataLoader asks for it; a mistake of the user is a result.

        Raised in a worker it would reach the user as the text of a traceback.
        """
        try:
            return [self[key] for key in keys]
        except UserError as error:
            return error


def load(
    dataset: ViewDataset, sampler: DrawSampler, workers: int, pin_memory: bool
) -> Generator[tuple[Tensor, Tensor]]:
    """Batches of images (B, 3, h, w) and labels (B, h, w), uint8.

    Raises:
        UserError: a file is missing or broken; whichever process met it.
    """
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        worker_init_fn=leave_signals_to_the_parent,
        # the loader would otherwise draw from the global generator, which checkpoints keep
        generator=generator("loader", dataset.purpose),
        collate_fn=_collate,
    )
    yield from raised(loader)


class InOrder(Dataset[T | UserError], Generic[K, T]):
    """`read` of each key; a mistake of the user is a result, as above."""

    def __init__(self, read: Callable[[K], T], keys: Sequence[K]) -> None:
        self.read, self.keys = read, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> T | UserError:
        try:
            return self.read(self.keys[index])
        except UserError as error:
            return error


def in_order(read: Callable[[K], T], keys: Sequence[K], workers: int) -> Iterable[T | UserError]:
    """`read` of each key, one by one, done ahead of time by `workers` processes; 0: by this one."""
    return DataLoader(
        InOrder(read, keys),
        batch_size=None,
        num_workers=min(workers, len(keys)),
        worker_init_fn=leave_signals_to_the_parent,
        generator=generator("loader", "in order"),  # checkpoints keep the global one
    )


def raised(items: Iterable[T | UserError]) -> Iterator[T]:
    """The items, but mistakes of the user, which loader processes return, are raised."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


def _collate(batch: list[tuple[Tensor, Tensor]] | UserError) -> Any:
    return batch if isinstance(batch, UserError) else default_collate(batch)


def leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all; the one that trains has a checkpoint to write."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
