import gc
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctt.data import loader
from ctt.data.dataset import Dataset
from ctt.data.digits import INFO
from ctt.data.loader import DrawSampler, ViewDataset, load, read_in_order
from ctt.data.prepare import Prepared
from ctt.data.views import GeometricView
from ctt.errors import LoaderError, UserError
from ctt.methods.base import Round
from ctt.train.batches import batch_of

VIEW = GeometricView((8, 8), (0.8, 1.2), True, 10, 0.1, (0.5, 0.5, 0.5))


class Images(Dataset):
    """Eleven random images without labels."""

    info = INFO

    def train_ids(self) -> list[str]:
        return [f"{i:02}" for i in range(11)]

    def eval_ids(self) -> list[str]:
        return []

    def image(self, name: str) -> Tensor:
        seed = torch.Generator().manual_seed(int(name))
        return torch.randint(0, 256, (3, 8, 8), generator=seed, dtype=torch.uint8)

    def label(self, name: str) -> Tensor:
        raise AssertionError("nobody may ask for the label of an unlabelled image")


def sampler(start: int, stop: int, batch: int = 4, rank: int = 0, world: int = 1) -> DrawSampler:
    return DrawSampler(11, batch, start * batch * world, stop - start, 7, "test", rank, world)


def test_each_epoch_shows_every_image_once() -> None:
    draws = [pair for batch in sampler(0, 11) for pair in batch]
    assert [draw for _, draw in draws] == list(range(44))
    epochs = [tuple(index for index, _ in draws[i : i + 11]) for i in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_going_on_gives_the_batches_that_would_have_come() -> None:
    assert list(sampler(0, 20))[13:] == list(sampler(13, 20))


def test_ranks_share_the_batch_of_one_process() -> None:
    whole = list(sampler(0, 9, batch=6))
    parts = [list(sampler(0, 9, batch=3, rank=r, world=2)) for r in (0, 1)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]


def test_unlabelled_images_need_no_label_and_tell_their_padding() -> None:
    dataset = Images()
    views = ViewDataset(dataset, dataset.train_ids(), VIEW, False, 0, "test")
    image, valid = views[(3, 17)]
    assert image.shape == (3, 8, 8)
    assert set(valid.unique().tolist()) <= {0, 255}


class Bands(Images):
    """Float images of five bands without data in their first two rows."""

    def image(self, name: str) -> Tensor:
        image = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(int(name)))
        image[:, :2] = torch.nan
        return image


@pytest.mark.parametrize("prepared", [False, True])
def test_unlabelled_bands_tell_their_padding_and_where_they_have_no_data(prepared: bool) -> None:
    bands = Bands()
    dataset = Prepared(bands, (8, 8), None) if prepared else bands
    view = GeometricView((8, 12), (1.0, 1.0), False, 0, 0, (0.5,) * 5)
    views = ViewDataset(dataset, bands.train_ids(), view, False, 0, "test")
    images, label = next(iter(load(views, sampler(0, 1), 0, False)))
    batch = batch_of([images, label, images, label], Round(1.0))
    assert (images.dtype, label.dtype) == (torch.float32, torch.uint8)
    assert batch["padding"][:, :2].all()  # no data
    padded = batch["padding"][:, 4].sum(dim=1)  # columns outside of the image
    assert padded.tolist() == [4] * len(padded)
    assert set(label.unique().tolist()) == {0, 255}


class Broken(Images):
    def image(self, name: str) -> Tensor:
        raise UserError(f"The image {name} is broken.")


def test_processes_end_when_the_garbage_collector_frees_their_loader() -> None:
    """As an error does that refers to itself: its traceback holds the frame that holds the loader.
    PyTorch would wait for each process for ten seconds."""
    dataset, others = Broken(), set(multiprocessing.active_children())
    views = ViewDataset(dataset, dataset.train_ids(), VIEW, False, 0, "test")
    with pytest.raises(UserError, match="is broken"):
        list(load(views, sampler(0, 6), 1, False))
    gc.collect()
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    dataset = Images()
    views = ViewDataset(dataset, dataset.train_ids(), VIEW, False, 0, "test")
    alone = list(load(views, sampler(2, 6), 0, False))
    shared = list(load(views, sampler(2, 6), workers, False))
    for (a, b), (c, d) in zip(alone, shared, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def number(key: int) -> Tensor:
    return torch.full((2,), key)


def test_processes_that_have_ended_leave_no_file_open() -> None:
    """Each evaluation of a run starts its own."""
    handles = Path("/proc/self/fd")
    if not handles.is_dir():
        pytest.skip("needs Linux's /proc")
    counts = []
    for _ in range(5):
        assert len(list(read_in_order(number, range(4), 2))) == 4
        counts.append(len(list(handles.iterdir())))
    # two for each process stayed open once; one count may meet processes that are about to end
    assert min(counts[1:]) < counts[0] + 4


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_are_told_to_end_without_a_lock(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """One that is killed while it holds a lock never gives it back, and the program would hang."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    context: Any = loader._context(1)
    event = context.Event()
    assert not event.is_set()
    process = context.Process(target=event.set)
    process.start()
    process.join(60)
    assert event.is_set()
    assert not hasattr(event, "_cond")
    assert loader._context(0) is None


KILLED = """
import multiprocessing
from ctt.cli.common import run_program
from ctt.data.loader import read_in_order
from tests.data.test_loader import number

def body():
    for i, item in enumerate(read_in_order(number, range(10**6), 2)):
        if i == 3:
            multiprocessing.active_children()[0].kill()
    return 0

run_program("ctt-x", body)
"""


def test_a_loader_process_that_is_killed_ends_the_program_with_a_word() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ctt-x: A process that loads images has ended (")
    # where lines break depends on how many digits the number of the process has
    assert "Give fewer of them" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_too_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    found = list(read_in_order(number, range(3), workers))
    if not workers:  # nothing is shared then
        assert [int(item[0]) for item in found if isinstance(item, Tensor)] == [0, 1, 2]
        return
    assert all(isinstance(item, LoaderError) for item in found)
    assert "cannot hand them on (unable to allocate shared memory(shm)" in str(found[0])
