"""`class_topk` and `queue_push_`: the bank's update of one step.

Fewest bytes: N confidences and labels read (12 N), C k features read and keys written (8 C k D in
float32). On a GPU that is far less than a launch costs, so there are times and no percentages.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import Row, Run, Setting
from ctt.ops import available_backends, class_topk, queue_push_, reference

SIZES: dict[str, tuple[int, int, int, int, int]] = {  # N, C, V, D, k
    "tiny": (200, 4, 8, 16, 3),
    "cityscapes-v2": (4290, 19, 128, 256, 64),
    "voc-v2": (16810, 21, 128, 256, 12),
    "voc-v3plus": (65610, 21, 128, 256, 12),
    **{f"series-n-{n}": (n, 21, 128, 256, 12) for n in (1000, 10_000, 100_000, 1_000_000)},
    **{f"series-c-{c}": (16810, c, 128, 256, 12) for c in (2, 19, 150)},
}
PAPER = ["cityscapes-v2", "voc-v2", "voc-v3plus"]
GROUPS = {"default": PAPER, "paper": PAPER, "series": [n for n in SIZES if n.startswith("series")]}

Inputs = tuple[Tensor, Tensor, Tensor]  # features (N, D), label (N,), confidence (N,)
Rings = tuple[Tensor, Tensor, Tensor]  # keys (C, V, D), count (C,), cursor (C,)
Update = Callable[[Inputs, Rings, int], None]


def ours(backend: str) -> Update:
    def update(inputs: Inputs, rings: Rings, k: int) -> None:
        features, label, confidence = inputs
        index, _ = class_topk(confidence, label, k, rings[0].shape[0], backend=backend)
        queue_push_(*rings, features, index, backend=backend)

    return update


def class_loop(inputs: Inputs, rings: Rings, k: int) -> None:
    """Run a loop over the classes with boolean indexing, as published programs write it."""
    features, label, confidence = inputs
    keys, count, cursor = rings
    capacity = keys.shape[1]
    for c in range(len(keys)):
        member = label == c
        if not member.any():
            continue
        chosen, score = features[member], confidence[member]
        best = score.topk(min(k, len(score))).indices
        fresh = F.normalize(chosen[best], dim=1)
        start = int(cursor[c])
        place = torch.arange(start, start + len(fresh), device=keys.device) % capacity
        keys[c, place] = fresh
        cursor[c] = (start + len(fresh)) % capacity
        count[c] = min(int(count[c]) + len(fresh), capacity)


def make(size: str, device: torch.device, seed: int = 0) -> Inputs:
    n, classes, _, dim, _ = SIZES[size]
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (n,), generator=g)
    label[torch.rand(n, generator=g) < 0.1] = 255
    features = torch.randn(n, dim, generator=g)
    confidence = torch.randperm(n, generator=g) / n  # no ties, which ways break as they like
    return features.to(device), label.to(device), confidence.to(device)


def empty(size: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Rings:
    _, classes, capacity, dim, _ = SIZES[size]
    count = torch.zeros(classes, dtype=torch.int64, device=device)
    return torch.zeros(classes, capacity, dim, dtype=dtype, device=device), count, count.clone()


def check(name: str, update: Update, inputs: Inputs, size: str) -> None:
    """Raise where a way stores something else than the reference in float64, past the wrap."""
    features, label, confidence = inputs
    k, capacity = SIZES[size][4], SIZES[size][2]
    got, want = empty(size, features.device), empty(size, features.device, torch.float64)
    index, _ = reference.class_topk(confidence, label, k, len(want[0]))
    for _ in range(capacity // k + 2):
        update(inputs, got, k)
        reference.queue_push_(*want, features.double(), index)
    for have, true in zip(got, want, strict=True):
        torch.testing.assert_close(
            have.double(), true.double(), rtol=1e-6, atol=1e-6, msg=lambda m: f"{name}: {m}"
        )


@pytest.mark.timeout(1800)
def test_selection(
    benchmark: BenchmarkFixture,
    device: torch.device,
    size: str,
    seconds: float,
    record: Callable[[list[Row]], None],
) -> None:
    here = available_backends(device)
    names = [b for b in here["class_topk"] if b in here["queue_push_"]]
    ways: dict[str, Update] = {name: ours(name) for name in names}
    ways["class loop"] = class_loop
    inputs, k = make(size, device), SIZES[size][4]
    for name, update in ways.items():
        check(name, update, inputs, size)

    shape = " ".join(f"{x}={n}" for x, n in zip("NCVDk", SIZES[size], strict=True))
    setting = Setting("class_topk + queue_push_", size, shape, "float32", device)
    runs: dict[str, Run] = {
        n: partial(update, inputs, empty(size, device), k) for n, update in ways.items()
    }
    memory = {n: harness.extra_memory(run, device) for n, run in runs.items()}
    times = harness.time_in_turns(runs, device, seconds)
    record(harness.rows(setting, times, memory, None))
    if device.type == "cuda":
        _measure_cold(setting, ways, size, seconds, record)
    benchmark.pedantic(partial(ours("auto"), inputs, empty(size, device), k), rounds=5)


def _measure_cold(
    setting: Setting,
    ways: dict[str, Update],
    size: str,
    seconds: float,
    record: Callable[[list[Row]], None],
) -> None:
    device, (n, _, _, dim, k) = setting.device, SIZES[size]
    copies = harness.copies_beyond_cache(n * dim * 4, device)
    sets = [(make(size, device, seed), empty(size, device)) for seed in range(copies)]
    graphs = {
        name: harness.replayed([partial(update, x, rings, k) for x, rings in sets], device)
        for name, update in ways.items()
    }
    ready = {n: g for n, g in graphs.items() if g is not None}
    if ready:
        times = harness.time_in_turns(ready, device, seconds)
        record(harness.rows(setting.graph(), harness.divided(times, copies), {}, None))
