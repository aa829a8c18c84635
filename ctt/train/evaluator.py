"""The evaluations of a run, and which of its networks was the best so far."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import record_function

from ctt import checkpoint, run
from ctt.data.check import missing_files
from ctt.inference.class_report import ClassRow, class_rows
from ctt.inference.evaluate import ENSEMBLE, Score, confusions, sample, score
from ctt.inference.predict import out_of_memory_as
from ctt.train import measures
from ctt.train.distributed import World
from ctt.train.engine import Engine
from ctt.train.plan import Plan
from ctt.train.record import Recorder
from ctt.train.setup import without_fixed_size_tuning

TOO_LARGE_TO_MEASURE = (
    "There is not enough memory to measure the pseudo-labels of an unlabelled image, for which the "
    "probabilities of all networks are held at once. Give `train.measured_images` 0, which leaves "
    "these measures out and changes neither the training nor the scores."
)


class Evaluator:
    """Scores the networks of a run, and keeps the weights of the best one.

    Attributes:
        best: the network with the highest mIoU over the classes with labels so far, with its
            iteration and score; None before the first evaluation. In the first process alone.
        last: iteration of the last evaluation.
        classes: what is known of every class after the last evaluation, by network.
        measured: unlabelled images of which pseudo-labels and agreement are measured.
    """

    def __init__(
        self, plan: Plan, engine: Engine, folder: Path, world: World, console: Console
    ) -> None:
        self.plan, self.engine, self.folder = plan, engine, folder
        self.world, self.console = world, console
        self.best: dict[str, Any] | None = None
        self.last = 0
        self.classes: dict[str, list[ClassRow]] = {}
        self.measured = sample(unlabeled_at_hand(plan), plan.settings.train.measured_images)

    @record_function("evaluation")  # for a trace that it falls into
    def __call__(
        self, recorder: Recorder | None, watch: Callable[[int, int], None]
    ) -> dict[str, Score]:
        """Return the scores of all networks after the steps so far.

        Args:
            recorder: takes a row of them; None in all processes but the first.
            watch: called after each batch with the number of images so far and that of all; what
                it raises ends the evaluation, which is to be done anew then.
        """
        dataset, settings, world = self.plan.dataset, self.plan.settings, self.world
        networks = self.engine.method.networks()
        ids, done = dataset.eval_ids()[world.rank :: world.size], 0

        def after_batch(images: int) -> None:
            nonlocal done
            done += images
            watch(done, len(ids))

        showing = torch.zeros(len(dataset.info.classes), dtype=torch.int64, device=self.plan.device)
        with without_fixed_size_tuning(settings.train.compile):
            matrices = confusions(
                networks,
                dataset,
                ids,
                self.plan.device,
                settings.eval,
                settings.data.workers,
                progress=after_batch,
                shown=showing,
            )
            with out_of_memory_as(TOO_LARGE_TO_MEASURE):
                measured = measures.measure(
                    networks,
                    dataset,
                    self.measured,
                    settings.eval,
                    settings.loss.confidence_threshold,
                    world,
                )
        matrices = {name: world.total(matrix) for name, matrix in matrices.items()}
        scores = {name: score(matrix) for name, matrix in matrices.items()}
        images = world.total(showing).cpu()
        self.classes = {n: class_rows(m, images, dataset.info) for n, m in matrices.items()}
        self.last = self.engine.iteration
        if recorder is not None:
            mious = {f"miou_{name}": score.miou for name, score in scores.items()}
            recorder.write(self.engine.iteration, mious | measured)
            shown = "  ".join(f"{name} {score.miou:.1f}" for name, score in scores.items())
            self.console.print(
                f"iteration {self.engine.iteration:>6}  mIoU  {shown}", soft_wrap=True
            )
            self._keep_best(scores)
        return scores

    def _keep_best(self, scores: dict[str, Score]) -> None:
        single = {name: s.miou_of_labeled for name, s in scores.items() if name != ENSEMBLE}
        name = max(single, key=lambda key: single[key])
        if self.best and single[name] <= _rank(self.best):
            return
        iteration, settings = self.engine.iteration, self.plan.settings
        self.best = {
            "network": name,
            "iteration": iteration,
            "miou": scores[name].miou,
            "miou_of_labeled": single[name],
            "chosen_on": settings.data.eval_split,
        }
        note = f"{name} after {iteration} iterations, {self.plan.asked.hash()}"
        network = self.engine.method.networks()[name]
        info = self.plan.dataset.info
        weights = self.folder / run.WEIGHTS
        checkpoint.save_network(weights, network, info, note, self.best, settings.eval)

    def resume(self, best: dict[str, Any] | None, last: int) -> None:
        """Go on with the best network that a checkpoint names, or the one that the run has kept.

        Args:
            best, last: as the checkpoint has them.

        A run that was lost between an evaluation and the next checkpoint has kept the weights of a
        better network than its checkpoint knows of; a worse one must not take their place.
        """
        self.best, self.last = best, last
        found = checkpoint.best_in(self.folder / run.WEIGHTS) if self.world.is_main else None
        if found is None:
            return
        kept, description = found
        network = self.engine.method.networks().get(kept.get("network", ""))
        if network is None:
            return
        facts = (self.plan.dataset.info, description.get("note", ""), self.plan.settings.eval)
        own = json.loads(json.dumps(checkpoint.description(network, *facts)))
        same = own == own | description  # else somebody put another file there
        if same and (best is None or _rank(kept) > _rank(best)):
            self.best = kept


def _rank(best: dict[str, Any]) -> float:
    """Return the score by which the best network is chosen.

    Checkpoints of earlier versions lack the mean over the labelled classes.
    """
    return float(best.get("miou_of_labeled", best["miou"]))


def unlabeled_at_hand(plan: Plan) -> list[str]:
    """Return the unlabelled images of a run, without missing ones if its method takes none."""
    if plan.about.unlabeled:  # all were there at its start
        return plan.unlabeled
    known = [name for name in plan.unlabeled if plan.dataset.find(name) == name]
    missing = {name for name, _ in missing_files(plan.dataset, [], known)}
    return [name for name in known if name not in missing]
