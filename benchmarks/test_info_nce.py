"""`info_nce`, forward and gradient.

Fewest operations: two matrix products of 2 N M D each, M = C V; fewest bytes: queries read and
gradients written, 2 N D values, and M D keys: far below what the products take.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import contrast
from benchmarks.contrast import GROUPS, SIZES  # noqa: F401  (the first is read by conftest.py)
from benchmarks.harness import Row
from tests.ops.common import Loss, dense_high_level, high_level, reference_high_level


@pytest.mark.timeout(1800)
def test_info_nce(
    benchmark: BenchmarkFixture,
    device: torch.device,
    size: str,
    seconds: float,
    may_compile: bool,
    record: Callable[[list[Row]], None],
) -> None:
    published = contrast.published_loop
    peers: dict[str, Loss] = {
        "class loop as published": partial(published, cosine=contrast.norms_cosine),
        "class loop": contrast.class_loop,
    }
    if size in ("tiny", "series-n-1024") or (size, device.type) == ("cityscapes-v2", "cuda"):
        # on a CPU a call takes seconds, on a GPU the cosines of all pairs 22 GB
        peers["class loop, pairwise cosines"] = partial(published, cosine=contrast.pairwise_cosine)
    library = contrast.metric_learning()
    if library is not None and size in contrast.FEW:
        peers["pytorch-metric-learning"] = library
    for dtype in contrast.dtypes(device):
        run = contrast.compare(
            "info_nce",
            size,
            SIZES[size],
            device,
            dtype,
            ours=high_level,
            truth=reference_high_level,
            dense=dense_high_level,
            peers=peers,
            banks=1,
            may_compile=may_compile,
            seconds=seconds,
            record=record,
        )
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
