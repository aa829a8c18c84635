"""The dry run: all that a run looks at before its first step, and the memory that it will take."""

from __future__ import annotations

import os
from pathlib import Path

from ctt import checkpoint, run
from ctt.console import plain_console
from ctt.settings import Settings
from ctt.train.memory import estimate, memory_table
from ctt.train.pace import duration, seconds_of_step
from ctt.train.plan import Plan, check_iterations


def dry_run(settings: Settings, *, out: Path | None = None, resume: Path | None = None) -> None:
    """Look at all that `train` looks at, and tell what memory a run takes; no file is written.

    Raises:
        UserError: settings, data, weights or folders that cannot work.
    """
    begun = run.begun(resume)
    plan = Plan.of(settings, begun, int(os.environ.get("WORLD_SIZE", "1")))
    if begun is None:
        if resume is None:
            run.check_new(out)
        start, broken, done = "start", "", 0
    else:
        saved, broken = checkpoint.load_last(begun / run.CHECKPOINT)
        done = int(saved["iteration"])
        check_iterations(settings, done)
        start = f"go on after iteration {done}"
    settings = plan.settings
    method = plan.build(finish=False)
    sketch = plan.sketch(method)
    parts = estimate(settings, method, plan.source.info, plan.about)
    console = plain_console()
    console.print(
        f"{settings.method} with {plan.pairs} pairs on {settings.dataset} would {start} with "
        f"{len(plan.labeled)} labelled and {len(plan.unlabeled)} unlabelled images. Nothing is "
        f"written.",
        sketch,
        *plan.notes(broken),
        sep="\n",
        soft_wrap=True,
    )
    console.print(memory_table(parts, settings, plan.device))
    del method
    if (seconds := seconds_of_step(plan)) is not None:
        left = settings.train.iterations - done
        console.print(
            f"The {left} iterations take about {duration(seconds * left)} here ({seconds:.2g} s "
            f"each), and evaluation comes on top."
        )
