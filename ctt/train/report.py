"""What a run tells its user: at its start, while it trains, and at its end."""

from __future__ import annotations

import platform
import shlex
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ctt import __version__
from ctt.data.check import handful
from ctt.device import device_name
from ctt.inference.evaluate import UNLABELED, Score, as_json, hash_of_list, number
from ctt.inference.figures import draw_samples
from ctt.train.engine import Engine
from ctt.train.plan import Plan

NAMED = 8  # classes that are named in a line
SAMPLES = 8  # images on the picture sheet


def announcement(plan: Plan, engine: Engine, folder: Path, broken: str) -> str:
    """Return what a run is about to do, with its warnings.

    Args:
        folder: of the run.
        broken: what is wrong with its last checkpoint, if anything.
    """
    s, world, pairs = plan.settings, engine.world, plan.pairs
    start = f", going on after iteration {engine.iteration}" if engine.iteration else ""
    unlabeled = len(plan.unlabeled) if plan.about.unlabeled else 0
    where = str(plan.device)
    if world.size > 1:
        where = (
            f"{world.size} processes ({plan.device.type}), "
            f"{s.data.batch_size * world.size} labelled images a step"
        )
    first = (
        f"{s.method} with {pairs} pair{'s' * (pairs > 1)} on {s.dataset}: "
        f"{len(plan.labeled)} labelled and {unlabeled} unlabelled images, "
        f"{s.train.iterations} iterations on {where}{start}. Run folder: {folder}"
    )
    return "\n".join([first, plan.sketch(engine.method), *plan.notes(broken)])


def ending(
    folder: Path, best: dict[str, Any], scores: dict[str, Score], plan: Plan, seconds: float
) -> str:
    """Return what a finished run is worth and what to do with it.

    Args:
        best: the best network. seconds: of training.
    """
    info, evaluated = plan.dataset.info, len(plan.dataset.eval_ids())
    unseen = scores[best["network"]].without_label
    shown = [name for c, name in enumerate(info.classes) if c not in unseen]
    classes = ", ".join(shown) if len(shown) <= NAMED else f"{len(shown)} classes"
    found = f"Best network: {best['network']} after iteration {best['iteration']}, "
    if shown:
        miou = best.get("miou_of_labeled", best["miou"])
        images = f"{evaluated} image{'s' * (evaluated != 1)}"
        found += f"mIoU {miou:.1f} over {classes} on {images}."
    else:
        found += (
            f"but without a score: {UNLABELED}. Evaluate on images whose masks show classes "
            f"(`data.holdout`, or a val/ folder)."
        )
    return (
        f"{plan.settings.train.iterations} iterations in {seconds:.0f} s of training. Everything "
        f"is in {folder}\n{found}\n"
        f"Next: ctt-predict {shlex.quote(str(folder))} IMAGES --out predictions"
    )


def progress_bar(console: Console) -> Progress:
    """Return the bar of the iterations, with the losses beside it."""
    return Progress(
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def summary_of(
    plan: Plan,
    engine: Engine,
    scores: dict[str, Score],
    best: dict[str, Any] | None,
    seconds: float,
    waited: float,
) -> dict[str, Any]:
    """Return what summary.json holds.

    Args:
        best: the best network so far.
        seconds: of training.
        waited: of them without a batch.
    """
    s, info, evaluated = plan.settings, plan.dataset.info, plan.dataset.eval_ids()
    images = engine.images
    return {
        **as_json(scores, info, s.eval),
        "dataset": s.dataset,
        "eval_split": s.data.eval_split,
        "images": len(evaluated),
        "images_sha256": hash_of_list(evaluated),
        "method": s.method,
        "pairs": plan.pairs,
        "seed": s.seed,
        "labeled": len(plan.labeled),
        "unlabeled": len(plan.unlabeled) if plan.about.unlabeled else 0,
        "best": best and {k: number(v) if isinstance(v, float) else v for k, v in best.items()},
        "iterations": s.train.iterations,
        "images_drawn": images,
        "forwards": {"trained": engine.trained, "untrained": engine.untrained},
        "seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "input_wait": round(waited / seconds, 4) if seconds else None,
        "settings_hash": plan.asked.hash(),
        "processes": engine.world.size,
        "device": device_name(plan.device),
        "versions": {
            "ctt": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def draw_predictions(plan: Plan, engine: Engine, path: Path) -> None:
    """Draw predictions of the first teacher, or student, for evaluation images.

    They are spread over the list, as neighbours are often alike: frames of a film, tiles of a map.
    """
    networks = engine.method.networks()
    shown = next((name for name in networks if name.startswith("teacher")), next(iter(networks)))
    draw_samples(
        path,
        networks[shown],
        plan.dataset,
        handful(plan.dataset.eval_ids(), SAMPLES),
        plan.device,
        plan.settings.eval,
        f"{shown.replace('_', ' ')} after {plan.settings.train.iterations} iterations",
    )
