"""The benchmarks measure what they say: statistics, rows, report, and that every way is right."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, report

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def some_rows(size: str = "series-n-8", factor: float = 1) -> list[harness.Row]:
    setting = harness.Setting("op", size, "N=8", "float32", CPU)
    times = {"reference": [4.0, 6.0, 8.0], "fast": [2.0 * factor, 2.0 * factor, 4.0 * factor]}
    return harness.rows(setting, times, {"fast": 1.25}, [1.0, 1.0, 1.0])


def test_ratios_are_taken_within_a_round() -> None:
    reference, fast = some_rows()
    assert (reference.ratio_p20, reference.ratio_p80) == (1, 1)
    assert fast.ratio_p50 == 2  # of 2, 3 and 2
    assert (fast.p50_ms, fast.limit_percent, fast.extra_mib) == (2, 50, 1.2)
    assert reference.extra_mib is None


def test_ways_take_turns() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) or sum(range(200_000)) for name in "ab"}
    times = harness.time_in_turns(runs, CPU, seconds=0, rounds=(3, 9))
    assert [len(t) for t in times.values()] == [3, 3]
    assert min(min(t) for t in times.values()) > 0


def test_memory_of_a_call() -> None:
    extra = harness.extra_memory(lambda: torch.ones(8 << 20), CPU)  # 32 MiB
    if extra is None:
        pytest.skip("no peak of memory on this system")
    assert 28 < extra < 60


def test_rows_append_and_the_newest_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.append(some_rows())
    assert harness.append(some_rows(factor=2)) == path
    harness.append(some_rows("series-n-16", factor=3))
    rows = report.read(tmp_path)
    assert len(rows) == 6
    kept = report.newest(rows)
    assert len(kept) == 4
    text = report.markdown(kept)
    assert "| fast | 4.0 | 4.0 |" in text
    assert "| fast | 2.0 |" not in text
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["report", "--results", str(tmp_path)])
    report.main()
    assert "wrote" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_every_way_of_the_benchmarks_is_right() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"),
            *("--sizes", "tiny", "--seconds", "0", "--no-compile", "--no-record"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for way in (
        "class loop",
        "class loop as published",
        "class loop, pairwise cosines",
        "two matrix products",
        "_foreach_lerp_",
        "swa_utils",
        "one flat lerp_",
        "plain rendering",
    ):
        assert f"\n{way}  " in done.stdout  # a row of its own: some names begin alike
