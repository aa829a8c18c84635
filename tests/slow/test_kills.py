"""kill -9 at random moments of a run with contrast: six minutes.

CTT_KILLS sets another number of kills than 30.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ctt import checkpoint, run
from ctt.train.record import read_rows
from tests.slow.programs import call, command, environment

pytestmark = pytest.mark.timeout(0)
KILLS = int(os.environ.get("CTT_KILLS", "30"))
ITERATIONS = 40 * KILLS
LONGEST = 4 * 3600  # seconds of a run, where others keep the machine busy
RUN = (
    "--ratio 24 --data.labeled-pool 60 --data.eval-images 12 --data.batch-size 4 --model.width 8 "
    "--model.features 16 --bank.capacity 16 --bank.start-after 20 --loss.hc 0.2 --loss.lc 0.2 "
    "--train.deterministic --train.threads 1 --train.no-tensorboard --train.log-every 3 "
    f"--train.checkpoint-every 4 --train.eval-every 10 --train.iterations {ITERATIONS}"
)
WALL_CLOCK = ("images_per_second", "input_wait")


def begin(out: Path) -> subprocess.Popen[bytes]:
    """Start the run, or go on with it."""
    there = (out / run.CONFIG).is_file()
    arguments = f"--resume {out}" if there else f"--out {out} {RUN}"
    return subprocess.Popen(
        command("train", arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for_moment(process: subprocess.Popen[bytes], out: Path, rng: random.Random) -> str:
    """Return what the process was doing when the wait ended; empty if it had ended itself.

    A third of the moments lie anywhere in its first ten seconds, a third after it has written some
    rows, however long that takes, and a third in the writing of a file after these.
    """
    kind = rng.choice(("start", "training", "writing"))
    began, metrics = time.monotonic(), out / "metrics.csv"
    before = metrics.stat().st_mtime_ns if metrics.is_file() else 0
    limit = rng.uniform(0, 10)
    changes, wanted = 0, rng.randint(1, 12)
    while process.poll() is None:
        passed = time.monotonic() - began
        if kind == "start":
            if passed > limit:
                return kind
        elif changes < wanted:
            now = metrics.stat().st_mtime_ns if metrics.is_file() else before
            if now != before:
                before, changes = now, changes + 1
                began, limit = time.monotonic(), rng.uniform(0, 0.5)
        elif passed > limit and (kind == "training" or any(out.rglob("*.part"))):
            return kind
        time.sleep(0.0005)
    return ""


def usable(out: Path) -> int:
    """Return after how many iterations a killed run can go on; a broken file is an error."""
    if not run.has_checkpoint(out):
        return 0
    last = out / run.CHECKPOINT
    for path in (last, checkpoint.previous(last)):
        if path.is_file():
            checkpoint.load(path)
    return int(checkpoint.load(last)["iteration"])


def rows(out: Path) -> list[dict[str, str]]:
    found = read_rows(out / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in found]


def test_a_run_killed_again_and_again_ends_as_one_left_alone(tmp_path: Path) -> None:
    rng = random.Random(os.environ.get("CTT_SEED", "0"))
    out, whole = tmp_path / "killed", tmp_path / "whole"
    done = call("train", f"--out {whole} {RUN}", LONGEST)
    assert done.returncode == 0, done.stderr
    kinds: list[str] = []
    while len(kinds) < KILLS:
        process = begin(out)
        moment = wait_for_moment(process, out, rng)
        process.kill()
        _, told = process.communicate()
        if not moment:  # it came to its end, or refused to go on
            assert process.returncode == 0, told.decode()
            shutil.rmtree(out)
            continue
        kinds.append(moment)
        print(f"kill {len(kinds)}, {moment}: goes on after iteration {usable(out)}", flush=True)
    done = call("train", f"--resume {out}" if out.exists() else f"--out {out} {RUN}", LONGEST)
    assert done.returncode == 0, done.stderr
    ends = [checkpoint.load(folder / run.CHECKPOINT) for folder in (whole, out)]
    assert ends[0]["method"].keys() == ends[1]["method"].keys()
    for name, value in ends[0]["method"].items():
        assert torch.equal(value, ends[1]["method"][name]), name
    assert rows(out) == rows(whole)
    assert len(rows(whole)) > ITERATIONS // 3
    assert [*out.rglob("*.part")] == []
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_torchrun_starts_processes_again_that_were_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --max-restarts 2 --no-python"
    again = command("train", f"--out {out} --auto-resume {RUN} --train.iterations 300")
    job = [sys.executable, *torchrun.split(), *again]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(job, env=environment(), stdout=log, stderr=log)
    killed: set[int] = set()
    while process.poll() is None and len(killed) < 2:
        time.sleep(0.5)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        trains = not killed.intersection(map(int, workers)) and run.has_checkpoint(out)
        if trains and usable(out) > 40 * (len(killed) + 1):
            victim = int(workers[len(killed)])  # the first process, then the second
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
    told = (tmp_path / "log").read_text
    assert process.wait(LONGEST) == 0, told()
    assert len(killed) == 2
    assert told().count("going on after iteration") == 2, told()
    assert [int(row["iteration"]) for row in rows(out)][-1] == 300
