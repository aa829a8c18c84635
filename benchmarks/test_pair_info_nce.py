"""`pair_info_nce` over two banks, forward and gradient.

Fewest operations: two matrix products of 2 N M D each, M = 2 C V; fewest bytes: queries and
positives read and gradients written, 3 N D values, and M D keys.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import contrast
from benchmarks.contrast import GROUPS, SIZES  # noqa: F401  (the first is read by conftest.py)
from benchmarks.harness import Row
from tests.ops.common import dense_low_level, low_level, reference_low_level


@pytest.mark.timeout(1800)
def test_pair_info_nce(
    benchmark: BenchmarkFixture,
    device: torch.device,
    size: str,
    seconds: float,
    may_compile: bool,
    record: Callable[[list[Row]], None],
) -> None:
    for dtype in contrast.dtypes(device):
        run = contrast.compare(
            "pair_info_nce",
            size,
            SIZES[size],
            device,
            dtype,
            ours=low_level,
            truth=reference_low_level,
            dense=dense_low_level,
            peers={
                "class loop as published": contrast.published_pair_loop,
                "class loop": contrast.pair_class_loop,
            },
            banks=2,
            may_compile=may_compile,
            seconds=seconds,
            record=record,
        )
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
