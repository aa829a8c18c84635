"""The run folder: where it is, what it is started from, how it is taken up again."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ctt import checkpoint, methods, recipes
from ctt.data.dataset import Dataset
from ctt.data.folder import refuse_among_images
from ctt.data.split import read_lines
from ctt.errors import UnwritableError, UserError
from ctt.files import atomic_write, expanded, is_on_hub, is_part_of, remove_parts
from ctt.fingerprint import of_teacher
from ctt.models.weights import IMAGENET
from ctt.settings import Settings, to_dict, update

CONFIG = "config.yaml"
CHECKPOINT = Path("checkpoints") / "last.pt"
WEIGHTS = "best.safetensors"
LOCK = Path("checkpoints") / ".lock"
SUMMARY = "summary.json"
CLASSES = "classes.csv"
METHOD = "method.py"  # the file of a method of one's own
LABELED_LIST = Path("split") / "labeled.txt"
UNLABELED_LIST = Path("split") / "unlabeled.txt"
EVALUATION_LIST = Path("split") / "evaluation.txt"

# What a checkpoint's tensors and data order stand for: a resumed run cannot change it.
FIXED = (
    *("dataset", "ratio", "method", "teacher", "pairs", "seed"),
    *("split_labeled", "split_unlabeled", "model"),
)
FIXED_IN = {
    "data": ("eval_split", "labeled_pool", "voc_set", "holdout"),
    "bank": ("capacity",),
    "labeled": ("class_weights", "beta", "weights"),
    "optim": ("name", "layer_decay", "decay_vectors"),
}
# What the score depends on, by which the run has chosen its best network so far.
SCORED = {
    "data": ("eval_images",),
    "eval": checkpoint.OF_PROTOCOL,
}


def create(out: Path | None, settings: Settings) -> tuple[Path, contextlib.ExitStack]:
    """Return a new folder for a run, with its config.yaml, and the `lock` of it.

    Raises:
        UserError: there is a run already, or the folder cannot be written.
    """
    check_new(out)
    folder = out or Path("runs")
    with _as_out_error(folder), contextlib.ExitStack() as held:
        if out is None:
            folder = new_numbered(settings)
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(folder))
        check_new(out)  # another program may have begun and ended there since
        write_settings(folder, settings)
        return folder, held.pop_all()


def check_new(out: Path | None) -> None:
    """Check that a new run can have its folder there, or in `runs`; nothing is written.

    Raises:
        UserError: there is something already, or the folder cannot be written.
    """
    folder = out or Path("runs")
    refuse_among_images(folder)
    with _as_out_error(folder):
        if out is not None and out.is_file():
            raise UserError(f"`out` {out}: this is a file; give a folder that is new or empty.")
        if out is not None and out.is_dir() and not _is_empty(out):
            go_on = f", or go on with its run by `resume` {out}"
            raise UserError(
                f"`out` {out}: the folder is not empty. Give a new one"
                f"{go_on if (out / CONFIG).is_file() else ''}."
            )
        whole = folder.absolute()
        nearest = next(path for path in (whole, *whole.parents) if path.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def new_or_begun(out: Path | None, resume: Path | None) -> tuple[Path | None, Path | None]:
    """Return `out` and `resume` of a run that goes on in `out` if it has begun there.

    Raises:
        UserError: there is no `out`, or `resume` is given.
    """
    if resume is not None:
        raise UserError("`resume` and `auto_resume` exclude each other. Leave one of them out.")
    if out is None:
        raise UserError("`auto_resume` needs `out`, the folder of the run. Name one.")
    return (None, out) if (out / CONFIG).is_file() else (out, None)


def _is_empty(folder: Path) -> bool:
    """Return whether it holds nothing but what a run leaves that ends in its first write."""
    own = {folder / LOCK, (folder / LOCK).parent}
    return all(path in own or is_part_of(path, folder / CONFIG) for path in folder.rglob("*"))


@contextlib.contextmanager
def _as_out_error(folder: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that names `out`."""
    try:
        yield
    except (OSError, UnwritableError) as error:
        raise UserError(
            f"`out` {folder}: the folder cannot be written ({error.strerror}). Give one that you "
            f"may write to."
        ) from None


def new_numbered(settings: Settings) -> Path:
    """Return a new folder in runs/ that no other run, started at the same time, can take too."""
    parent, stem = Path("runs"), f"{settings.dataset}-{settings.method.rpartition(':')[2]}"
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / f"{stem}-{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def write_settings(folder: Path, settings: Settings) -> None:
    """Write config.yaml, which `resume` reads from whatever folder it is given in."""
    values = to_dict(with_whole_paths(settings))
    with atomic_write(folder / CONFIG) as part:
        part.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")


