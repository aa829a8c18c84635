"""Rounds of a run: between two of them networks label images, which the next one learns from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctt.data.dataset import Dataset, DatasetInfo
from ctt.data.loader import read_in_order, reraise_user_errors
from ctt.data.masks import read_mask
from ctt.data.packed import pack
from ctt.data.pictures import open_picture
from ctt.data.prepare import Prepared
from ctt.data.split import write_list
from ctt.errors import UserError
from ctt.files import as_write_error
from ctt.inference.predict import Predict, out_of_memory_as, predictor
from ctt.inference.render import palette_image, save_png
from ctt.methods.base import Round, round_starts
from ctt.models.base import SegmentationModel
from ctt.run import read_names
from ctt.settings import EvalSettings, Settings
from ctt.train.distributed import World

LIST = "images.txt"  # of a round, in its folder
TOO_LARGE_TO_LABEL = (
    "There is not enough memory to label an unlabelled image between two rounds, which takes the "
    "whole image. Resume the run with `train.device` cpu or on a GPU with more memory, or start a "
    "new run with a smaller `data.resize`."
)


class Rounds:
    """When the rounds of a run begin and end, in iterations.

    Args:
        rounds: in their order.
        total: iterations of the run.

    Raises:
        UserError: a round would have no iteration.
    """

    def __init__(self, rounds: Sequence[Round], total: int) -> None:
        self.rounds = rounds
        self.starts = round_starts(rounds, total)  # and the end of the last
        if any(end <= start for start, end in itertools.pairwise(self.starts)):
            raise UserError(
                f"`train.iterations` {total} are too few for the {len(rounds)} rounds of this "
                f"method. Give more, or other shares of the run by `options`."
            )

    def at(self, iteration: int) -> int:
        """Return the number, from 0, of the round that the step after `iteration` belongs to."""
        begun = [r for r, start in enumerate(self.starts[:-1]) if start <= iteration]
        return max(begun)

    def schedule(self, iteration: int) -> tuple[int, int]:
        """Return the first iteration of the learning-rate schedule in use, and its length."""
        r = self.at(iteration)
        fresh = [i for i, kind in enumerate(self.rounds) if i == 0 or kind.restart]
        first = max(i for i in fresh if i <= r)
        later = [i for i in fresh if i > r]
        return self.starts[first], self.starts[later[0] if later else -1] - self.starts[first]


def stretches(starts: Sequence[int], stage: Callable[[int], int]) -> Iterator[tuple[int, int, int]]:
    """Yield the parts of a run whose steps are of one round and stage: the number of the round, the
    first iteration, and that after the last.

    Args:
        starts: see `round_starts`.
        stage: of the method, see `Method.stage`.
    """
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        for _, within in itertools.groupby(range(start, end), stage):
            first, *rest = within
            yield number, first, first + len(rest) + 1


class KeptLabels(Prepared):
    """The images of a round, with the labels that networks gave them.

    Args:
        folder: of the round, in the run folder.
    """

    def __init__(
        self, dataset: Dataset, size: tuple[int, int] | None, cache: Path | None, folder: Path
    ) -> None:
        super().__init__(dataset, size, cache)
        self.folder = folder

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the image (3, H, W), and its label and confidence as `pack` does: (H, W)."""
        label, confidence = (
            torch.from_numpy(read_mask(path).values.astype(np.int32))
            for path in paths(self.folder, name)
        )
        return self.image(name), pack(label, confidence)


def paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the files of the label and of the confidence of an image."""
    return folder / "labels" / f"{name}.png", folder / "confidence" / f"{name}.png"


class Labeling:
    """The `ctt.methods.base.Labeler` of the engine."""

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset,
        unlabeled: list[str],
        folder: Path,
        number: int,
        device: torch.device,
        world: World,
        watch: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.settings, self.unlabeled, self.device, self.world = settings, unlabeled, device, world
        self.watch = watch  # called with the number of labelled images and that of all
        self.dataset = Prepared(dataset, settings.data.resize, settings.data.cache)
        self.info: DatasetInfo = dataset.info
        self.folder, self.before = folder_of(folder, number), folder_of(folder, number - 1)
        self.names: list[str] = []
        listed = (self.before / LIST).is_file()
        self.used = images_of(folder, number - 1) if listed else []

    def probabilities(
        self, networks: Sequence[SegmentationModel], names: Sequence[str], settings: EvalSettings
    ) -> Iterator[tuple[str, list[Tensor]]]:
        own = names[self.world.rank :: self.world.size]
        predicts: list[Predict] = [predictor(net, self.info, settings) for net in networks]
        training = [net.training for net in networks]
        for net in networks:
            net.eval()
        images = reraise_user_errors(
            read_in_order(self.dataset.image, own, self.settings.data.workers)
        )
        for done, (name, image) in enumerate(zip(own, images, strict=True), start=1):
            batch = image[None].to(self.device)
            with out_of_memory_as(TOO_LARGE_TO_LABEL):
                given = [predict(batch)[0] for predict in predicts]
            if batch.is_floating_point():
                given = [p.masked_fill_(batch[0].isnan().any(dim=0), math.nan) for p in given]
            yield name, given
            self.watch(done, len(own))
        for net, mode in zip(networks, training, strict=True):
            net.train(mode)

    def keep(self, name: str, label: Tensor, confidence: Tensor) -> None:
        own, sure = paths(self.folder, name)
        _save(palette_image(label, self.info), own)
        level = (255 * confidence.nan_to_num(0).clamp(0, 1)).round().to(torch.uint8).cpu()
        _save(Image.fromarray(level.numpy()), sure)

    def carry(self, names: Sequence[str]) -> None:
        for name in names[self.world.rank :: self.world.size]:  # two must not write one file
            for new, old in zip(paths(self.folder, name), paths(self.before, name), strict=True):
                with open_picture(old) as picture:
                    _save(picture.copy(), new)

    def total(self, values: Tensor) -> Tensor:
        return self.world.total(values)

    def use(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def finish(self) -> None:
        """Write the list of the images, after all processes have written their labels."""
        self.world.wait()
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_list(self.folder / LIST, self.names)
        self.world.wait()


def _save(picture: Image.Image, path: Path) -> None:
    with as_write_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_png(picture, path)


def folder_of(run: Path, number: int) -> Path:
    """Return the folder of a round."""
    return run / "rounds" / str(number)


def images_of(run: Path, number: int) -> list[str]:
    """Return the images that a round learns from.

    Raises:
        UserError: the round's files are gone.
    """
    path = folder_of(run, number) / LIST
    if not path.is_file():
        raise UserError(
            f"{path} is missing, so the run cannot go on in its round {number}. Restore the folder "
            f"{path.parent} (every process must see the same files), or start a new run."
        )
    return read_names(path)
