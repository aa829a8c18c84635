"""How long a run takes, from the time of a few steps."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from math import inf
from pathlib import Path

import torch

from ctt.inference.predict import is_out_of_memory
from ctt.train.distributed import World
from ctt.train.engine import Engine
from ctt.train.memory import ACTIVATIONS, total_memory
from ctt.train.plan import Plan
from ctt.train.rounds import Labeling, stretches
from ctt.train.streams import Streams

FEW = 2  # labelled images of a step that is timed where a whole one takes long
STEPS = 3  # timed, of which the first warms up
LONG = 2.0  # seconds of a step of few images from which on no whole one is timed
ROOM = 0.5  # share of the memory that the timing may take; others may hold the rest
UNITS = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def seconds_of_step(plan: Plan, parts: dict[str, int], done: int = 0) -> float | None:
    """Return the seconds of a training step with its images, without evaluation.

    Trains networks of its own. Where a step of a few images takes long, or that of the whole batch
    much memory, the latter is worked out from the former. Steps with and without unlabelled images,
    or with and without a term that begins later, are timed apart and count as often as they come.

    Args:
        parts: the bytes that a step takes, see `estimate`.
        done: iterations that the run has behind it.

    Returns:
        None if the device has too little memory.
    """
    images, memory = plan.settings.data.batch_size, total_memory(plan.device)
    room = inf if memory is None else memory * ROOM
    few, grows = min(images, FEW), parts.get(ACTIVATIONS, 0)
    fixed = sum(parts.values()) - grows
    if fixed + grows * few / images > room:
        return None
    try:
        spent = _timed(plan, few, done) * images / few
        whole = few < images and spent < LONG and fixed + grows < room
        return _timed(plan, images, done) if whole else spent
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _timed(plan: Plan, images: int, done: int) -> float:
    """Return the mean seconds of the steps that are left, of so many labelled images and their part
    of unlabelled ones."""
    s = plan.settings
    share = images * s.data.unlabeled_images // s.data.batch_size
    beside = max(min(FEW, s.data.unlabeled_images), share)  # batch norms may need two
    settings = replace(
        s,
        data=replace(s.data, batch_size=images, unlabeled_batch_size=beside, workers=0, cache=None),
        train=replace(s.train, accumulate=1, compile="off", cuda_graph=False, profile=0),
    )
    plan = replace(plan, settings=settings, origins=[])
    engine = Engine(plan.build(), settings, plan.dataset.info, plan.device)
    starts, rounds = engine.rounds.starts, engine.rounds.rounds
    done = done if done < starts[-1] else 0
    steps, seconds = Counter[Hashable](), dict[Hashable, float]()
    for number, first, end in stretches(starts, engine.method.stage):
        kind: Hashable = (rounds[number].images, engine.method.stage(first))
        left = max(0, end - max(done, first))
        steps[kind] += left
        if left and kind not in seconds:
            seconds[kind] = _timed_stretch(plan, engine, number, first, end)
    return sum(seconds[kind] * steps[kind] for kind in seconds) / steps.total()


def _timed_stretch(plan: Plan, engine: Engine, number: int, first: int, end: int) -> float:
    """Return the seconds of a step of such a part. One class everywhere stands for the labels that
    an earlier round would have left."""
    engine.iteration = first
    engine.step.forget()  # other rounds and stages draw other numbers
    times: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if engine.rounds.rounds[number].images == "kept":
            _keep_some(plan, folder, number)
        streams = Streams(plan, engine, folder)
        try:
            feed = streams.feed()
            for _ in range(min(STEPS, end - first)):
                begin = time.perf_counter()
                engine(*feed())
                if plan.device.type == "cuda":
                    torch.cuda.synchronize(plan.device)
                times.append(time.perf_counter() - begin)
                if times[-1] > LONG:
                    break
        finally:
            streams.close()
    return min(times)


def _keep_some(plan: Plan, folder: Path, number: int) -> None:
    """Write labels for the images of the steps of a round that are timed."""
    names = plan.unlabeled[: STEPS * plan.settings.data.unlabeled_images]
    where = (folder, number, plan.device, World())
    labeling = Labeling(plan.settings, plan.dataset, names, *where)
    for name in names:
        size = labeling.dataset.image(name).shape[-2:]
        labeling.keep(name, torch.zeros(size, dtype=torch.uint8), torch.ones(size))
    labeling.use(names)
    labeling.finish()


def duration(seconds: float) -> str:
    """Return a time as `40 seconds`, `12 minutes`, `3.5 hours` or `2.1 days`."""
    for size, unit in UNITS:
        value = seconds / size
        if value >= 1.5:
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
