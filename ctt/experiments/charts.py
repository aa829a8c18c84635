"""Charts of experiments: scores during training, by labelled images and by cost."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctt.experiments import results
from ctt.experiments.catalog import EQUAL_ITERATIONS
from ctt.experiments.results import Row, mean, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 10  # after which Matplotlib begins anew
FORMS = (("o", "-"), ("s", "--"), ("^", ":"))  # marker and line, of each ten lines of a chart


@dataclass(frozen=True)
class Chart:
    """A picture and what it shows.

    Attributes:
        file: its bytes.
        kind: of the file, as pages name it.
    """

    title: str
    file: bytes
    kind: str = "svg+xml"


def draw(title: str, across: str, body: Any, log: bool = False) -> Chart:
    """Return a chart of mIoU that `body` draws on its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "ctt"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        body(axes)
        axes.set(title=title, xlabel=across, ylabel="mIoU, %")
        if log:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return Chart(title, file.getvalue())


def lines(axes: Axes, rows: Sequence[Row], across: str) -> None:
    """Draw a line for each variant through its means, with the standard deviation over seeds."""
    by_variant = results.groups(rows, "variant")
    for number, ((variant,), own) in enumerate(by_variant.items()):
        points = []
        for at in results.groups(own, "share", "budget").values():
            x, y = mean(at, across), numbers(at, "last")
            if x is not None and y:
                deviation = statistics.stdev(y) if len(y) > 1 else 0.0
                points.append((x, sum(y) / len(y), deviation))
        if points:
            xs, ys, bars = zip(*sorted(points), strict=True)
            marker, dash = FORMS[number // COLOURS % len(FORMS)]
            axes.errorbar(
                xs, ys, bars, marker=marker, linestyle=dash, markersize=4, capsize=3, label=variant
            )


def score_by_share(rows: Sequence[Row]) -> Chart:
    """Return the chart of scores over the number of labelled images."""
    first = [row for row in rows if row["budget"] in ("", EQUAL_ITERATIONS)]

    def body(axes: Axes) -> None:
        lines(axes, first, "labeled")
        axes.set_xscale("log")
        counts = sorted({int(value) for value in numbers(first, "labeled")})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()

    return draw("mIoU and labelled images", "labelled images", body)


def score_by_cost(rows: Sequence[Row], column: str, place: str = "") -> Chart:
    """Return the chart of scores over the cost of training, counted or measured.

    Args:
        rows: of one share of labels. place: that share, for the title.
    """
    costly = [row for row in rows if row["budget"] != EQUAL_ITERATIONS]
    of = {"forwards": "forward passes of images", "seconds": "seconds of training"}[column]
    return draw(f"mIoU and {of}{place}", of, lambda axes: lines(axes, costly, column), log=True)


def curves(file: Path) -> list[Chart]:
    """Return a chart of the scores during the runs for each share and budget; none without a file.

    Raises:
        UserError: the file cannot be read.
    """
    if not file.is_file():
        return []
    found = []
    points = results.read_table(file, ("share", "budget", "variant", "iteration", "last"))
    for (share, budget), own in results.groups(points, "share", "budget").items():

        def body(axes: Axes, own: Sequence[Row] = own) -> None:
            by_variant = results.groups(own, "variant")
            for number, ((variant,), some) in enumerate(by_variant.items()):
                steps = {
                    int(i): numbers(at, "last")
                    for (i,), at in results.groups(some, "iteration").items()
                }
                means = [sum(values) / len(values) for values in steps.values()]
                _, dash = FORMS[number // COLOURS % len(FORMS)]
                axes.plot(list(steps), means, linestyle=dash, label=variant)

        place = ", ".join(part for part in (f"--ratio {share}", budget) if part)
        found.append(draw(f"mIoU during training, {place}", "iteration", body))
    return found
