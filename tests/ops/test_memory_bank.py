"""`MemoryBank`: the order of the queues, the draw, and several processes."""

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from ctt.ops import MemoryBank, reference
from tests.ports import free_port

CLASSES, CAPACITY, DIM = 4, 6, 8


def batch(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and confidences with ties."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(-1, CLASSES, (n,), generator=g)
    confidence = torch.rand(n, generator=g).mul(10).round().div(10)
    return torch.randn(n, DIM, generator=g), label, confidence


def test_a_new_bank_is_empty() -> None:
    bank = MemoryBank(CLASSES, CAPACITY, DIM)
    assert sorted(bank.state_dict()) == ["count", "cursor", "keys"]
    assert not bank.full.any()
    assert bank.queue(0).shape == (0, DIM)
    assert repr(bank) == "MemoryBank(num_classes=4, capacity=6, dim=8)"
    assert list(bank.parameters()) == []


def test_oldest_first_after_wrapping_around() -> None:
    bank = MemoryBank(1, 3, 2)
    angles = torch.arange(8) / 5
    features = torch.stack([angles.cos(), angles.sin()], dim=1)  # already of norm 1
    label = torch.zeros(2, dtype=torch.int64)
    for step in range(4):  # pushes 0 1, 2 3, 4 5, 6 7, the more confident of two first
        pair = features[2 * step : 2 * step + 2]
        bank.push(pair, label, torch.tensor([0.9, 0.8]), top_k=2, per_class=2)
        seen = 2 * step + 2
        torch.testing.assert_close(bank.queue(0), features[max(seen - 3, 0) : seen])
        assert bool(bank.full) is (seen >= 3)
    assert bank.count.tolist() == [3]
    assert bank.cursor.tolist() == [8 % 3]


def test_push_stores_the_most_confident_pixels() -> None:
    bank = MemoryBank(CLASSES, CAPACITY, DIM)
    features, label, confidence = batch(60, 0)
    valid = torch.arange(60) % 3 > 0
    features[~valid] = torch.nan
    bank.push(features, label, confidence, valid=valid, top_k=4, per_class=4)
    index, count = reference.class_topk(confidence, label, 4, CLASSES, valid)
    assert torch.equal(bank.count, count)
    for c in range(CLASSES):
        chosen = features[index[c, : int(count[c])]]
        torch.testing.assert_close(bank.queue(c), F.normalize(chosen, dim=1))


def test_draw_among_the_most_confident() -> None:
    features, label, confidence = batch(200, 0)
    index, _ = reference.class_topk(confidence, label, 20, CLASSES)

    def pushed(seed: int) -> Tensor:
        bank = MemoryBank(CLASSES, CAPACITY, DIM)
        source = torch.Generator().manual_seed(seed)
        bank.push(features, label, confidence, top_k=20, per_class=5, generator=source)
        assert bank.count.tolist() == [5] * CLASSES
        for c in range(CLASSES):
            alike = bank.queue(c) @ F.normalize(features[index[c]], dim=1).T > 1 - 1e-5
            assert bool(alike.any(dim=1).all())
            places = alike.int().argmax(dim=1)
            assert bool((places.diff() > 0).all()), "drawn keys keep the order of confidence"
        return bank.keys

    assert torch.equal(pushed(0), pushed(0))
    assert not torch.equal(pushed(0), pushed(1))


@pytest.mark.parametrize(("top_k", "per_class"), [(8, 8), (4, 8), (20, 30)])
def test_more_than_a_queue_holds_leaves_the_most_confident(top_k: int, per_class: int) -> None:
    bank = MemoryBank(1, 4, 20)
    label, confidence = torch.zeros(20, dtype=torch.int64), torch.linspace(1, 0.1, 20)
    bank.push(torch.eye(20), label, confidence, top_k=top_k, per_class=per_class)
    assert torch.equal(bank.queue(0), torch.eye(20)[:4])


def test_any_random_numbers_are_tickets() -> None:
    bank = MemoryBank(1, 4, 3)
    label = torch.zeros(3, dtype=torch.int64)
    ticket = torch.tensor([[-3.0, -2.0, -4.0, 5.0, 6.0, 7.0]])  # the last three are of no candidate
    bank.push(torch.eye(3), label, torch.tensor([3, 2, 1.0]), top_k=6, per_class=2, ticket=ticket)
    assert torch.equal(bank.queue(0), torch.eye(3)[:2])


def test_a_bank_from_the_meta_device_is_emptied() -> None:
    with torch.device("meta"):
        bank = MemoryBank(CLASSES, CAPACITY, DIM)
    bank.to_empty(device="cpu")
    for buffer in bank.buffers():
        buffer.fill_(9)  # what memory may hold
    bank.reset_parameters()
    assert all(not buffer.any() for buffer in bank.buffers())


def test_padding_is_not_drawn() -> None:
    bank = MemoryBank(2, 8, DIM)
    label = torch.tensor([0, 0, 0, 1])
    bank.push(torch.randn(4, DIM), label, torch.rand(4), top_k=50, per_class=3)
    assert bank.count.tolist() == [3, 1]


def test_a_batch_without_pixels() -> None:
    bank = MemoryBank(2, 8, DIM)
    empty = torch.empty(0)
    bank.push(empty.view(0, DIM), empty.long(), empty, top_k=3, per_class=3)
    assert bank.count.tolist() == [0, 0]


def test_state_can_be_saved_and_loaded(tmp_path: Path) -> None:
    bank, other = MemoryBank(CLASSES, CAPACITY, DIM), MemoryBank(CLASSES, CAPACITY, DIM)
    bank.push(*batch(50, 0), top_k=5, per_class=5)
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other.load_state_dict(torch.load(tmp_path / "bank.pt"))
    for x in (bank, other):
        x.push(*batch(50, 1), top_k=5, per_class=5)
    for name, value in bank.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_half_precision_features_and_gradient() -> None:
    features, label, confidence = batch(50, 0)
    bank = MemoryBank(CLASSES, CAPACITY, DIM)
    bank.push(features.half().requires_grad_(), label, confidence, top_k=3, per_class=3)
    assert bank.keys.dtype == torch.float32
    assert not bank.keys.requires_grad


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="MemoryBank: capacity must be at least 1, got 0"):
        MemoryBank(3, 0, 4)
    with pytest.raises(TypeError, match="MemoryBank: dim must be an integer, got float"):
        MemoryBank(3, 2, 4.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="MemoryBank: group must be a process group, None"):
        MemoryBank(3, 2, 4, group="all")  # type: ignore[arg-type]
    bank = MemoryBank(CLASSES, CAPACITY, DIM)
    features, label, confidence = batch(5, 0)
    with pytest.raises(ValueError, match="features must have shape"):
        bank.push(features[:, :3], label, confidence, top_k=2, per_class=2)
    with pytest.raises(ValueError, match=r"MemoryBank\.push: top_k must be at least 1"):
        bank.push(features, label, confidence, top_k=0, per_class=2)
    with pytest.raises(ValueError, match="label must have shape"):
        bank.push(features, label[:4], confidence, top_k=2, per_class=2)
    with pytest.raises(ValueError, match="confidence must have shape"):
        bank.push(features, label, confidence[:4], top_k=2, per_class=2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        bank.push(features, label, confidence, top_k=0, per_class=2)
    with pytest.raises(ValueError, match="per_class must be at least 1"):
        bank.push(features, label, confidence, top_k=2, per_class=0)
    with pytest.raises(ValueError, match=r"c must be in 0\.\.3, got 4"):
        bank.queue(4)


@pytest.mark.parametrize("kind", [numpy.int64, numpy.array, torch.tensor])
def test_sizes_of_other_kinds_of_integer(kind: Any) -> None:
    sizes = CLASSES, CAPACITY, DIM
    bank, same = MemoryBank(*map(kind, sizes)), MemoryBank(*sizes)
    bank.push(*batch(50, 0), top_k=kind(3), per_class=kind(3))
    same.push(*batch(50, 0), top_k=3, per_class=3)
    assert torch.equal(bank.keys, same.keys)
    assert all(type(size) is int for size in (bank.num_classes, bank.capacity, bank.dim))


STEPS = 3
SIZES = ((40, 25), (0, 30), (3, 60))  # pixels of each rank at each step


def train(rank: int, draw: bool, group: Any = None) -> MemoryBank:
    """Pushes the batch of one rank, or for rank -1 the batches of both joined."""
    bank = MemoryBank(CLASSES, CAPACITY, DIM, group=group)
    source = torch.Generator().manual_seed(max(rank, 0))
    for step in range(STEPS):
        parts = [batch(n, 10 * step + r) for r, n in enumerate(SIZES[step])]
        if rank >= 0:
            parts = [parts[rank]]
        features, label, confidence = (torch.cat(x) for x in zip(*parts, strict=True))
        per_class = 2 if draw else 5
        bank.push(features, label, confidence, top_k=5, per_class=per_class, generator=source)
    return bank


def work(rank: int, port: int, folder: str, draw: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    try:
        torch.save(train(rank, draw).state_dict(), Path(folder) / f"{rank}.pt")
        check_groups(rank, draw)
        dist.barrier()  # rank 0 holds the store through which the others still speak
    finally:
        dist.destroy_process_group()


def check_groups(rank: int, draw: bool) -> None:
    """One rank alone pushes: to a bank of its own, and to that of a group that holds it alone."""
    both, last = dist.new_group([0, 1]), dist.new_group([1])
    shared = train(rank, draw, both)
    assert copy.deepcopy(shared).group is both
    if rank == 0:
        with pytest.raises(ValueError, match="this process is not in the group"):
            MemoryBank(CLASSES, CAPACITY, DIM, group=last)
        return
    alone, grouped = train(1, draw, "local"), train(1, draw, last)
    for name, value in alone.state_dict().items():
        assert torch.equal(grouped.state_dict()[name], value), name
    assert not torch.equal(alone.keys, shared.keys)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("draw", [False, True])
def test_two_processes_end_as_one_with_the_joined_batch(tmp_path: Path, draw: bool) -> None:
    """The draw of rank 0 decides, which is the draw of the single process."""
    mp.spawn(work, args=(free_port(), str(tmp_path), draw), nprocs=2)
    alone = train(-1, draw).state_dict()
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt")
        for name, value in alone.items():
            assert torch.equal(together[name], value), (rank, name)
