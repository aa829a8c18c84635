"""The batches of a run: which images a round draws, in which order, and their loading."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from pathlib import Path

from ctt.data.external_masks import WithMasks
from ctt.data.loader import DrawSampler, ViewDataset, load
from ctt.data.prepare import Prepared
from ctt.data.rare import RareClasses
from ctt.data.views import GeometricView
from ctt.methods.base import Round
from ctt.train.engine import Engine
from ctt.train.plan import Plan
from ctt.train.prefetcher import Batch, DevicePrefetcher
from ctt.train.rounds import KeptLabels, folder_of, images_of


class Streams:
    """Streams of labelled and unlabelled images, opened anew for every round.

    Args:
        folder: of the run.
    """

    def __init__(self, plan: Plan, engine: Engine, folder: Path) -> None:
        self.plan, self.engine, self.folder = plan, engine, folder
        self._opened: list[Generator[Batch]] = []

    def feed(self) -> DevicePrefetcher:
        """Return the batches of the steps that are left of the round; those before it end."""
        self.close()
        lists = self.lists()
        unlabeled = self._unlabeled(lists["unlabeled"]) if "unlabeled" in lists else None
        labeled = self.open("labeled", lists["labeled"])
        return DevicePrefetcher(labeled, unlabeled, self.engine.step.phase)

    def _unlabeled(self, ids: list[str]) -> Iterator[Batch | None]:
        """Yield None for each step that sees labelled images alone, then the unlabelled batches."""
        alone = self.plan.about.steps_without_unlabeled(self.plan.settings)
        yield from itertools.repeat(None, alone - self.engine.iteration)
        yield from self.open("unlabeled", ids)

    def lists(self, number: int | None = None) -> dict[str, list[str]]:
        """Return the images that a round draws its batches from, by the purpose of the draw.

        Args:
            number: of the round; None: that of the next step.
        """
        number = self._round()[0] if number is None else number
        kind = self.engine.rounds.rounds[number]
        lists = {"labeled": self.plan.labeled}
        if self.plan.about.unlabeled and kind.images != "none":
            every = kind.images == "all"
            lists["unlabeled"] = self.plan.unlabeled if every else images_of(self.folder, number)
        return lists

    def open(self, purpose: str, ids: list[str]) -> Generator[Batch]:
        """Return the batches of a list of images, until the end of the round."""
        s, d, engine = self.plan.settings, self.plan.settings.data, self.engine
        dataset, (number, kind) = self.plan.dataset, self._round()
        kept = purpose == "unlabeled" and kind.images == "kept"
        images = Prepared(dataset, d.resize, d.cache)
        if kept:
            images = KeptLabels(dataset, d.resize, d.cache, folder_of(self.folder, number))
        elif purpose == "unlabeled" and self.plan.masks is not None:
            images = WithMasks(dataset, d.resize, d.cache, self.plan.masks)
        view = GeometricView(d.crop, d.scale, d.flip, d.rotation, d.translation, dataset.info.mean)
        labeled = kept or purpose == "labeled" or isinstance(images, WithMasks)
        rare = self._rare(purpose)
        views = ViewDataset(images, ids, view, labeled, s.seed, purpose, rare)
        steps = engine.rounds.starts[number + 1] - engine.iteration
        share = (engine.world.rank, engine.world.size)
        draws = (len(ids), self._batch(purpose), self._first(purpose), steps)
        sampler = DrawSampler(*draws, s.seed, purpose, *share, rare)
        stream = load(views, sampler, d.workers, pin_memory=engine.device.type == "cuda")
        self._opened.append(stream)
        return stream

    def drawn(self, steps: int) -> Iterator[str]:
        """Return a line for each of the last steps and each list: the images of all processes.

        They are of the round that was trained, even if the next step begins another.
        """
        engine, settings = self.engine, self.plan.settings
        for purpose, ids in self.lists(engine.method.round).items():
            images = self._batch(purpose) * engine.world.size
            last = min(steps, self._first(purpose) // images)  # all had so many since a resume
            draws = (len(ids), images, self._first(purpose) - last * images, last)
            sampler = DrawSampler(*draws, settings.seed, purpose, rare=self._rare(purpose))
            for i, batch in enumerate(sampler, engine.iteration - last + 1):
                yield f"iteration {i}, {purpose}: {', '.join(ids[k] for k, _ in batch)}\n"

    def _batch(self, purpose: str) -> int:
        """Return how many images of the list a process takes a step."""
        data = self.plan.settings.data
        return data.batch_size if purpose == "labeled" else data.unlabeled_images

    def _first(self, purpose: str) -> int:
        """Return the number of the draw that the next step begins with, on rank 0.

        It counts images, not steps, so a resumed run may take other numbers of them a step.
        """
        return self.engine.drawn if purpose == "labeled" else self.engine.drawn_unlabeled

    def _rare(self, purpose: str) -> RareClasses | None:
        """Return which draws are made for a class."""
        share, pixels = self.plan.settings.data.rare_crops, self.plan.class_pixels
        if purpose != "labeled" or not share or pixels is None:
            return None
        return RareClasses(pixels, share, self.plan.settings.seed)

    def close(self) -> None:
        """End the processes that load: they ignore SIGTERM, so Python would wait for them."""
        for stream in self._opened:
            stream.close()
        self._opened.clear()

    def _round(self) -> tuple[int, Round]:
        """Return the number and the kind of the round that the next step belongs to."""
        number = self.engine.rounds.at(self.engine.iteration)
        return number, self.engine.rounds.rounds[number]
