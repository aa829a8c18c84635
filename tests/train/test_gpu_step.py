"""The step on a GPU: it never waits, and a recorded one does what the ordinary one does."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ctt.settings import Settings, update
from ctt.train.phases import NAMES
from ctt.train.prefetcher import DevicePrefetcher
from tests.train.steps import Images, batch, make, unlabelled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = torch.device("cuda", 0)
VARIANTS: dict[str, dict[str, Any]] = {
    "cutmix": {},
    "classmix": {"views": {"mix": "classmix"}},
    "bf16": {"train": {"amp": "bf16"}},
    "fp16 with clipping": {"train": {"amp": "fp16"}, "optim": {"clip_norm": 1.0}},
    "parts": {"data": {"batch_size": 4}, "train": {"accumulate": 2}},
    "image by image": {"bank": {"per_image": True}, "loss": {"confidence_weight": "uniform"}},
}


def pinned(first: int) -> Iterator[Images]:
    for i in range(first, first + 40):
        images, label = batch(4, seed=i) if first else unlabelled(4, seed=i)
        yield images.pin_memory(), label.pin_memory()


def run(settings: Settings, steps: int, quiet_from: int | None = None) -> list[dict[str, float]]:
    """Losses of each step; from step `quiet_from` on a wait for the device is an error."""
    engine = make(settings, device=GPU)
    feed = DevicePrefetcher(pinned(1), pinned(0), engine.step.phase)
    seen: list[dict[str, Tensor]] = []
    try:
        for i in range(steps):
            if i == quiet_from:
                torch.cuda.set_sync_debug_mode("error")
            seen.append(engine(*feed()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.iteration == steps
    return [{name: float(value) for name, value in terms.items()} for terms in seen]


@pytest.fixture
def plain(tiny: Settings) -> Settings:
    torch.use_deterministic_algorithms(False)  # a run in this process may have asked for it
    change = {"data": {"batch_size": 4}, "train": {"deterministic": False, "iterations": 40}}
    return update(tiny, change, "test")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_never_waits_for_the_device(plain: Settings, name: str) -> None:
    seen = run(update(plain, VARIANTS[name], "test"), 6, quiet_from=2)
    assert all(abs(value) < 1e6 for terms in seen for value in terms.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_replayed_step_is_the_step(plain: Settings, name: str) -> None:
    """Over the start of the contrast, where the graph is recorded anew."""
    change = {
        "bank": {"start_after": 8},
        "loss": {"ct_ramp": 10, "confidence_weight": "none"},
        "optim": {"lr": 0.01},
    }
    settings = update(update(plain, change, "test"), VARIANTS[name], "test")
    expected = run(settings, 16)
    seen = run(update(settings, {"train": {"cuda_graph": True}}, "test"), 16)
    assert expected[15]["hc"] + expected[15]["lc"] > 0
    for one, other in zip(expected, seen, strict=True):
        # convolutions sum in another order from run to run, and a pixel may change its class
        for name, close in (("sup", 0.02), ("ct", 0.05), ("hc", 0.15), ("lc", 0.15)):
            assert other[name] == pytest.approx(one[name], rel=close, abs=0.02)


def test_a_replayed_step_waits_for_nothing(plain: Settings) -> None:
    settings = update(plain, {"train": {"cuda_graph": True}}, "test")
    run(settings, 10, quiet_from=5)


def test_phases_on_the_clock_of_the_device(plain: Settings) -> None:
    engine = make(plain, device=GPU)
    phases = engine.step.phase
    feed = DevicePrefetcher(pinned(1), pinned(0), phases)
    engine(*feed())
    phases.timing = True
    engine(*feed())
    spent = phases.seconds()
    assert tuple(spent) == NAMES
    assert all(value >= 0 for value in spent.values())
    assert feed.waited() >= 0


@pytest.mark.parametrize("how", ["network", "blocks"])
def test_compiled_networks_train_alike(plain: Settings, how: str) -> None:
    settings = update(plain, {"optim": {"lr": 0.01}}, "test")
    expected = run(settings, 4)
    seen = run(update(settings, {"train": {"compile": how, "amp": "bf16"}}, "test"), 4)
    for one, other in zip(expected, seen, strict=True):
        assert other["sup"] == pytest.approx(one["sup"], rel=0.05)
