"""`ema_update_` over the tensors of DeepLabV2 with a ResNet-101.

Fewest bytes: teacher read, student read, teacher written: 12 bytes a value in float32. The limit is
what the machine copies per second (4 bytes read and 4 written for a value) in the same run. A CPU
may read a line before a copy overwrites it, which is not counted; an update in place needs no such
read and can pass 100 %. So the same update of one flat tensor stands in the table too.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks import harness
from benchmarks.harness import Row, Run, Setting
from ctt.ops import available_backends, ema_update_, reference

DECAY = 0.99
SIZES: dict[str, tuple[int, ...]] = {  # blocks of each stage
    "tiny": (1,),
    "resnet-50": (3, 4, 6, 3),
    "resnet-101": (3, 4, 23, 3),
    "resnet-101-pairs": (3, 4, 23, 3),
}
GROUPS = {
    "default": ["resnet-101"],
    "paper": ["resnet-101", "resnet-101-pairs"],
    "series": ["resnet-50", "resnet-101"],
}
BYTES, COPY_BYTES = 12, 8  # a value: of the update, and of a copy
COPIED = {"cpu": 16 << 20, "cuda": 256 << 20}  # values of the copy that gives the limit


def shapes(size: str) -> list[tuple[int, ...]]:
    """Return the shapes of a bottleneck ResNet of these blocks with the four dilated classifiers of
    DeepLabV2, 21 classes: weights of convolutions, and weight, bias, mean and variance of batch
    normalisation."""
    out: list[tuple[int, ...]] = []

    def block(inputs: int, outputs: int, kernel: int) -> None:
        out.extend([(outputs, inputs, kernel, kernel), *[(outputs,)] * 4])

    block(3, 64, 7)
    inputs = 64
    for stage, depth in enumerate(SIZES[size]):
        width = 64 << stage
        for i in range(depth):
            block(inputs, width, 1)
            block(width, width, 3)
            block(width, 4 * width, 1)
            if i == 0:
                block(inputs, 4 * width, 1)
            inputs = 4 * width
    for _ in range(4):
        out.extend([(21, 2048, 3, 3), (21,)])
    return out * 2 if size.endswith("pairs") else out


class Holder(nn.Module):
    """A module that holds tensors, for peers that take one."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterList(tensors)


def ours(backend: str, teacher: list[Tensor], student: list[Tensor]) -> tuple[Run, list[Tensor]]:
    return partial(ema_update_, teacher, student, DECAY, backend=backend), teacher


def foreach_lerp(teacher: list[Tensor], student: list[Tensor]) -> tuple[Run, list[Tensor]]:
    return partial(torch._foreach_lerp_, teacher, student, 1 - DECAY), teacher


def swa_utils(teacher: list[Tensor], student: list[Tensor]) -> tuple[Run, list[Tensor]]:
    average = get_ema_multi_avg_fn(DECAY)
    return partial(average, teacher, student, torch.tensor(1)), teacher


def timm_v3(teacher: list[Tensor], student: list[Tensor]) -> tuple[Run, list[Tensor]]:
    from timm.utils import ModelEmaV3

    source = Holder(student)
    average = ModelEmaV3(deepcopy(source), decay=DECAY)
    for parameter, value in zip(average.module.parameters(), teacher, strict=True):
        parameter.data = value
    return partial(average.update, source), teacher


def loop(teacher: list[Tensor], student: list[Tensor]) -> tuple[Run, list[Tensor]]:
    def run() -> None:
        for t, s in zip(teacher, student, strict=True):
            t.mul_(DECAY).add_(s, alpha=1 - DECAY)

    return run, teacher


def flat(teacher: list[Tensor], student: list[Tensor]) -> tuple[Run, list[Tensor]]:
    """Return the update of all values in one tensor each: its traffic and nothing else."""
    one, other = (
        torch.cat([t.flatten() for t in teacher]),
        torch.cat([s.flatten() for s in student]),
    )
    return partial(one.lerp_, other, 1 - DECAY), list(one.split([t.numel() for t in teacher]))


def make(size: str, device: torch.device, seed: int) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    return [torch.randn(s, generator=g, device=device) for s in shapes(size)]


def check(name: str, run: Run, held: list[Tensor]) -> Callable[[list[Tensor], list[Tensor]], None]:
    """Run once; the returned function raises where the result is not that of the reference in
    float64. A few tensors of each end stand for all, to bound the memory."""
    run()

    def compare(before: list[Tensor], student: list[Tensor]) -> None:
        for i in (*range(5), *range(-5, 0)):
            want = [before[i].double()]
            reference.ema_update_(want, [student[i].double()], DECAY)
            torch.testing.assert_close(
                held[i].double().view_as(want[0]),
                want[0],
                rtol=1e-6,
                atol=1e-6,
                msg=lambda m: f"{name}: {m}",
            )

    return compare


def prepare(size: str, device: torch.device) -> dict[str, Run]:
    """Return every way, checked; all on one teacher, as its place in memory alone makes a fifth of
    the time."""
    before, student = make(size, device, 0), make(size, device, 1)
    teacher = [t.clone() for t in before]
    makers = {n: partial(ours, n) for n in available_backends(device)["ema_update_"]}
    peers = {
        "_foreach_lerp_": foreach_lerp,
        "swa_utils": swa_utils,
        "timm ModelEmaV3": timm_v3,
        "python loop": loop,
        "one flat lerp_": flat,
    }
    if not harness.installed("timm"):
        del peers["timm ModelEmaV3"]
    runs: dict[str, Run] = {}
    for name, maker in (makers | peers).items():
        with torch.no_grad():
            torch._foreach_copy_(teacher, before)
            run, held = maker(teacher, student)
            check(name, run, held)(before, student)
        runs[name] = torch.no_grad()(run)
    return runs


@pytest.mark.timeout(1800)
def test_ema(
    benchmark: BenchmarkFixture,
    device: torch.device,
    size: str,
    seconds: float,
    record: Callable[[list[Row]], None],
) -> None:
    values = sum(torch.Size(s).numel() for s in shapes(size))
    setting = Setting("ema_update_", size, f"values={values}", "float32", device)
    runs = prepare(size, device)
    memory = {n: harness.extra_memory(run, device) for n, run in runs.items()}
    modes = [(setting, runs)]
    if device.type == "cuda" and values * 8 > 3 * harness.cache_bytes(device):
        # teacher and student exceed the cache: a graph of one call is cold already
        graphs = {n: harness.replayed([run], device) for n, run in runs.items()}
        modes.append((setting.graph(), {n: g for n, g in graphs.items() if g is not None}))
    for kind, ways in modes:
        copied = COPIED[device.type]
        every = {**ways, "copy": harness.copy_bandwidth(device, copied)}
        times = harness.time_in_turns(every, device, seconds)
        scale = values * BYTES / (copied * COPY_BYTES)
        limit = [scale * t for t in times.pop("copy")]
        record(harness.rows(kind, times, memory if kind is setting else {}, limit))
    benchmark.pedantic(runs[available_backends(device)["ema_update_"][0]], rounds=5)
