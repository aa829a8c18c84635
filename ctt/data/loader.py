"""Batches in an order that is a function of the seed and the step alone."""

import atexit
import contextlib
import copy
import ctypes
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from ctt.data.dataset import Dataset
from ctt.data.prepare import Prepared
from ctt.data.rare import RareClasses, pixel_of
from ctt.data.seeding import derive_seed, generator
from ctt.data.views import GeometricView
from ctt.errors import LoaderError, UserError

T = TypeVar("T")
K = TypeVar("K")
# what PyTorch says where the memory that processes share, or their number of files, is used up
NO_SHARED_MEMORY = ("shared memory", "</torch_", "unable to mmap", "Too many open files", "ancdata")
LOST_WORKER = "DataLoader worker"  # how PyTorch begins to tell that a process has ended
FEWER_WORKERS = (
    "Give fewer of them (`data.workers` in training, --workers of ctt-eval and ctt-predict; 0 "
    "loads in the main process), or more memory to share (docker run --shm-size 2g; /dev/shm)."
)
BROKEN_CONNECTION = (ConnectionError, EOFError)
# of this process; one that nothing else holds has ended, and would keep its pipes open here
_workers: WeakSet[BaseProcess] = WeakSet()
# Iterators of loaders that are in use. An error may tie one into a cycle of references, and the
# garbage collector closes the queues of a cycle before its iterator can end the processes by them.
_in_use: set[Iterator[Any]] = set()


class DrawSampler(Sampler[list[tuple[int, int]]]):
    """Endless shuffled epochs, cut into batches; every batch is a list of (index, draw).

    `draw` numbers the images of the whole run and seeds their views. Rank r of W takes the r-th
    share of a batch of W times `batch_size`, so W processes see what one would with that batch.

    Args:
        length: images to choose from.
        first: draw that the first step begins with, on rank 0.
        steps: how many.
        purpose: tells this stream of random numbers from others.
        rare: the draws that take another image, for a class that it shows.
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
        rare: RareClasses | None = None,
    ) -> None:
        self.length, self.batch_size, self.first, self.steps = length, batch_size, first, steps
        self.seed, self.purpose, self.rank, self.world = seed, purpose, rank, world
        self.rare = rare

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
                chosen = self.rare and self.rare(draw)
                batch.append((chosen[0] if chosen else int(order[draw % self.length]), draw))
            yield batch


class ViewDataset(TorchDataset[tuple[Tensor, Tensor]]):
    """Weak views: (image (3, h, w) uint8, of bands (C, h, w) float32; label (h, w) uint8).

    Without labels the second tensor is 0 where there is image and 255 where there is padding or no
    data; no label is ever asked for.
    """

    def __init__(
        self,
        dataset: Dataset | Prepared,
        ids: list[str],
        view: GeometricView,
        labeled: bool,
        seed: int,
        purpose: str,
        rare: RareClasses | None = None,
    ) -> None:
        self.dataset, self.ids, self.view, self.labeled = dataset, ids, view, labeled
        self.seed, self.purpose, self.rare = seed, purpose, rare

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, draw = key
        name = self.ids[index]
        if self.labeled:
            image, label = self.dataset.pair(name)
        else:
            image = self.dataset.image(name)
            label = torch.zeros(image.shape[1:], dtype=torch.uint8)  # images may be of float
        seed = derive_seed("view", self.purpose, self.seed, draw)
        chosen = self.rare and self.rare(draw)
        point = pixel_of(label, chosen[1], seed) if chosen else None
        return self.view(image, label, seed, point)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]] | UserError:
        """Read a batch; a UserError is returned, not raised.

        Raised in a worker it would reach the user as the text of a traceback.
        """
        try:
            return [self[key] for key in keys]
        except UserError as error:
            return error


def load(
    dataset: ViewDataset, sampler: DrawSampler, workers: int, pin_memory: bool
) -> Generator[tuple[Tensor, Tensor]]:
    """Yield batches of images (B, 3, h, w) and labels (B, h, w), uint8.

    Raises:
        UserError: a file is missing or broken; whichever process met it.
    """
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        multiprocessing_context=_context(workers),
        pin_memory=pin_memory,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        worker_init_fn=leave_signals_to_the_parent,
        # the loader would otherwise draw from the global generator, which checkpoints keep
        generator=generator("loader", dataset.purpose),
        collate_fn=_collate,
    )
    yield from reraise_user_errors(_counted(loader))


class InOrder(TorchDataset[T | UserError], Generic[K, T]):
    """Items that `read` makes of keys; a UserError is returned, not raised, see `ViewDataset`."""

    def __init__(self, read: Callable[[K], T], keys: Sequence[K]) -> None:
        self.read, self.keys = read, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> T | UserError:
        try:
            with reraise_full_shared_memory():
                value = self.read(self.keys[index])
                _share(value)
                return value
        except UserError as error:
            return error


def read_in_order(
    read: Callable[[K], T], keys: Sequence[K], workers: int
) -> Iterable[T | UserError]:
    """Return `read` of each key in order, computed ahead by `workers` processes; 0: by this one."""
    loader: DataLoader[T | UserError] = DataLoader(
        InOrder(read, keys),
        batch_size=None,
        num_workers=min(workers, len(keys)),
        multiprocessing_context=_context(min(workers, len(keys))),
        worker_init_fn=leave_signals_to_the_parent,
        generator=generator("loader", "in order"),  # checkpoints keep the global one
    )
    return _counted(loader)


def reraise_user_errors(items: Iterable[T | UserError]) -> Iterator[T]:
    """Return the items, but mistakes of the user, which loader processes return, are raised."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