def keep_method(folder: Path, settings: Settings) -> None:
    """Copy the file of a method of one's own into the run folder, unless it is that copy."""
    own, kept = methods.own_file(settings.method), folder / METHOD
    if own is not None and not (kept.is_file() and own[0].samefile(kept)):
        with atomic_write(kept) as part:
            shutil.copyfile(own[0], part)


def with_whole_paths(settings: Settings) -> Settings:
    """Return settings whose folders and lists do not depend on where the program is started."""

    def whole(path: Path | None) -> Path | None:
        if path is None or is_on_hub(path) or str(path).startswith("~"):
            return path
        return path.absolute()

    weights = tuple(
        w if w in ("none", IMAGENET) else str(whole(Path(w))) for w in settings.model.weights
    )
    return dataclasses.replace(
        settings,
        data_root=whole(settings.data_root),
        split_labeled=whole(settings.split_labeled),
        split_unlabeled=whole(settings.split_unlabeled),
        teacher=whole(settings.teacher),
        data=dataclasses.replace(settings.data, cache=whole(settings.data.cache)),
        model=dataclasses.replace(settings.model, weights=weights),
        masks=dataclasses.replace(
            settings.masks,
            folder=whole(settings.masks.folder),
            confidence=whole(settings.masks.confidence),
        ),
    )


def find(path: Path) -> Path:
    """Return the run folder that `path`, a folder or a checkpoint in it, belongs to.

    A run that ended before its first checkpoint has none, see `begun`.

    Raises:
        UserError: there is nothing, or something else.
    """
    if path.is_dir():
        folder = path
    elif path.is_file():
        folder = path.parent.parent
        if path != folder / CHECKPOINT:
            raise UserError(
                f"`resume` {path}: this file is no checkpoint of a run. Give the folder of a run, "
                f"which holds {CONFIG} and {CHECKPOINT}."
            )
    else:
        raise UserError(f"`resume` {path}: there is no such folder. Give the folder of a run.")
    needed_files = [CONFIG]
    if has_checkpoint(folder):
        needed_files += [str(LABELED_LIST), str(UNLABELED_LIST)]
    elif (folder / SUMMARY).is_file():  # it had one
        needed_files += [str(CHECKPOINT)]
    for needed in needed_files:
        if not (folder / needed).is_file():
            raise UserError(
                f"`resume` {path}: {folder} cannot be resumed, because {needed} is missing. "
                f"Restore it, or start a new run."
            )
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"`resume` {path}: you may not write to {folder}. Change its permissions, or resume a "
            f"copy."
        )
    return folder


def begun(resume: Path | None) -> Path | None:
    """Return the folder of a run to be resumed, or None if it has no checkpoint to go on from.

    A run that ended before its first checkpoint begins from the start.

    Raises:
        UserError: as `find`.
    """
    folder = None if resume is None else find(resume)
    return folder if folder is not None and has_checkpoint(folder) else None


