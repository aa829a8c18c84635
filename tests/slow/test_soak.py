"""A long run, whose memory, file handles and threads must stay what they are: an hour.

CTT_SOAK_MINUTES sets another time than 60, CTT_SOAK_CSV where the series is written.
"""

import csv
import os
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from tests.slow.programs import command, environment

pytestmark = pytest.mark.timeout(0)
MINUTES = float(os.environ.get("CTT_SOAK_MINUTES", "60"))
SAMPLES = 300  # of the whole time
WARM_UP = 0.2  # share of the time that counts for nothing
MOST = 0.02  # growth from the first to the last fifth of what is left
COLUMNS = ("seconds", "mebibytes", "handles", "threads")
RUN = (
    "--ratio 24 --data.labeled-pool 60 --data.eval-images 12 --data.batch-size 4 --model.width 8 "
    "--model.features 16 --bank.capacity 16 --bank.start-after 20 --data.workers 1 "
    "--train.threads 1 --train.log-every 20 --train.checkpoint-every 100 --train.eval-every 100 "
    "--train.iterations 10000000"
)


def tree(root: int) -> list[int]:
    """Return a process and all that descend from it."""
    children = [int(p) for p in Path(f"/proc/{root}/task/{root}/children").read_text().split()]
    return [root, *(pid for child in children for pid in tree(child))]


def mebibytes(pid: int) -> float:
    """Return the memory of a process that belongs to no file.

    What it has in common with a process that forked from it counts in both: a collection of
    garbage writes to much of that, and would look like growth where shares are counted.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith(("RssAnon:", "RssShmem:"))) / 1024


def sample(process: subprocess.Popen[bytes], began: float) -> dict[str, float]:
    here = Path(f"/proc/{process.pid}")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "mebibytes": round(sum(mebibytes(pid) for pid in tree(process.pid)), 2),
        "handles": len([*(here / "fd").iterdir()]),
        "threads": len([*(here / "task").iterdir()]),
    }


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_nothing_grows(tmp_path: Path) -> None:
    out = tmp_path / "run"
    series = Path(os.environ.get("CTT_SOAK_CSV", tmp_path / "soak.csv"))
    process = subprocess.Popen(
        command("train", f"--out {out} {RUN}"), env=environment(), stdout=subprocess.DEVNULL
    )
    began, found = time.monotonic(), []
    try:
        with series.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            while time.monotonic() - began < 60 * MINUTES:
                time.sleep(60 * MINUTES / SAMPLES)
                try:
                    found.append(sample(process, began))
                except (FileNotFoundError, ProcessLookupError):  # a loader process that just ended
                    assert process.poll() is None, f"it ended with code {process.returncode}"
                    continue
                writer.writerow(found[-1])
                file.flush()
        process.send_signal(signal.SIGTERM)
        assert process.wait(1200) == 130
    finally:
        process.kill()
    kept = [row for row in found if row["seconds"] > WARM_UP * 60 * MINUTES]
    fifth = len(kept) // 5
    print(f"\n{len(found)} samples in {series}")
    grown = {}
    for name in COLUMNS[1:]:
        first, last = (statistics.median(r[name] for r in x) for x in (kept[:fifth], kept[-fifth:]))
        grown[name] = last / first - 1
        print(f"{name}: {first:g} in the first fifth after the warm-up, {last:g} in the last")
    assert max(grown.values()) <= MOST, grown
