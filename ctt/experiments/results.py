"""Rows of an experiment: a run each, in one CSV, and what follows from them."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctt.errors import UserError
from ctt.files import atomic_write

CURVES = "-curves.csv"  # how the file of the scores during the runs ends
IOU = "iou "  # how the columns of classes begin
DONE, FAILED, MISSING = "done", "failed", "missing"
LEVEL = 0.95  # of the confidence intervals
BACKWARD = 2  # a backward pass takes about twice the time of a forward pass

# The columns that every table has. `last` is the mean over the teachers, of methods without
# teachers over the students, after the last iteration; `best` that of the best network at its best,
# which is chosen by the same score and so optimistic.
COLUMNS = (
    "experiment",
    "dataset",
    "eval_split",
    "share",
    "budget",
    "variant",
    "seed",
    "status",
    "last",
    "ensemble",
    "best",
    "labeled",
    "unlabeled",
    "iterations",
    "images",
    "trained",
    "untrained",
    "forwards",
    "seconds",
    "processes",
    "device",
    "settings_hash",
    "ctt",
    "torch",
    "python",
    "error",
)
# what the last evaluation saw inside the run, see `ctt.train.measures.names`
INSIDE = (
    *("confident_pixels", "pseudo_label_accuracy", "confident_accuracy"),
    *("teachers_agree", "teachers_apart", "students_agree", "weights_apart"),
)
NUMBERS = (
    *("last", "ensemble", "best", "labeled"),
    *("iteration", "iterations", "forwards", "seconds"),
    *INSIDE,
)

Row = dict[str, str]


def from_summary(summary: Mapping[str, Any]) -> Row:
    """Return the columns that the summary of a finished run gives."""
    miou, forwards = summary["miou"], summary["forwards"]
    networks = {name: value for name, value in miou.items() if name != "ensemble"}
    best = summary["best"] or {}
    found = {
        "eval_split": summary["eval_split"],
        "status": DONE,
        "last": _single(networks),
        "ensemble": miou.get("ensemble"),
        "best": best.get("miou"),
        **networks,
        **class_iou(summary["class_iou"]),
        "labeled": summary["labeled"],
        "unlabeled": summary["unlabeled"],
        "iterations": summary["iterations"],
        "images": summary["images_drawn"],
        **forwards,
        "forwards": (1 + BACKWARD) * forwards["trained"] + forwards["untrained"],
        "seconds": summary["seconds"],
        "processes": summary.get("processes"),
        "device": summary["device"],
        "settings_hash": summary["settings_hash"],
        **summary["versions"],
    }
    return {name: "" if value is None else str(value) for name, value in found.items()}


def class_iou(networks: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return a column for each class: its IoU, the mean over the networks that `last` is of."""
    classes = dict.fromkeys(name for scores in networks.values() for name in scores)
    return {
        f"{IOU}{name}": _single(
            {network: scores[name] for network, scores in networks.items() if network != "ensemble"}
        )
        for name in classes
    }


def _single(networks: Mapping[str, float | None]) -> float | None:
    """Return the mean over the teachers, or over the students where there are none."""
    teachers = [value for name, value in networks.items() if name.startswith("teacher")]
    values = [value for value in teachers or networks.values() if value is not None]
    return round(statistics.mean(values), 2) if values else None


def read_summary(path: Path) -> dict[str, Any] | None:
    """Return what a summary.json holds; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def curve(metrics: Iterable[Mapping[str, str]]) -> list[tuple[int, float]]:
    """Return iteration and `last` of each evaluation in the rows of a metrics.csv."""
    points = []
    for row in metrics:
        scores = {
            name.removeprefix("miou_"): float(value) if _is_number(value) else None
            for name, value in row.items()
            if name.startswith("miou_") and name != "miou_ensemble"
        }
        if (value := _single(scores)) is not None:
            points.append((int(row["iteration"]), value))
    return points


def inside(metrics: Iterable[Mapping[str, str]]) -> Row:
    """Return what the last evaluation measured inside a run, by the rows of its metrics.csv.

    A number that this evaluation lacks is left out, even if an earlier one had it.
    """
    last: Row = {}
    for row in metrics:
        found = {name: row[name] for name in INSIDE if _is_number(row.get(name, ""))}
        last = found or last
    return {name: f"{float(value):.3f}" for name, value in last.items()}


def write(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Write rows with the columns given first, and after them what else the rows have.

    Raises:
        UnwritableError: the file cannot be written.
    """
    others = [name for row in rows for name in row if name not in columns]
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *dict.fromkeys(others)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """Return the rows of a table of runs.

    Raises:
        UserError: it cannot be read, or is another table.
    """
    needed = ("experiment", "dataset", "variant", "share", "budget", "seed", "status", "last")
    return read_table(path, needed)


def read_table(path: Path, needed: Sequence[str]) -> list[Row]:
    """Return the rows of a file that `write` has written.

    Args:
        needed: columns that it must have.

    Raises:
        UserError: it cannot be read, or is another table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [{k: v or "" for k, v in row.items() if k is not None} for row in reader]
            columns = reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: the results cannot be read ({error}).") from None
    if missing := [name for name in needed if name not in columns]:
        raise UserError(
            f"{path}: this is no table of ctt-sweep, because the column {missing[0]} is missing."
        )
    for number, row in enumerate(rows, 2):
        for name in (*NUMBERS, *(name for name in row if name.startswith(IOU))):
            if row.get(name) and not _is_number(row[name]):
                raise UserError(f"{path}, line {number}: {name} is no number: {row[name]!r}.")
    return rows


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def numbers(rows: Iterable[Row], column: str) -> list[float]:
    """Return the values of a column, without the empty ones."""
    return [float(row[column]) for row in rows if row.get(column)]


def mean(rows: Sequence[Row], column: str) -> float | None:
    """Return the mean of a column; None where it is empty."""
    values = numbers(rows, column)
    return sum(values) / len(values) if values else None


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean and, of several values, the standard deviation; empty for none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


@dataclass(frozen=True)
class Difference:
    """Mean of the differences between two variants, run by run with the same seed.

    Attributes:
        low, high: bounds of the confidence interval by Student's t; None of fewer than two runs.
    """

    mean: float
    pairs: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.1f} (one seed)"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(rows: Sequence[Row], others: Sequence[Row], column: str) -> Difference | None:
    """Return by how much `rows` are above `others`; None where no seed is in both."""
    theirs = {row["seed"]: row for row in others if row.get(column)}
    leads = [
        float(row[column]) - float(theirs[row["seed"]][column])
        for row in rows
        if row.get(column) and row["seed"] in theirs
    ]
    if not leads:
        return None
    mean = statistics.mean(leads)
    if len(leads) == 1:
        return Difference(mean, 1)
    from scipy.stats import t

    reach = t.ppf((1 + LEVEL) / 2, len(leads) - 1) * statistics.stdev(leads) / len(leads) ** 0.5
    return Difference(mean, len(leads), mean - reach, mean + reach)


def groups(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Return the rows that have the same values in these columns, in the order of the first one."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in columns), []).append(row)
    return found
