"""Poison for what an operation forgets to write."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh memory holds NaN (integers: the largest), so that an unwritten output shows.

    On a GPU the switch would also choose other kernels.
    """
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("device", "cpu") != "cpu" or request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
