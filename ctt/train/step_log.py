"""What a run tells of its steps: a row of numbers every few of them, the time left, warnings."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from ctt.train.contract import checked_report
from ctt.train.engine import Engine
from ctt.train.pace import duration
from ctt.train.record import Recorder

LOST = "lost_pixels"  # share of unlabelled pixels without a finite probability of a teacher
WORTH_TELLING = 30.0  # seconds that are left
ENOUGH = 5.0  # seconds of steps on a CPU from which the others are estimated
FEWEST = 3  # of these steps


class StepLog:
    """Writes rows about the steps, and prints once what the user should know of them.

    Attributes:
        recorder: takes the rows; None in all processes but the first, which write none.
    """

    def __init__(self, engine: Engine, console: Console, recorder: Recorder | None) -> None:
        self.engine, self.console, self.recorder = engine, console, recorder
        self.paced = False  # the time that is left has been told in this stage
        self.begun: tuple[int, float] | None = None  # iteration and seconds after its first step
        self.warned = False  # of pixels for which the teachers gave no finite probability

    def row(
        self, show: Callable[..., None], means: dict[str, float], speed: float, waiting: float
    ) -> None:
        """Write a row of the steps since the one before.

        Args:
            show: takes a line of losses for the progress bar.
            means: of the terms and of what the method logs.
            speed: images a second.
            waiting: share of the time in which there was no batch.
        """
        if self.recorder is None:
            return
        if means.get(LOST, 0.0) > 0:
            self._warn_of_lost_pixels(means[LOST])
        method = self.engine.method
        values = {name: value for name, value in means.items() if name in method.logged}
        means = {name: value for name, value in means.items() if name not in values}
        values |= {f"loss_{name}": value for name, value in means.items()}
        values |= checked_report(method, method.report())
        rate = next(iter(self.engine.optimizers.values())).param_groups[0]["lr"]
        values |= {"lr": float(rate), "images_per_second": speed, "input_wait": waiting}
        self.recorder.write(self.engine.iteration, values)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items() if name != "total")
        show(losses=f"{shown}  {speed:.0f} images/s")

    def time_left(self, total: int, seconds: float, is_row: bool) -> None:
        """Print how long the run will take: after a few steps on a CPU, else after a row.

        It is told once in each stage of the method, whose steps do more than those before. The
        first step of a stage does not count, for much of it is done only once.

        Args:
            total: iterations of the run.
            seconds: of training so far.
            is_row: the step ends a row, for which the device has done all its work.
        """
        done, stage = self.engine.iteration, self.engine.method.stage
        if self.begun is None or stage(done - 1) != stage(self.begun[0] - 1):
            self.begun, self.paced = (done, seconds), False
        steps, spent = done - self.begun[0], seconds - self.begun[1]
        early = self.engine.device.type == "cpu" and steps >= FEWEST and spent >= ENOUGH
        if self.paced or steps == 0 or not (is_row or early):
            return
        self.paced = True
        if (left := (total - done) * spent / steps) > WORTH_TELLING:
            later = next((i for i in range(done, total) if stage(i) != stage(done - 1)), None)
            told = f"About {duration(left)} to go, without evaluation."
            if later is not None:
                told = (
                    f"About {duration(left)} to go at this speed, without evaluation; from "
                    f"iteration {later} on a step does more."
                )
            self.console.print(told, soft_wrap=True)

    def _warn_of_lost_pixels(self, share: float) -> None:
        """Print once that a teacher gives no finite probabilities."""
        if self.warned:
            return
        self.warned = True
        self.console.print(
            f"Warning: at iteration {self.engine.iteration} the teachers gave no finite "
            f"probability for {share:.1%} of the unlabelled pixels, and nothing is learnt there. "
            f"If the share stays, train without `train.amp` fp16, or look at `model.weights` for "
            f"batch norms with bad statistics; {LOST} in metrics.csv shows it.",
            soft_wrap=True,
        )
