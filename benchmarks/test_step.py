"""The whole step of training, on random images that lie on the device already.

Beside ours: the same step with the plain formulas for the operations (`reference`), a plain
rendering of it (benchmarks/plain_step.py), and supervised training of the same two networks on the
labelled images, which is the floor. The banks are full and gamma is 0, so every pixel of every
student takes part in the contrast, as it does late in a run. Views and labels are random.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import REFERENCE, Row, Run, Setting
from benchmarks.plain_step import PlainStep
from ctt import methods, recipes
from ctt.data.dataset import DatasetInfo
from ctt.data.views import normalize, to_unit
from ctt.device import device_name
from ctt.methods.base import Setup
from ctt.models.base import SegmentationModel
from ctt.ops import MemoryBank, prefer_backend
from ctt.settings import Settings, update
from ctt.train.engine import Engine
from ctt.train.plan import ready_to_train
from ctt.train.profiling import phase_table

CLASSES = {"tiny": 11, "digits": 11, "voc": 21, "cityscapes": 19}
RECIPES = {
    "tiny": "digits",
    "digits": "digits",
    "voc": "voc-aug-deeplabv2",
    "cityscapes": "cityscapes-deeplabv2",
}
SIZES = RECIPES
GROUPS = {"default": ["digits"], "paper": ["digits", "voc", "cityscapes"], "series": []}
OURS = "ctt"
LABELED = 212  # of the paper's first ratio: one key of each class a step
ITERATIONS = 80_000
SMALL = ("contrast", "banks", "ema")  # phases that are no network
PHASE_STEPS = 5

COMMON: dict[str, Any] = {
    "model": {"weights": ["none"]},
    "bank": {"start_after": 0, "every": 1},  # as the plain step
    "loss": {"gamma": 0.0},
}
TINY: dict[str, Any] = {
    "data": {"crop": [24, 24], "batch_size": 4},
    "model": {"width": 4, "features": 8},
    "bank": {"capacity": 4},
}

Batches = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def settings_of(size: str, change: dict[str, Any] | None = None) -> Settings:
    settings = update(Settings(), recipes.load(RECIPES[size]), "recipe")
    settings = update(settings, COMMON, "benchmark")
    settings = update(settings, TINY if size == "tiny" else {}, "benchmark")
    return update(settings, change or {}, "benchmark")


def info_of(size: str) -> DatasetInfo:
    classes = CLASSES[size]
    names = tuple(map(str, range(classes)))
    half = (0.5, 0.5, 0.5)
    return DatasetInfo(size, names, ((0, 0, 0),) * classes, half, half)


def make_batches(settings: Settings, classes: int, device: torch.device) -> Batches:
    count, (height, width) = settings.data.batch_size, settings.data.crop
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, count, 3, height, width), generator=rng).to(torch.uint8)
    blocks = torch.randint(0, classes, (count, -(-height // 40), -(-width // 40)), generator=rng)
    label = blocks.repeat_interleave(40, 1).repeat_interleave(40, 2)[:, :height, :width]
    labeled = (images[0].to(device), label.to(torch.uint8).to(device))
    return labeled, (images[1].to(device), torch.zeros_like(labeled[1]))


def make_engine(settings: Settings, size: str, device: torch.device) -> Engine:
    def finish(network: SegmentationModel) -> SegmentationModel:
        return ready_to_train(network, settings, device)

    setup = Setup(settings, info_of(size), 2, LABELED, finish=finish)
    method = methods.get(settings.method).load()(setup)
    return Engine(method, settings, info_of(size), device)


def ours(
    settings: Settings, size: str, device: torch.device, batches: Batches, backend: str = "auto"
) -> tuple[Callable[[], dict[str, Tensor]], Engine]:
    """Return one step, with full banks."""
    about = methods.get(settings.method)
    engine = make_engine(settings, size, device)
    banks = [m for m in engine.method.modules() if isinstance(m, MemoryBank)]
    rng = torch.Generator().manual_seed(0)  # the same keys in each way
    for bank in banks:
        bank.keys.copy_(F.normalize(torch.randn(bank.keys.shape, generator=rng), dim=2))
        bank.count.fill_(settings.bank.capacity)
    labeled, unlabeled = batches

    def run() -> dict[str, Tensor]:
        engine.iteration = 1000  # far from the end of the decay, however often it is called
        prefer_backend(backend)
        try:
            return engine(labeled, unlabeled if about.unlabeled else None)
        finally:
            prefer_backend("auto")

    return run, engine


def plain(settings: Settings, size: str, device: torch.device, batches: Batches) -> Run:
    info = info_of(size)
    engine = make_engine(settings, size, device)
    step = PlainStep(settings, list(engine.method.students), len(info.classes))
    view = engine.step.photometric
    (images, label), (more, _) = batches

    def run() -> dict[str, float]:
        draws = torch.rand(7, len(more), device=device)
        weak = to_unit(more)
        strong = normalize(view(weak, draws), info)
        return step((normalize(to_unit(images), info), label.long()), normalize(weak, info), strong)

    return run


def variants(device: torch.device, may_compile: bool) -> dict[str, dict[str, Any]]:
    """Return settings of ways to run our step."""
    ways: dict[str, dict[str, Any]] = {OURS: {}}
    if may_compile and device.type == "cpu":
        ways["ctt compiled"] = {"train": {"compile": "network"}}
    if device.type == "cuda":
        ways["ctt bf16"] = {"train": {"amp": "bf16"}}
        if may_compile:
            ways["ctt bf16 compiled"] = {"train": {"amp": "bf16", "compile": "network"}}
            ways["ctt bf16 compiled blocks"] = {"train": {"amp": "bf16", "compile": "blocks"}}
        # one way alone: a graph keeps the memory of its whole step
        ways["ctt bf16 graph"] = {"train": {"amp": "bf16", "cuda_graph": True}}
    return ways


def phases_of(run: Run, engine: Engine, device: torch.device) -> tuple[dict[str, float], float]:
    """Return the seconds of each phase and of the whole of some steps."""
    run()
    phases = engine.step.phase
    phases.seconds()
    phases.timing = True
    start = phases.now()
    for _ in range(PHASE_STEPS):
        run()
    end = phases.now()
    spent = phases.seconds()
    phases.timing = False
    return spent, phases.between(start, end)


@pytest.mark.timeout(3600)
def test_step(
    benchmark: BenchmarkFixture,
    device: torch.device,
    size: str,
    seconds: float,
    may_compile: bool,
    record: Callable[[list[Row]], None],
    note: Callable[[str], None],
) -> None:
    if device.type == "cpu" and size in ("voc", "cityscapes"):
        pytest.skip("a step of ResNet-101 takes a minute on a CPU")
    settings, classes = settings_of(size), CLASSES[size]
    batches = make_batches(settings, classes, device)
    made = {
        name: ours(settings_of(size, change), size, device, batches)
        for name, change in variants(device, may_compile).items()
    }
    made[REFERENCE] = ours(settings, size, device, batches, backend="reference")
    made["supervised"] = ours(settings_of(size, {"method": "supervised"}), size, device, batches)
    runs: dict[str, Run] = {name: run for name, (run, _) in made.items()}
    runs["plain rendering"] = plain(settings, size, device, batches)

    first = {name: harness.seconds_of(run, device) for name, run in runs.items()}
    expected, seen = made[REFERENCE][0](), made[OURS][0]()
    for term, value in expected.items():
        assert float(seen[term]) == pytest.approx(float(value), rel=1e-3), term
    for run in runs.values():
        assert all(float(x) == float(x) for x in run().values())

    count, (height, width) = settings.data.batch_size, settings.data.crop
    shape = f"{count}+{count}x{height}x{width} C={classes} D={settings.model.features}"
    setting = Setting("step", size, shape, "float32", device)
    memory = {name: harness.extra_memory(run, device) for name, run in runs.items()}
    times = harness.time_in_turns(runs, device, seconds, rounds=(3, 60))
    record(harness.rows(setting, times, memory, None))

    lines = [f"step {size} ({device_name(device)})"]
    for name, spent in times.items():
        middle = harness.quantiles(spent)[1]
        images = count if name == "supervised" else 2 * count
        lines.append(
            f"{name:28} {1000 * images / middle:8.1f} images/s  "
            f"{middle * ITERATIONS / 3.6e6:7.1f} hours for {ITERATIONS} iterations, "
            f"the first step {first[name]:.1f} s"
        )
    for name in (OURS, REFERENCE):
        spent, whole = phases_of(*made[name], device)
        text = io.StringIO()
        Console(file=text, width=80).print(phase_table(spent, whole, PHASE_STEPS))
        share = sum(spent.get(phase, 0.0) for phase in SMALL) / whole
        if name == OURS:
            parts = {n: [1e3 * t / PHASE_STEPS] for n, t in spent.items()}
            together = [sum(x) for x in zip(*(parts.get(n, [0.0]) for n in SMALL), strict=True)]
            joined = {
                "contrast, banks and EMA": together,
                "whole step": [1e3 * whole / PHASE_STEPS],
            }
            phases = replace(setting, operation="phases")
            record(harness.rows(phases, parts | joined, {}, None))
        lines += [
            text.getvalue().rstrip(),
            f"{name}: contrast, banks and EMA together are {100 * share:.1f} % of a step",
        ]
    note("\n".join(lines))
    benchmark.pedantic(harness.seconds_of, args=(runs[OURS], device), rounds=3)
