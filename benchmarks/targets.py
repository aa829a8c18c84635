"""`python -m benchmarks.targets`: what a GPU must reach, beside what the rows of it show.

Reads the newest rows of benchmarks/results, or of a folder that is given; rows of other devices
than CUDA ones are left out by `--device`, a part of the device's name.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.report import Row, newest, read

OURS = ("cuda", "triton", "chunked", "torch")  # in the order of "auto"
Rows = list[Row]


@dataclass(frozen=True)
class Target:
    """One number that a run must reach.

    Attributes:
        measure: from the rows of one operation, size and dtype; None where a row lacks.
        limit: the most it may be, or the least where `at_least`.
    """

    name: str
    operation: str
    size: str
    dtype: str
    unit: str
    limit: float
    measure: Callable[[Rows], float | None]
    at_least: bool = False

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def of(rows: Rows, *ways: str) -> Row | None:
    """Return the first of the ways that was measured, replayed over cold buffers or else eager."""
    for mode in ("graph", "eager"):
        for way in ways:
            found = [r for r in rows if r["way"] == way and r["mode"] == mode]
            if found:
                return found[-1]
    return None


def over_products(rows: Rows) -> float | None:
    """Return the time over that of the two matrix products, in one mode."""
    ours = of(rows, *OURS[1:])
    if ours is None:
        return None
    products = of([r for r in rows if r["mode"] == ours["mode"]], "two matrix products")
    return None if products is None else float(ours["p50_ms"]) / float(products["p50_ms"])


def percent_of_limit(rows: Rows) -> float | None:
    row = of(rows, *OURS)
    return None if row is None or not row["limit_percent"] else float(row["limit_percent"])


def microseconds(rows: Rows) -> float | None:
    row = of(rows, *OURS)
    return None if row is None else 1000 * float(row["p50_ms"])


def share_of_step(rows: Rows) -> float | None:
    part, whole = of(rows, "contrast, banks and EMA"), of(rows, "whole step")
    if part is None or whole is None:
        return None
    return 100 * float(part["p50_ms"]) / float(whole["p50_ms"])


def times_the_rendering(rows: Rows) -> float | None:
    plain = of(rows, "plain rendering")
    ours = [float(r["p50_ms"]) for r in rows if r["way"].startswith("ctt")]
    return None if plain is None or not ours else float(plain["p50_ms"]) / min(ours)


TARGETS = (
    *(
        Target(
            f"{op}, time over its two products", op, size, "bfloat16", "times", 1.0, over_products
        )
        for op in ("info_nce", "pair_info_nce")
        for size in ("voc-v2", "voc-v3plus")
    ),
    Target(
        "EMA, of the bandwidth of a copy",
        "ema_update_",
        "resnet-101-pairs",
        "float32",
        "%",
        90,
        percent_of_limit,
        at_least=True,
    ),
    Target(
        "selection and push",
        "class_topk + queue_push_",
        "voc-v2",
        "float32",
        "us",
        60,
        microseconds,
    ),
    Target("contrast, banks and EMA in a step", "phases", "voc", "float32", "%", 5, share_of_step),
    Target(
        "step, faster than the published rendering",
        "step",
        "voc",
        "float32",
        "times",
        4,
        times_the_rendering,
        at_least=True,
    ),
)


def table(rows: Rows) -> str:
    """Return a line for each target: what must be reached, what was, and by what device."""
    lines = [f"{'what':42} {'size':18} {'must be':>16} {'is':>12}  verdict"]
    for t in TARGETS:
        asked = (t.operation, t.size, t.dtype)
        mine = [r for r in rows if (r["operation"], r["size"], r["dtype"]) == asked]
        value = t.measure(mine)
        sign = "at least" if t.at_least else "at most"
        wanted = f"{sign} {t.limit:g} {t.unit}"
        shown = "-" if value is None else f"{value:.3g} {t.unit}"
        verdict = "not measured" if value is None else "reached" if t.reached(value) else "MISSED"
        lines.append(f"{t.name:42} {t.size:18} {wanted:>16} {shown:>12}  {verdict}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the .csv files")
    parser.add_argument("--device", default="nvidia", help="part of the device's name")
    arguments = parser.parse_args()
    rows = [r for r in read(arguments.results) if arguments.device.lower() in r["device"].lower()]
    print(table(newest(rows)))


if __name__ == "__main__":
    main()
