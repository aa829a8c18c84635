"""The training loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch.profiler import record_function

from ctt import checkpoint, run
from ctt.console import plain_console
from ctt.data.loader import lost_worker
from ctt.data.split import write_list
from ctt.errors import LoaderError, UnwritableError, UserError
from ctt.inference.class_report import (
    class_table,
    classes_as_json,
    write_classes,
)
from ctt.inference.evaluate import (
    ENSEMBLE,
    Score,
    score_table,
    write_json,
)
from ctt.inference.predict import is_out_of_memory
from ctt.settings import Settings, to_dict
from ctt.train import loggers, measures, same_data
from ctt.train.compiling import missing_compiler
from ctt.train.distributed import World, join
from ctt.train.divergence import Losses
from ctt.train.engine import Engine
from ctt.train.evaluator import Evaluator
from ctt.train.loggers import Ending, Logger
from ctt.train.plan import Plan
from ctt.train.prefetcher import DevicePrefetcher
from ctt.train.profiling import Profile
from ctt.train.record import Recorder, draw_curves
from ctt.train.report import announcement, draw_predictions, ending, progress_bar, summary_of
from ctt.train.resuming import changed_method, finished, loading, nothing_left, resume_hint
from ctt.train.rounds import Labeling, folder_of
from ctt.train.setup import not_deterministic, restored_torch, without_fixed_size_tuning
from ctt.train.signals import interrupt_flag
from ctt.train.step_log import StepLog
from ctt.train.streams import Streams

NO_CHECKPOINT = "The run ended before its first checkpoint, so it begins from the start."


class Stopped(Exception):  # noqa: N818  (not an error)
    """The user asked to stop; a checkpoint has been written.

    Attributes:
        folder: of the run.
        iteration: after which it stopped.
        is_main: whether this process is the one to say so.
    """

    def __init__(self, folder: Path, iteration: int, is_main: bool) -> None:
        super().__init__(folder, iteration, is_main)
        self.folder, self.iteration, self.is_main = folder, iteration, is_main


def train(
    settings: Settings,
    *,
    out: Path | None = None,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Do what `train_in_folder` does, and return what summary.json holds."""
    return train_in_folder(settings, out=out, resume=resume)[1]


def train_in_folder(
    settings: Settings,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    own: Sequence[Logger] = (),
) -> tuple[Path, dict[str, Any]]:
    """Train as `settings` say, in a new folder `out` or going on in the run folder `resume`.

    Args:
        out: by default a numbered one in runs/.
        own: loggers beside those that the settings name.

    Returns:
        the folder of the run, and what its summary.json holds.

    In the processes that torchrun starts, all train one run together.

    Raises:
        UserError: settings or data that cannot work, too little memory, or a full disk.
        Stopped: interrupted, checkpoint written.
    """
    folder = resume
    with restored_torch(), join() as world:
        try:
            trainer = Trainer(settings, out, resume, world, own)
            folder = trainer.folder
            with trainer.lock:
                return folder, trainer.train()
        except (UnwritableError, LoaderError) as error:
            raise UserError(f"{error}{resume_hint(folder)}") from None
        except RuntimeError as error:
            text = lost_worker(error) or missing_compiler(error) or not_deterministic(error)
            if text:
                raise UserError(f"{text}{resume_hint(folder)}") from None
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"There is not enough memory for a step of this run. Give a smaller "
                f"`data.batch_size`, `train.accumulate` N to take it in N parts, "
                f"`train.gradient_checkpointing`, or `train.amp` bf16; `ctt-train --dry-run` tells "
                f"what a run takes.{resume_hint(folder)}"
            ) from None


class Interrupted(Exception):  # noqa: N818  (not an error)
    """The user asked to stop during an evaluation or labelling, which is then done anew."""


