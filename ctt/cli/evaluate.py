"""ctt-eval: mIoU of a run's networks, or of one file of weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctt.cli.common import run_program
from ctt.errors import UserError
from ctt.train.settings import Settings

if TYPE_CHECKING:
    from ctt.models.base import SegmentationModel


@dataclass(frozen=True)
class Arguments:
    """Evaluate every network of a run, or one file of weights, and print IoU by class."""

    path: Path
    """Folder of a run (all students, teachers and their ensemble), or a best.safetensors."""
    eval_split: str = ""
    """Images to evaluate on; by default those of the run, or `val`."""
    json: Path | None = None
    """Also write the scores to this file."""
    device: str = "auto"


def main() -> None:
    """The program."""
    run_program("ctt-eval", lambda: _main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    import tyro

    parsed = tyro.cli(
        Arguments, prog="ctt-eval", args=arguments, config=(tyro.conf.PositionalRequiredArgs,)
    )
    from rich.console import Console

    from ctt.train.evaluate import as_json, evaluate, write_json
    from ctt.train.loop import open_source, pick_device, score_table

    if parsed.json is not None and parsed.json.exists():
        raise UserError(f"--json {parsed.json}: the file exists already. Give a new name.")
    if parsed.json is not None and not parsed.json.parent.is_dir():
        raise UserError(f"--json {parsed.json}: there is no folder {parsed.json.parent}.")
    device = pick_device(parsed.device)
    networks, settings, origin = _networks(parsed.path)
    settings = _choose_split(settings, parsed.eval_split)
    source = open_source(settings)
    for network in networks.values():
        network.to(device)
    scores = evaluate(networks, source, source.eval_ids(), device)
    result: dict[str, Any] = {
        **as_json(scores, source.info),
        "dataset": settings.dataset,
        "eval_split": settings.data.eval_split,
        "images": len(source.eval_ids()),
        "weights": origin,
    }
    console = Console()
    console.print(score_table(scores, source.info))
    console.print(
        f"{origin}; protocol {result['protocol']}, {result['images']} images of "
        f"{settings.dataset}/{settings.data.eval_split}",
        highlight=False,
        soft_wrap=True,
    )
    if parsed.json is not None:
        write_json(parsed.json, result)
    return 0


def _networks(path: Path) -> tuple[dict[str, SegmentationModel], Settings, str]:
    """The networks by name, the settings that say which data they belong to, and their origin."""
    import dataclasses

    from ctt.train import checkpoint, run

    if not path.is_dir():
        network, info, note = checkpoint.load_network(path)
        return {"network": network}, dataclasses.replace(Settings(), dataset=info.name), note
    import torch

    from ctt import methods
    from ctt.train.loop import open_source
    from ctt.train.state import TrainState

    if not (path / run.CHECKPOINT).is_file():
        raise UserError(f"{path}: the folder holds no {run.CHECKPOINT}, so it is no run.")
    settings = run.read_settings(path)
    saved = checkpoint.load(path / run.CHECKPOINT)
    pairs = settings.pairs or methods.get(settings.method).default_pairs
    classes = len(open_source(settings).info.classes)
    state = TrainState(settings, pairs, classes, torch.device("cpu"), initialize=False)
    try:
        state.load_state_dict(saved)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: checkpoint and config.yaml do not fit ({reason}).") from None
    return state.networks(), settings, f"{path} after {state.iteration} iterations"


def _choose_split(settings: Settings, split: str) -> Settings:
    from ctt.train.settings import update

    trained_on = settings.data.eval_split
    if split == "tune" and trained_on == "val":
        raise UserError(
            "--eval-split tune: this run was trained with those digits. Train with "
            "--data.eval-split tune to hold them out."
        )
    values = {"data": {"eval_split": split}} if split else {}
    return update(settings, values, "--eval-split")