def lock(folder: Path) -> contextlib.AbstractContextManager[object]:
    """Return a lock that keeps other programs from training in the folder while it is entered.

    What killed programs have left of files that they wrote is removed.

    Raises:
        UserError: another program trains there.
    """
    from filelock import FileLock, Timeout

    try:
        (folder / LOCK).parent.mkdir(exist_ok=True)
        held = FileLock(folder / LOCK).acquire(timeout=0)
        remove_parts(folder, alone=True)
        return held
    except Timeout:
        raise UserError(
            f"{folder}: another program trains in this folder right now. Wait for its end, or "
            f"stop it."
        ) from None
    except (OSError, NotImplementedError):
        return contextlib.nullcontext()  # a file system without locks, or one that is full


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has written a checkpoint."""
    last = folder / CHECKPOINT
    return last.is_file() or checkpoint.previous(last).is_file()


def hold_out(folder: Path, dataset: Dataset, same_part: bool = True) -> None:
    """Evaluate on the images that the run in `folder` was evaluated on, whatever came since.

    Leaves `dataset` as it is where none of those images is in it: it is another dataset then.

    Args:
        same_part: the images to evaluate on are the run's; without it they stay as they are.

    Raises:
        UserError: an image to evaluate on is one that the run was trained with.
    """
    if same_part and (folder / EVALUATION_LIST).is_file():
        held_out = read_names(folder / EVALUATION_LIST)
        dataset.evaluate_on(held_out)
        if not set(dataset.eval_ids()) & {dataset.find(name) for name in held_out}:
            return
    learned = {
        dataset.find(name)
        for path in (LABELED_LIST, UNLABELED_LIST)
        if (folder / path).is_file()
        for name in read_names(folder / path)
    }
    both = sorted(set(dataset.eval_ids()) & learned)
    if both:
        raise UserError(
            f"{both[0]} is an image to evaluate on, but the run in {folder} was trained with it "
            f"({len(both)} such): the dataset has changed since. Restore its images as they were, "
            f"put images to evaluate on into a part of their own (val/ of a folder), or start a "
            f"new run."
        )


def check_evaluated(folder: Path, dataset: Dataset) -> None:
    """Check that a run that goes on is evaluated on the same images as before.

    Raises:
        UserError: an image is missing, or one came to a dataset that cannot leave it out.
    """
    path = folder / EVALUATION_LIST
    if not path.is_file():
        return
    before = {dataset.find(name) or name for name in read_names(path)}
    found = set(dataset.eval_ids())
    if differing := sorted(before - found) or sorted(found - before):
        what = "is no longer there" if differing[0] in before else "was not there before"
        raise UserError(
            f"{path}: the images to evaluate on have changed since the run was started: "
            f"{differing[0]} {what} ({len(differing)} such). Scores of other images are not "
            f"comparable, so the best network could not be chosen. Restore the images as they "
            f"were, or start a new run."
        )


def read_names(path: Path) -> list[str]:
    """Return the names in a list of a run, which may be empty."""
    return list(read_lines(path).values()) if path.stat().st_size else []


def read_settings(folder: Path, serve: bool = False) -> Settings:
    """Return the settings of a run.

    Args:
        serve: without its method, whose code is not run and may be gone: its networks need none.

    Raises:
        UserError: there is no such file, or a value in it cannot be used.
    """
    values = recipes.load_file(folder / CONFIG)
    if isinstance(values.get("model", {}), dict):  # a run of a version without this setting
        values["model"] = {"grid": "legacy", **values.get("model", {})}
    if serve:
        values.pop("method", None)
        values.pop("options", None)
    else:
        values["method"] = _present_method(str(values.get("method", Settings.method)), folder)
        methods.get(values["method"])  # raises where neither its file nor the copy is there
    return update(Settings(), values, str(folder / CONFIG))


def _present_method(name: str, folder: Path) -> str:
    """Return the name of a run's method, with the copy in its folder for a file that is gone."""
    own, kept = methods.own_file(name), (folder / METHOD).absolute()
    gone = own is not None and not own[0].is_file()
    return f"{kept}:{own[1]}" if own and gone and kept.is_file() else name


def check_resumable(old: Settings, new: Settings) -> None:
    """Refuse to go on with settings that the checkpoint does not fit.

    Raises:
        UserError: names the setting, what the run has and what was asked for.
    """
    old, new = with_whole_paths(old), with_whole_paths(new)
    for name, before, after in [*_fixed(old, new), *_values_in(FIXED_IN, old, new)]:
        if before != after:
            raise UserError(
                f"`{name}` {after}: the run to be resumed has {before}, and its checkpoint fits "
                f"nothing else. Leave it out, or start a new run."
            )
    for name, before, after in _values_in(SCORED, old, new):
        if before != after:
            raise UserError(
                f"`{name}` {after}: the run to be resumed has {before}, and scores under the "
                f"two are not comparable, so the best network could not be chosen. Leave it out; "
                f"ctt-eval evaluates the networks of a run under other protocols."
            )


def _values_in(
    groups: Mapping[str, Sequence[str]], old: Settings, new: Settings
) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of these settings."""
    for group, names in groups.items():
        for name in names:
            before, after = getattr(getattr(old, group), name), getattr(getattr(new, group), name)
            yield f"{group}.{name}", before, after


def _fixed(old: Settings, new: Settings) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of `FIXED`."""
    for name in FIXED:
        before, after = getattr(old, name), getattr(new, name)
        if name == "pairs":  # 0 stands for what the method uses by default
            default = methods.get(old.method).pairs
            before, after = before or default, after or default
        if name == "teacher" and before and after and before != after:
            # a run that was moved is the same one; nothing moves on the hub
            there = expanded(before, "`teacher`").exists() or is_on_hub(before)
            same = not there or of_teacher(before) == of_teacher(after)
            before = after if same else before
        if dataclasses.is_dataclass(before):
            for f in dataclasses.fields(before):
                yield f"{name}.{f.name}", getattr(before, f.name), getattr(after, f.name)
        else:
            yield name, before, after