class Trainer:
    """One run, from its data to its summary."""

    def __init__(
        self,
        settings: Settings,
        out: Path | None,
        resume: Path | None,
        world: World,
        own: Sequence[Logger] = (),
    ) -> None:
        self.world, self.loggers = world, own
        loggers.check(settings)
        self.console = plain_console(quiet=not world.is_main)
        with contextlib.ExitStack() as held:  # a run that cannot begin keeps no lock
            if resume is not None and world.is_main:
                # before anything is read that another program may write
                held.enter_context(run.lock(run.find(resume)))
            world.wait()
            begun = run.begun(resume)
            self.plan = plan = Plan.of(settings, begun, world.size).counted(world)
            self.settings = settings = plan.settings
            self.dataset, self.device = plan.dataset, plan.device
            self.data = same_data.facts(plan.dataset, plan.labeled)
            self.method = plan.build()
            self.engine = Engine(self.method, settings, self.dataset.info, self.device, world)
            self.seconds, self.waited = 0.0, 0.0  # of training, and of it without a batch
            self.recorder: Recorder | None = None
            self.broken = ""  # what is wrong with the last checkpoint
            self.show: Callable[..., None] = lambda **_: None  # takes what the progress bar shows
            self.interrupted: Sequence[object] = ()  # not empty once the user asks to stop
            saved: dict[str, Any] = {}
            if begun is not None:
                saved, self.broken = checkpoint.load_last(begun / run.CHECKPOINT)
            check_same_checkpoint(int(saved.get("iteration", 0)), resume or out, world)
            if begun is None:
                folder = str(self._create(out, resume, held)) if world.is_main else ""
                self.folder = Path(world.broadcast(folder))
            else:
                self.folder = begun
            self.streams = Streams(plan, self.engine, self.folder)
            self.losses = Losses(self.streams)
            self.evaluator = Evaluator(plan, self.engine, self.folder, world, self.console)
            if begun is not None:
                self._load(saved)
            self.lock = held.pop_all()

    def _create(self, out: Path | None, resume: Path | None, held: contextlib.ExitStack) -> Path:
        if resume is None:
            folder, lock = run.create(out, self.plan.asked)
            held.enter_context(lock)
        else:
            folder = run.find(resume)
            told = changed_method(folder, self.plan.settings)
            self.dataset.notes += (NO_CHECKPOINT, *told)
        (folder / run.LABELED_LIST).parent.mkdir(exist_ok=True)
        write_list(folder / run.LABELED_LIST, self.plan.labeled)
        write_list(folder / run.UNLABELED_LIST, self.plan.unlabeled)
        write_list(folder / run.EVALUATION_LIST, self.dataset.eval_ids())
        return folder

    def train(self) -> dict[str, Any]:
        """Run to the last iteration, evaluate, and write everything the run folder holds."""
        settings, engine = self.settings, self.engine
        total = settings.train.iterations
        if (summary := finished(self.folder, engine.iteration, total)) is not None:
            told = nothing_left(self.folder, total, len(engine.rounds.rounds))
            self.console.print(told, soft_wrap=True)
            return summary
        if self.world.is_main:
            run.write_settings(self.folder, self.plan.asked)  # for the next time it is resumed
            run.keep_method(self.folder, settings)
            if self.broken:  # the next checkpoint must not take the place of the whole one
                (self.folder / run.CHECKPOINT).unlink(missing_ok=True)
            self.recorder = Recorder(
                self.folder,
                self.method,
                engine.iteration,
                [*loggers.make(settings, self.folder, engine.iteration), *self.loggers],
                measures.names(self.method.networks()) if self.evaluator.measured else (),
                partial(self.console.print, soft_wrap=True),
                evaluates=engine.iteration == total or self._is_unevaluated(),
            )
        told = announcement(self.plan, engine, self.folder, self.broken)
        self.console.print(told, soft_wrap=True)
        profile: Profile | None = None
        if settings.train.profile and self.world.is_main:
            profile = Profile(settings.train.profile, engine.step.phase, self.folder)
        scores: dict[str, Score] = {}
        ending: Ending = "failed"
        try:
            with (
                interrupt_flag() as interrupted,
                progress_bar(self.console) as progress,
                # however the steps end, the trace so far is written
                contextlib.closing(profile) if profile else contextlib.nullcontext(),
            ):
                bar = progress.add_task("", total=total, completed=engine.iteration, losses="")
                self.show, self.interrupted = partial(progress.update, bar), interrupted
                if self._is_unevaluated():
                    self._evaluate()
                for _ in self._steps(profile):
                    if engine.iteration == total:
                        break
                    if self.world.any_raised(bool(interrupted)):
                        self._save()
                        self._stop()
                    self._save_and_evaluate()
                self._save()
                scores = self._evaluate()
                self._save(keep=False)  # with what was found to be the best network
            ending = "finished"
        except (Stopped, KeyboardInterrupt):
            ending = "stopped"
            raise
        finally:
            self.streams.close()
            if self.recorder is not None:
                self.recorder.close(ending)
        return self._finish(scores)

    def _every(self, name: str) -> int:
        settings = self.settings.train
        evaluation = settings.eval_every or max(1, math.ceil(settings.iterations / 10))
        return evaluation if name == "eval_every" else settings.checkpoint_every or evaluation

    def _is_unevaluated(self) -> bool:
        """Return whether the run stopped before or within an evaluation, which is then done."""
        done = self.engine.iteration
        due = done < self.settings.train.iterations and done % self._every("eval_every") == 0
        return due and done > self.evaluator.last

    def _save_and_evaluate(self) -> None:
        """Write a checkpoint, and evaluate, where either is due between two steps."""
        done = self.engine.iteration
        evaluates = done % self._every("eval_every") == 0
        saves = done % self._every("checkpoint_every") == 0
        saves |= done in self.engine.rounds.starts  # files of the next one follow
        if saves:  # first: an evaluation that is killed, as it may take minutes, costs no step
            self._save()
        if evaluates:
            self._evaluate()
        if saves and evaluates:
            self._save(keep=False)

    def _steps(self, profile: Profile | None) -> Iterator[None]:
        """Do the steps that are left; yields after each one."""
        settings, engine = self.settings, self.engine
        log = StepLog(engine, self.console, self.recorder)
        feed: DevicePrefetcher | None = None
        images, start = engine.images, time.perf_counter()  # of a row, or of this process
        clock = start
        while engine.iteration < settings.train.iterations:
            if feed is None or engine.iteration in engine.rounds.starts:
                self._begin_round()
                feed = self.streams.feed()
            self.losses.add(engine(*feed()))
            due = engine.iteration % settings.train.log_every == 0
            due |= engine.iteration == settings.train.iterations
            # waits for the device, and so belongs to the time that the steps took
            means = self.losses.means() if due else {}
            now = time.perf_counter()
            self.seconds += now - clock
            if due:
                spent, waited = now - start, feed.waited()
                self.waited += waited
                speed = (engine.images - images) / spent
                log.row(self.show, means, speed, waited / spent)
                images, start = engine.images, now
            log.time_left(settings.train.iterations, self.seconds, due)
            self.show(completed=engine.iteration)
            table = profile and profile.after_step()
            if table:
                self.console.print(table)
            yield
            # evaluation and checkpoints are not training time
            pause = time.perf_counter() - now
            start, clock = start + pause, now + pause
            if profile is not None:
                profile.leave_out(pause)

    def _begin_round(self) -> None:
        """Let the networks label images, if the next step is the first of a later round."""
        engine, rounds = self.engine, self.engine.rounds
        number = rounds.at(engine.iteration)
        if number == 0 or engine.iteration != rounds.starts[number]:
            return
        self.console.print(
            f"iteration {engine.iteration:>6}  round {number} begins: the networks label "
            f"images in {folder_of(self.folder, number)}",
            soft_wrap=True,
        )
        where = (self.dataset, self.plan.unlabeled, self.folder, number, self.device, self.world)
        labeling = Labeling(self.settings, *where, partial(self._watch, "labels"))
        try:
            with without_fixed_size_tuning(self.settings.train.compile):
                engine.begin_round(labeling)
        except Interrupted:  # a checkpoint from before the round is there
            self._stop()

    def _evaluate(self) -> dict[str, Score]:
        self.losses.check_weights()
        try:
            return self.evaluator(self.recorder, partial(self._watch, "evaluation"))
        except Interrupted:
            self._save()
            self._stop()

    def _watch(self, what: str, done: int, total: int) -> None:
        """Show how many images are done, and end this where the user asks to stop.

        A process among others goes on, for they wait for each other at the end.
        """
        self.show(losses=f"{what}: {done} of {total} images" if done < total else "")
        if self.interrupted and self.world.size == 1:
            raise Interrupted

    def _stop(self) -> NoReturn:
        """End the run, of which a checkpoint is written, as the user has asked for."""
        self.world.wait()  # torchrun ends all once one has gone
        self.world.leave()
        raise Stopped(self.folder, self.engine.iteration, self.world.is_main)

    @record_function("checkpoint")
    def _save(self, keep: bool = True) -> None:
        losses = self.losses.state_dict()
        self.losses.check_weights()
        self.engine.gather()
        if not self.world.is_main:
            return
        checkpoint.save(
            self.folder / run.CHECKPOINT,
            {
                **self.engine.state_dict(),
                "settings": to_dict(self.settings),
                "info": checkpoint.facts(self.dataset.info),
                "data": self.data,
                "seconds": self.seconds,
                "waited": self.waited,
                "best": self.evaluator.best,
                "evaluated": self.evaluator.last,
                **losses,
            },
            keep,
        )

    def _load(self, saved: dict[str, Any]) -> None:
        rounds = len(self.engine.rounds.rounds)
        with loading(saved, self.plan, self.folder, rounds):
            self.engine.load_state_dict(saved)
        self.seconds, self.waited = float(saved["seconds"]), float(saved["waited"])
        # checkpoints of former versions were written after the evaluation that was due
        self.evaluator.resume(saved["best"], saved.get("evaluated", saved["iteration"]))
        self.losses.load_state_dict(saved)

    def _finish(self, scores: dict[str, Score]) -> dict[str, Any]:
        plan, engine = self.plan, self.engine
        best, classes = self.evaluator.best, self.evaluator.classes
        summary = summary_of(plan, engine, scores, best, self.seconds, self.waited)
        summary |= classes_as_json(classes)
        if not self.world.is_main:
            return summary
        write_classes(self.folder / run.CLASSES, classes)
        draw_curves(self.folder)
        with without_fixed_size_tuning(self.settings.train.compile):
            draw_predictions(plan, engine, self.folder / "samples.png")
        write_json(self.folder / run.SUMMARY, summary)  # the last: with it the run is finished
        self.console.print(score_table(scores, self.dataset.info))
        assert best is not None  # the last evaluation has chosen one
        chosen = ENSEMBLE if ENSEMBLE in scores else best["network"]
        self.console.print(class_table(classes[chosen], chosen))
        self.console.print(ending(self.folder, best, scores, plan, self.seconds), soft_wrap=True)
        return summary


def check_same_checkpoint(done: int, folder: Path | None, world: World) -> None:
    """Check that all processes go on from one checkpoint: each reads it on its own machine.

    Args:
        done: iterations of the one that this process sees; 0: it sees none.
        folder: of the run.

    Raises:
        UserError: the first process sees another.
    """
    if (first := int(world.broadcast(str(done)))) != done:
        own, other = (f"the checkpoint after iteration {n}" if n else "none" for n in (done, first))
        raise UserError(
            f"{folder}: process {world.rank} of {world.size} looks there for a checkpoint to go on "
            f"from and finds {own}, and the first process finds {other}. All processes must see "
            f"the same run folder: put it on a disk that their machines share, or copy the first "
            f"one's to the others."
        )
