"""The runs of an experiment, where they lie and how far they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ctt import __version__, run
from ctt.errors import UserError
from ctt.experiments import results
from ctt.experiments.results import CURVES, DONE, FAILED, MISSING, Row
from ctt.files import atomic_write, waiting_lock
from ctt.settings import WITHOUT_EFFECT, Settings, to_dict

RUNS = "runs"  # the folder of the runs, beside the tables
SAID = 300  # letters of an error that the table keeps


@dataclass(frozen=True)
class Run:
    """A run of an experiment.

    Attributes:
        share, budget, variant: its place in the table.
        arguments: those of `ctt-train` that make it, without its folder.
        folder: where it is or will be. The name is the hash of the settings, so experiments in one
            folder share their runs.
    """

    experiment: str
    share: str
    budget: str
    variant: str
    arguments: tuple[str, ...]
    settings: Settings
    folder: Path

    @property
    def log(self) -> Path:
        """Return the file of what the run prints."""
        return self.folder.with_suffix(".log")

    @property
    def error(self) -> Path:
        """Return the file with the last words of a run that failed."""
        return self.folder.with_suffix(".failed")

    @property
    def name(self) -> str:
        """Return the run's place in the table, for messages."""
        parts = (self.variant, self.share, self.budget, f"seed {self.settings.seed}")
        return ", ".join(part for part in parts if part)

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of the finished run; None if it is not finished."""
        found = results.read_summary(self.folder / run.SUMMARY)
        return found if found and found.get("settings_hash") == self.folder.name else None

    def is_busy(self) -> bool:
        """Return whether another program trains in its folder right now."""
        if not (self.folder / "checkpoints").is_dir():
            return False
        try:
            with run.lock(self.folder):
                return False
        except UserError:
            return True

    def command(self) -> list[str]:
        """Return the arguments of `ctt-train` that start the run, or go on with it."""
        if (self.folder / run.CONFIG).is_file():  # without a checkpoint it begins from the start
            return ["--resume", str(self.folder)]
        return [*self.arguments, "--out", str(self.folder)]

    def row(self) -> Row:
        """Return its row of the table."""
        summary = self.summary()
        found: Row = {"status": MISSING, "settings_hash": self.folder.name}
        if summary is not None:
            found = results.from_summary(summary)
        elif self.error.is_file():
            found |= {"status": FAILED, "error": self.error.read_text("utf-8", "replace")}
        place = {
            "experiment": self.experiment,
            "dataset": data_name(self.settings),
            "eval_split": self.settings.data.eval_split,
            "share": self.share,
            "budget": self.budget,
            "variant": self.variant,
            "seed": str(self.settings.seed),
            "iterations": str(self.settings.train.iterations),
        }
        return found | place


def data_name(settings: Settings) -> str:
    """Return the name of the dataset, with the set of VOC where it is not the augmented one."""
    classic = settings.dataset == "voc" and settings.data.voc_set == "classic"
    return "voc classic" if classic else settings.dataset


def flat(settings: Settings) -> dict[str, Any]:
    """Return the settings that change a result, but for the seed, by their dotted names."""
    values = to_dict(settings)
    del values["seed"]
    for group, names in WITHOUT_EFFECT.items():
        for name in names:
            del (values[group] if group else values)[name]
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name}.{key}".rstrip("."): item for key, item in inner}
    return found


def split_settings(runs: Sequence[Run]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings that all runs have, and of each run the others."""
    each = [flat(r.settings) for r in runs]
    names = dict.fromkeys(name for settings in each for name in settings)
    shared = {
        name: each[0][name]
        for name in names
        if all(name in s and s[name] == each[0].get(name) for s in each)
    }
    return shared, [{n: v for n, v in s.items() if n not in shared} for s in each]


def write_results(path: Path, runs: Sequence[Run], command: Sequence[str]) -> list[Row]:
    """Write the table, the scores during the runs beside it and, in a YAML file, what all share.

    Sweeps that write the same table at a time wait for each other.

    Args:
        path: the CSV.
        command: that made them.

    Returns:
        the rows of the table.

    Raises:
        UnwritableError: a file cannot be written.
    """
    with waiting_lock(path):
        return _write_results(path, runs, command)


def _write_results(path: Path, runs: Sequence[Run], command: Sequence[str]) -> list[Row]:
    from ctt.train.record import read_rows

    shared, others = split_settings(runs)
    rows, curves = [], []
    for r, own in zip(runs, others, strict=True):
        row = r.row()
        row |= {name: str(value) for name, value in own.items()}
        rows.append(row)
        if row["status"] == DONE:
            metrics = read_rows(r.folder / "metrics.csv")
            row |= results.inside(metrics)
            place = {name: row[name] for name in ("share", "budget", "variant", "seed")}
            curves += [
                {**place, "iteration": str(iteration), "last": f"{value:.2f}"}
                for iteration, value in results.curve(metrics)
            ]
    columns = [*results.COLUMNS, *dict.fromkeys(name for own in others for name in own)]
    results.write(path, rows, columns)
    points = ("share", "budget", "variant", "seed", "iteration", "last")
    results.write(path.with_name(f"{path.stem}{CURVES}"), curves, points)
    told = {"command": list(command), "ctt": __version__, "settings": shared}
    with atomic_write(path.with_suffix(".yaml")) as part:
        part.write_text(yaml.safe_dump(told, sort_keys=False), "utf-8")
    return rows


def unique(runs: Iterable[Run]) -> list[Run]:
    """Return the runs without those that are the same as one before."""
    return list({r.folder: r for r in reversed(list(runs))}.values())[::-1]


def last_words(log: Path, start: int = 0) -> str:
    """Return how a program that failed ended its log: its own message, or the end of a traceback.

    On one line.

    Args:
        start: where in the log the program began.
    """
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - 2**14))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line for line in text.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("ctt-train: ")]
    told = lines[starts[-1] :] if starts else lines[-1:]
    return " ".join(" ".join(told).split())[:SAID]
