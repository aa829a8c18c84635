"""The same training run with every backend of the operations ends at the same losses."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctt.ops import available_backends, prefer_backend
from ctt.ops._registry import OPERATIONS, select
from ctt.settings import Settings, update
from ctt.train.loop import train
from tests.train.steps import exactly

BACKENDS = [b for b in available_backends("cpu")["info_nce"] if b != "reference"]
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def measured_order() -> Iterator[None]:
    yield
    prefer_backend("auto")


def losses(settings: Settings, backend: str, out: Path) -> list[dict[str, float]]:
    change = {"train": {"backend": backend, "iterations": 12, "log_every": 4}}
    train(update(settings, change, "test"), out=out)
    with (out / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss_total"]]
    return [{k: float(v) for k, v in row.items() if k.startswith("loss")} for row in rows]


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_converges_alike(tiny: Settings, tmp_path: Path, backend: str) -> None:
    # large weights, so that a wrong gradient shows, and no random choice
    change = {
        "loss": {
            "hc": 0.5,
            "lc": 0.5,
            "gamma": 0.11,
            "confidence_weight": "none",
            "contrast_stride": 1,
        },
        "bank": {"start_after": 0, "capacity": 32, "per_class": 32, "random_choice": False},
        "optim": {"lr": 0.01},
    }
    settings = update(tiny, change, "test")
    # in float32 rounding soon tips a pixel over a threshold, which then counts in its class's mean
    with exactly():
        truth = losses(settings, "reference", tmp_path / "reference")
        ours = losses(settings, backend, tmp_path / backend)
    assert truth[-1]["loss_hc"] > 0
    assert truth[-1]["loss_lc"] > 0
    for expected, got in zip(truth, ours, strict=True):
        assert got == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_a_preferred_backend_is_taken_where_it_runs() -> None:
    import torch

    prefer_backend("torch")
    for operation in OPERATIONS:
        assert select(operation, "auto", torch.device("cpu")).__name__.endswith(".torch")
    prefer_backend("cuda")  # runs nowhere on a CPU: the usual order serves
    assert not select("info_nce", "auto", torch.device("cpu")).__name__.endswith(".cuda")
    with pytest.raises(ValueError, match="backend must be one of"):
        prefer_backend("abacus")
