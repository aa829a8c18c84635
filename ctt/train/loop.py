"""The training loop."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shlex
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.profiler import record_function

from ctt import __version__, data, methods
from ctt.console import plain_console
from ctt.data.check import check_quickly
from ctt.data.loader import DrawSampler, ViewDataset, load
from ctt.data.prepare import Prepared
from ctt.data.source import IGNORE, Source
from ctt.data.split import make_split, read_list, write_list
from ctt.data.views import GeometricView
from ctt.errors import UnwritableError, UserError
from ctt.methods.base import Method
from ctt.ops import prefer_backend
from ctt.train import checkpoint, run
from ctt.train.compiling import uncompiled
from ctt.train.distributed import World, join, local_rank, local_size
from ctt.train.evaluate import (
    Score,
    as_json,
    confusions,
    hash_of_list,
    score,
    score_table,
    write_json,
)
from ctt.train.feed import Feed
from ctt.train.inference import is_out_of_memory
from ctt.train.memory import estimate, memory_table
from ctt.train.profiling import Profile
from ctt.train.record import Recorder, draw_curves, draw_samples
from ctt.train.settings import Settings, to_dict
from ctt.train.state import TrainState, check_batch_norm, make_student
from ctt.train.step import LOST, Step

SUMMARY = "summary.json"
FEW = 300  # labelled images whose masks are read through at the start
ECHO = 2.0  # seconds in which a SIGTERM may come twice: from the scheduler, and from torchrun
SAMPLES = 8  # images on the picture sheet


class Stopped(Exception):  # noqa: N818  (not an error)
    """The user asked to stop; a checkpoint has been written.

    Attributes:
        folder: of the run. iteration: after which it stopped. is_main: whether this process is the
            one to say so.
    """

    def __init__(self, folder: Path, iteration: int, is_main: bool) -> None:
        super().__init__(folder, iteration, is_main)
        self.folder, self.iteration, self.is_main = folder, iteration, is_main


def train(
    settings: Settings, *, out: Path | None = None, resume: Path | None = None
) -> dict[str, Any]:
    """Train as `settings` say, in a new folder `out` or going on in the run folder `resume`.

    Returns:
        what summary.json holds.

    In the processes that torchrun starts, all train one run together.

    Raises:
        UserError: settings or data that cannot work, too little memory, or a full disk.
        Stopped: interrupted, checkpoint written.
    """
    folder = resume
    with join() as world:
        try:
            trainer = Trainer(settings, out, resume, world)
            folder = trainer.folder
            return trainer.train()
        except UnwritableError as error:
            raise UserError(f"{error}{way_on(folder)}") from None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"There is not enough memory for a step of this run. Give a smaller "
                f"--data.batch-size, --train.accumulate N to take it in N parts, or --train.amp "
                f"bf16; --dry-run tells what a run takes.{way_on(folder)}"
            ) from None


def way_on(folder: Path | None) -> str:
    """What is left of a run that failed, as the end of a message."""
    if folder is None or not (folder / run.CHECKPOINT).is_file():
        return ""
    return f" The last checkpoint is whole: --resume {shlex.quote(str(folder))} goes on from it."


class Trainer:
    """One run, from its data to its summary."""

    def __init__(
        self,
        settings: Settings,
        out: Path | None,
        resume: Path | None,
        world: World,
    ) -> None:
        self.settings, self.world = settings, world
        self.device = device = pick_device(settings.train.device)
        check_cuda_graph(settings, device, world.size)
        self.console = plain_console(quiet=not world.is_main)
        set_up_torch(settings)
        self.method = methods.get(settings.method)
        self.pairs = settings.pairs or self.method.default_pairs
        self.source = open_source(settings)
        self.uses_unlabeled = bool(self.method.teachers_of(0, self.pairs))
        if resume is None:
            self.labeled, self.unlabeled = new_split(settings, self.source, self.uses_unlabeled)
        classes = len(self.source.info.classes)
        fresh = resume is None
        self.state = TrainState(
            settings, self.pairs, classes, device, initialize=fresh, world=world
        )
        for student in self.state.students:
            check_batch_norm(student, settings, seen_together(self.method, self.pairs))
        self.seconds, self.waited = 0.0, 0.0  # of training, and of it without a batch
        self.best: dict[str, Any] | None = None
        self.warned = False  # of pixels for which the teachers gave no finite probability
        self.streams: list[Generator[tuple[Tensor, Tensor]]] = []  # of batches
        self.sums: dict[str, Tensor] = {}  # of each loss since the last row of metrics.csv
        self.summed = 0  # steps in them
        if resume is None:
            self.folder = Path(world.tell(str(self._create(out)) if world.is_main else ""))
        else:
            self.folder = run.find(resume)
            self.labeled, self.unlabeled = split_of_run(self.folder, self.source)
            self._load(checkpoint.load(self.folder / run.CHECKPOINT))
            if world.is_main:
                run.write_settings(self.folder, settings)  # for the next time it is resumed
        self.step = Step(settings, self.method, self.source.info, len(self.labeled), device, world)

    def _create(self, out: Path | None) -> Path:
        folder = run.create(out, self.settings)
        (folder / run.LABELED_LIST).parent.mkdir(exist_ok=True)
        write_list(folder / run.LABELED_LIST, self.labeled)
        write_list(folder / run.UNLABELED_LIST, self.unlabeled)
        write_list(folder / run.EVALUATION_LIST, self.source.eval_ids())
        return folder

    def train(self) -> dict[str, Any]:
        """Run to the last iteration, evaluate, and write everything the run folder holds."""
        settings, state = self.settings, self.state
        total = settings.train.iterations
        if (finished := self._finished()) is not None:
            self.console.print(
                f"The run in {self.folder} is finished: all {total} iterations are done and "
                f"evaluated. To train further, give a larger --train.iterations.",
                soft_wrap=True,
            )
            return finished
        networks = [*state.networks(), "ensemble"]
        recorder: Recorder | None = None
        if self.world.is_main:
            recorder = Recorder(
                self.folder, networks, state.iteration, tensorboard=settings.train.tensorboard
            )
        self._announce()
        scores: dict[str, Score] = {}
        try:
            with (
                interrupt_flag() as interrupted,
                self._progress() as progress,
                self._profile() as profile,
            ):
                bar = progress.add_task("", total=total, completed=state.iteration, losses="")
                for _ in self._steps(recorder, progress, bar, profile):
                    due = state.iteration % self._every("eval_every") == 0
                    if due and state.iteration < total:
                        self._evaluate(recorder)
                    if state.iteration % self._every("checkpoint_every") == 0:
                        self._save()
                    if self.world.agree(bool(interrupted)) and state.iteration < total:
                        self._save()
                        self.world.leave()
                        raise Stopped(self.folder, state.iteration, self.world.is_main)
                self._save()
                scores = self._evaluate(recorder)
        finally:
            for stream in self.streams:
                # its processes ignore SIGTERM: at the end of Python they would be waited for
                stream.close()
            if recorder is not None:
                recorder.close()
        return self._finish(scores)

    def _finished(self) -> dict[str, Any] | None:
        """Return the summary of a resumed run that has nothing left to do, else None."""
        path = self.folder / SUMMARY
        if self.state.iteration < self.settings.train.iterations or not path.is_file():
            return None
        try:
            summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return None  # it is written anew
        same = summary.get("settings_hash") == self.settings.hash()
        return summary if same else None

    def _every(self, name: str) -> int:
        settings = self.settings.train
        evaluation = settings.eval_every or max(1, math.ceil(settings.iterations / 10))
        return evaluation if name == "eval_every" else settings.checkpoint_every or evaluation

    @contextlib.contextmanager
    def _profile(self) -> Iterator[Profile | None]:
        """What looks at the steps, if wanted; however they end, the trace so far is written."""
        if not (self.settings.train.profile and self.world.is_main):
            yield None
            return
        profile = Profile(self.settings.train.profile, self.step.phases, self.folder)
        try:
            yield profile
        finally:
            profile.close()

    def _steps(
        self, recorder: Recorder | None, progress: Progress, bar: Any, profile: Profile | None
    ) -> Iterator[None]:
        """Do the steps that are left; yields after each one."""
        settings, state = self.settings, self.state
        feed = Feed(
            self._batches(self.labeled, labeled=True),
            self._batches(self.unlabeled, labeled=False) if self.uses_unlabeled else None,
            self.step.phases,
        )
        taken, start = 0, time.perf_counter()  # steps since the start of a row or of this process
        clock = start
        while state.iteration < settings.train.iterations:
            for name, value in self.step(state, *feed()).items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            taken, self.summed = taken + 1, self.summed + 1
            due = state.iteration % settings.train.log_every == 0
            due |= state.iteration == settings.train.iterations
            # waits for the device, and so belongs to the time that the steps took
            sums = self._finite_sums() if due else {}
            means = {name: value / self.summed for name, value in sums.items()}
            now = time.perf_counter()
            self.seconds += now - clock
            if due:
                spent, waited = now - start, feed.waited()
                self.waited += waited
                speed = taken * self._images_a_step() / spent
                self._log(recorder, progress, bar, means, speed, waited / spent)
                self.sums, self.summed, taken, start = {}, 0, 0, now
            progress.update(bar, completed=state.iteration)
            table = profile and profile.after_step()
            if table:
                self.console.print(table)
            yield
            # evaluation and checkpoints are not training time
            pause = time.perf_counter() - now
            start, clock = start + pause, now + pause
            if profile is not None:
                profile.leave_out(pause)

    def _images_a_step(self) -> int:
        kinds = 2 if self.uses_unlabeled else 1
        return self.settings.data.batch_size * kinds * self.world.size

    def _finite_sums(self) -> dict[str, float]:
        """Losses of all processes, summed over the steps since the last row.

        Called before anything that these steps led to is kept.
        """
        if not self.sums:
            return {}
        values = self.world.total(torch.stack(list(self.sums.values()))).tolist()
        sums = dict(zip(self.sums, values, strict=True))
        if not math.isfinite(sums["total"]):
            bad = ", ".join(f"{name} {value}" for name, value in sums.items())
            raise UserError(
                f"Training diverged: by iteration {self.state.iteration} the objective is no "
                f"number any more ({bad}). Lower --optim.lr or set --optim.clip-norm; the last "
                f"checkpoint in {self.folder} is from before."
            )
        return sums

    def _log(
        self,
        recorder: Recorder | None,
        progress: Progress,
        bar: Any,
        means: dict[str, float],
        speed: float,
        waiting: float,
    ) -> None:
        if recorder is None:
            return
        lost = means.pop(LOST, 0.0)
        if lost > 0:
            self._warn_of_lost_pixels(lost)
        values = {f"loss_{name}": value for name, value in means.items()}
        if self.uses_unlabeled:
            values[LOST] = lost
        full = [bank.full.float().mean() for bank in self.state.banks] if self.step.contrast else []
        if full:
            values["queues_full"] = float(torch.stack(full).mean())
        rate = self.state.optimizer.param_groups[0]["lr"]
        values |= {"lr": float(rate), "images_per_second": speed, "input_wait": waiting}
        recorder.write(self.state.iteration, values)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items() if name != "total")
        progress.update(bar, losses=f"{shown}  {speed:.0f} images/s")

    def _warn_of_lost_pixels(self, share: float) -> None:
        """Print once that a teacher gives no finite probabilities."""
        if self.warned:
            return
        self.warned = True
        self.console.print(
            f"Warning: at iteration {self.state.iteration} the teachers gave no finite probability "
            f"for {share:.1%} of the unlabelled pixels, and nothing is learnt from those. If the "
            f"share stays, train without --train.amp fp16, or look at --model.weights for batch "
            f"norms with bad statistics; {LOST} in metrics.csv shows it.",
            soft_wrap=True,
        )

    def _batches(self, ids: list[str], *, labeled: bool) -> Iterator[tuple[Tensor, Tensor]]:
        s, d = self.settings, self.settings.data
        purpose = "labeled" if labeled else "unlabeled"
        view = GeometricView(
            d.crop, d.scale, d.flip, d.rotation, d.translation, self.source.info.mean
        )
        source = Prepared(self.source, d.resize, d.cache)
        dataset = ViewDataset(source, ids, view, labeled, s.seed, purpose)
        sampler = DrawSampler(
            len(ids),
            d.batch_size,
            self.state.drawn,
            s.train.iterations - self.state.iteration,
            s.seed,
            purpose,
            self.world.rank,
            self.world.size,
        )
        stream = load(dataset, sampler, d.workers, pin_memory=self.device.type == "cuda")
        self.streams.append(stream)
        return stream

    @record_function("evaluation")  # for a trace that it falls into
    def _evaluate(self, recorder: Recorder | None) -> dict[str, Score]:
        state, world = self.state, self.world
        with images_of_any_size(self.settings.train.compile):
            matrices = confusions(
                state.networks(),
                self.source,
                self.source.eval_ids()[world.rank :: world.size],
                self.device,
                self.settings.eval,
                self.settings.data.workers,
            )
        scores = {name: score(world.total(matrix)) for name, matrix in matrices.items()}
        if recorder is None:
            return scores
        recorder.write(
            state.iteration, {f"miou_{name}": score.miou for name, score in scores.items()}
        )
        shown = "  ".join(f"{name} {score.miou:.1f}" for name, score in scores.items())
        self.console.print(f"iteration {state.iteration:>6}  mIoU  {shown}", soft_wrap=True)
        single = {name: score.miou for name, score in scores.items() if name != "ensemble"}
        name = max(single, key=lambda key: single[key])
        if self.best is None or single[name] > self.best["miou"]:
            self.best = {
                "network": name,
                "iteration": state.iteration,
                "miou": single[name],
                "chosen_on": self.settings.data.eval_split,
            }
            note = f"{name} after {state.iteration} iterations, {self.settings.hash()}"
            checkpoint.save_network(
                self.folder / run.WEIGHTS,
                state.networks()[name],
                self.source.info,
                note,
            )
        return scores

    @record_function("checkpoint")
    def _save(self) -> None:
        sums = self._finite_sums()
        if not self.world.is_main:
            return
        checkpoint.save(
            self.folder / run.CHECKPOINT,
            {
                **self.state.state_dict(),
                "settings": to_dict(self.settings),
                "seconds": self.seconds,
                "waited": self.waited,
                "best": self.best,
                "sums": sums,
                "summed": self.summed,
            },
        )

    def _load(self, saved: dict[str, Any]) -> None:
        try:
            self.state.load_state_dict(saved)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.folder / run.CHECKPOINT} does not fit the settings of its run ({reason})."
            ) from None
        check_iterations(self.settings, self.state.iteration)
        self.seconds, self.waited = float(saved["seconds"]), float(saved["waited"])
        self.best = saved["best"]
        # one process goes on with the sums of all; checkpoints of earlier versions have none
        own = self.world.is_main
        self.sums = {
            name: torch.tensor(value if own else 0.0, dtype=torch.float32, device=self.device)
            for name, value in saved.get("sums", {}).items()
        }
        self.summed = int(saved.get("summed", 0))

    def _finish(self, scores: dict[str, Score]) -> dict[str, Any]:
        s, info = self.settings, self.source.info
        images = self.state.drawn * (2 if self.uses_unlabeled else 1)
        summary = {
            **as_json(scores, info, s.eval),
            "dataset": s.dataset,
            "eval_split": s.data.eval_split,
            "images": len(self.source.eval_ids()),
            "images_sha256": hash_of_list(self.source.eval_ids()),
            "method": s.method,
            "pairs": self.pairs,
            "seed": s.seed,
            "labeled": len(self.labeled),
            "unlabeled": len(self.unlabeled) if self.uses_unlabeled else 0,
            "best": self.best and {**self.best, "miou": round(self.best["miou"], 2)},
            "iterations": s.train.iterations,
            "seconds": round(self.seconds, 1),
            "images_per_second": round(images / self.seconds, 1) if self.seconds else None,
            "input_wait": round(self.waited / self.seconds, 4) if self.seconds else None,
            "settings_hash": s.hash(),
            "processes": self.world.size,
            "versions": versions(),
        }
        if not self.world.is_main:
            return summary
        write_json(self.folder / SUMMARY, summary)
        draw_curves(self.folder)
        best = self.state.teachers[0]
        ids = self.source.eval_ids()[:SAMPLES]
        with images_of_any_size(s.train.compile):
            draw_samples(
                self.folder / "samples.png",
                best,
                self.source,
                ids,
                self.device,
                s.eval,
                f"teacher 1 after {s.train.iterations} iterations",
            )
        self.console.print(score_table(scores, info))
        self.console.print(
            f"{s.train.iterations} iterations in {self.seconds:.0f} s of training. "
            f"Everything is in {self.folder}",
            soft_wrap=True,
        )
        return summary

    def _announce(self) -> None:
        s = self.settings
        start = f", going on after iteration {self.state.iteration}" if self.state.iteration else ""
        unlabeled = len(self.unlabeled) if self.uses_unlabeled else 0
        where = str(self.device)
        if self.world.size > 1:
            where = (
                f"{self.world.size} processes ({self.device.type}), "
                f"{s.data.batch_size * self.world.size} labelled images a step"
            )
        self.console.print(
            f"{s.method} with {self.pairs} pair{'s' * (self.pairs > 1)} on {s.dataset}: "
            f"{len(self.labeled)} labelled and {unlabeled} unlabelled images, "
            f"{s.train.iterations} iterations on {where}{start}. Run folder: {self.folder}",
            *self.source.notes,
            *warnings_of(s, self.method, self.pairs, self.source, self.labeled),
            sep="\n",
            soft_wrap=True,
        )
        for origin in dict.fromkeys(self.state.origins):
            self.console.print(origin, soft_wrap=True)

    def _progress(self) -> Progress:
        return Progress(
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )


def new_split(
    settings: Settings, source: Source, uses_unlabeled: bool
) -> tuple[list[str], list[str]]:
    """Names of the labelled and unlabelled images of a new run, with a quick look at their files.

    Raises:
        UserError: lists or files that cannot be used, or nothing left to learn from.
    """
    s = settings
    labeled, unlabeled = make_split(source, s.ratio, s.seed, s.split_labeled, s.split_unlabeled)
    check_quickly(source, labeled, unlabeled if uses_unlabeled else [])
    if uses_unlabeled and not unlabeled:
        raise UserError(
            f"--method {s.method} learns from unlabelled images, but all {len(labeled)} "
            f"training images are labelled. Lower --ratio, or use --method supervised."
        )
    return labeled, unlabeled


def split_of_run(folder: Path, source: Source) -> tuple[list[str], list[str]]:
    """`new_split` for a run that goes on: the lists that it was started with."""
    run.hold_out(folder, source)
    labeled = read_list(folder / run.LABELED_LIST, source, labeled=True)
    path = folder / run.UNLABELED_LIST
    unlabeled = read_list(path, source, labeled=False) if path.stat().st_size else []
    check_quickly(source, labeled, unlabeled)
    return labeled, unlabeled


def warnings_of(
    settings: Settings, method: Method, pairs: int, source: Source, labeled: list[str]
) -> list[str]:
    """Return a sentence for each thing that is allowed and probably not what the user wants."""
    found = []
    loss, total = settings.loss, settings.train.iterations
    terms = loss.hc > 0 or (loss.lc > 0 and pairs > 1)
    if method.contrast and terms and settings.bank.start_after >= total:
        found.append(
            f"Warning: the contrast never begins, because --bank.start-after "
            f"{settings.bank.start_after} is not below --train.iterations {total}."
        )
    if method.teachers_of(0, pairs) and loss.ct_ramp > total:
        found.append(
            f"Warning: the weight of the pseudo-labels never reaches its full value, because "
            f"--loss.ct-ramp {loss.ct_ramp} is above --train.iterations {total}."
        )
    missing = classes_without_label(source, labeled)
    if missing:
        found.append(
            f"Warning: none of the {len(labeled)} labelled images shows {', '.join(missing)}, so "
            f"no network can learn it. Give more labelled images or --split-labeled, or check the "
            f"masks by ctt-data check."
        )
    return found


def classes_without_label(source: Source, labeled: list[str]) -> list[str]:
    """Return the names of the classes that no labelled image shows.

    Only lists of up to `FEW` images are read through; in longer ones a class is seldom missing, and
    reading them takes minutes.
    """
    if len(labeled) > FEW:
        return []
    seen: set[int] = set()
    for name in labeled:
        seen.update(torch.bincount(source.label(name).flatten()).nonzero().flatten().tolist())
        if len(seen - {IGNORE}) == len(source.info.classes):
            break
    return [name for c, name in enumerate(source.info.classes) if c not in seen]


def seen_together(method: Method, pairs: int) -> bool:
    """Return whether students in training mode see unlabelled images only beside labelled ones."""
    return bool(method.teachers_of(0, pairs)) and method.labels_by == "teachers"


def check_cuda_graph(settings: Settings, device: torch.device, processes: int) -> None:
    if settings.train.cuda_graph and (device.type != "cuda" or processes > 1):
        raise UserError(
            f"--train.cuda-graph records the work of one process on a GPU, and this run has "
            f"{processes} on {device.type}. Leave it out."
        )


def check_iterations(settings: Settings, done: int) -> None:
    total = settings.train.iterations
    if done > total:
        raise UserError(
            f"--train.iterations {total}: the run has been trained for {done} iterations already."
        )


def dry_run(settings: Settings, *, out: Path | None = None, resume: Path | None = None) -> None:
    """Look at all that `train` looks at, and tell what memory a run takes; no file.

    Raises:
        UserError: settings, data, weights or folders that cannot work.
    """
    device = pick_device(settings.train.device)
    check_cuda_graph(settings, device, int(os.environ.get("WORLD_SIZE", "1")))
    set_up_torch(settings)
    method = methods.get(settings.method)
    pairs = settings.pairs or method.default_pairs
    source = open_source(settings)
    uses_unlabeled = bool(method.teachers_of(0, pairs))
    classes = len(source.info.classes)
    if resume is None:
        labeled, unlabeled = new_split(settings, source, uses_unlabeled)
        run.check_new(out)
        start = "start"
    else:
        folder = run.find(resume)
        labeled, unlabeled = split_of_run(folder, source)
        done = int(checkpoint.load(folder / run.CHECKPOINT)["iteration"])
        check_iterations(settings, done)
        start = f"go on after iteration {done}"
    made = [make_student(settings, k, classes, resume is None) for k in range(pairs)]
    students = [student for student, _ in made]
    for student in students:
        check_batch_norm(student, settings, seen_together(method, pairs))
    parts = estimate(settings, students, classes, uses_unlabeled, method.contrast)
    console = plain_console()
    console.print(
        f"{settings.method} with {pairs} pairs on {settings.dataset} would {start} with "
        f"{len(labeled)} labelled and {len(unlabeled)} unlabelled images. Nothing is written.",
        *warnings_of(settings, method, pairs, source, labeled),
        *dict.fromkeys(origin for _, origin in made if origin),
        sep="\n",
        soft_wrap=True,
    )
    console.print(memory_table(parts, settings, device))


def open_source(settings: Settings) -> Source:
    return data.open_source(settings.dataset, settings.data_root, settings.data)


def pick_device(name: str, option: str = "--train.device") -> torch.device:
    """`auto`: a GPU where there is one; under torchrun each process has its own.

    Args:
        option: where the name comes from, for the message.

    Raises:
        UserError: not a device, or one that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and "WORLD_SIZE" in os.environ:
            if name != device.type:
                raise RuntimeError("torchrun gives every process a device; leave the number out")
            device = torch.device("cuda", local_rank())
        elif name == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option} {name} cannot be used here ({reason}).") from None
    return device


