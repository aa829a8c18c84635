"""What a step of every method costs, beside one of a mean teacher with the same network.

Each has its own number of students, and is in the last round of its run, with all its terms. The
medians, as multiples of the mean teacher's, are the costs that `ctt-train --list-methods` shows.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row, Run, Setting
from benchmarks.test_step import Batches, info_of, make_batches
from benchmarks.test_step import settings_of as recipe_of
from ctt import methods
from ctt.device import device_name
from ctt.methods.base import Setup
from ctt.models.base import SegmentationModel
from ctt.settings import Settings, update
from ctt.train.engine import Engine
from ctt.train.plan import ready_to_train

BASELINE = "mean-teacher"
RESNET: dict[str, Any] = {
    "data": {"crop": [97, 97], "batch_size": 2},
    "model": {"name": "deeplabv2", "backbone": ["resnet50"], "features": 256},
}
CHANGES = {"tiny": {}, "digits": {}, "resnet": RESNET}
SIZES = tuple(CHANGES)
GROUPS = {"default": ["digits"], "paper": ["digits", "resnet"], "series": []}
CRITIC = {"tiny": 4, "digits": 16, "resnet": 64}  # width; the networks are as unequal


def settings_of(name: str, size: str) -> Settings:
    recipe = "tiny" if size == "tiny" else "digits"
    settings = update(recipe_of(recipe), CHANGES[size], "benchmark").with_method(name)
    if hasattr(settings.options, "critic_width"):
        settings = update(settings, {"options": {"critic_width": CRITIC[size]}}, "benchmark")
    return settings


def step_of(name: str, size: str, device: torch.device, batches: Batches) -> Run:
    settings, about = settings_of(name, size), methods.get(name)

    def finish(network: SegmentationModel) -> SegmentationModel:
        return ready_to_train(network, settings, device)

    info = info_of("digits")
    method = about.load()(Setup(settings, info, about.pairs, 50, finish=finish))
    engine = Engine(method, settings, info, device)
    labeled, (images, padding) = batches
    late = settings.train.iterations - 100
    kind = engine.rounds.rounds[engine.rounds.at(late)].images
    more: tuple[Tensor, Tensor] | None = images, padding
    if kind == "kept":
        more = images, labeled[1].int() + 256 * 200
    if not about.unlabeled:
        more = None

    def run() -> dict[str, Tensor]:
        engine.iteration = late
        return engine(labeled, more)

    return run


@pytest.mark.timeout(3600)
def test_methods(
    benchmark: BenchmarkFixture,
    device: torch.device,
    size: str,
    seconds: float,
    record: Callable[[list[Row]], None],
    note: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> None:
    chosen = request.config.getoption("--methods")
    # distill needs a finished run, and costs what its teachers' forward passes do
    names = chosen.split(",") if chosen else [n for n in methods.names() if n != "distill"]
    settings = settings_of(BASELINE, size)
    batches = make_batches(settings, 11, device)
    count, (height, width) = settings.data.batch_size, settings.data.crop
    network = f"{settings.model.name} {' '.join(settings.model.backbone)}".strip()
    shape = f"{count}+{count}x{height}x{width} {network}"
    setting = Setting("method", size, shape, "float32", device)
    lines = [f"cost of a step, {shape} ({device_name(device)})"]
    for name in names:
        # two at a time, because all networks together would fill the memory
        runs = {BASELINE: step_of(BASELINE, size, device, batches)}
        runs[name] = step_of(name, size, device, batches)
        assert all(float(x) == float(x) for x in runs[name]().values())
        memory = {key: harness.extra_memory(run, device) for key, run in runs.items()}
        times = harness.time_in_turns(runs, device, seconds / 5, rounds=(3, 60))
        if name != BASELINE:
            rows = {harness.REFERENCE: BASELINE, name: name}  # rows are multiples of the reference
            told_times = {way: times[run] for way, run in rows.items()}
            told_memory = {way: memory[run] for way, run in rows.items()}
            record(harness.rows(setting, told_times, told_memory, None))
        low, middle, high = harness.quantiles(
            [a / b for a, b in zip(times[name], times[BASELINE], strict=True)]
        )
        peak = memory[name]
        told = "" if peak is None else f", {peak:.0f} MiB above what it holds"
        lines.append(f"{name:24} {middle:5.2f} ({low:.2f} to {high:.2f}){told}")
    note("\n".join(lines))
    benchmark.pedantic(step_of(BASELINE, size, device, batches), rounds=1)
