"""The training loop."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shlex
import shutil
import time
from collections.abc import Generator, Iterator
from pathlib import Path
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

from ctt import __version__, checkpoint, run
from ctt.console import plain_console
from ctt.data.loader import DrawSampler, ViewDataset, load, lost_worker
from ctt.data.prepare import Prepared
from ctt.data.split import write_list
from ctt.data.views import GeometricView
from ctt.device import device_name
from ctt.errors import LoaderError, UnwritableError, UserError
from ctt.files import written
from ctt.inference.evaluate import (
    Score,
    as_json,
    confusions,
    hash_of_list,
    score,
    score_table,
    write_json,
)
from ctt.inference.figures import draw_samples
from ctt.inference.predict import is_out_of_memory
from ctt.settings import Settings, to_dict
from ctt.text import BYTES_AS_THEY_ARE
from ctt.train import measures
from ctt.train.distributed import World, join
from ctt.train.engine import Engine
from ctt.train.feed import Feed
from ctt.train.plan import Plan, check_iterations, check_rounds
from ctt.train.profiling import Profile
from ctt.train.record import Recorder, draw_curves
from ctt.train.rounds import KeptLabels, Labeling, folder_of, images_of
from ctt.train.setup import images_of_any_size
from ctt.train.signals import interrupt_flag

SUMMARY = "summary.json"
LOST = "lost_pixels"  # share of unlabelled pixels without a finite probability of a teacher
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
            with trainer.lock:
                return trainer.train()
        except (UnwritableError, LoaderError) as error:
            raise UserError(f"{error}{way_on(folder)}") from None
        except RuntimeError as error:
            if text := lost_worker(error):
                raise UserError(f"{text}{way_on(folder)}") from None
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"There is not enough memory for a step of this run. Give a smaller "
                f"--data.batch-size, --train.accumulate N to take it in N parts, or --train.amp "
                f"bf16; --dry-run tells what a run takes.{way_on(folder)}"
            ) from None


def way_on(folder: Path | None) -> str:
    """Return what is left of a run that failed, as the end of a message."""
    if folder is None or not run.has_checkpoint(folder):
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
        self.console = plain_console(quiet=not world.is_main)
        self.plan = plan = Plan.of(settings, resume, world.size)
        self.source, self.labeled, self.unlabeled = plan.source, plan.labeled, plan.unlabeled
        self.uses_unlabeled, self.device = plan.about.unlabeled, plan.device
        self.method = plan.build()
        self.engine = Engine(self.method, settings, self.source.info, self.device, world)
        self.seconds, self.waited = 0.0, 0.0  # of training, and of it without a batch
        self.best: dict[str, Any] | None = None
        self.warned = False  # of pixels for which the teachers gave no finite probability
        self.streams: list[Generator[tuple[Tensor, Tensor]]] = []  # of batches
        self.sums: dict[str, Tensor] = {}  # of each loss since the last row of metrics.csv
        self.summed = 0  # steps in them
        self.broken = ""  # what is wrong with the last checkpoint
        if resume is None:
            self.folder = Path(world.tell(str(self._create(out)) if world.is_main else ""))
        else:
            self.folder = run.find(resume)
            saved, self.broken = checkpoint.load_last(self.folder / run.CHECKPOINT)
            self._load(saved)
        self.sound = self.engine.iteration  # until which all weights are known to be numbers
        self.lock = run.lock(self.folder) if world.is_main else contextlib.nullcontext()

    def _create(self, out: Path | None) -> Path:
        folder = run.create(out, self.settings)
        (folder / run.LABELED_LIST).parent.mkdir(exist_ok=True)
        write_list(folder / run.LABELED_LIST, self.labeled)
        write_list(folder / run.UNLABELED_LIST, self.unlabeled)
        write_list(folder / run.EVALUATION_LIST, self.source.eval_ids())
        own = Path(self.settings.method.rpartition(":")[0])
        if own.suffix == ".py":
            shutil.copyfile(own, folder / "method.py")
        return folder

    def train(self) -> dict[str, Any]:
        """Run to the last iteration, evaluate, and write everything the run folder holds."""
        settings, engine = self.settings, self.engine
        total = settings.train.iterations
        if (finished := self._finished()) is not None:
            self.console.print(
                f"The run in {self.folder} is finished: all {total} iterations are done and "
                f"evaluated. To train further, give a larger --train.iterations.",
                soft_wrap=True,
            )
            return finished
        recorder: Recorder | None = None
        if self.world.is_main:
            run.write_settings(self.folder, settings)  # for the next time it is resumed
            if self.broken:  # the next checkpoint must not take the place of the whole one
                (self.folder / run.CHECKPOINT).unlink(missing_ok=True)
            recorder = Recorder(
                self.folder,
                self.method,
                engine.iteration,
                settings.train.tensorboard,
                measures.names(self.method.networks()) if self._measured() else (),
            )
        self._announce()
        scores: dict[str, Score] = {}
        try:
            with (
                interrupt_flag() as interrupted,
                self._progress() as progress,
                self._profile() as profile,
            ):
                bar = progress.add_task("", total=total, completed=engine.iteration, losses="")
                for _ in self._steps(recorder, progress, bar, profile):
                    due = engine.iteration % self._every("eval_every") == 0
                    if due and engine.iteration < total:
                        self._evaluate(recorder)
                    due = engine.iteration % self._every("checkpoint_every") == 0
                    due |= engine.iteration in engine.rounds.starts  # files of the next one follow
                    if due and engine.iteration < total:
                        self._save()
                    if self.world.agree(bool(interrupted)) and engine.iteration < total:
                        self._save()
                        self.world.leave()
                        raise Stopped(self.folder, engine.iteration, self.world.is_main)
                self._save()
                scores = self._evaluate(recorder)
                self._save(keep=False)  # with what was found to be the best network
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
        if self.engine.iteration < self.settings.train.iterations or not path.is_file():
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
        profile = Profile(self.settings.train.profile, self.engine.step.phase, self.folder)
        try:
            yield profile
        finally:
            profile.close()

    def _steps(
        self, recorder: Recorder | None, progress: Progress, bar: Any, profile: Profile | None
    ) -> Iterator[None]:
        """Do the steps that are left; yields after each one."""
        settings, engine = self.settings, self.engine
        feed, end = self._feed(), self._end_of_round()
        taken, start = 0, time.perf_counter()  # steps since the start of a row or of this process
        clock = start
        while engine.iteration < settings.train.iterations:
            if engine.iteration == end:
                feed, end = self._feed(), self._end_of_round()
            for name, value in engine(*feed()).items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            taken, self.summed = taken + 1, self.summed + 1
            due = engine.iteration % settings.train.log_every == 0
            due |= engine.iteration == settings.train.iterations
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
            progress.update(bar, completed=engine.iteration)
            table = profile and profile.after_step()
            if table:
                self.console.print(table)
            yield
            # evaluation and checkpoints are not training time
            pause = time.perf_counter() - now
            start, clock = start + pause, now + pause
            if profile is not None:
                profile.leave_out(pause)

    def _feed(self) -> Feed:
        """Return the batches of the round that the next step belongs to, once it has begun."""
        engine, rounds = self.engine, self.engine.rounds
        number = rounds.at(engine.iteration)
        if number > 0 and engine.iteration == rounds.starts[number]:
            self.console.print(
                f"iteration {engine.iteration:>6}  round {number} begins: the networks label "
                f"images in {folder_of(self.folder, number)}",
                soft_wrap=True,
            )
            where = (self.source, self.unlabeled, self.folder, number, self.device, self.world)
            with images_of_any_size(self.settings.train.compile):
                engine.begin_round(Labeling(self.settings, *where))
        streams = {purpose: self._batches(purpose, ids) for purpose, ids in self._lists().items()}
        return Feed(streams["labeled"], streams.get("unlabeled"), engine.step.phase)

    def _end_of_round(self) -> int:
        return self.engine.rounds.starts[self.engine.rounds.at(self.engine.iteration) + 1]

    def _images_a_step(self) -> int:
        images = self.engine.rounds.rounds[self.method.round].images
        kinds = 2 if self.uses_unlabeled and images != "none" else 1
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
            raise self._diverged(f"the objective is no number any more ({bad})", self.summed)
        return sums

    def _check_weights(self) -> None:
        """Refuse to keep anything of weights that are no numbers any more."""
        state = self.method.state_dict()
        finite = {n: x.isfinite().all() for n, x in state.items() if x.is_floating_point()}
        if not bool(torch.stack(list(finite.values())).all()):
            lost = [name for name, good in finite.items() if not good]
            what = f"{len(lost)} tensors are no numbers any more, first {lost[0]}"
            raise self._diverged(what, self.engine.iteration - self.sound)
        self.sound = self.engine.iteration

    def _diverged(self, what: str, steps: int) -> UserError:
        """Return the error, having written down the images of the last `steps` steps."""
        return UserError(
            f"Training diverged: by iteration {self.engine.iteration} {what}. Lower --optim.lr, "
            f"set --optim.clip-norm or leave out --train.amp fp16; the last checkpoint in "
            f"{self.folder} is from before, and {self._tell_images(steps)} names the images of the "
            f"steps in question."
        )

    def _tell_images(self, steps: int) -> Path:
        """Write the names of the images of the last steps, and return the file."""
        path = self.folder / "diverged.txt"
        rounds = self.engine.rounds  # those before had other images
        steps = min(steps, self.engine.iteration - rounds.starts[self.method.round])
        first = self.engine.iteration - steps
        images = self.settings.data.batch_size * self.world.size
        lines = []
        for purpose, ids in self._lists().items():
            drawn = self.engine.drawn - steps * images
            sampler = DrawSampler(len(ids), images, drawn, steps, self.settings.seed, purpose)
            for i, batch in enumerate(sampler, first + 1):
                lines.append(f"iteration {i}, {purpose}: {', '.join(ids[k] for k, _ in batch)}\n")
        if self.world.is_main:
            with written(path) as part:
                part.write_text("".join(lines), "utf-8", BYTES_AS_THEY_ARE)
        return path

    def _lists(self) -> dict[str, list[str]]:
        """Return the images that this round draws its batches from, by the purpose of the draw."""
        number = self.engine.rounds.at(self.engine.iteration)
        images = self.engine.rounds.rounds[number].images if self.uses_unlabeled else "none"
        if images == "none":
            return {"labeled": self.labeled}
        more = self.unlabeled if images == "all" else images_of(self.folder, number)
        return {"labeled": self.labeled, "unlabeled": more}

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
        if means.get(LOST, 0.0) > 0:
            self._warn_of_lost_pixels(means[LOST])
        values = {name: value for name, value in means.items() if name in self.method.logged}
        means = {name: value for name, value in means.items() if name not in values}
        values |= {f"loss_{name}": value for name, value in means.items()}
        values |= self.method.report()
        rate = next(iter(self.engine.optimizers.values())).param_groups[0]["lr"]
        values |= {"lr": float(rate), "images_per_second": speed, "input_wait": waiting}
        recorder.write(self.engine.iteration, values)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items() if name != "total")
        progress.update(bar, losses=f"{shown}  {speed:.0f} images/s")

    def _warn_of_lost_pixels(self, share: float) -> None:
        """Print once that a teacher gives no finite probabilities."""
        if self.warned:
            return
        self.warned = True
        self.console.print(
            f"Warning: at iteration {self.engine.iteration} the teachers gave no finite "
            f"probability for {share:.1%} of the unlabelled pixels, and nothing is learnt there. "
            f"If the share stays, train without --train.amp fp16, or look at --model.weights for "
            f"batch norms with bad statistics; {LOST} in metrics.csv shows it.",
            soft_wrap=True,
        )

    def _batches(self, purpose: str, ids: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        s, d, rounds = self.settings, self.settings.data, self.engine.rounds
        view = GeometricView(
            d.crop, d.scale, d.flip, d.rotation, d.translation, self.source.info.mean
        )
        source = Prepared(self.source, d.resize, d.cache)
        number = rounds.at(self.engine.iteration)
        kept = purpose == "unlabeled" and rounds.rounds[number].images == "kept"
        if kept:
            source = KeptLabels(self.source, d.resize, d.cache, folder_of(self.folder, number))
        dataset = ViewDataset(source, ids, view, kept or purpose == "labeled", s.seed, purpose)
        sampler = DrawSampler(
            len(ids),
            d.batch_size,
            self.engine.drawn,
            rounds.starts[number + 1] - self.engine.iteration,
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
        self._check_weights()
        engine, world, networks = self.engine, self.world, self.method.networks()
        with images_of_any_size(self.settings.train.compile):
            matrices = confusions(
                networks,
                self.source,
                self.source.eval_ids()[world.rank :: world.size],
                self.device,
                self.settings.eval,
                self.settings.data.workers,
            )
            measured = measures.measure(
                networks,
                self.source,
                self._measured(),
                self.settings.eval,
                self.settings.loss.confidence_threshold,
                world,
            )
        scores = {name: score(world.total(matrix)) for name, matrix in matrices.items()}
        if recorder is None:
            return scores
        mious = {f"miou_{name}": score.miou for name, score in scores.items()}
        recorder.write(engine.iteration, mious | measured)
        shown = "  ".join(f"{name} {score.miou:.1f}" for name, score in scores.items())
        self.console.print(f"iteration {engine.iteration:>6}  mIoU  {shown}", soft_wrap=True)
        single = {name: s.miou_of_labeled for name, s in scores.items() if name != "ensemble"}
        name = max(single, key=lambda key: single[key])
        # checkpoints of earlier versions lack the mean over the labelled classes
        if self.best is None or single[name] > self.best.get("miou_of_labeled", self.best["miou"]):
            self.best = {
                "network": name,
                "iteration": engine.iteration,
                "miou": scores[name].miou,
                "miou_of_labeled": single[name],
                "chosen_on": self.settings.data.eval_split,
            }
            note = f"{name} after {engine.iteration} iterations, {self.settings.hash()}"
            checkpoint.save_network(
                self.folder / run.WEIGHTS,
                networks[name],
                self.source.info,
                note,
            )
        return scores

    def _measured(self) -> list[str]:
        """Return the unlabelled images to measure on, from all over the list."""
        count = min(self.settings.train.measured_images, len(self.unlabeled))
        return [self.unlabeled[i * len(self.unlabeled) // count] for i in range(count)]

    @record_function("checkpoint")
    def _save(self, keep: bool = True) -> None:
        sums = self._finite_sums()
        self._check_weights()
        if not self.world.is_main:
            return
        checkpoint.save(
            self.folder / run.CHECKPOINT,
            {
                **self.engine.state_dict(),
                "settings": to_dict(self.settings),
                "info": checkpoint.facts(self.source.info),
                "seconds": self.seconds,
                "waited": self.waited,
                "best": self.best,
                "sums": sums,
                "summed": self.summed,
            },
            keep,
        )

    def _load(self, saved: dict[str, Any]) -> None:
        try:
            self.engine.load_state_dict(saved)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.folder / run.CHECKPOINT} does not fit the settings of its run ({reason})."
            ) from None
        check_iterations(self.settings, self.engine.iteration)
        if len(self.engine.rounds.rounds) > 1:
            check_rounds(saved["settings"], self.settings)
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
        images = self.engine.drawn + self.engine.drawn_unlabeled
        summary = {
            **as_json(scores, info, s.eval),
            "dataset": s.dataset,
            "eval_split": s.data.eval_split,
            "images": len(self.source.eval_ids()),
            "images_sha256": hash_of_list(self.source.eval_ids()),
            "method": s.method,
            "pairs": self.plan.pairs,
            "seed": s.seed,
            "labeled": len(self.labeled),
            "unlabeled": len(self.unlabeled) if self.uses_unlabeled else 0,
            "best": self.best
            and {k: round(v, 2) if isinstance(v, float) else v for k, v in self.best.items()},
            "iterations": s.train.iterations,
            "images_drawn": images,
            "forwards": {"trained": self.engine.trained, "untrained": self.engine.untrained},
            "seconds": round(self.seconds, 1),
            "images_per_second": round(images / self.seconds, 1) if self.seconds else None,
            "input_wait": round(self.waited / self.seconds, 4) if self.seconds else None,
            "settings_hash": s.hash(),
            "processes": self.world.size,
            "device": device_name(self.device),
            "versions": versions(),
        }
        if not self.world.is_main:
            return summary
        write_json(self.folder / SUMMARY, summary)
        draw_curves(self.folder)
        networks = self.method.networks()
        shown = next(
            (name for name in networks if name.startswith("teacher")), next(iter(networks))
        )
        ids = self.source.eval_ids()[:SAMPLES]
        with images_of_any_size(s.train.compile):
            draw_samples(
                self.folder / "samples.png",
                networks[shown],
                self.source,
                ids,
                self.device,
                s.eval,
                f"{shown.replace('_', ' ')} after {s.train.iterations} iterations",
            )
        self.console.print(score_table(scores, info))
        self.console.print(
            f"{s.train.iterations} iterations in {self.seconds:.0f} s of training. "
            f"Everything is in {self.folder}",
            soft_wrap=True,
        )
        return summary

    def _announce(self) -> None:
        s, pairs = self.settings, self.plan.pairs
        start = (
            f", going on after iteration {self.engine.iteration}" if self.engine.iteration else ""
        )
        unlabeled = len(self.unlabeled) if self.uses_unlabeled else 0
        where = str(self.device)
        if self.world.size > 1:
            where = (
                f"{self.world.size} processes ({self.device.type}), "
                f"{s.data.batch_size * self.world.size} labelled images a step"
            )
        self.console.print(
            f"{s.method} with {pairs} pair{'s' * (pairs > 1)} on {s.dataset}: "
            f"{len(self.labeled)} labelled and {unlabeled} unlabelled images, "
            f"{s.train.iterations} iterations on {where}{start}. Run folder: {self.folder}",
            *([f"Warning: {self.broken}"] if self.broken else []),
            *self.source.notes,
            *self.plan.warnings(),
            sep="\n",
            soft_wrap=True,
        )
        for origin in dict.fromkeys(self.plan.origins):
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


def versions() -> dict[str, str]:
    return {
        "ctt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
