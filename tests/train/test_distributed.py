"""Several processes on the CPU that train one run together."""

import copy
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import get_worker_info

from ctt import checkpoint, run
from ctt.cli import train as program
from ctt.cli.common import run_program
from ctt.errors import UserError
from ctt.inference import evaluate
from ctt.settings import Settings, update
from ctt.train import distributed, loop
from ctt.train.distributed import VARIABLES, World, join, of_this_attempt
from ctt.train.engine import Engine
from tests.conftest import leave_out_figures
from tests.train import steps
from tests.train.processes import finish, shown, start
from tests.train.steps import exactly, make

EVERYTHING: list[dict[str, Any]] = [
    {"views": {"mix": "cutmix"}, "loss": {"confidence_weight": "none"}},
    {
        "views": {"mix": "classmix"},
        "loss": {
            "confidence_weight": "uniform",
            "confidence_threshold": 0.2,
            "contrast_reduction": "mean",
        },
        "bank": {"per_image": True},
    },
]


def record_steps(settings: Settings, folder: Path) -> None:
    """Train in double precision, where no rounding error decides which of two classes is larger."""
    seen: list[dict[str, float]] = []
    last: list[Engine] = []

    def call(self: Engine, *batches: Any) -> dict[str, Tensor]:
        terms = Engine.__call__(self, *batches)
        seen.append({name: float(self.world.total(value)) for name, value in terms.items()})
        last[:] = [self]
        return terms

    class Recorded(Engine):
        __call__ = call

    with exactly(), pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch)
        patch.setattr(loop, "Engine", Recorded)
        loop.train(settings, out=folder / "run")
    state = {"seen": seen, "method": last[0].method.state_dict()}
    torch.save(state, folder / f"rank-{last[0].world.rank}.pt")


@pytest.mark.parametrize("change", EVERYTHING)
def test_two_processes_equal_one_with_twice_the_batch(
    tiny: Settings, tmp_path: Path, change: dict[str, Any]
) -> None:
    common = {
        "model": {"sync_batch_norm": True},
        "train": {"iterations": 20, "eval_every": 20, "tensorboard": False},
    }
    settings = update(update(tiny, common, "test"), change, "test")
    both = start(2, tmp_path / "two", record_steps, settings, tmp_path / "two")
    (tmp_path / "one").mkdir()
    record_steps(update(settings, {"data": {"batch_size": 6}}, "test"), tmp_path / "one")
    assert finish(both) == [0, 0], shown(tmp_path / "two")
    one = torch.load(tmp_path / "one" / "rank-0.pt")
    first, second = (torch.load(tmp_path / "two" / f"rank-{r}.pt") for r in (0, 1))
    assert len(one["seen"]) == 20
    for terms in ("ct", "hc", "lc"):
        assert sum(step[terms] for step in one["seen"]) > 0
    for expected, step in zip(one["seen"], first["seen"], strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-9)
    for name, expected in one["method"].items():
        mine, other = first["method"][name], second["method"][name]
        assert torch.equal(mine, other), name
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6, msg=name)
    summaries = [json.loads((tmp_path / n / "run" / "summary.json").read_text()) for n in EITHER]
    assert summaries[0]["miou"] == summaries[1]["miou"]
    assert [s["processes"] for s in summaries] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "two" / "run").iterdir()) == sorted(
        p.name for p in (tmp_path / "one" / "run").iterdir()
    )
    assert shown(tmp_path / "two")[1] == ""


EITHER = ("one", "two")


def keep_state(settings: Settings, folder: Path) -> None:
    """Train, and write what this process ends with."""
    states: list[Any] = []

    class Kept(Engine):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            states.append((self, self.world.rank))

    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch)
        patch.setattr(loop, "Engine", Kept)
        loop.train(settings, out=folder / "run")
    state, rank = states[0]
    torch.save(state.state_dict(), folder / f"rank-{rank}.pt")


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices")


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_processes_end_alike(tiny: Settings, tmp_path: Path, sync: bool, device: str) -> None:
    """The gradients of the parts are summed once, and running statistics are shared."""
    train = {"iterations": 3, "eval_every": 3, "accumulate": 2, "tensorboard": False}
    change = {
        "data": {"batch_size": 4},
        "model": {"sync_batch_norm": sync},
        "train": {**train, "amp": "bf16", "device": device, "deterministic": False},
    }
    both = start(2, tmp_path, keep_state, update(tiny, change, "test"), tmp_path)
    assert finish(both) == [0, 0], shown(tmp_path)
    first, second = (torch.load(tmp_path / f"rank-{r}.pt") for r in (0, 1))
    for name, value in first["method"].items():
        assert torch.equal(value, second["method"][name]), name
    assert first["drawn"] == 3 * 2 * 4


