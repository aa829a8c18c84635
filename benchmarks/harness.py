"""Timing of several ways to compute one thing, in turns within one run, with memory and limits.

Times of a shared machine drift; ratios between ways that took turns do not. So every round calls
each way once, in a rotated order, and a ratio is taken within a round.
"""

import csv
import ctypes
import datetime
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import ctt
from ctt.device import device_name
from ctt.ops._nvtx import named_range

RESULTS = Path(__file__).parent / "results"
REFERENCE = "reference"
MEBI = 1 << 20

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of benchmarks/results/<device>.csv."""

    date: str
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    ctt: str
    operation: str
    size: str
    shape: str
    dtype: str
    mode: str  # "eager", or "graph": replayed over buffers that together exceed the cache
    way: str
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratio_p20: float  # time of the reference over time of this way, within a round
    ratio_p50: float
    ratio_p80: float
    extra_mib: float | None  # peak memory above what the inputs hold; results included
    limit_percent: float | None  # of the measured limit of the machine


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(
    runs: dict[str, Run], device: torch.device, seconds: float, rounds: tuple[int, int] = (5, 60)
) -> dict[str, list[float]]:
    """Return the milliseconds of each call of each way; at least and at most so many rounds."""
    repeats = {name: _repeats(run, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    end = time.perf_counter() + seconds
    for turn in range(rounds[1]):
        if turn >= rounds[0] and time.perf_counter() > end:
            break
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            with named_range(name, "benchmark"):
                spent = seconds_of(runs[name], device, repeats[name])
            times[name].append(1e3 * spent / repeats[name])
    return times


def _repeats(run: Run, device: torch.device) -> int:
    """Return how many calls in a row take at least two milliseconds; the first call warms up."""
    run()
    once = seconds_of(run, device)
    return max(1, min(1000, round(2e-3 / max(once, 1e-7))))


def seconds_of(run: Run, device: torch.device, repeats: int = 1) -> float:
    """Return the seconds of so many calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return time.perf_counter() - start


def replayed(runs: list[Run], device: torch.device) -> Run | None:
    """Return a CUDA graph that calls `runs`, each on its own buffers; None if none can be recorded.

    With buffers that exceed the second-level cache no call finds its inputs there.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # found out beforehand: a recording that breaks off spoils all later ones of the process
    if not _never_waits(runs[0], stream):
        return None
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.synchronize(device)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    return graph.replay


def _never_waits(run: Run, stream: torch.cuda.Stream) -> bool:
    """Return whether a call does without the host once it is warm."""
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError:
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
            stream.synchronize()
    return True


def copies_beyond_cache(bytes_each: int, device: torch.device) -> int:
    """Return how many sets of buffers are together three times the second-level cache."""
    return max(2, min(64, -(-3 * cache_bytes(device) // max(bytes_each, 1))))


def cache_bytes(device: torch.device) -> int:
    """Return the second-level cache of a GPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def extra_memory(run: Run, device: torch.device) -> float | None:
    """Return MiB at the peak of one call above what was held before it.

    On a GPU as PyTorch's allocator counts it. On Linux the peak of resident memory, which sees
    every allocator; freed memory is handed back to the system first, so that a reuse counts too.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MEBI
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    run()
    return max(_resident("VmHWM") - before, 0) / MEBI


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def copy_bandwidth(device: torch.device, values: int) -> Run:
    """Copy `values` float32 values: 4 bytes read and 4 written for each."""
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


@dataclass(frozen=True)
class Setting:
    """What was measured."""

    operation: str
    size: str
    shape: str
    dtype: str
    device: torch.device
    mode: str = "eager"

    def graph(self) -> "Setting":
        return replace(self, mode="graph")


def divided(times: dict[str, list[float]], calls: int) -> dict[str, list[float]]:
    """Return the times of one call, where `calls` of them were timed at once."""
    return {name: [t / calls for t in spent] for name, spent in times.items()}


def rows(
    setting: Setting,
    times: dict[str, list[float]],
    memory: dict[str, float | None],
    limit_ms: list[float] | None,
    reference: str = REFERENCE,
) -> list[Row]:
    """Return what was measured as rows of the file.

    limit_ms: the time of each round that the machine would need at its limit. reference: the way
    that ratios are taken to."""
    device = setting.device
    base = times.get(reference)
    out = []
    for name, spent in times.items():
        ratios = [b / t for b, t in zip(base, spent, strict=True)] if base else [float("nan")]
        percent = None
        if limit_ms is not None:
            shares = [100 * m / t for m, t in zip(limit_ms, spent, strict=True)]
            percent = round(statistics.median(shares), 1)
        extra = memory.get(name)
        out.append(
            Row(
                datetime.date.today().isoformat(),
                device_name(device),
                torch.get_num_threads(),
                platform.python_version(),
                torch.__version__,
                installed("triton"),
                ctt.__version__,
                setting.operation,
                setting.size,
                setting.shape,
                setting.dtype,
                setting.mode,
                name,
                len(spent),
                *(_short(x) for x in quantiles(spent)),
                *(_short(x) for x in quantiles(ratios)),
                None if extra is None else round(extra, 1),
                percent,
            )
        )
    return out


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def append(new: list[Row]) -> Path:
    """Add the rows to the file of their device."""
    RESULTS.mkdir(exist_ok=True)
    slug = "-".join("".join(c if c.isalnum() else " " for c in new[0].device.lower()).split())
    path = RESULTS / f"{slug}.csv"
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(asdict(row) for row in new)
    return path


def table(some: list[Row]) -> str:
    """Return the rows of one measurement as text."""
    lines = [
        f"{'way':28} {'p20':>9} {'p50':>9} {'p80':>9} ms  "
        f"{'times the reference':>22}  {'extra MiB':>9}  {'% of limit':>10}"
    ]
    for r in sorted(some, key=lambda r: r.p50_ms):
        ratio = f"{r.ratio_p50:.2f} ({r.ratio_p20:.2f}-{r.ratio_p80:.2f})"
        extra = "" if r.extra_mib is None else f"{r.extra_mib:.1f}"
        limit = "" if r.limit_percent is None else f"{r.limit_percent:.0f}"
        lines.append(
            f"{r.way:28} {r.p20_ms:9.3f} {r.p50_ms:9.3f} {r.p80_ms:9.3f}     "
            f"{ratio:>22}  {extra:>9}  {limit:>10}"
        )
    return "\n".join(lines)
