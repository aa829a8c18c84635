"""Trains several runs at a time on this machine; they can be resumed whatever stops them."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ctt import run
from ctt.errors import UserError
from ctt.experiments.runs import Run, last_words
from ctt.train.signals import interrupt_flag

PROGRAM = (sys.executable, "-c", "from ctt.cli.train import main; main()")
POLL = 0.2  # seconds between looks at the processes
INTERRUPTED = 130  # exit code of `ctt-train` after Ctrl-C


Place = tuple[str, ...]
"""Where a run computes: arguments of `ctt-train` for one of the jobs at a time."""


def places(jobs: int, given: Sequence[str]) -> list[Place]:
    """Return a place for each job: its share of the cores, and a GPU in turn where there are some.

    Args:
        given: the user's own options, which are left as they are.
    """
    import torch

    named = {text.partition("=")[0] for text in given}
    threads = max(1, torch.get_num_threads() // jobs)
    found = []
    for number in range(jobs):
        arguments: list[str] = []
        if "--train.threads" not in named:
            arguments += ["--train.threads", str(threads)]
        if "--train.device" not in named and torch.cuda.device_count() > 1:
            arguments += ["--train.device", f"cuda:{number % torch.cuda.device_count()}"]
        found.append(tuple(arguments))
    return found


@dataclass(frozen=True)
class Job:
    """A run that is being trained.

    Attributes:
        said: letters that its log had before.
    """

    run: Run
    process: subprocess.Popen[bytes]
    place: Place
    said: int


def start(r: Run, place: Place) -> Job | None:
    """Start a run, or go on with it; None if another program is at it.

    It is in a session of its own, so that Ctrl-C on the terminal reaches it once, through this
    program.

    Raises:
        UserError: it can neither begin nor go on.
    """
    r.folder.parent.mkdir(parents=True, exist_ok=True)
    claim = claimed(r)
    if claim is None:
        return None
    try:
        if (why := r.obstacle()) is not None:
            r.error.write_text(why, "utf-8")
            raise UserError(f"{r.name}: {why}")
        r.error.unlink(missing_ok=True)
        fresh = not run.has_checkpoint(r.folder)
        if fresh and (r.folder / run.CONFIG).is_file():
            shutil.rmtree(r.folder)  # stopped before its first checkpoint
        with r.log.open("wb" if fresh else "ab") as log:
            said = log.tell()
            process = subprocess.Popen(
                [*PROGRAM, *r.command(), *place],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(claim,),
            )
    finally:
        os.close(claim)
    return Job(r, process, place, said)


def claimed(r: Run) -> int | None:
    """Return a lock on a run, or None if another program has it.

    The lock is an open file, and lasts until the last process that has it open ends: the run's own
    process, though this program may be killed before.
    """
    claim = os.open(r.folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(claim)
        return None
    except OSError:
        pass  # a file system without locks
    if r.is_busy():
        os.close(claim)
        return None
    return claim


def finish(r: Run, code: int, said: int = 0) -> bool:
    """Return whether a run is finished, and keep why it failed, if it did.

    Args:
        code: with which its program ended; below 0, the signal that killed it.
        said: letters of its log that are of earlier tries.
    """
    if code == 0 and r.summary() is not None:
        return True
    if code not in (INTERRUPTED, -signal.SIGINT):
        r.error.write_text(reason(r, code, said), "utf-8")
    return False


def reason(r: Run, code: int, said: int) -> str:
    """Return why the program of a run ended, see `finish`."""
    if code == 0:
        return (
            f"There is no {run.SUMMARY} of these settings in {r.folder}, though the program "
            f"ended well. Remove this folder to train the run anew."
        )
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = ", as systems do when memory is short" if -code == signal.SIGKILL else ""
        return f"The program was killed ({name}){why}."
    return last_words(r.log, said) or f"The program ended with code {code}."


def train_all(
    runs: Iterable[Run], at: Sequence[Place], done: Callable[[Run, bool], object]
) -> bool:
    """Train runs, as many at a time as there are places; a run that fails stops no other.

    A run that another program is training is left to it, and waited for in the end.

    Args:
        done: called with each run and whether it is finished.

    Returns:
        whether all were tried; otherwise the user has asked to stop. Those in progress have then
        written checkpoints.
    """
    waiting, free = deque(runs), deque(at)
    active: list[Job] = []
    asked = False
    with interrupt_flag() as interrupted:
        try:
            while active or (waiting and not interrupted):
                for _ in range(0 if interrupted else len(waiting)):
                    if not free:
                        break
                    r = waiting.popleft()
                    if r.summary() is not None:  # another program has trained it meanwhile
                        done(r, True)
                        continue
                    try:
                        job = start(r, free[0])
                    except UserError:
                        done(r, False)
                        continue
                    if job is not None:
                        active.append(job)
                        free.popleft()
                    else:
                        waiting.append(r)
                if interrupted and not asked:
                    asked = True
                    for job in active:
                        job.process.send_signal(signal.SIGINT)
                for job in [job for job in active if job.process.poll() is not None]:
                    active.remove(job)
                    free.append(job.place)
                    done(job.run, finish(job.run, job.process.returncode, job.said))
                time.sleep(POLL)
        except Exception:
            for job in active:
                job.process.send_signal(signal.SIGINT)  # they write checkpoints
            for job in active:
                job.process.wait()
            raise
        finally:  # a second Ctrl-C
            for job in active:
                job.process.kill()
                job.process.wait()
    return not interrupted


def train_one(r: Run, given: Sequence[str]) -> None:
    """Train a run in this process's place, as a job of a cluster.

    Raises:
        UserError: it failed; the message is what it said last.
    """
    place = places(1, given)[0]
    while r.summary() is None:
        job = start(r, place)
        if job is None:
            time.sleep(POLL)
        elif not finish(r, job.process.wait(), job.said):
            raise UserError(f"{r.name}: {r.row().get('error') or 'it was interrupted.'}")
