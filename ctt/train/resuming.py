"""What a run that goes on must fit, and whether it has anything left to do."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctt import checkpoint, methods, run
from ctt.data.dataset import first_difference
from ctt.errors import UserError
from ctt.settings import WITHOUT_EFFECT, Settings, to_dict
from ctt.train import same_data
from ctt.train.loggers import flattened
from ctt.train.plan import Plan, check_iterations, check_joined, check_rounds


def resume_hint(folder: Path | None) -> str:
    """Return a hint to append to an error: how to resume from the last checkpoint."""
    if folder is None or not run.has_checkpoint(folder):
        return ""
    return f" The last checkpoint is whole: `resume` {shlex.quote(str(folder))} goes on from it."


@contextlib.contextmanager
def loading(saved: dict[str, Any], plan: Plan, folder: Path, rounds: int) -> Iterator[None]:
    """Check that a run can go on from a checkpoint, and load its networks within the context.

    Args:
        saved: the checkpoint.
        plan: what the run would go on with.
        folder: of the run.
        rounds: how many the method has.

    Raises:
        UserError: the data or the settings are others than the checkpoint fits, or it does not
            fit the networks.
    """
    path = folder / run.CHECKPOINT
    trained = checkpoint.info_of(saved)
    difference = first_difference(trained, plan.dataset.info) if trained else ""
    before, now = saved.get("data", {}), same_data.facts(plan.dataset, plan.labeled)
    if difference := difference or same_data.difference(before, now):
        raise UserError(
            f"{path}: its networks were trained on other data than the run would go on with: "
            f"{difference}. Restore the dataset as it was, its dataset.yaml above all, or start a "
            f"new run."
        )
    plan.dataset.notes += (*same_data.changed(before, now), *changed_method(folder, plan.settings))
    try:
        yield
    except (RuntimeError, KeyError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if not line.endswith(":")), lines[0])
        what, mend = "the settings of its run", "Restore the run's config.yaml"
        own = to_dict(plan.settings)["options"]
        before = saved["settings"].get("options", {})
        if changed := [f"`options.{n}` {v}" for n, v in own.items() if before.get(n, v) != v]:
            what, mend = " and ".join(changed), "Leave out what differs from the run"
        raise UserError(
            f"{path} does not fit {what} ({reason}). {mend}, or start a new run."
        ) from None
    done = int(saved["iteration"])
    check_iterations(plan.settings, done)
    check_joined(saved["settings"], plan.settings, done)
    if rounds > 1:
        check_rounds(saved["settings"], plan.settings)
    if done == plan.settings.train.iterations:
        check_unchanged(folder, plan.asked, rounds)


def changed_method(folder: Path, settings: Settings) -> Iterator[str]:
    """Yield a sentence if a method of one's own is not in the file that the run began with."""
    own, kept = methods.own_file(settings.method), folder / run.METHOD
    if own is None or not kept.is_file():
        return
    if own[0].samefile(kept):
        yield f"The run goes on with its own copy of the method, {kept}."
    elif kept.read_bytes() != own[0].read_bytes():
        yield (
            f"Warning: {own[0]} has changed since the run began, and the run goes on with it as it "
            f"is now."
        )


def check_unchanged(folder: Path, asked: Settings, rounds: int) -> None:
    """Refuse other settings for a run whose iterations are done: it was not trained with them.

    Raises:
        UserError: names the settings.
    """
    total = asked.train.iterations
    summary, known = finished(folder, total, total) or {}, asked.hash()
    if summary.get("settings_hash") == known:
        return  # files that the settings name may have moved since
    old = replace(run.read_settings(folder), data_root=asked.data_root)
    if old.hash() == known:
        return
    before, after = (dict(flattened(to_dict(run.with_whole_paths(s)))) for s in (old, asked))
    names = {f"{group}.{n}" for group, within in WITHOUT_EFFECT.items() for n in within}
    changed = [n for n in after if before.get(n) != after[n] and n not in names]
    further = "give a larger `train.iterations`, to train further with it"
    raise UserError(
        f"All {total} iterations of the run in {folder} are done, and no step is "
        f"left for what differs from its {run.CONFIG} now: `{'`, `'.join(changed)}`. Leave it out, "
        f"or {further if rounds == 1 else 'start a new run'}."
    )


def finished(folder: Path, done: int, total: int) -> dict[str, Any] | None:
    """Return the summary of a run that has nothing left to do, else None.

    Args:
        done: its iterations.
        total: those that it is to do.
    """
    if done < total:
        return None
    try:
        summary = json.loads((folder / run.SUMMARY).read_text("utf-8"))
    except (OSError, ValueError):
        return None  # it is written anew
    whole = isinstance(summary, dict) and summary.get("iterations") == total
    return summary if whole else None


def nothing_left(folder: Path, total: int, rounds: int) -> str:
    """Return the sentences about a run that is finished.

    Args:
        total: its iterations.
        rounds: how many its method has; more iterations would move them.
    """
    told = f"The run in {folder} is finished: all {total} iterations are done and evaluated."
    if rounds > 1:
        return f"{told} To train longer, start a new run: its rounds fit so many iterations alone."
    return f"{told} To train further, give a larger `train.iterations`."
