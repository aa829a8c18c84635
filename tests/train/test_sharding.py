"""Optimiser states shared out among processes: the same weights, and checkpoints of either kind."""

import copy
from pathlib import Path
from typing import Any

import torch

from ctt import checkpoint
from ctt.methods.sharding import own_states
from ctt.settings import Settings, update
from ctt.train import loop
from ctt.train.distributed import World, join
from ctt.train.engine import Engine
from ctt.train.memory import size_of
from tests.methods.test_contract import assert_same
from tests.train.processes import finish, shown, start
from tests.train.steps import CPU, make, run

OPTIMISERS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 1e-3, "decay_vectors": False},
    {"name": "sgd", "clip_norm": 0.5},
]


def settings_of(tiny: Settings, optim: dict[str, Any], shared: bool) -> Settings:
    change = {"optim": optim, "train": {"shard_optimizer": shared}, "data": {"batch_size": 2}}
    return update(tiny, change, "test")


def state_of(engine: Engine) -> dict[str, Any]:
    """Return what a checkpoint holds; of the first process alone it is whole."""
    engine.gather()
    return copy.deepcopy(engine.state_dict()) if engine.world.is_main else {}


def held(engine: Engine) -> int:
    """Return the bytes that this process's optimiser remembers."""
    states = [s for o in engine.optimizers.values() for s in own_states(o).state.values()]
    return sum(size_of(x) for state in states for x in state.values() if x.dim() > 0)


def compare(tiny: Settings, optim: dict[str, Any], folder: Path, world: World) -> None:
    after: dict[str, dict[str, Any]] = {}
    for name, shared in (("whole", False), ("shared", True)):
        engine = make(settings_of(tiny, optim, shared), 0, CPU, world)
        run(engine, 4, 3)
        state = state_of(engine)
        if world.is_main:
            checkpoint.save(folder / f"{name}.pt", state)
        torch.distributed.barrier()
        bytes_here = held(engine)
        run(engine, 4, 2, first=3)
        after[name] = {"method": copy.deepcopy(engine.method.state_dict()), "bytes": bytes_here}
        after[name]["optimizers"] = state_of(engine).get("optimizers")
    for part in ("method", "optimizers"):
        assert_same(after["shared"][part], after["whole"][part])
    # each has its part, and together they have all
    parts = world.total(torch.tensor(after["shared"]["bytes"]))
    assert int(parts) == after["whole"]["bytes"]
    assert after["shared"]["bytes"] < 0.7 * int(parts)
    # a checkpoint of either kind serves the other
    for shared, source in ((True, "whole"), (False, "shared"), (True, "shared")):
        engine = make(settings_of(tiny, optim, shared), 0, CPU, world)
        engine.load_state_dict(checkpoint.load(folder / f"{source}.pt"))
        run(engine, 4, 2, first=3)
        assert_same(engine.method.state_dict(), after["whole"]["method"])
        assert_same(state_of(engine).get("optimizers"), after["whole"]["optimizers"])


def compare_all(tiny: Settings, folder: Path) -> None:
    with join() as world:
        for optim in OPTIMISERS:
            compare(tiny, optim, folder, world)


def test_sharded_equals_whole_also_after_a_resume(tiny: Settings, tmp_path: Path) -> None:
    assert finish(start(2, tmp_path, compare_all, tiny, tmp_path), 300) == [0, 0], shown(tmp_path)


def test_one_process_has_all(tiny: Settings) -> None:
    engine = make(settings_of(tiny, OPTIMISERS[0], True))
    assert type(engine.optimizers["students"]) is torch.optim.AdamW


def train_whole(settings: Settings, folder: Path) -> None:
    loop.train(update(settings, {"train": {"iterations": 4}}, "test"), out=folder / "once")


def test_a_run_writes_a_whole_checkpoint(tiny: Settings, tmp_path: Path) -> None:
    """From which one process can go on."""
    constant = {"name": "adamw", "lr": 1e-3, "power": 0}
    change = {"train": {"eval_every": 4, "tensorboard": False, "measured_images": 0}}
    settings = update(settings_of(tiny, constant, True), change, "test")
    assert finish(start(2, tmp_path, train_whole, settings, tmp_path), 300) == [0, 0], shown(
        tmp_path
    )
    saved = checkpoint.load(tmp_path / "once" / "checkpoints" / "last.pt")
    named = make(settings).optimizers["students"].param_groups
    count = sum(len(group["params"]) for group in named)
    assert len(saved["optimizers"]["students"]["state"]) == count
    more = update(settings, {"train": {"iterations": 5}}, "test")
    assert loop.train(more, resume=tmp_path / "once")["iterations"] == 5
