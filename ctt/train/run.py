"""The run folder: where it is, what it is started from, how it is taken up again."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from ctt import recipes
from ctt.errors import UserError
from ctt.train.settings import Settings, to_dict, update

CONFIG = "config.yaml"
CHECKPOINT = Path("checkpoints") / "last.pt"
WEIGHTS = "best.safetensors"
LABELED_LIST = Path("split") / "labeled.txt"
UNLABELED_LIST = Path("split") / "unlabeled.txt"

# What a checkpoint's tensors and data order stand for: a resumed run cannot change it.
FIXED = ("dataset", "ratio", "method", "pairs", "seed", "split_labeled", "split_unlabeled", "model")
FIXED_IN = {
    "data": ("batch_size", "eval_split", "labeled_pool"),
    "bank": ("capacity",),
}


def create(out: Path | None, settings: Settings) -> Path:
    """A new folder for a run, with its config.yaml.

    Raises:
        UserError: there is a run already, or the folder cannot be written.
    """
    folder = out or _free_name(Path("runs"), f"{settings.dataset}-{settings.method}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: this is a file; give a folder that is new or empty.")
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"--out {folder}: the folder is not empty. Give a new one, or go on with a stopped "
                f"run by --resume {folder}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(to_dict(settings), sort_keys=False)
        (folder / CONFIG).write_text(text, "utf-8")
    except OSError as error:
        raise UserError(
            f"--out {folder}: the folder cannot be written ({error.strerror}). Give one that you "
            f"may write to."
        ) from None
    return folder


def _free_name(parent: Path, stem: str) -> Path:
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"


def find(path: Path) -> Path:
    """The run folder that `path`, a folder or a checkpoint in it, belongs to.

    Raises:
        UserError: there is nothing, or something else.
    """
    if path.is_dir():
        folder = path
    elif path.is_file():
        folder = path.parent.parent
        if path != folder / CHECKPOINT:
            raise UserError(
                f"--resume {path}: this file is no checkpoint of a run. Give the folder of a run, "
                f"which holds {CONFIG} and {CHECKPOINT}."
            )
    else:
        raise UserError(f"--resume {path}: there is no such folder.")
    for needed in (CONFIG, CHECKPOINT):
        if not (folder / needed).is_file():
            raise UserError(
                f"--resume {path}: {folder} is no run that can go on, because {needed} is missing."
            )
    if not os.access(folder, os.W_OK):
        raise UserError(f"--resume {path}: {folder} cannot be written.")
    return folder


def read_settings(folder: Path) -> Settings:
    """The settings of a run."""
    return update(Settings(), recipes.load_file(folder / CONFIG), str(folder / CONFIG))


def check_resumable(old: Settings, new: Settings) -> None:
    """Refuse to go on with settings that the checkpoint does not fit.

    Raises:
        UserError: names the setting, what the run has and what was asked for.
    """
    pairs: list[tuple[str, Any, Any]] = []
    for name in FIXED:
        before, after = getattr(old, name), getattr(new, name)
        if dataclasses.is_dataclass(before):
            for f in dataclasses.fields(before):
                pairs.append((f"{name}.{f.name}", getattr(before, f.name), getattr(after, f.name)))
        else:
            pairs.append((name, before, after))
    for group, names in FIXED_IN.items():
        for name in names:
            before, after = getattr(getattr(old, group), name), getattr(getattr(new, group), name)
            pairs.append((f"{group}.{name}", before, after))
    for name, before, after in pairs:
        if before != after:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {after}: the run to be resumed has {before}, and its checkpoint fits "
                f"nothing else. Leave the option out, or start a new run."
            )
