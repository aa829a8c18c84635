"""Trained networks, out of a run's folder or a file of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ctt import checkpoint, models, run
from ctt.data.dataset import DatasetInfo
from ctt.data.fit import FITTING
from ctt.errors import UserError
from ctt.files import HUB, is_on_hub, sha256
from ctt.inference.evaluate import ENSEMBLE
from ctt.inference.predict import Predict, mean_of, predictor
from ctt.models.base import SegmentationModel
from ctt.settings import EvalSettings, Settings, update


@dataclass(frozen=True)
class TrainedNetworks:
    """Networks in evaluation mode on the CPU, and where they come from.

    Attributes:
        networks: student_1.. and teacher_1.. of a run, or `network` alone out of a file.
        info: of the dataset they were trained on.
        settings: of the run; where there is only a file its protocol, and else the defaults.
        origin: a phrase that says where the networks come from.
        sha256: of the file that was read.
    """

    networks: dict[str, SegmentationModel]
    info: DatasetInfo
    settings: Settings
    origin: str
    sha256: str

    def names(self) -> list[str]:
        """Return the names of the networks, and `ensemble`, the mean of the teachers'
        probabilities."""
        teachers = any(name.startswith("teacher") for name in self.networks)
        return [*self.networks, *([ENSEMBLE] if teachers else [])]

    def choose(self, names: Sequence[str]) -> TrainedNetworks:
        """Return the same with only the networks that `names` need.

        Raises:
            UserError: no such network.
        """
        for name in names:
            if name not in self.names():
                raise UserError(
                    f"`network` {name}: there is none of that name in {self.origin}. Networks: "
                    f"{', '.join(self.names())}."
                )
        networks = {
            name: network
            for name, network in self.networks.items()
            if name in names or (ENSEMBLE in names and name.startswith("teacher"))
        }
        return replace(self, networks=networks)

    def only(self) -> SegmentationModel:
        """Return the one network, where one was chosen.

        Raises:
            UserError: there are several.
        """
        if len(self.networks) != 1:
            raise UserError(
                f"`network` must name one network here: best, {', '.join(self.networks)}."
            )
        return next(iter(self.networks.values()))

    def predictor(self, device: torch.device, settings: EvalSettings) -> Predict:
        """Return the mean of the networks' probabilities as a function; they move to `device`."""
        networks = [network.to(device) for network in self.networks.values()]
        predict = mean_of([predictor(network, self.info, settings) for network in networks])
        return lambda images: predict(images.to(device))


def load_trained(path: Path, network: str = "") -> TrainedNetworks:
    """Load all networks of the run in the folder `path`, or the one in the file `path`.

    Args:
        network: only this one, `ensemble` for all teachers, or `best` for the one network that the
            run wrote out.

    Raises:
        UserError: there is neither, or its parts do not fit each other, or no such network.
    """
    if is_on_hub(path):
        from ctt.inference.hub import download

        path = download(path.as_posix().removeprefix(HUB))  # on Windows, str has \ for /
    if network == "best" or not run.has_checkpoint(path):
        trained = _of_file(path)
        network = "" if network == "best" else network
    else:
        trained = _of_run(path)
    return trained.choose([network]) if network else trained


def _of_file(path: Path) -> TrainedNetworks:
    weights = path / run.WEIGHTS if path.is_dir() else path
    network, info, note = checkpoint.load_network(weights)
    settings = Settings(dataset=info.name, eval=checkpoint.protocol_of(weights))
    if (path / run.CONFIG).is_file():
        settings = run.read_settings(path, serve=True)
    return TrainedNetworks({"network": network}, info, settings, note, sha256(weights))


def _of_run(folder: Path) -> TrainedNetworks:
    settings = run.read_settings(folder, serve=True)
    saved, broken = checkpoint.load_last(folder / run.CHECKPOINT)
    if settings.data.crop == FITTING:  # position embeddings are for the crop that was found
        data = {"crop": saved["settings"]["data"]["crop"]}
        settings = update(settings, {"data": data}, str(folder / run.CHECKPOINT))
    info = checkpoint.info_of(saved) or checkpoint.load_network(folder / run.WEIGHTS)[1]
    networks: dict[str, SegmentationModel] = {}
    try:
        for name in checkpoint.networks_in(saved):
            k = int(name.partition("_")[2]) - 1
            network = models.build(
                num_classes=len(info.classes), channels=info.channels, **settings.network(k)
            )
            network.load_state_dict(checkpoint.weights_of(saved, name))
            networks[name] = network.eval()
        origin = f"{folder} after {saved['iteration']} iterations"
        origin += f" ({broken})" if broken else ""
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: checkpoint and config.yaml do not fit ({reason}).") from None
    last = folder / run.CHECKPOINT
    read = checkpoint.previous(last) if broken else last
    return TrainedNetworks(networks, info, settings, origin, sha256(read))
