"""What the program computed before stays what it computes: losses of 20 steps, former files."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from ctt import checkpoint, run
from ctt.settings import Settings, update
from ctt.train.loop import train

GOLDEN = Path(__file__).with_name("golden_losses.csv")


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    change = {
        "bank": {"start_after": 4, "capacity": 2, "per_class": 2},
        "loss": {"gamma": 0.3},
        "model": {"grid": "legacy"},
        "optim": {"weight_decay": 5e-4},
        "train": {"iterations": 20, "log_every": 1, "eval_every": 20, "tensorboard": False},
    }
    return update(tiny, change, "test")


def losses(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["loss_total"]]
    return [{n: float(v) for n, v in row.items() if n.startswith("loss_")} for row in rows]


def test_losses_of_twenty_steps(settings: Settings, out: Path) -> None:
    """The file holds what the first version of the program computed with an AVX-512 processor.

    Others round otherwise, and a pixel may change its class.
    """
    train(settings, out=out)
    expected = list(csv.DictReader(io.StringIO(GOLDEN.read_text(encoding="utf-8"))))
    seen = losses(out)
    assert len(seen) == len(expected) == 20
    for mine, wanted in zip(seen, expected, strict=True):
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            assert mine[name] == pytest.approx(float(value), rel=0.02, abs=0.01), name
    assert sum(row["loss_hc"] for row in seen) > 0
    assert sum(row["loss_lc"] for row in seen) > 0


def former(state: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint in the format of the first version, which knew one method."""
    lists: dict[str, list[dict[str, torch.Tensor]]] = {"students": [], "teachers": [], "banks": []}
    for name, value in state.pop("method").items():
        kind, k, rest = name.split(".", 2)
        while len(lists[kind]) <= int(k):
            lists[kind].append({})
        lists[kind][int(k)][rest] = value
    optimizer = state.pop("optimizers")["students"]
    return {**state, **lists, "optimizer": optimizer, "format": checkpoint.FORMER_FORMAT}


def test_a_run_of_the_former_version_goes_on(settings: Settings, tmp_path: Path) -> None:
    train(settings, out=tmp_path / "whole")
    half = update(settings, {"train": {"checkpoint_every": 8}}, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_first(checkpoint.save))
        train(half, out=tmp_path / "run")
    path = tmp_path / "run" / run.CHECKPOINT
    state = torch.load(path, weights_only=True)
    assert state["iteration"] == 8
    torch.save(former(state), path)
    train(half, resume=tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ends = [checkpoint.load(tmp_path / name / run.CHECKPOINT) for name in ("whole", "run")]
    assert all(torch.equal(ends[1]["method"][n], value) for n, value in ends[0]["method"].items())


def save_first(save: Any) -> Any:
    """Return `checkpoint.save` that writes once and does nothing later, as if the run was lost."""
    calls = 0

    def once(path: Path, state: dict[str, Any], keep: bool = True) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            save(path, state)

    return once
