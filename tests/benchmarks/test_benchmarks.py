"""The benchmarks measure what they say: statistics, rows, report, and that every way is right."""

import importlib
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

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


def row(way: str, p50: float, shape: str, size: str = "series-n-8") -> report.Row:
    setting = harness.Setting("info_nce", size, shape, "float32", CPU)
    (made,) = harness.rows(setting, {way: [p50]}, {}, None)
    return {name: str(value) for name, value in asdict(made).items()}


def test_the_smallest_size_at_which_another_way_is_faster() -> None:
    small, middle, large = (f"N={n} C=4 V=8 D=16" for n in (64, 128, 1024))
    rows = [
        *(row("cpu", 2, shape) for shape in (large, small, middle)),
        *(row("torch", 1, shape) for shape in (large, small, middle)),  # a backend of ours
        *(row("two matrix products", 1, shape) for shape in (large, small, middle)),
        row("class loop", 3, small),
        row("class loop", 1.5, large),
        row("reference", 1.6, middle),
    ]
    (line,) = report.lost(rows).splitlines()
    assert line.endswith(f"first lost at {middle}, 1.25 times reference")
    assert report.lost(rows[:-2]).endswith("lost at none of 3 sizes")


class StandIn:
    """What tritonbench offers an operator, as far as ours asks."""

    device, dtype = CPU, torch.float32

    def __init__(self, tb_args: object, extra_args: list[str] | None) -> None: ...


def test_every_way_of_the_operator_for_tritonbench_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways: list[str] = []

    def register_benchmark(baseline: bool = False) -> Callable[[Any], Any]:
        return lambda method: ways.append(method.__name__) or method

    def unchanged(**_: str) -> Callable[[Any], Any]:
        return lambda method: method

    module = types.ModuleType("tritonbench.utils.triton_op")
    vars(module).update(
        BenchmarkOperator=StandIn,
        BenchmarkOperatorMetrics=object,
        register_benchmark=register_benchmark,
        register_metric=unchanged,
        register_x_val=unchanged,
    )
    for name in ("tritonbench", "tritonbench.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "benchmarks.tritonbench_operator", raising=False)
    operators = importlib.import_module("benchmarks.tritonbench_operator")
    monkeypatch.delitem(sys.modules, operators.__name__)
    monkeypatch.setattr(operators, "PIXELS", (40,))
    operator = operators.Operator(None, ["--classes", "3", "--capacity", "4", "--dim", "8"])
    (inputs,) = operator.get_input_iter()
    assert operator.get_x_val(inputs) == (40, 3, 4, 8)
    assert operator.flops("ctt", inputs, None) == 4 * 40 * 3 * 4 * 8
    grads = []
    for way in ways:
        inputs[0].grad = None
        operator.get_bwd_fn(getattr(operator, way)(*inputs))()
        grads.append(inputs[0].grad)
    assert len(grads) == 3
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


def test_every_way_of_the_benchmarks_is_right() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"),
            *("--sizes", "tiny", "--seconds", "0", "--no-compile", "--no-record"),
            *("--methods", "cross-teacher,self-training"),
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
        "cross_entropy",
        "two matrix products",
        "_foreach_lerp_",
        "swa_utils",
        "one flat lerp_",
        "plain rendering",
    ):
        assert f"\n{way}  " in done.stdout  # a row of its own: some names begin alike


@pytest.mark.parametrize("arguments", [["--dry-run"], ["results", "nothing"]])
def test_the_run_on_a_gpu_takes_no_other_words(arguments: list[str]) -> None:
    """Nothing is built or written."""
    script = ROOT / "benchmarks" / "on_gpu.sh"
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "targets" in done.stdout + done.stderr  # the parts are named
    assert not any((ROOT / name).exists() for name in arguments)
