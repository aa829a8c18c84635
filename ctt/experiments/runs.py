"""The runs of an experiment, where they lie and how far they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctt import run
from ctt.errors import UserError
from ctt.experiments import results
from ctt.experiments.results import FAILED, MISSING, Row
from ctt.settings import WITHOUT_EFFECT, Settings

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
    def job(self) -> Path:
        """Return the file with the number of its job on a Slurm cluster."""
        return self.folder.with_suffix(".job")

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
            # the data may have moved since, and this may be another machine
            return ["--resume", str(self.folder), *options_without_effect(self.arguments)]
        # a list of commands may be worked through again after some of them were stopped
        return [*self.arguments, "--out", str(self.folder), "--auto-resume"]

    def obstacle(self) -> str | None:
        """Return why the run can neither go on nor begin; None if it can."""
        if run.has_checkpoint(self.folder) or not (self.folder / run.SUMMARY).is_file():
            return None
        return (
            f"{self.folder} has the results of other settings, but no checkpoint to go on from, "
            f"and would be overwritten. Move it away."
        )

    def last_error(self) -> str | None:
        """Return why the run failed; None if it did not, or if a program tries it again."""
        try:
            return self.error.read_text("utf-8", "replace")
        except FileNotFoundError:
            return None

    def row(self) -> Row:
        """Return its row of the table."""
        summary = self.summary()
        found: Row = {"status": MISSING, "settings_hash": self.folder.name}
        if summary is not None:
            found = results.from_summary(summary)
        elif (error := self.last_error()) is not None:
            found |= {"status": FAILED, "error": error}
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


def options_without_effect(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the options of `ctt-train` that do not change what a run computes, with their values,
    such as where the data lies and which device computes."""
    names = {
        f"{group}.{name}".lstrip(".") for group, names in WITHOUT_EFFECT.items() for name in names
    }
    keep = False
    for text in arguments:
        if text.startswith("--"):
            keep = option_name(text) in names
        if keep:
            yield text


def option_name(text: str) -> str:
    """Return the name of the setting of an option such as --train.no-tensorboard or --seed=3."""
    return text.partition("=")[0].removeprefix("--").replace("-", "_").replace(".no_", ".")


def data_name(settings: Settings) -> str:
    """Return the name of the dataset, with the set of VOC where it is not the augmented one."""
    classic = settings.dataset == "voc" and settings.data.voc_set == "classic"
    return "voc classic" if classic else settings.dataset


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
