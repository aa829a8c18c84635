"""What a run leaves behind: metrics.csv, what loggers make of its numbers, curves.png."""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from ctt.errors import UserError
from ctt.files import as_write_error, atomic_write
from ctt.inference.evaluate import names_of_scores
from ctt.inference.figures import save_figure
from ctt.methods.base import Method
from ctt.train.loggers import Ending, Logger


class Recorder:
    """Appends rows to metrics.csv, and hands the numbers to loggers.

    `measured` are columns beside those of the method, and `warn` tells of a logger that fails. A
    run that `evaluates` before another step writes the scores of `iteration` again.

    Going on from a checkpoint drops the rows after `iteration`: they will be written again. Columns
    of a term that is switched off by then stay, after the others.
    """

    def __init__(
        self,
        folder: Path,
        method: Method,
        iteration: int,
        loggers: Iterable[Logger] = (),
        measured: Iterable[str] = (),
        warn: Callable[[str], object] = print,
        evaluates: bool = False,
    ) -> None:
        self.loggers, self.warn = list(loggers), warn
        self.path = folder / "metrics.csv"
        self.columns = [
            "iteration",
            "lr",
            *(f"loss_{term}" for term in (*method.terms, "total")),
            *method.logged,
            "images_per_second",
            "input_wait",
            *(f"miou_{name}" for name in names_of_scores(method.networks())),
            *measured,
        ]
        kept = [
            row
            for row in read_rows(self.path)
            # 1 and nothing more is what a crash left of 1200
            if int(row["iteration"]) <= iteration and any(list(row.values())[1:])
        ]
        if evaluates:
            scores = [c for c in self.columns if c.startswith("miou_")]
            kept = [
                row
                for row in kept
                if int(row["iteration"]) < iteration or not any(map(row.get, scores))
            ]
        if kept:
            self.columns += [c for c in kept[0] if c not in self.columns]
        with atomic_write(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def write(self, iteration: int, values: dict[str, float]) -> None:
        """Write one row; columns that `values` does not name stay empty."""
        with as_write_error(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            row = {name: f"{value:.6g}" for name, value in values.items()}
            csv.DictWriter(file, self.columns).writerow({"iteration": iteration, **row})
        self._tell(lambda logger: logger.log(iteration, values))

    def close(self, ending: Ending) -> None:
        """End the loggers, as the steps of the run have ended."""
        for logger in self.loggers:
            if hasattr(logger, "ending"):
                logger.ending = ending
        self._tell(lambda logger: logger.close())

    def _tell(self, what: Callable[[Logger], None]) -> None:
        """Do the same with every logger; one that fails is left out from then on.

        A server that does not answer must not end a run of days; a full disk is reported at once.
        """
        for logger in list(self.loggers):
            try:
                what(logger)
            except UserError:
                raise
            except Exception as error:
                self.loggers.remove(logger)
                reason = str(error).partition("\n")[0] or type(error).__name__
                self.warn(
                    f"Warning: {type(logger).__name__} takes no more numbers of this run "
                    f"({reason}). metrics.csv has them all."
                )


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv; none if there is no such file.

    Broken bytes, as of a disk that lost power, end no run: a value that is no number is empty, and
    a row without the number of its iteration, as of a line that a crash cut short, is left out.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("iteration") or "").isdecimal()]
    return [  # None: the name of what stands beyond the last column
        {name: text if is_number(text) else "" for name, text in row.items() if name is not None}
        for row in rows
    ]


def is_number(text: str | None) -> bool:
    """Return whether a value of metrics.csv can be read."""
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def draw_curves(folder: Path) -> None:
    """Draw curves.png: the terms of the objective and the mIoU of every network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_rows(folder / "metrics.csv")
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, prefix, title in (
        (axes[0], "loss_", "loss, summed over the students"),
        (axes[1], "miou_", "mIoU on the evaluation images, %"),
    ):
        for column in (name for name in rows[0] if name.startswith(prefix)):
            points = [(int(r["iteration"]), float(r[column])) for r in rows if r[column]]
            if points:
                x, y = zip(*points, strict=True)
                dashed = "--" if "student" in column else "-"
                axis.plot(x, y, dashed, label=column.removeprefix(prefix), linewidth=1.2)
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    axes[0].set_yscale("symlog", linthresh=0.01)
    save_figure(figure, folder / "curves.png")