def _collate(batch: list[tuple[Tensor, Tensor]] | UserError) -> Any:
    if isinstance(batch, UserError):
        return batch
    try:
        with reraise_full_shared_memory():
            return default_collate(batch)
    except UserError as error:
        return error


def _share(value: object) -> None:
    """Put tensors where the parent sees them; later, what goes wrong could not be told to it."""
    if get_worker_info() is None:
        return
    if isinstance(value, tuple):
        for part in value:
            _share(part)
    elif isinstance(value, Tensor):
        value.share_memory_()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def reraise_full_shared_memory() -> Iterator[None]:
    """Turn a lack of memory shared by processes into a `LoaderError`."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not any(words in str(error) for words in NO_SHARED_MEMORY):
            raise
        reason = str(error).partition("\n")[0]
        raise LoaderError(
            f"The processes that load images cannot hand them on ({reason}). {FEWER_WORKERS}"
        ) from None


def lost_worker(error: Exception) -> str:
    """Return the message if a process that loads images has ended, else an empty text.

    PyTorch may raise the error at any place of the main thread, or find the connection to that
    process broken.
    """
    reason = str(error).partition("\n")[0].strip().removesuffix(".")
    if not reason.startswith(LOST_WORKER) and not isinstance(error, BROKEN_CONNECTION):
        return ""
    _listen_no_more()
    return (
        f"A process that loads images has ended ({reason}), as when the system has no memory left, "
        f"or after an error that is told above. {FEWER_WORKERS}"
    )


class _Flag:
    """An event without a lock, which a process killed while it looks at it would keep for ever."""

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue(ctypes.c_bool, False)

    def set(self) -> None:
        self._value.value = True

    def is_set(self) -> bool:
        return bool(self._value.value)


def _context(workers: int) -> BaseContext | None:
    """Return what starts the loader's processes; None where there are none."""
    if not workers:
        return None
    context: Any = copy.copy(multiprocessing.get_context(multiprocessing.get_start_method()))
    context.Event = _Flag  # by which the loader's processes learn that they are to end
    return cast(BaseContext, context)


def _counted(loader: Iterable[T]) -> Iterator[T]:
    """Yield the items of a loader, whose processes are known from then on.

    Raises:
        LoaderError: one of them has ended.
    """
    before = set(multiprocessing.active_children())
    items = iter(loader)
    _workers.update(set(multiprocessing.active_children()) - before)
    _in_use.add(items)
    try:
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except (RuntimeError, *BROKEN_CONNECTION) as error:
                if text := lost_worker(error):
                    raise LoaderError(text) from None
                raise
            yield item
    finally:
        _in_use.discard(items)


@atexit.register
def _end_workers() -> None:
    """End the processes that are left after an error, for which Python would wait for ever.

    They ignore the SIGTERM by which it ends them, see `leave_signals_to_the_parent`.
    """
    left = [worker for worker in multiprocessing.active_children() if worker in _workers]
    if left:
        _listen_no_more()
    for worker in left:
        worker.kill()


def _listen_no_more() -> None:
    """Remove PyTorch's handler, which raises an error wherever the main thread is."""
    if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def leave_signals_to_the_parent(_worker: int) -> None:
    """Ignore Ctrl-C, SIGTERM and SIGHUP, which reach all processes: the training one has a
    checkpoint to write."""
    for number in {"SIGINT", "SIGTERM", "SIGHUP"} & set(signal.Signals.__members__):
        signal.signal(signal.Signals[number], signal.SIG_IGN)
