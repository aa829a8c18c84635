"""Batches and engines for the tests of training."""

import torch
from torch import Tensor

from ctt import methods
from ctt.data.digits import INFO
from ctt.data.source import IGNORE
from ctt.methods.base import Setup
from ctt.models.base import SegmentationModel
from ctt.settings import Settings
from ctt.train.distributed import World
from ctt.train.engine import Engine
from ctt.train.plan import finished

Images = tuple[Tensor, Tensor]
CPU = torch.device("cpu")


def batch(size: int = 3, seed: int = 0, classes: int = 11) -> Images:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 24, 24), generator=rng, dtype=torch.uint8)
    blocks = torch.randint(0, classes, (size, 3, 3), generator=rng, dtype=torch.uint8)
    return images, blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)


def unlabelled(size: int = 3, seed: int = 1) -> Images:
    images, _ = batch(size, seed)
    padding = torch.zeros(size, 24, 24, dtype=torch.uint8)
    padding[:, :2] = IGNORE
    return images, padding


def make(
    settings: Settings,
    pairs: int = 0,
    device: torch.device = CPU,
    world: World | None = None,
) -> Engine:
    """Return an engine for the digits, as with 6 labelled images."""
    about = methods.get(settings.method)

    def finish(network: SegmentationModel) -> SegmentationModel:
        return finished(network, settings, device)

    setup = Setup(settings, INFO, pairs or about.pairs, 6, finish=finish)
    return Engine(about.load()(setup), settings, INFO, device, world)


def student(settings: Settings, k: int = 0) -> SegmentationModel:
    return Setup(settings, INFO, k + 1, 6, initialize=False).student(k)