def set_up_torch(settings: Settings) -> None:
    if settings.train.threads or local_size() > 1:
        own_share = max(1, (os.cpu_count() or 1) // local_size())
        torch.set_num_threads(settings.train.threads or own_share)
    prefer_backend(settings.train.backend)
    if settings.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # all crops are of one size, so the search for the fastest convolutions is made once
    torch.backends.cudnn.benchmark = not settings.train.deterministic
    torch.use_deterministic_algorithms(settings.train.deterministic)


@contextlib.contextmanager
def images_of_any_size(compiled: str) -> Iterator[None]:
    """Run networks without what pays for images of one size alone: for evaluation.

    cuDNN would search the fastest convolutions anew for every size, and torch.compile compile.

    Args:
        compiled: the setting `train.compile`.
    """
    searching = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with uncompiled(compiled):
            yield
    finally:
        torch.backends.cudnn.benchmark = searching


@contextlib.contextmanager
def interrupt_flag() -> Iterator[list[int]]:
    """Yield a list that stops being empty on Ctrl-C or SIGTERM; a second one ends the program."""
    caught: list[int] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if caught and (number == signal.SIGINT or time.monotonic() - first > ECHO):
            raise KeyboardInterrupt
        first = first if caught else time.monotonic()
        caught.append(number)

    try:
        previous = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals reach the main thread only
        previous = {}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def versions() -> dict[str, str]:
    return {
        "ctt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
