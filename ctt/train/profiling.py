"""Where the time of a step goes: a table of its phases, and a trace of every kernel."""

import time
from pathlib import Path

import torch
from rich.table import Table

from ctt.settings import PROFILE_WARM_UP
from ctt.train.phases import Phases

TRACE = "trace.json"


class Profile:
    """Times the phases of some steps after the first ten, and traces as many that follow.

    They are not the same steps, because tracing slows the host.

    Args:
        steps: how many.
        folder: of the run, for trace.json (chrome://tracing, ui.perfetto.dev).
    """

    def __init__(self, steps: int, phases: Phases, folder: Path) -> None:
        self.steps, self.phases, self.path = steps, phases, folder / TRACE
        self._done = 0
        self._start = 0.0
        self._profiler: torch.profiler.profile | None = None

    def after_step(self) -> Table | None:
        """Return the table, once, when its last step is over."""
        self._done += 1
        table = None
        if self._done == PROFILE_WARM_UP:
            self.phases.seconds()  # waits for the device
            self.phases.timing, self._start = True, time.perf_counter()
        elif self._done == PROFILE_WARM_UP + self.steps:
            spent = self.phases.seconds()
            table = phase_table(spent, time.perf_counter() - self._start, self.steps)
            self.phases.timing = False
            self._profiler = torch.profiler.profile()  # of all devices that are here
            self._profiler.start()
        elif self._done == PROFILE_WARM_UP + 2 * self.steps:
            self.close()
        return table

    def leave_out(self, seconds: float) -> None:
        """Leave out time between steps, such as that of an evaluation."""
        self._start += seconds

    def close(self) -> None:
        """Write the trace, if it was begun."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None


def phase_table(spent: dict[str, float], seconds: float, steps: int) -> Table:
    """Return a table of the milliseconds and the share of each phase.

    Args:
        spent: seconds of each phase, summed over the steps.
        seconds: of all `steps` together.
    """
    table = Table(title=f"a step, mean of {steps}")
    table.add_column("phase")
    table.add_column("ms", justify="right")
    table.add_column("share, %", justify="right")
    for name, value in {**spent, "the rest": seconds - sum(spent.values())}.items():
        table.add_row(name, f"{1000 * value / steps:.1f}", f"{100 * value / seconds:.1f}")
    table.add_section()
    table.add_row("all", f"{1000 * seconds / steps:.1f}", "100")
    return table
