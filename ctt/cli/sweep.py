"""ctt-sweep: train the runs of a named experiment, and write one table of them."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ctt import methods, recipes
from ctt.cli import train
from ctt.cli.common import INTERRUPTED, refuse_torchrun, run_program
from ctt.errors import UserError
from ctt.experiments import budgets, catalog, results
from ctt.settings import Settings, validate
from ctt.text import say

if TYPE_CHECKING:
    from ctt.experiments.catalog import Experiment, Variant
    from ctt.experiments.results import Row
    from ctt.experiments.runs import Run

SOME_FAILED = 1  # exit code
MANY = 2**62  # images, where only the form of a share is looked at
OWN = (
    *("--seed", "--ratio", "--method"),
    *("--resume", "--auto-resume", "--dry-run", "--list-methods"),
)


@dataclass(frozen=True)
class Arguments:
    """Train the runs of a named experiment, and write one table of them.

    Options of `ctt-train` may follow, such as --train.iterations 500, and hold for every run whose
    method reads them. The same command again resumes interrupted runs, repeats failed ones and
    skips finished ones.
    """

    experiment: str
    """Name of an experiment; --list prints them."""
    dataset: str = "digits"
    """Name of the dataset; `ctt-train --help` lists them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every run is done with each of them; a seed draws labels, weights and views."""
    shares: tuple[str, ...] = ()
    """Labelled shares as --ratio takes them; by default those of the experiment for this dataset,
    or that of the recipe."""
    only: tuple[str, ...] = ()
    """Rows of the experiment that are wanted, by name; by default all."""
    jobs: int = 1
    """Runs at a time, in processes of this machine. They share its cores, and have one GPU each in
    turn where it has several."""
    out: Path | None = None
    """Folder of the runs and the tables; by default sweeps/DATASET. Experiments in one folder
    share the runs that they have in common."""
    print: bool = False
    """Print the commands of the runs that are not finished, one a line, for any scheduler, and
    write the table of those that are."""
    submit: tuple[str, ...] | None = None
    """Submit the runs to a Slurm cluster by the package submitit with these parameters of it, such
    as timeout_min=600 slurm_partition=gpu. Jobs that are preempted go on later."""


def main() -> None:
    """Run the program."""
    run_program("ctt-sweep", lambda: _main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    import tyro

    if "--list" in arguments:
        list_experiments()
        return 0
    parsed, given = tyro.cli(
        Arguments,
        prog="ctt-sweep",
        args=arguments,
        return_unknown_args=True,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    refuse_torchrun("ctt-sweep", " --jobs trains several runs at a time.")
    check(parsed, given)
    from ctt.experiments import pool
    from ctt.experiments.runs import unique
    from ctt.experiments.table import write_results

    out = parsed.out or Path("sweeps") / parsed.dataset
    runs = list(plan(parsed, given, out))
    table = out / f"{parsed.experiment}.csv"
    command = ["ctt-sweep", *(text for text in arguments if text != "--print")]

    check_kept(table, runs)
    if idle := unread(parsed, given):
        say(f"Note: {', '.join(idle)}: no method of these rows reads this.", file=sys.stderr)

    def write() -> list[Row]:
        out.mkdir(parents=True, exist_ok=True)
        return write_results(table, runs, command)

    finished = {row["settings_hash"] for row in write() if row["status"] == results.DONE}
    left = [r for r in unique(runs) if r.folder.name not in finished]
    if parsed.print:
        for r in left:
            print_command(r)
        return 0
    if parsed.submit is not None:
        submit(left, parsed.submit, given, out, parsed.jobs)
        return 0
    total = len(unique(runs))
    ready = f"{total - len(left)} of {total} runs are finished"
    say(f"{parsed.experiment} on {parsed.dataset}: {ready}.")
    ended = 0

    def done(r: Run, good: bool) -> None:
        nonlocal ended
        ended += 1
        row = r.row()
        what = f"mIoU {row['last']}, {row['seconds']} s" if good else "not finished"
        if row.get("error") and not good:
            what = f"failed: {row['error']}"
        say(f"[{ended}/{len(left)}] {r.name}: {what}")
        try:
            write()
        except UserError as error:  # it is written again after the next run, and in the end
            say(f"Not written: {error}")

    tried = pool.train_all(left, pool.places(parsed.jobs, given), done)
    rows = write()
    if not tried:
        say("Stopped; the same command goes on.")
        return INTERRUPTED
    failed = sum(row["status"] != results.DONE for row in rows)
    say(f"{len(rows) - failed} of {len(rows)} rows are in {table}")
    return SOME_FAILED if failed else 0


def check_kept(table: Path, runs: Sequence[Run]) -> None:
    """Refuse to write a table without the finished runs that it has.

    Raises:
        UserError: names the table and one of them.
    """
    if not table.is_file():
        return
    planned = {r.folder.name for r in runs}
    lost = [
        row
        for row in results.read(table)
        if row["status"] == results.DONE and row.get("settings_hash") not in planned
    ]
    if lost:
        first = ", ".join(lost[0][name] for name in ("variant", "share", "budget") if lost[0][name])
        raise UserError(
            f"{table} has {len(lost)} finished runs that this command does not train, such as "
            f"{first}, seed {lost[0]['seed']}. Repeat the command in {table.with_suffix('.yaml')} "
            f"and add to it, give another --out, or move the table away. If this is that command, "
            f"the recipe, the data or the program has changed since, and so have the runs: give "
            f"another --out."
        )


def list_experiments() -> None:
    """Print a table of the experiments."""
    from rich.table import Table

    from ctt.console import plain_console

    table = Table(title="experiments", caption="Tables are those of Xiao et al., 2022.")
    for column in ("experiment", "source", "what it asks", "rows"):
        table.add_column(column, no_wrap=column == "experiment")
    for name, experiment in catalog.EXPERIMENTS.items():
        rows = ", ".join(variant.name for variant in experiment.variants)
        table.add_row(name, experiment.source, experiment.what, rows)
    plain_console().print(table)


def check(parsed: Arguments, given: Sequence[str]) -> None:
    """Refuse arguments that cannot work.

    Raises:
        UserError: names the option.
    """
    from ctt.experiments.runs import option_name

    catalog.get(parsed.experiment).chosen(parsed.only)
    if parsed.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {parsed.jobs}.")
    if not parsed.seeds:
        raise UserError("--seeds needs at least one number.")
    for name, values in (("seeds", parsed.seeds), ("shares", parsed.shares)):
        for value in values:
            if values.count(value) > 1:
                raise UserError(f"--{name} {value} is given twice, and would count twice.")
    named = {text.partition("=")[0].replace("_", "-") for text in given if text[:2] == "--"}
    rows = catalog.get(parsed.experiment).chosen(parsed.only)
    for name in sorted(named):
        setting = option_name(name)
        reading = [
            v for v in rows if methods.get(v.method).reads(setting, pairs_of((*given, *v.options)))
        ]
        if reading and all(setting in map(option_name, v.options) for v in reading):
            raise UserError(
                f"{name}: the rows of {parsed.experiment} set this themselves. Leave it out."
            )
    for name in OWN:
        if name in named:
            instead = {"--seed": ". Give --seeds", "--ratio": ". Give --shares"}.get(name, "")
            raise UserError(f"{name} is not for all runs of an experiment{instead}.")
    if given and not given[0].startswith("--"):
        raise UserError(f"{given[0]}: this belongs to no option. Give one experiment at a time.")


@dataclass(frozen=True)
class Way:
    """A row of an experiment as this command trains it.

    Attributes:
        options: those of `ctt-train`, without labels, seed and budget.
    """

    variant: Variant
    options: tuple[str, ...]
    settings: Settings


def plan(parsed: Arguments, given: Sequence[str], out: Path) -> Iterator[Run]:
    """Yield the runs, those of the first seed first.

    Raises:
        UserError: options that cannot work.
    """
    from ctt.experiments.runs import RUNS, Run

    experiment = catalog.get(parsed.experiment)
    wanted = experiment.chosen(parsed.only)
    # a budget is a share of what the costliest row costs, whether this row is wanted or not
    rows = experiment.variants if experiment.budgets else wanted
    ways = [way(parsed, given, variant) for variant in rows]
    for seed in parsed.seeds:
        validate(dataclasses.replace(ways[0].settings, seed=seed))
        for share, w in itertools.product(shares(parsed, ways[0].settings), ways):
            if w.variant not in wanted or lacks_unlabeled(parsed, share, w):
                continue
            for budget, settings, more in lengths(w, experiment, ways):
                settings = dataclasses.replace(settings, seed=seed, ratio=share)
                yield Run(
                    experiment=parsed.experiment,
                    share=share,
                    budget=budget,
                    variant=w.variant.name,
                    arguments=(*w.options, "--ratio", share, "--seed", str(seed), *more),
                    settings=settings,
                    folder=out / RUNS / settings.hash(),
                )


def way(parsed: Arguments, given: Sequence[str], variant: Variant) -> Way:
    """Return how a row is trained; its method is named, because a recipe may have another."""
    own = () if "--method" in variant.options else ("--method", variant.method)
    pairs = pairs_of((*given, *variant.options))
    user, rest = (fitting(options, variant, pairs) for options in (given, variant.options))
    options = ["--dataset", parsed.dataset, *user, *own, *rest]
    read, settings = train.read(options)
    return Way(variant, (*options, *default_recipe(read, given)), settings)


def shares(parsed: Arguments, settings: Settings) -> tuple[str, ...]:
    """Return the labelled shares of the runs.

    Raises:
        UserError: a share that is none, or several of one list of labelled images.
    """
    from ctt.data.split import parse_ratio
    from ctt.experiments.runs import data_name

    of_dataset = catalog.get(parsed.experiment).shares.get(data_name(settings), ())
    found = parsed.shares or of_dataset or (settings.ratio,)
    by_count: dict[int, list[str]] = {}
    for share in found:
        by_count.setdefault(parse_ratio(share, MANY), []).append(share)
    for same in by_count.values():
        if len(same) > 1:
            raise UserError(f"--shares {' '.join(same)} are one share, and would count twice.")
    if settings.split_labeled is not None and len(found) > 1:
        raise UserError(
            f"`split_labeled` {settings.split_labeled} is one share of labels, and --shares "
            f"{' '.join(found)} would train on it {len(found)} times. Give one --shares."
        )
    return found


def lacks_unlabeled(parsed: Arguments, share: str, w: Way) -> bool:
    """Return whether a row has no unlabelled images at a share that the experiment itself names.

    The paper, too, has supervised training alone for all labels. A share of the user or of the
    recipe is tried, because a folder may have unlabelled images beside those with labels.
    """
    from ctt.experiments.runs import data_name

    own = catalog.get(parsed.experiment).shares.get(data_name(w.settings), ())
    if parsed.shares or share not in own:
        return False
    return share == "1/1" and methods.get(w.variant.method).unlabeled


def lengths(
    w: Way, experiment: Experiment, ways: Sequence[Way]
) -> Iterator[tuple[str, Settings, list[str]]]:
    """Yield the budgets of a row: name, settings and the options that make these."""
    if not experiment.budgets:
        yield "", w.settings, []
        return
    yield catalog.EQUAL_ITERATIONS, w.settings, []
    most = max(budgets.forwards(other.settings) for other in ways)
    for budget in experiment.budgets:
        length = budgets.iterations(w.settings, most, budget)
        yield f"cost {budget}", *budgets.of_length(w.settings, length)


def default_recipe(read: train.Arguments, given: Sequence[str]) -> list[str]:
    """Return the option that names the recipe of the dataset, if the user leaves it open.

    What it is may depend on whether the machine has a GPU, and the runs may train on another one.
    """
    named = any(text.partition("=")[0] == "--recipe" for text in given)
    if read.config is not None:
        named |= bool(recipes.load_file(read.config).get("recipe"))
    return ["--recipe", read.recipe] if read.recipe and not named else []


def pairs_of(options: Sequence[str]) -> int:
    """Return the number of pairs that options ask for; 0 if they leave it open."""
    words = [word for text in options for word in text.split("=", 1)]
    asked = [value for name, value in itertools.pairwise(words) if name == "--pairs"]
    return int(asked[-1]) if asked and asked[-1].isdecimal() else 0


def fitting(options: Sequence[str], variant: Variant, pairs: int) -> list[str]:
    """Return options without those that change nothing with the variant's method and pairs."""
    from ctt.experiments.runs import option_name

    kept, keep = [], True
    for text in options:
        if text.startswith("--"):
            keep = methods.get(variant.method).reads(option_name(text), pairs)
        if keep:
            kept.append(text)
    return kept


