"""The dry run: all that a run looks at before its first step, and the memory and time it takes."""

from __future__ import annotations

from pathlib import Path

from ctt import checkpoint, run
from ctt.console import plain_console
from ctt.processes import world_size
from ctt.settings import Settings
from ctt.train import loggers
from ctt.train.cost import CARDS, card_of, cost_table, step_operations
from ctt.train.memory import ACTIVATIONS, MOMENTA, estimate, memory_table
from ctt.train.pace import duration, seconds_of_step
from ctt.train.plan import Plan
from ctt.train.resuming import finished, loading, nothing_left
from ctt.train.rounds import Rounds


def dry_run(
    settings: Settings,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    card: str = "",
    cards: int = 0,
) -> None:
    """Look at all that `train` looks at, and tell what memory and time a run takes.

    No file is written.

    Args:
        card: whose hours are estimated, see `ctt.train.cost.CARDS`; empty: all of them.
        cards: how many, beside one; 0: as many as there are processes.

    Raises:
        UserError: settings, data, weights or folders that cannot work, or no such card.
    """
    names = [card] if card else list(CARDS)
    for name in names:
        card_of(name)
    processes = world_size()
    loggers.check(settings)
    begun = run.begun(resume)
    plan = Plan.of(settings, begun, processes)
    if begun is None:
        if resume is None:
            run.check_new(out)
        start, broken, done = "start", "", 0
    else:
        saved, broken = checkpoint.load_last(begun / run.CHECKPOINT)
        done = int(saved["iteration"])
        start = f"go on after iteration {done}"
    settings = plan.settings
    method = plan.build(finish=False)
    rounds = Rounds(method.rounds(), settings.train.iterations).rounds
    console = plain_console()
    if begun is not None:
        with loading(saved, plan, begun, len(rounds)):
            method.load_state_dict(saved["method"])
        if finished(begun, done, settings.train.iterations) is not None:
            told = nothing_left(begun, settings.train.iterations, len(rounds))
            console.print(told, soft_wrap=True)
            return
    sketch = plan.sketch(method)
    parts = estimate(settings, method, plan.dataset.info, plan.about)
    console.print(
        f"{settings.method} with {plan.pairs} pair{'s' * (plan.pairs > 1)} on {settings.dataset} "
        f"would {start} with {len(plan.labeled)} labelled and {len(plan.unlabeled)} unlabelled "
        f"images. Nothing is written.",
        sketch,
        *plan.notes(broken),
        sep="\n",
        soft_wrap=True,
    )
    console.print(memory_table(per_process(parts, settings, processes), settings, plan.device))
    operations = step_operations(settings, method, plan.dataset.info, plan.about)
    labels = any(kind.images == "kept" for kind in rounds)
    del method
    left = settings.train.iterations - done
    if operations is not None and ACTIVATIONS in parts:
        needed = {n: sum(per_process(parts, settings, n).values()) for n in {1, cards or processes}}
        console.print(cost_table(operations, needed, settings, left, names))
    if (seconds := seconds_of_step(plan, parts, done)) is not None:
        more = " and the labelling between rounds come" if labels else " comes"
        console.print(
            f"The {left} iterations take about {duration(seconds * left)} here ({seconds:.2g} s "
            f"each), and evaluation{more} on top."
        )


def per_process(parts: dict[str, int], settings: Settings, processes: int) -> dict[str, int]:
    """Return `parts` of one of `processes` processes: a sharded optimiser holds its share alone."""
    if not settings.train.shard_optimizer:
        return parts
    return parts | {MOMENTA: -(-parts[MOMENTA] // processes)}
