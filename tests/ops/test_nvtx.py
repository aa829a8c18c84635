"""Ranges for NVIDIA's profilers."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ctt.ops import MemoryBank, _nvtx, ema_update_, info_nce
from ctt.ops._nvtx import COLORS, named_range
from ctt.ops._registry import OPERATIONS
from ctt.train.phases import NAMES, Phases


class Domain:
    """Writes down what a profiler would be told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def get_event_attributes(self, **attributes: Any) -> Any:
        return attributes

    def push_range(self, attributes: Any) -> None:
        self.events.append(attributes)

    def pop_range(self) -> None:
        self.events.append("end")


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Domain]:
    made = Domain()
    monkeypatch.setattr(_nvtx, "nvtx", SimpleNamespace(get_domain=lambda name: made))
    _nvtx._listening.cache_clear()
    yield made
    _nvtx._listening.cache_clear()


def step() -> None:
    bank = MemoryBank(3, 4, 8)
    query, label = torch.randn(20, 8), torch.arange(20) % 3
    bank.push(query, label, torch.rand(20), top_k=4, per_class=4)
    info_nce(query, label, bank.keys, bank.count, temperature=0.5)
    ema_update_([query], [query.clone()], 0.9)


def test_operations_and_phases_are_ranges_on_every_device(domain: Domain) -> None:
    step()
    told = [(e["message"], e["category"], e["payload"]) for e in domain.events[::2]]
    assert told == [
        ("class_topk", "operation", 20),
        ("queue_push_", "operation", 12),
        ("info_nce", "operation", 20),
        ("ema_update_", "operation", 1),
    ]
    assert domain.events[1::2] == ["end"] * 4
    domain.events.clear()
    with Phases(torch.device("cpu"))("contrast"):
        pass
    (begin, _) = domain.events
    assert (begin["message"], begin["category"]) == ("contrast", "phase")


def test_every_name_has_a_colour_of_its_own() -> None:
    assert set(COLORS) == {*OPERATIONS, *NAMES}
    assert len(set(COLORS.values())) == len(COLORS)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvtx, "nvtx", None)
    _nvtx._listening.cache_clear()
    with named_range("info_nce"):
        step()
    _nvtx._listening.cache_clear()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_a_real_listener_is_told(tmp_path: Path) -> None:
    """The package finds a profiler by this variable."""
    pytest.importorskip("nvtx")
    source, library = tmp_path / "listener.c", tmp_path / "listener.so"
    source.write_text("int InitializeInjectionNvtx2(void *f) { return 1; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    code = "from tests.ops import test_nvtx as t; t.step(); print(t._nvtx._listening() is None)"
    for listens in (False, True):
        environment = dict(os.environ)
        environment.pop("NVTX_INJECTION64_PATH", None)
        if listens:
            environment["NVTX_INJECTION64_PATH"] = str(library)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(not listens)
