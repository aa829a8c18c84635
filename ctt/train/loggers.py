"""Where the numbers of a run go beside metrics.csv: TensorBoard, W&B, MLflow, one of yours."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from ctt.errors import UserError
from ctt.files import as_write_error, atomic_write
from ctt.settings import Settings, to_dict

IDS = "loggers.json"  # names of the run at other places, for when it is resumed
PROJECT = "ctt"  # unless the environment variables of W&B and MLflow name another
PARAMETERS = 50  # that go to MLflow at once
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
Name = Literal["wandb", "mlflow"]
Ending = Literal["finished", "stopped", "failed"]
STATUS: dict[Ending, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Logger(Protocol):
    """Takes the numbers of a run. `ctt.train(loggers=[...])` takes objects of any such class."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Take the numbers of an iteration, under the names of the columns of metrics.csv.

        An iteration with an evaluation comes twice, with other names.
        """

    def close(self) -> None:
        """End, because the run has ended or stopped.

        A logger with an attribute `ending` finds there which of `Ending` it was.
        """


class TensorBoard:
    """Events in the run folder."""

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer: Any = SummaryWriter(str(folder), purge_step=iteration + 1)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            with as_write_error(self.folder):
                self.writer.add_scalar(grouped(name), value, iteration)

    def close(self) -> None:
        with as_write_error(self.folder):
            self.writer.close()


class WeightsAndBiases:
    """A run of W&B in the project that WANDB_PROJECT names; WANDB_MODE=offline stays on disk."""

    ending: Ending = "finished"

    def __init__(self, folder: Path, settings: Settings) -> None:
        import wandb

        name = kept_id(folder, "wandb", lambda: secrets.token_hex(4))
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=folder.name,
            dir=str(folder),
            config=to_dict(settings),
            resume="allow",
        )

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        self.run.log({grouped(name): value for name, value in values.items()}, step=iteration)

    def close(self) -> None:
        self.run.finish(exit_code=int(self.ending != "finished"))


class Mlflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI and in the experiment of MLFLOW_EXPERIMENT_NAME."""

    ending: Ending = "finished"

    def __init__(self, folder: Path, settings: Settings) -> None:
        from mlflow import MlflowClient

        self.client: Any = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self.client.create_experiment(experiment)

        def begin() -> str:
            from mlflow.entities import Param

            run: str = self.client.create_run(place, run_name=folder.name).info.run_id
            flat = [Param(name, str(value)[:500]) for name, value in flattened(to_dict(settings))]
            for first in range(0, len(flat), PARAMETERS):
                self.client.log_batch(run, params=flat[first : first + PARAMETERS])
            return run

        self.run = kept_id(folder, "mlflow", begin)
        self.client.update_run(self.run, status="RUNNING")

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(grouped(name), value, now, iteration)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        self.client.log_batch(self.run, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run, STATUS[self.ending])


def make(settings: Settings, folder: Path, iteration: int) -> list[Logger]:
    """Return the loggers that the settings name.

    Raises:
        UserError: one of them cannot begin.
    """
    loggers: list[Logger] = []
    if settings.train.tensorboard:
        loggers.append(TensorBoard(folder, iteration))
    for name in settings.train.loggers:
        try:
            loggers.append(
                WeightsAndBiases(folder, settings) if name == "wandb" else Mlflow(folder, settings)
            )
        except Exception as error:  # of their clients, of many kinds
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"`train.loggers` {name} cannot begin ({reason}). Mend it, or leave it out; "
                f"`resume` goes on with the run."
            ) from None
    return loggers


def check(settings: Settings) -> None:
    """Refuse loggers whose package is not installed, before a run has a folder.

    Raises:
        UserError: says what to install.
    """
    for name in settings.train.loggers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"`train.loggers` {name} needs the package {PACKAGES[name]}. Install it with: pip "
                f"install 'ctt[{name}]'"
            )


def kept_id(folder: Path, logger: str, new: Callable[[], str]) -> str:
    """Return the name that a run has at another place; a new one where it has none yet."""
    path = folder / IDS
    known: dict[str, str] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if logger not in known:
        known[logger] = new()
        with atomic_write(path) as part:
            part.write_text(json.dumps(known), "utf-8")
    return known[logger]


def grouped(name: str) -> str:
    """Return the name of a column as `group/name`: loss/total, miou/teacher_1, train/lr."""
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("loss", "miou") else f"train/{name}"


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings with dots in their names."""
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        whole = f"{prefix}{name}"
        flat += flattened(value, f"{whole}.") if isinstance(value, dict) else [(whole, value)]
    return flat
