"""Several processes that train one run together, as torchrun starts them, for the tests."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.ports import free_port

# the server loads the libraries once, and every process starts from there
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "ctt.train.loop",
        "ctt.data.digits",
        "sklearn.datasets",
        # what the first step and the end of a run import
        "torch._dynamo",
        "torch._inductor.config",
        "torch.utils.tensorboard",
        "matplotlib.pyplot",
    ]
)


def start(
    count: int, folder: Path, body: Callable[..., None], *arguments: Any, daemon: bool = True
) -> list[ForkServerProcess]:
    """Run `body` in processes that find each other; rank r prints to folder/rank-r.txt.

    Args:
        daemon: they end with this process, and can start none themselves.
    """
    folder.mkdir(exist_ok=True)
    port = free_port()
    started = []
    for rank in range(count):
        process = CONTEXT.Process(
            target=_enter, args=(rank, count, port, folder, body, *arguments), daemon=daemon
        )
        process.start()
        started.append(process)
    return started


def _enter(
    rank: int, count: int, port: int, folder: Path, body: Callable[..., None], *arguments: Any
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
    }
    # loader processes start as under torchrun, not from a server of their own
    multiprocessing.set_start_method(None, force=True)
    with (folder / f"rank-{rank}.txt").open("w", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    body(*arguments)


def finish(processes: list[ForkServerProcess], seconds: float = 120) -> list[int | None]:
    """Exit codes; None for a process that does not end."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def shown(folder: Path) -> list[str]:
    """What each rank printed, without the lines by which torch 2.9 tells of its connections."""
    return [
        "".join(line for line in path.read_text().splitlines(True) if not line.startswith("[Gloo]"))
        for path in sorted(folder.glob("rank-*.txt"))
    ]
