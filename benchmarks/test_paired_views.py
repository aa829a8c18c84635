"""`info_nce` as plain InfoNCE: N classes with one key each, which is a cross-entropy over all keys.

So two views of N images are told apart. The keys take no gradient, as with a momentum encoder.
Fewest operations: two matrix products of 2 N N D each.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from benchmarks import contrast
from benchmarks.contrast import TAU, Shape
from benchmarks.harness import Row
from tests.ops.common import Contrast, Loss, dense_high_level, high_level, reference_high_level

SIZES: dict[str, Shape] = {
    "tiny": (24, 24, 1, 16),
    **{f"series-views-{n}": (n, n, 1, 256) for n in (64, 256, 1024, 4096, 8192)},
}
SERIES = [n for n in SIZES if n != "tiny"]
GROUPS = {"default": ["series-views-1024"], "paper": SERIES, "series": SERIES}


def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Contrast:
    case = contrast.make(shape, dtype, device, seed)
    return replace(case, label=torch.arange(shape[0], device=device))


def cross_entropy(q: Tensor, case: Contrast, reduction: str) -> Tensor:
    """Compute what everybody writes."""
    keys = case.keys.flatten(0, 1).to(q.dtype)
    return F.cross_entropy(F.normalize(q, dim=1) @ keys.T / case.temperature, case.label)


def inf_cl() -> Loss:
    """Return tiles of scores that are never stored; a program of Triton."""
    from inf_cl import cal_flash_loss

    def run(q: Tensor, case: Contrast, reduction: str) -> Tensor:
        keys = case.keys.flatten(0, 1).to(q.dtype)
        value: Tensor = cal_flash_loss(F.normalize(q, dim=1), keys, case.label, 1 / TAU).mean()
        return value

    return run


def liger() -> Loss:
    """Return the keys as weights of the last layer; chunks of scores, gradient made on the way."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(q: Tensor, case: Contrast, reduction: str) -> Tensor:
        keys = case.keys.flatten(0, 1).to(q.dtype)
        unit = F.normalize(q, dim=1) / TAU
        value: Tensor = liger_fused_linear_cross_entropy(unit, keys, case.label)
        return value

    return run


def peers(device: torch.device, may_compile: bool) -> dict[str, Loss]:
    """Return what is installed and runs here."""
    ways: dict[str, Loss] = {"cross_entropy": cross_entropy}
    if may_compile:
        ways["cross_entropy, torch.compile"] = contrast.compiled(cross_entropy)
    for package, module, load in (
        ("Inf-CL", "inf_cl", inf_cl),
        ("Liger, linear cross-entropy", "liger_kernel", liger),
    ):
        if device.type != "cuda":
            warnings.warn(f"{package} was left out: it needs a CUDA device", stacklevel=2)
        elif importlib.util.find_spec(module) is None:
            warnings.warn(f"{package} was left out: it is not installed", stacklevel=2)
        else:
            ways[package] = load()
    return ways


@pytest.mark.timeout(1800)
def test_paired_views(
    benchmark: BenchmarkFixture,
    device: torch.device,
    size: str,
    seconds: float,
    may_compile: bool,
    record: Callable[[list[Row]], None],
) -> None:
    for dtype in contrast.dtypes(device):
        run = contrast.compare(
            "info_nce, two views",
            size,
            SIZES[size],
            device,
            dtype,
            ours=high_level,
            truth=reference_high_level,
            dense=dense_high_level,
            peers=peers(device, may_compile),
            banks=1,
            may_compile=False,  # of the formula with classes, which nobody would take here
            seconds=seconds,
            record=record,
            make=make,
        )
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