def train_and_resume(settings: Settings, folder: Path) -> None:
    """Train three steps, and the last two of them again from the state after the first."""
    with join() as world:
        whole, resumed = (make(settings, world=world) for _ in range(2))
        steps.run(whole, 3, 1)
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        for engine in (whole, resumed):
            steps.run(engine, 3, 2, first=1)
        torch.save((whole.state_dict(), resumed.state_dict()), folder / f"ends-{world.rank}.pt")


def test_three_processes_go_on_to_equal_weights(tiny: Settings, tmp_path: Path) -> None:
    """Of three summands the order decides the rounding; of two it does not."""
    three = start(3, tmp_path, train_and_resume, tiny, tmp_path)
    assert finish(three) == [0] * 3, shown(tmp_path)
    for rank in range(3):
        whole, resumed = torch.load(tmp_path / f"ends-{rank}.pt")
        for name, value in whole["method"].items():
            assert torch.equal(value, resumed["method"][name]), name


def roll_and_write(folder: Path) -> None:
    with join() as world:
        own = torch.arange(16).view(2, 2, 2, 2) + 16 * world.rank
        own = own.to(memory_format=torch.channels_last)
        torch.save(world.roll(own), folder / f"rolled-{world.rank}.pt")


def test_a_joined_batch_is_rolled_from_process_to_process(tmp_path: Path) -> None:
    """Of two processes each is the other's neighbour on both sides; of three it is not."""
    assert finish(start(3, tmp_path, roll_and_write, tmp_path)) == [0] * 3, shown(tmp_path)
    rolled = torch.cat([torch.load(tmp_path / f"rolled-{rank}.pt") for rank in range(3)])
    assert torch.equal(rolled, torch.arange(48).view(6, 2, 2, 2).roll(1, dims=0))


def command_line(arguments: str) -> None:
    sys.argv = ["ctt-train", *shlex.split(arguments)]
    program.main()


QUICK = (
    "--ratio 6 --data.labeled-pool 24 --data.eval-images 6 --data.batch-size 2 --model.width 4 "
    "--model.features 8 --train.threads 1 --train.log-every 1 --train.checkpoint-every 1 "
    "--train.iterations 100000 --train.eval-every 100000 --train.no-tensorboard"
)


def wait_for_rows(out: Path, rows: int, processes: list[Any]) -> None:
    deadline = time.monotonic() + 120
    metrics = out / "metrics.csv"
    while not metrics.exists() or metrics.read_text().count("\n") < rows:
        assert all(p.is_alive() for p in processes)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def resume_own(arguments: str, folder: Path) -> None:
    """Resume the run in the folder that this process's machine has."""
    os.chdir(folder / f"machine-{os.environ['RANK']}")
    command_line(arguments)


def test_processes_that_see_other_checkpoints_of_a_run_do_not_train_it(
    tiny: Settings, tmp_path: Path
) -> None:
    out, log = tmp_path / "machine-1" / "run", tmp_path / "log"
    change = {"train": {"iterations": 1, "tensorboard": False}}
    loop.train(update(tiny, change, "test"), out=out)
    shutil.copytree(out.parent, tmp_path / "machine-0")
    change["train"]["iterations"] = 2
    loop.train(update(tiny, change, "test"), resume=tmp_path / "machine-0" / "run")
    arguments = "--resume run --train.iterations 3"
    assert finish(start(2, log, resume_own, arguments, tmp_path)) == [2, 2], shown(log)
    told = [" ".join(text.split()) for text in shown(log)]
    assert "run: process 1 of 2 looks there for a checkpoint to go on from" in told[1]
    assert "finds the checkpoint after iteration 1, and the first process finds the c" in told[1]
    assert "ctt-train:" not in told[0]


