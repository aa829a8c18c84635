"""Trained networks, out of a run's folder or a file of weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ctt import methods
from ctt.data.source import DatasetInfo
from ctt.errors import UserError
from ctt.models.base import SegmentationModel
from ctt.train import checkpoint, run
from ctt.train.settings import Settings
from ctt.train.state import TrainState


@dataclass(frozen=True)
class Trained:
    """Networks in evaluation mode on the CPU, and where they come from.

    Attributes:
        networks: student_1.. and teacher_1.. of a run, or `network` alone out of a file.
        info: of the data set they were trained on.
        settings: of the run; the defaults where there is only a file.
        origin: in words. sha256: of the file that was read.
    """

    networks: dict[str, SegmentationModel]
    info: DatasetInfo
    settings: Settings
    origin: str
    sha256: str


def load_trained(path: Path) -> Trained:
    """All networks of the run in the folder `path`, or the one in the file `path`.

    Raises:
        UserError: there is neither, or its parts do not fit each other.
    """
    return _of_run(path) if (path / run.CHECKPOINT).is_file() else _of_file(find_weights(path))


def find_weights(path: Path) -> Path:
    """The file of weights that `path`, such a file or the folder of a run, stands for."""
    return path / run.WEIGHTS if path.is_dir() else path


def _of_file(path: Path) -> Trained:
    network, info, note = checkpoint.load_network(path)
    return Trained({"network": network}, info, Settings(dataset=info.name), note, sha256(path))


def _of_run(folder: Path) -> Trained:
    _, info, _ = checkpoint.load_network(folder / run.WEIGHTS)
    settings = run.read_settings(folder)
    saved = checkpoint.load(folder / run.CHECKPOINT)
    pairs = settings.pairs or methods.get(settings.method).default_pairs
    cpu = torch.device("cpu")
    state = TrainState(settings, pairs, len(info.classes), cpu, initialize=False)
    try:
        state.load_state_dict(saved)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: checkpoint and config.yaml do not fit ({reason}).") from None
    networks = {name: network.eval() for name, network in state.networks().items()}
    origin = f"{folder} after {state.iteration} iterations"
    return Trained(networks, info, settings, origin, sha256(folder / run.CHECKPOINT))


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
