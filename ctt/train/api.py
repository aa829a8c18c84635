"""`ctt.train`: what ctt-train does, called from Python."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctt import recipes, run
from ctt.configure import Given, layered, named_in, refuse_unused
from ctt.errors import UserError
from ctt.files import expanded
from ctt.methods import catalog
from ctt.settings import validate
from ctt.train.loggers import Logger

SOURCE = "ctt.train"  # named in messages about settings


def train(
    *,
    recipe: str = "",
    config: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    auto_resume: bool = False,
    loggers: Sequence[Logger] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Train as `ctt-train` does with the same settings, and return how it went.

    Settings have the names of the command line, in groups or with dots:
    `ctt.train(dataset="folder", data_root="mine", train={"iterations": 100})`, or
    `ctt.train(**{"train.iterations": 100})`.

    Args:
        recipe: settings by name; by default those of the dataset.
        config: YAML file of settings over the recipe.
        out: new folder for the run; by default a numbered one in runs/.
        resume: folder of a stopped run to go on with.
        auto_resume: go on with the run in `out` if there is one, and begin it otherwise.
        loggers: objects that take the numbers of the run, see `ctt.train.loggers.Logger`.
        settings: over all of these.

    Returns:
        what summary.json holds, and under `folder` the path of the run, for `ctt.load`. With
        several processes they return the same folder, and `best` is known to the first.

    Raises:
        ctt.errors.UserError: settings or data that cannot work, too little memory, a full disk.
    """
    from ctt.train.loop import Stopped, train_in_folder

    # as `spawn` and `forkserver` do, which are the default of macOS, Windows and Python 3.14
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "A process that loads images has imported the program that calls ctt.train, and would "
            'train once more. Put the call below `if __name__ == "__main__":`, or give '
            "`data.workers` 0."
        )
    catalog.load.cache_clear()  # the file of a method may have changed since the last run
    given = _nested(settings)
    config, out, resume = _whole(config, "config"), _whole(out, "out"), _whole(resume, "resume")
    if auto_resume:
        out, resume = run.new_or_begun(out, resume)
    values = recipes.load_file(config) if config is not None else {}
    named = named_in(values) + named_in(given)
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            given[name] = _over(values[name], value)
    values = _over(values, given)
    if out is not None and resume is not None:
        raise UserError("out and resume exclude each other: a resumed run stays in its folder.")
    early = Given(recipe=recipe or None, resume=resume)
    made = layered(values, SOURCE, early)
    validate(made)
    refuse_unused(made, named)
    if resume is not None:
        run.check_resumable(run.read_settings(run.find(resume)), made)
    try:
        folder, summary = train_in_folder(made, out=out, resume=resume, own=loggers)
    except Stopped as stopped:
        raise KeyboardInterrupt(
            f"stopped after iteration {stopped.iteration}; go on with "
            f"ctt.train(resume={str(stopped.folder)!r})"
        ) from None
    return {**summary, "folder": folder}


def _whole(path: str | Path | None, name: str) -> Path | None:
    return None if path is None else expanded(Path(path), f"`{name}`")


def _over(values: dict[Any, Any], given: dict[str, Any]) -> dict[Any, Any]:
    """Return settings of a file with those given over them, which may be spelled otherwise."""
    names = {name.replace("-", "_") for name in given}
    kept = {name: v for name, v in values.items() if str(name).replace("-", "_") not in names}
    return kept | given


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose names have dots in the groups that these mean."""
    groups: dict[str, Any] = {}
    for name, value in settings.items():
        group, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(group, {})[rest] = value
        elif isinstance(value, dict):
            groups.setdefault(group, {}).update(value)
        else:
            groups[name] = str(value) if isinstance(value, Path) else value
    return groups
