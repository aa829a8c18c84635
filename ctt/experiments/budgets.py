"""Runs of equal cost: what a step costs, and the schedules of a shorter or longer run."""

from __future__ import annotations

from fractions import Fraction

from ctt import methods
from ctt.experiments.results import BACKWARD
from ctt.settings import Settings, update

SCHEDULES = ("optim.warmup", "loss.ct_ramp", "bank.start_after")  # settings in iterations


def forwards(settings: Settings) -> Fraction:
    """Return the cost of a step in forward passes of an image, as the column `forwards` counts it,
    the mean over the run.

    For methods whose networks see each image once: supervised training, and pseudo-labels from a
    teacher of each student, with or without the banks of the cross teacher. Losses are not counted.
    """
    from ctt.methods.teacher_banks import images_between

    about, labeled = methods.get(settings.method), settings.data.batch_size
    pairs = settings.pairs or about.pairs
    found = Fraction((1 + BACKWARD) * labeled)
    if about.unlabeled:
        steps = settings.train.iterations
        joined = Fraction(steps - about.steps_without_unlabeled(settings), steps)
        unlabeled = settings.data.unlabeled_batch_size or labeled
        found += joined * (2 + BACKWARD) * unlabeled  # the teachers see them as well
    if about.contrasts(settings):
        found += labeled // images_between(settings)  # which fill the banks
    return pairs * found


def iterations(settings: Settings, most: Fraction, budget: Fraction) -> int:
    """Return how many iterations a budget pays for.

    Args:
        settings: with the iterations of the recipe.
        most: cost of a step of the costliest run.
        budget: as a share of the costliest run's cost for the iterations of the recipe.
    """
    return max(1, round(settings.train.iterations * budget * most / forwards(settings)))


def of_length(settings: Settings, length: int) -> tuple[Settings, list[str]]:
    """Return the settings of a run of so many iterations, and the options that make them of these.

    What the method reads of the schedules keeps its share of the run, so that a short run too
    has all of its phases.
    """
    about, before = methods.get(settings.method), settings.train.iterations
    if length == before:
        return settings, []
    values: dict[str, dict[str, int]] = {"train": {"iterations": length}}
    for name in SCHEDULES:
        group, _, field = name.partition(".")
        value: int = getattr(getattr(settings, group), field)
        if value and about.reads(name, settings.pairs):
            values.setdefault(group, {})[field] = round(value * length / before)
    options = [
        text
        for group, fields in values.items()
        for field, value in fields.items()
        for text in (f"--{group}.{field.replace('_', '-')}", str(value))
    ]
    return update(settings, values, "budget"), options