def unread(parsed: Arguments, given: Sequence[str]) -> list[str]:
    """Return the user's options that change nothing in the rows that are trained."""
    rows = catalog.get(parsed.experiment).chosen(parsed.only)
    kept = {text for v in rows for text in fitting(given, v, pairs_of((*given, *v.options)))}
    return [text for text in given if text.startswith("--") and text not in kept]


def print_command(r: Run) -> None:
    """Print what trains a run."""
    say(shlex.join(["ctt-train", *r.command()]))


def submit(
    runs: Sequence[Run], parameters: Sequence[str], given: Sequence[str], out: Path, jobs: int
) -> None:
    """Submit the runs to a cluster.

    Args:
        parameters: `name=value` of submitit's executor.
        jobs: at a time; 1 sets no limit.

    Raises:
        UserError: a parameter that submitit does not take.
    """
    from ctt.experiments.cluster import is_submitted, submit_all

    new = [r for r in runs if not is_submitted(r, out / "jobs")]
    if len(new) < len(runs):
        say(
            f"{len(runs) - len(new)} of the runs have jobs that wait or work (`squeue` tells). "
            f"They are not submitted again."
        )
    if not new:
        return
    try:
        names = submit_all(new, parameters, given, out / "jobs", jobs)
    except (NameError, ValueError, RuntimeError) as error:
        raise UserError(f"--submit: {' '.join(str(error).split())}") from None
    counted = "1 job is" if len(names) == 1 else f"{len(names)} jobs are"
    say(
        f"{counted} submitted; what they print is in {out / 'jobs'}. The same command "
        f"with --print instead of --submit writes the table of what is finished."
    )
