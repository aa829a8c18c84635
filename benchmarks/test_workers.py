"""Training on a CPU whose cores compute the steps and load the images: which shares are best.

Each way trains the embedded digits by their recipe, from its own start, with so many loader
processes and so many threads in the steps. The time is that of a step, batch included. The figure
beside it is the share of the time in which the step had no batch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness
from benchmarks.harness import Row, Setting
from ctt import recipes
from ctt.settings import Settings, update
from ctt.train.loop import train

SIZES = {"tiny": 2, "digits": 100}  # steps of a run
GROUPS = {"default": ["digits"], "paper": ["digits"], "series": []}
ROUNDS = 3
SHARES = [(0, 2), (0, 1), (1, 2), (1, 1), (2, 2), (2, 1)]  # workers, threads
TINY = {
    "ratio": "6",
    "data": {"labeled_pool": 24, "batch_size": 2},
    "model": {"width": 4, "features": 8},
}


def settings_of(size: str, workers: int, threads: int) -> Settings:
    change: dict[str, Any] = {
        "data": {"workers": workers, "eval_images": 6},
        "train": {
            "iterations": SIZES[size],
            "threads": threads,
            "device": "cpu",
            "eval_every": SIZES[size],
            "tensorboard": False,
        },
        "bank": {"start_after": 0},
    }
    settings = update(Settings(), recipes.load("digits"), "recipe")
    settings = update(settings, TINY if size == "tiny" else {}, "benchmark")
    return update(settings, change, "benchmark")


@pytest.mark.timeout(1800)
def test_workers(
    benchmark: BenchmarkFixture,
    size: str,
    tmp_path: Path,
    record: Callable[[list[Row]], None],
    note: Callable[[str], None],
) -> None:
    threads_before = torch.get_num_threads()
    times: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    rounds, shares = (1, SHARES[::3]) if size == "tiny" else (ROUNDS, SHARES)
    try:
        for turn in range(rounds):
            for i in range(len(shares)):
                workers, threads = shares[(i + turn) % len(shares)]
                out = tmp_path / f"{turn}-{i}"
                summary = train(settings_of(size, workers, threads), out=out)
                name = f"{workers} workers, {threads} threads"
                # the seconds are rounded, which those of a tiny run do not survive
                images = 2 * settings_of(size, workers, threads).data.batch_size
                times.setdefault(name, []).append(1e3 * images / summary["images_per_second"])
                waits.setdefault(name, []).append(100 * summary["input_wait"])
    finally:
        torch.set_num_threads(threads_before)
    batch = settings_of(size, 0, 1).data.batch_size
    device = torch.device("cpu")
    setting = Setting("step and input", size, f"{batch}+{batch}x40x40", "float32", device)
    record(harness.rows(setting, times, {}, None, reference="0 workers, 2 threads"))
    lines = [
        f"{name:24} without a batch {harness.quantiles(spent)[1]:.1f} % of the time"
        for name, spent in waits.items()
    ]
    note("\n".join([f"input of a run, {size}", *lines]))
    settings = settings_of("tiny", 0, threads_before)
    benchmark.pedantic(train, args=(settings,), kwargs={"out": tmp_path / "last"}, rounds=1)
