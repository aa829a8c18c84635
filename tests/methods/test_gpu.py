"""Every method on a GPU: a step never waits, and a recorded one does what the ordinary one does."""

from typing import Any

import pytest
import torch

from ctt import methods
from ctt.settings import Settings, update
from tests.train.test_gpu_step import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RECORDABLE = [name for name in methods.names() if methods.get(name).load().recordable]


def settings_of(name: str, tiny: Settings, change: dict[str, Any] | None = None) -> Settings:
    torch.use_deterministic_algorithms(False)  # a run in this process may have asked for it
    common = {
        "data": {"batch_size": 4},
        "loss": {"confidence_weight": "none"},
        "optim": {"lr": 0.01},
        "train": {"deterministic": False, "iterations": 40},
    }
    return update(update(tiny.with_method(name), common, "test"), change or {}, "test")


@pytest.mark.parametrize("name", RECORDABLE)
def test_a_step_never_waits_for_the_device(tiny: Settings, name: str) -> None:
    seen = run(settings_of(name, tiny), 6, quiet_from=2)
    assert all(abs(value) < 1e6 for terms in seen for value in terms.values())


@pytest.mark.parametrize("name", RECORDABLE)
def test_a_replayed_step_is_the_step(tiny: Settings, name: str) -> None:
    expected = run(settings_of(name, tiny), 12)
    seen = run(settings_of(name, tiny, {"train": {"cuda_graph": True}}), 12)
    for one, other in zip(expected, seen, strict=True):
        # convolutions sum in another order from run to run, and a pixel may change its class
        for term, value in one.items():
            close = 0.02 if term == "sup" else 0.2
            assert other[term] == pytest.approx(value, rel=close, abs=0.05), term


@pytest.mark.parametrize("name", methods.names())
def test_a_step_in_mixed_precision(tiny: Settings, name: str) -> None:
    for amp in ("bf16", "fp16"):
        seen = run(settings_of(name, tiny, {"train": {"amp": amp}}), 4)
        assert all(abs(value) < 1e6 for terms in seen for value in terms.values())
