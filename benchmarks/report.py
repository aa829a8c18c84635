"""`python -m benchmarks.report`: a markdown table and plots from the rows of benchmarks/results.

Of several rows for one measurement the newest counts. Plots need matplotlib.
"""

import argparse
import csv
import math
import re
from collections import defaultdict
from pathlib import Path

from benchmarks.harness import REFERENCE, RESULTS
from ctt.ops._registry import BACKENDS

Row = dict[str, str]
SERIES = "series-"
LIMIT = "two matrix products"
HEAD = "| way | p20 ms | p50 ms | p80 ms | times the reference (p20-p80) | extra MiB | % of limit |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the .csv files")
    parser.add_argument("--no-plots", action="store_true")
    arguments = parser.parse_args()
    rows = newest(read(arguments.results))
    print(markdown(rows))
    print(lost(rows))
    if not arguments.no_plots:
        for path in plots(rows, arguments.results):
            print(f"wrote {path}")


def read(folder: Path) -> list[Row]:
    rows: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def newest(rows: list[Row]) -> list[Row]:
    """Return the last row of each measurement: files grow at their end."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        kept[(*group(row), row["way"])] = row
    return list(kept.values())


def group(row: Row) -> tuple[str, ...]:
    names = ("device", "threads", "operation", "size", "shape", "dtype", "mode")
    return tuple(row[n] for n in names)


def markdown(rows: list[Row]) -> str:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[group(row)].append(row)
    parts = []
    for (device, threads, operation, size, shape, dtype, mode), members in groups.items():
        last = members[-1]
        parts += [
            f"**`{operation}`**, {size} ({shape}, {dtype}, {mode}): {device}, {threads} threads, "
            f"torch {last['torch']}, {last['date']}\n",
            HEAD,
            "|---|---|---|---|---|---|---|",
            *(_line(r) for r in sorted(members, key=lambda r: float(r["p50_ms"]))),
            "",
        ]
    return "\n".join(parts)


def lost(rows: list[Row]) -> str:
    """Return a line for each device and operation: the smallest size at which another way is faster
    than ours, that is the backend which "auto" takes there."""
    sizes: dict[tuple[str, ...], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if re.fullmatch(r"N=\d+ C=\d+ V=\d+ D=\d+", row["shape"]):
            measured = ("device", "threads", "operation", "dtype", "mode")
            sizes[tuple(row[n] for n in measured)][row["shape"]].append(row)
    lines = []
    for (device, threads, operation, dtype, mode), by_shape in sizes.items():
        what = f"{operation}, {dtype}, {mode}, on {device} with {threads} threads:"
        for shape in sorted(by_shape, key=_work):
            ours, peer = _fastest(by_shape[shape])
            if ours and peer and float(peer["p50_ms"]) < float(ours["p50_ms"]):
                factor = float(ours["p50_ms"]) / float(peer["p50_ms"])
                lines.append(f"{what} first lost at {shape}, {factor:.2f} times {peer['way']}")
                break
        else:
            lines.append(f"{what} lost at none of {len(by_shape)} sizes")
    return "\n".join(lines)


def _work(shape: str) -> int:
    return math.prod(int(n) for n in re.findall(r"\d+", shape))


def _fastest(rows: list[Row]) -> tuple[Row | None, Row | None]:
    """Return ours, and the fastest of the ways that are not ours."""
    by_way = {row["way"]: row for row in rows}
    ours = next((by_way[b] for b in BACKENDS if b != REFERENCE and b in by_way), None)
    others = [r for way, r in by_way.items() if way == REFERENCE or way not in (*BACKENDS, LIMIT)]
    return ours, min(others, key=lambda r: float(r["p50_ms"]), default=None)


def _line(r: Row) -> str:
    ratio = f"{r['ratio_p50']} ({r['ratio_p20']}-{r['ratio_p80']})"
    cells = (r["way"], r["p20_ms"], r["p50_ms"], r["p80_ms"], ratio, r["extra_mib"])
    return f"| {' | '.join((*cells, r['limit_percent']))} |"


def plots(rows: list[Row], folder: Path) -> list[Path]:
    """Draw cost against N, V or C for each device, operation and letter, on logarithmic axes."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plots")
        return []
    matplotlib.use("Agg")
    series: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["size"].startswith(SERIES):
            letter = row["size"].removeprefix(SERIES).partition("-")[0]
            key = (row["device"], row["operation"], row["dtype"], row["mode"], letter)
            series[key].append(row)
    return [_plot(key, members, folder) for key, members in series.items()]


def _plot(key: tuple[str, ...], rows: list[Row], folder: Path) -> Path:
    from matplotlib import pyplot as plt

    device, operation, dtype, mode, letter = key
    lines: dict[str, list[tuple[float, Row]]] = defaultdict(list)
    for row in rows:
        lines[row["way"]].append((float(row["size"].rpartition("-")[2]), row))
    figure, axes = plt.subplots(figsize=(6, 4))
    for way, points in lines.items():
        points.sort(key=lambda p: p[0])
        x = [p for p, _ in points]
        low, middle, high = (
            [float(r[q]) for _, r in points] for q in ("p20_ms", "p50_ms", "p80_ms")
        )
        axes.plot(x, middle, marker="o", label=way)
        axes.fill_between(x, low, high, alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel=letter.upper(), ylabel="milliseconds")
    axes.set_title(f"{operation}, {dtype}, {mode}\n{device}", fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    words = "".join(c if c.isalnum() else " " for c in "-".join(key).lower()).split()
    path = folder / f"{'-'.join(words)}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()
