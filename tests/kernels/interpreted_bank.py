"""Selection, push and EMA in Triton's interpreter; run by test_interpreter.py."""

import pytest
import torch
from torch import Tensor

from ctt.ops import class_topk, ema_update_, queue_push_, reference
from ctt.ops.backends import triton


@pytest.mark.parametrize(
    ("n", "classes", "k", "dtype"),
    [
        (0, 3, 2, torch.float32),
        (1, 1, 1, torch.float32),
        (500, 6, 5, torch.float32),
        (300, 150, 3, torch.float32),
        (400, 2, 250, torch.float16),
        (300, 6, 5, torch.float64),
    ],
    ids=str,
)
def test_class_topk(n: int, classes: int, k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    # few values: many ties, both zeros among them
    confidence = (torch.randn(n, generator=g) * 4).round() / 4
    confidence = torch.where(torch.rand(n, generator=g) < 0.1, -0.0, confidence)
    extreme = torch.tensor([torch.nan, torch.inf, -torch.inf])
    chosen = torch.rand(n, generator=g) < 0.2
    confidence[chosen] = extreme[torch.randint(3, (int(chosen.sum()),), generator=g)]
    confidence = confidence.to(dtype)
    label = torch.randint(-1, classes + 1, (n,), generator=g)
    label[label == classes] = 1 << 40
    valid = torch.rand(n, generator=g) > 0.2
    for given in (None, valid):
        ours = class_topk(confidence, label, k, classes, valid=given, backend="triton")
        truth = reference.class_topk(confidence, label, k, classes, given)
        assert torch.equal(ours[0], truth[0])
        assert torch.equal(ours[1], truth[1])


def test_class_topk_tells_close_values_apart() -> None:
    one = torch.ones(1, dtype=torch.float64)
    above = torch.nextafter(one, 2 * one)
    confidence = torch.cat([one, above, -one, -above])
    label = torch.zeros(4, dtype=torch.int64)
    index, _ = class_topk(confidence, label, 4, 1, backend="triton")
    assert index.tolist() == [[1, 0, 2, 3]]


def rings(capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.randn(4, capacity, 19, generator=torch.Generator().manual_seed(1)).to(dtype)
    count = torch.tensor([0, capacity // 2, capacity, capacity])
    cursor = torch.tensor([0, capacity // 2, 0, capacity - 1])
    return keys, count, cursor


@pytest.mark.parametrize(
    ("dtype", "capacity", "k"),
    [
        (torch.float32, 1, 1),
        (torch.float32, 5, 7),
        (torch.float32, 5, 40),
        (torch.float32, 16, 7),
        (torch.float16, 5, 7),
        (torch.float64, 5, 7),
    ],
    ids=str,
)
def test_queue_push(dtype: torch.dtype, capacity: int, k: int) -> None:
    g = torch.Generator().manual_seed(k)
    features = torch.randn(30, 19, generator=g).to(dtype)
    features[3], features[4, 2], features[5, 1] = 0, torch.nan, torch.inf
    ours, truth = rings(capacity, dtype), rings(capacity, dtype)
    for step in range(2):
        index = torch.randint(-2, 33, (4, k), generator=g)
        index[step] = -1
        queue_push_(*ours, features, index, backend="triton")
        reference.queue_push_(*truth, features, index)
        tolerance = 1e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(ours[0], truth[0], rtol=tolerance, atol=tolerance)
        assert torch.equal(ours[1], truth[1])
        assert torch.equal(ours[2], truth[2])


def test_queue_push_into_views() -> None:
    features = torch.randn(19, 12).T
    index = torch.randint(-1, 12, (6, 4)).T
    wide = torch.zeros(4, 19, 10)
    keys, numbers = wide[:, :, ::2].transpose(1, 2), torch.zeros(4, 4, dtype=torch.int64)
    queue_push_(keys, numbers[:, 0], numbers[:, 2], features, index, backend="triton")
    truth = torch.zeros(4, 5, 19), *torch.zeros(2, 4, dtype=torch.int64)
    reference.queue_push_(*truth, features, index)
    torch.testing.assert_close(keys, truth[0])
    assert not wide[:, :, 1::2].any()
    assert torch.equal(numbers[:, 0], truth[1])
    assert torch.equal(numbers[:, 2], truth[2])
    assert not numbers[:, 1::2].any()


def parameters(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 4, 5, generator=g)
    return [
        torch.randn(3, 5, generator=g),
        torch.randn((), generator=g),
        torch.randn(0, 4, generator=g),
        torch.randn(9001, generator=g),
        image.to(memory_format=torch.channels_last),
        torch.randn(41, generator=g)[1:],  # not aligned to 16 bytes
        torch.randn(8, 8, generator=g)[:, ::2],  # not one run of memory
        torch.randn(6, generator=g).double(),
        torch.randn(50, generator=g).half(),
    ]


@pytest.mark.parametrize("decay", [0.0, 0.99, 1.0, torch.tensor(0.9), torch.tensor(0.3).double()])
def test_ema_update(decay: float | Tensor) -> None:
    teacher, truth = parameters(0), parameters(0)
    versions = [t._version for t in teacher]
    for step in range(2):
        student = parameters(step + 1)
        student[0] = student[0].half()
        student[4] = student[4].contiguous() if step else student[4]
        ema_update_(teacher, student, decay, backend="triton")
        reference.ema_update_(truth, student, decay)
        for ours, expected in zip(teacher, truth, strict=True):
            torch.testing.assert_close(ours, expected)
    assert all(t._version > before for t, before in zip(teacher, versions, strict=True))


def test_ema_update_follows_tensors_that_move() -> None:
    teacher, student = [torch.zeros(5000)], [torch.ones(5000)]
    for _ in range(20):
        ema_update_(teacher, student, 0.5, backend="triton")
        assert (teacher[0] == 0.5).all()
        teacher, student = [torch.zeros(5000)], [torch.ones(5000)]
    one, two = torch.zeros(10), torch.ones(10)
    ema_update_([one, one], [two, two], 0.5, backend="triton")
    assert (one == 0.5).all()  # tied weights are averaged once


def test_new_views_of_the_same_memory_share_a_table_of_pointers() -> None:
    teacher, student = torch.ones(5), torch.zeros(5)
    ema_update_([teacher.data], [student.data], 0.5, backend="triton")
    before = list(triton._ema_tables.values())
    ema_update_([teacher.data], [student.data], 0.5, backend="triton")
    assert (teacher == 0.25).all()
    assert all(a is b for a, b in zip(before, triton._ema_tables.values(), strict=True))
