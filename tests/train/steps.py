"""Batches and engines for the tests of training."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from ctt import checkpoint, methods
from ctt.data import views
from ctt.data.dataset import IGNORE
from ctt.data.digits import INFO
from ctt.methods.base import Setup
from ctt.models.base import SegmentationModel
from ctt.settings import Settings, update
from ctt.train.distributed import World
from ctt.train.engine import Engine
from ctt.train.plan import Plan, ready_to_train

Images = tuple[Tensor, Tensor]
T = TypeVar("T")
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


def kept(size: int = 3, seed: int = 1) -> Images:
    """Return images with labels that networks gave them, and their confidence."""
    images, label = batch(size, seed)
    label[:, :2] = IGNORE
    rng = torch.Generator().manual_seed(seed)
    confidence = torch.randint(30, 256, label.shape, generator=rng, dtype=torch.int32)
    return images, label.int() + 256 * confidence


def make(
    settings: Settings,
    pairs: int = 0,
    device: torch.device = CPU,
    world: World | None = None,
) -> Engine:
    """Return an engine for the digits, as with 6 labelled images."""
    about = methods.get(settings.method)

    def finish(network: SegmentationModel) -> SegmentationModel:
        return ready_to_train(network, settings, device)

    teachers = None
    if "teacher" in about.uses:
        teachers = [student(update(settings, {"seed": 99}, "test"))], INFO
    setup = Setup(
        settings, INFO, pairs or about.pairs, 6, finish=finish, finished_teachers=teachers
    )
    return Engine(about.load()(setup), settings, INFO, device, world)


def with_small_critics(settings: Settings) -> Settings:
    """Return settings in which networks that judge predictions are small, if there are any."""
    if not hasattr(settings.options, "critic_width"):
        return settings
    return update(settings, {"options": {"critic_width": 4}}, "test")


def with_teacher(settings: Settings, folder: Path) -> Settings:
    """Return settings with the weights of a network to learn from, if the method wants one."""
    if "teacher" not in methods.get(settings.method).uses:
        return settings
    path = folder / "teacher.safetensors"
    checkpoint.save_network(path, student(settings), INFO, "for the tests")
    return update(settings, {"teacher": path}, "test")


def student(settings: Settings, k: int = 0) -> SegmentationModel:
    return Setup(settings, INFO, k + 1, 6, initialize=False).student(k)


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Train inside in double precision, in which no rounding error decides which of two classes is
    larger."""
    normalize = views.normalize
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for name, m in sys.modules.items() if name.startswith("ctt.")]:
            if getattr(module, "normalize", None) is normalize:
                patch.setattr(module, "normalize", lambda *args: normalize(*args).double())
        build = Plan.build
        patch.setattr(Plan, "build", lambda plan, *arguments: double(build, plan, *arguments))
        yield


def double(build: Callable[..., T], *arguments: Any) -> T:
    """Return what `build` returns, with weights in double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        return build(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)


def beside_labeled(engine: Engine, size: int) -> int:
    """Return how many unlabelled images come with labelled ones: more, where they need not be as
    many."""
    return size if methods.get(engine.settings.method).paired else size + 2


def run(engine: Engine, size: int, steps: int, first: int = 0) -> list[dict[str, Tensor]]:
    """Train on batches of `size` labelled images, of which this process takes its own.

    Returns:
        what each step gives, summed over the processes.
    """
    world, seen = engine.world, []
    beside = beside_labeled(engine, size)
    own, others = (
        slice(world.rank * n // world.size, (world.rank + 1) * n // world.size)
        for n in (size, beside)
    )
    for i in range(first, first + steps):
        images = engine.rounds.rounds[engine.rounds.at(engine.iteration)].images
        packed = images == "kept" or engine.settings.masks.folder is not None
        more = kept(beside, seed=100 + i) if packed else unlabelled(beside, seed=100 + i)
        labeled = [x[own] for x in batch(size, seed=i)]
        unlabeled = None if images == "none" else (more[0][others], more[1][others])
        terms = engine((labeled[0], labeled[1]), unlabeled)
        seen.append({name: world.total(value) for name, value in terms.items()})
    return seen
