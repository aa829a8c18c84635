"""`queue_push_`: every backend against pushing one key after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctt.ops import queue_push_, reference
from tests.ops.common import DTYPES, assert_accurate, examples, runs, skip_unfit

RUNS = pytest.mark.parametrize(("backend", "device"), runs("queue_push_"))
State = tuple[Tensor, Tensor, Tensor]  # keys (C, V, D), count (C,), cursor (C,)


def rings(
    classes: int,
    capacity: int,
    dim: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> State:
    """Rings with some keys each; where they hold none there is something too."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(classes, capacity, dim, generator=g).to(device, dtype)
    count = torch.randint(0, capacity + 1, (classes,), generator=g)
    free = torch.randint(0, capacity, (classes,), generator=g)
    cursor = torch.where(count == capacity, free, count % capacity)
    return keys, count.to(device), cursor.to(device)


def check(backend: str, state: State, features: Tensor, index: Tensor) -> None:
    """Pushes to `state`, and compares with the reference in the same dtype and in float64."""
    before = state[0].clone()
    plain = tuple(x.clone() for x in state)
    truth = (state[0].double(), state[1].clone(), state[2].clone())
    untouched = (features.clone(), index.clone())
    queue_push_(*state, features, index, backend=backend)
    reference.queue_push_(*plain, features, index)
    reference.queue_push_(*truth, features.double(), index)
    assert torch.equal(state[1], truth[1])
    assert torch.equal(state[2], truth[2])
    written = (truth[0] != before.double()).any(dim=2)  # (C, V)
    assert torch.equal(state[0][~written], before[~written])
    assert_accurate(state[0][written], truth[0][written], plain[0][written], 2)
    for now, was in zip((features, index), untouched, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


@RUNS
@pytest.mark.parametrize("dim", [19, 64, 256])
@pytest.mark.parametrize(("classes", "capacity"), [(2, 1), (19, 7), (21, 128), (150, 7)])
def test_equals_one_by_one(
    backend: str, device: str, classes: int, capacity: int, dim: int
) -> None:
    state = rings(classes, capacity, dim, device)
    g = torch.Generator().manual_seed(1)
    features = torch.randn(123, dim, generator=g).to(device)
    for k in (1, 5):
        index = torch.randint(-3, 130, (classes, k), generator=g).to(device)
        check(backend, state, features, index)


@RUNS
@pytest.mark.parametrize("k", [7, 8, 15, 40])
def test_more_keys_than_places(backend: str, device: str, k: int) -> None:
    """Only the last V of them stay, as if all had been pushed one after the other."""
    state = rings(5, 7, 16, device)
    features = torch.randn(50, 16, device=device)
    index = torch.arange(5 * k, device=device).remainder(53).view(5, k) - 1
    check(backend, state, features, index)


@RUNS
@settings(max_examples=examples(25))
@given(data=st.data())
def test_any_sequence_of_pushes(backend: str, device: str, data: st.DataObject) -> None:
    classes, capacity = data.draw(st.integers(1, 4), "C"), data.draw(st.integers(1, 5), "V")
    state = rings(classes, capacity, 3, device, seed=data.draw(st.integers(0, 99), "seed"))
    for _ in range(data.draw(st.integers(1, 4), "pushes")):
        n, k = data.draw(st.integers(0, 6), "N"), data.draw(st.integers(0, 9), "k")
        entry = st.integers(-2, n + 1)
        rows = [[data.draw(entry) for _ in range(k)] for _ in range(classes)]
        index = torch.tensor(rows, dtype=torch.int64, device=device).view(classes, k)
        check(backend, state, torch.randn(n, 3).to(device), index)


@RUNS
@pytest.mark.parametrize("keys", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("features", DTYPES, ids=str)
def test_dtypes(backend: str, device: str, features: torch.dtype, keys: torch.dtype) -> None:
    skip_unfit(backend, device, features)
    state = rings(3, 4, 32, device, keys)
    index = torch.tensor([[0, 1], [-1, 5], [7, 3]], device=device)
    check(backend, state, torch.randn(9, 32).to(device, features), index)


@RUNS
def test_norms_beyond_the_range_of_float16(backend: str, device: str) -> None:
    features = torch.full((2, 64), 60000.0, dtype=torch.float16, device=device)
    state = rings(1, 4, 64, device)
    check(backend, state, features, torch.tensor([[0, 1]], device=device))


@RUNS
def test_features_that_are_not_chosen_do_not_leak(backend: str, device: str) -> None:
    features = torch.full((6, 16), torch.nan, device=device)
    features[2], features[4] = 1, -2
    state = rings(3, 4, 16, device)
    check(backend, state, features, torch.tensor([[2, -1], [9, 4], [-1, -1]], device=device))


@RUNS
def test_a_feature_without_direction_becomes_zeros(backend: str, device: str) -> None:
    features = torch.zeros(5, 16, device=device)
    features[1], features[2, 3], features[3, 7] = 1e-14, torch.nan, -torch.inf
    features[4] = 1e30  # whose square is infinite
    features[3, 2] = 1
    state = rings(1, 6, 16, device)
    place = int(state[2])
    check(backend, state, features, torch.tensor([[0, 1, 2, 3, 4]], device=device))
    for i in range(5):
        assert not state[0][0, (place + i) % 6].any()


@RUNS
def test_strided_memory(backend: str, device: str) -> None:
    """Features as a feature map, rings inside a larger tensor, an index seen from the side."""
    _, count, cursor = rings(3, 4, 16, device)
    keys = torch.randn(16, 3, 4, device=device).permute(1, 2, 0)
    features = torch.randn(16, 20, device=device).T[::2]
    index = torch.randint(-1, 10, (2, 3), device=device).T
    check(backend, (keys, count, cursor), features, index)
    wide = torch.randn(3, 8, 16, device=device)
    half = wide.clone()
    check(backend, (half[:, ::2], count, cursor), features, index)
    assert torch.equal(half[:, 1::2], wide[:, 1::2])


@RUNS
def test_nothing_to_push(backend: str, device: str) -> None:
    state = rings(3, 4, 16, device)
    features = torch.randn(5, 16, device=device)
    check(backend, state, features, torch.full((3, 2), -1, device=device))
    check(backend, state, features, torch.zeros(3, 0, dtype=torch.int64, device=device))
    check(backend, state, features[:0], torch.zeros(3, 2, dtype=torch.int64, device=device))


@RUNS
def test_features_that_take_gradient(backend: str, device: str) -> None:
    state = rings(1, 4, 16, device)
    features = torch.randn(2, 16, device=device, requires_grad=True)
    queue_push_(*state, features * 2, torch.tensor([[0, 1]], device=device), backend=backend)
    assert not state[0].requires_grad


def test_errors_name_the_argument() -> None:
    keys, count, cursor = rings(3, 4, 16, "cpu")
    good = {
        "keys": keys,
        "count": count,
        "cursor": cursor,
        "features": torch.randn(5, 16),
        "index": torch.zeros(3, 2, dtype=torch.int64),
    }
    queue_push_(**good)
    bad = [
        (TypeError, "keys", {"keys": keys.long()}),
        (ValueError, "keys", {"keys": keys[0]}),
        (ValueError, "keys", {"keys": keys[:, :0]}),
        (ValueError, "keys", {"keys": keys[..., :0], "features": torch.randn(5, 0)}),
        (TypeError, "count", {"count": count.int()}),
        (ValueError, "count", {"count": count[:2]}),
        (TypeError, "cursor", {"cursor": cursor.float()}),
        (ValueError, "cursor", {"cursor": cursor[:, None]}),
        (ValueError, "features", {"features": torch.randn(5, 15)}),
        (ValueError, "features", {"features": torch.randn(5, 16, device="meta")}),
        (TypeError, "index", {"index": torch.zeros(3, 2)}),
        (ValueError, "index", {"index": torch.zeros(2, 2, dtype=torch.int64)}),
        (ValueError, "backend", {"backend": "fastest"}),
    ]
    for error, name, change in bad:
        with pytest.raises(error, match=rf"^queue_push_: {name} "):
            queue_push_(**(good | change))
