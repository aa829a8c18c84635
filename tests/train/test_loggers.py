"""Loggers of a run, without a network."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ctt
from ctt.errors import UserError
from ctt.settings import Settings, TrainSettings
from ctt.train import loggers
from ctt.train.engine import Engine
from tests.conftest import leave_out_figures
from tests.data.trees import write_folder
from tests.train.test_api import TINY


class Own:
    """A logger of a user, which may break."""

    ending: str

    def __init__(self, breaks: bool = False) -> None:
        self.breaks, self.closed = breaks, False
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        if self.breaks:
            raise ConnectionError("no server")
        self.rows.append((iteration, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_own_loggers_take_what_metrics_csv_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "data", labeled=3, unlabeled=2, size=(20, 24))
    own, broken = Own(), Own(breaks=True)
    values: dict[str, Any] = {**TINY, "train": {**TINY["train"], "iterations": 2, "log_every": 1}}
    values["train"]["tensorboard"] = True
    done = ctt.train(
        dataset="folder", data_root=data, out=tmp_path / "run", loggers=[own, broken], **values
    )
    assert [iteration for iteration, _ in own.rows][-2:] == [2, 2]
    assert own.closed
    merged: dict[str, float] = {}
    for _, row in own.rows:
        merged |= row
    assert merged["miou_teacher_1"] == pytest.approx(done["miou"]["teacher_1"], abs=0.01)
    assert {"loss_total", "lr", "images_per_second"} <= set(merged)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Warning: Own takes no more numbers of this run (no server)") == 1
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert {"loss/total", "miou/teacher_1", "train/lr"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("error", "ending"),
    [(KeyboardInterrupt(), "stopped"), (UserError("Training diverged."), "failed")],
)
def test_loggers_know_how_a_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, ending: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    data = write_folder(tmp_path / "data", labeled=3, unlabeled=2, size=(20, 24))
    own = Own()
    own.ending = ""
    arguments: dict[str, Any] = {**TINY, "dataset": "folder", "data_root": data, "loggers": [own]}
    leave_out_figures(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "__call__", fail)
        with pytest.raises(type(error)):
            ctt.train(**arguments, out=tmp_path / "run")
    assert own.ending == ending
    assert own.closed
    ctt.train(**arguments, out=tmp_path / "other", **{"train.iterations": 1})
    assert own.ending == "finished"


def settings(*names: Any) -> Settings:
    return Settings(train=TrainSettings(tensorboard=False, loggers=names))


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen: list[dict[str, Any]] = []
    for iteration in (1, 2):  # the second as a resumed run begins
        (logger,) = loggers.make(settings("wandb"), tmp_path, iteration)
        assert isinstance(logger, loggers.WeightsAndBiases)
        monkeypatch.setattr(
            logger.run, "log", lambda values, step: seen.append({**values, "s": step})
        )
        logger.log(iteration, {"loss_total": 3.0, "miou_teacher_1": math.nan})
        assert logger.run.config["model"]["name"] == "small"
        assert logger.run.id == json.loads((tmp_path / "loggers.json").read_text())["wandb"]
        logger.close()
    assert [row["s"] for row in seen] == [1, 2]
    assert seen[0]["loss/total"] == 3
    assert list(tmp_path.glob("wandb/offline-run-*"))
    assert wandb.run is None


def test_mlflow_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(None)
    for iteration in (1, 2):
        (logger,) = loggers.make(settings("mlflow"), tmp_path, iteration)
        assert isinstance(logger, loggers.Mlflow)
        logger.log(iteration, {"loss_total": 3.0 + iteration, "miou_teacher_1": math.nan})
        logger.close()
    run = logger.client.get_run(logger.run)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.name"] == "small"
    assert len(run.data.params) > 100
    assert run.data.metrics == {"loss/total": 5}
    assert [m.step for m in logger.client.get_metric_history(logger.run, "loss/total")] == [1, 2]
    for ending, status in (("stopped", "KILLED"), ("failed", "FAILED")):
        logger.ending = ending  # type: ignore[assignment]
        logger.close()
        assert logger.client.get_run(logger.run).info.status == status


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(UserError, match=rf"pip install 'ctt\[{name}\]'"):
            loggers.check(settings(name))
    loggers.check(settings())


def test_a_logger_that_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        class MlflowClient:
            def __init__(self) -> None:
                raise ConnectionError("no server\nand more")

    monkeypatch.setitem(sys.modules, "mlflow", Module)
    with pytest.raises(UserError, match=r"mlflow cannot begin \(no server\)"):
        loggers.make(settings("mlflow"), tmp_path, 0)