def test_a_lost_process_ends_the_run_which_goes_on_with_another_number(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    both = start(2, log, command_line, f"{QUICK} --out {out}")
    wait_for_rows(out, 4, both)
    both[1].kill()
    assert finish(both[:1]) == [2]
    told = shown(log)[0]
    assert "Another process of this run has ended" in told
    assert "Traceback" not in told
    saved = checkpoint.load(out / run.CHECKPOINT)
    assert saved["drawn"] == 4 * saved["iteration"]
    total = saved["iteration"] + 2
    settings = update(run.read_settings(out), {"train": {"iterations": total}}, "test")
    assert loop.train(settings, resume=out)["iterations"] == total
    assert checkpoint.load(out / run.CHECKPOINT)["drawn"] == saved["drawn"] + 2 * 2


def test_the_loss_of_the_first_process_which_all_meet_at_ends_the_others(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    both = start(2, log, command_line, f"{QUICK} --out {out}")
    wait_for_rows(out, 4, both)
    both[0].kill()
    assert finish(both[1:]) == [2]
    told = shown(log)[1]
    assert told.count("Another process of this run has ended") == 1
    assert "Traceback" not in told
    assert checkpoint.load(out / run.CHECKPOINT)["iteration"] >= 1


read_pair = evaluate.read_pair


def dying_pair(*arguments: Any) -> Any:
    """Read an image and its label, in no process of the rank that is to lose one."""
    rank, where = os.environ["LOSE"].split()
    if os.environ["RANK"] == rank and (where == "here" or get_worker_info() is not None):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_pair(*arguments)


def die_evaluating(arguments: str, lose: str) -> None:
    """Lose a process of the run, or one that loads for it, in the first evaluation."""
    os.environ["LOSE"] = lose
    evaluate.read_pair = dying_pair
    command_line(arguments)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("loads", [False, True])
def test_a_process_lost_in_the_evaluation_ends_all(tmp_path: Path, rank: int, loads: bool) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = f"{QUICK} --train.eval-every 2 --data.workers {int(loads)} --out {out}"
    lose = f"{rank} {'loader' if loads else 'here'}"
    both = start(2, log, die_evaluating, arguments, lose, daemon=not loads)
    codes = finish(both)
    assert codes[1 - rank] == 2, shown(log)
    assert codes[rank] == (2 if loads else -signal.SIGKILL)
    texts = shown(log)
    said = "A process that loads images has ended" if loads else "Another process of this run has"
    assert said in texts[rank if loads else 1 - rank]
    for told in texts:  # the one that the others meet at may be gone before they can ask it
        assert told.count("ctt-train:") <= 1
        assert "Traceback" not in told


def test_all_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    both = start(2, log, command_line, f"{QUICK} --out {out}")
    wait_for_rows(out, 3, both)
    assert both[1].pid is not None
    os.kill(both[1].pid, signal.SIGTERM)
    assert finish(both) == [130, 130], shown(log)
    iteration = checkpoint.load(out / run.CHECKPOINT)["iteration"]
    first, second = shown(log)
    assert f"Stopped after iteration {iteration}" in first
    assert second == ""


save, leave = checkpoint.save, World.leave


def leave_late(arguments: str, folder: Path) -> None:
    """Train with a checkpoint that takes long, and note which process leaves before it is there."""

    def slow(*parts: Any) -> None:
        time.sleep(1)
        save(*parts)

    def noted(world: World) -> None:
        there = (folder / "run" / run.CHECKPOINT).exists()
        (folder / f"left-{world.rank}.txt").write_text(str(there))
        leave(world)

    checkpoint.save, World.leave = slow, noted  # type: ignore[method-assign]
    command_line(arguments)


def test_no_process_leaves_before_the_last_checkpoint_is_written(tmp_path: Path) -> None:
    """Torchrun ends the others as soon as one has gone."""
    out, log = tmp_path / "run", tmp_path / "log"
    rarely = QUICK.replace("checkpoint-every 1 ", "checkpoint-every 100000 ")
    both = start(2, log, leave_late, f"{rarely} --out {out}", tmp_path)
    wait_for_rows(out, 3, both)
    assert both[0].pid is not None
    os.kill(both[0].pid, signal.SIGTERM)
    assert finish(both) == [130, 130], shown(log)
    assert [(tmp_path / f"left-{r}.txt").read_text() for r in (0, 1)] == ["True", "True"]


def one_fails(message: str) -> None:
    def body() -> int:
        with join() as world:
            if world.rank == 1:
                raise UserError(message)
            world.total(torch.ones(3))
        return 0

    run_program("ctt-train", body)


def test_an_error_of_one_process_ends_all_with_one_paragraph(tmp_path: Path) -> None:
    assert finish(start(3, tmp_path, one_fails, "The image x.png is broken.")) == [2, 2, 2]
    assert shown(tmp_path) == ["", "ctt-train: The image x.png is broken.\n", ""]


def test_a_rank_that_is_left_in_the_environment_silences_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        command_line("--loss.tau-hc -1")
    assert "--loss.tau-hc must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_variable_of_torchrun_that_is_no_number_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "two")
    with pytest.raises(SystemExit, match="2"):
        command_line("--dry-run")
    assert f"ctt-train: The environment variable {name} is 'two'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--loss.tau-hc -1", "--loss.nonsense 3", "--ratio 5000"])
def test_bad_arguments_are_told_once(tmp_path: Path, arguments: str) -> None:
    assert finish(start(2, tmp_path, command_line, arguments)) == [2, 2]
    told = [text for text in shown(tmp_path) if text]
    assert len(told) == 1
    assert "Traceback" not in told[0]


def test_a_process_that_finds_no_others_names_what_torchrun_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for size in ("2", "two"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with (
            pytest.raises(UserError, match=rf"^WORLD_SIZE is {size}, .*MASTER_ADDR"),
            join(),
        ):
            pass


def test_a_process_that_others_do_not_answer_ends_with_a_paragraph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        values = ("0", "2", "127.0.0.1", str(taken.getsockname()[1]))
        for name, value in zip(VARIABLES, values, strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"^WORLD_SIZE is 2, .*EADDRINUSE"), join():
            pass


def test_processes_that_are_restarted_find_nothing_of_those_that_have_ended() -> None:
    """As of torchrun --max-restarts, which keeps the store."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        for attempt in range(3):
            if attempt == 1:  # one that was killed before the others had come
                store.set("here/2", "killed")
            parts = list(threads.map(lambda rank: of_this_attempt(store, rank, 3), range(3)))
            assert not any(part.check(["address"]) for part in parts)
            parts[0].set("address", str(attempt))
            assert all(part.get("address") == str(attempt).encode() for part in parts)


def test_a_process_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="process 1 of 2 has not come"):
        of_this_attempt(dist.HashStore(), 0, 2)


def test_processes_that_see_different_folders_of_a_run_do_not_begin_it(tmp_path: Path) -> None:
    """The first one finds a run to go on with, the other one none."""
    for machine in ("machine-0", "machine-1"):
        (tmp_path / machine).mkdir()
    alone = f"{QUICK} --out {tmp_path / 'machine-0' / 'run'} --train.iterations 1"
    assert finish(start(1, tmp_path / "first", command_line, alone)) == [0]
    log, again = tmp_path / "log", f"{QUICK} --out run --auto-resume --train.iterations 2"
    assert finish(start(2, log, resume_own, again, tmp_path)) == [2, 2], shown(log)
    told = " ".join(shown(log)[1].split())
    assert "ctt-train: run: process 1 of 2 looks there for a checkpoint to go on from" in told
    assert "finds none, and the first process finds the checkpoint after iteration 1." in told


def train_among_others(settings: Settings, folder: Path) -> None:
    """Train where the program itself has joined its processes, with and without the variables."""
    dist.init_process_group("gloo")
    with pytest.raises(UserError, match=r"initialised .* with 2 processes.*destroy_process_group"):
        loop.train(settings, out=folder / "run")
    for name in VARIABLES:
        os.environ.pop(name)
    with pytest.raises(UserError, match=r"initialised .* with 2 processes.*destroy_process_group"):
        loop.train(settings, out=folder / "run")


def test_processes_that_have_joined_already_are_told_so(tiny: Settings, tmp_path: Path) -> None:
    """Each would train a run of its own, whose banks would wait for those of the others."""
    assert finish(start(2, tmp_path, train_among_others, tiny, tmp_path)) == [0, 0], shown(tmp_path)
    assert not (tmp_path / "run").exists()
