"""What each recipe costs: time and memory of its step on this device, and hours of the whole run.

    python -m benchmarks.recipes [--recipes NAME...] [--amp bf16] [--out FILE.csv]

Networks start from random weights and images are random: nothing is downloaded and no data is
needed. Beside what is measured stands what `ctt-train --dry-run` works out: memory, operations, and
the share of the card's peak that the step reaches where the card is known.

Without a CUDA device this is a dry run: the same at the smallest sizes, with the smallest networks
of each kind, so that the table is right in form only.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.test_step import make_batches
from ctt import data, methods, recipes
from ctt.console import plain_console
from ctt.data.dataset import DatasetInfo
from ctt.device import device_name, pick_device
from ctt.methods.base import Setup
from ctt.settings import Settings, update
from ctt.train.cost import CARDS, HOUR, TERA, step_operations
from ctt.train.engine import Engine
from ctt.train.memory import MEBI, estimate
from ctt.train.plan import ready_to_train

CLASSES = {"voc": 21, "cityscapes": 19, "ade20k": 150, "coco": 81, "digits": 11, "earth": 11}
OTHER = 21  # classes of a dataset of one's own
LABELED = 100
WARM_UP = 3  # steps before those that are measured: cuDNN looks for the fastest convolutions
SMALLEST = {"dpt": "test_vit", "vit": "test_vit"}  # backbones of a dry run
COLUMNS = (
    "recipe",
    "device",
    "amp",
    "images",
    "step_ms",
    "memory_mib",
    "estimated_mib",
    "tflop",
    "of_peak",
    "iterations",
    "hours",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=recipes.names(), default=recipes.names())
    parser.add_argument("--steps", type=int, default=20, help="that are measured")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="CSV file that the rows are written to")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    rows = []
    for name in arguments.recipes:
        settings = settings_of(name, arguments.amp, device)
        if settings is None:
            continue
        try:
            rows.append(measured(name, settings, device, arguments.steps))
        except torch.OutOfMemoryError:
            plain_console().print(f"{name}: a step does not fit into the memory of {device}")
            torch.cuda.empty_cache()
            continue
        plain_console().print(rows[-1])
    plain_console().print(table_of(rows))
    if arguments.out is not None:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def settings_of(name: str, amp: str, device: torch.device) -> Settings | None:
    """Return a recipe as it is measured; None for one that is meant to be put over others."""
    values = recipes.load(name)
    if "name" not in values.get("model", {}) or name.startswith("as-"):
        return None
    weights = {"model": {"weights": ["none"]}, "train": {"amp": amp, "device": str(device)}}
    settings = update(update(Settings(), values, name), weights, "benchmark")
    return settings if device.type == "cuda" else smallest(settings)


def smallest(settings: Settings) -> Settings:
    """Return the settings at sizes at which a CPU takes a step in a second."""
    network = settings.model.name
    backbone = SMALLEST.get(network, "test_resnet")
    own = {} if network == "small" else {"backbone": [backbone]}
    change: dict[str, Any] = {
        "model": {**own, "features": 8, "freeze_batch_norm": False},
        "data": {"crop": [64, 64], "batch_size": 2},
        "train": {"accumulate": 1},
    }
    return update(settings, change, "benchmark")


def info_of(settings: Settings) -> DatasetInfo:
    """Return facts of a dataset with as many classes as that of the settings."""
    assert settings.dataset in data.names()
    classes = CLASSES.get(settings.dataset, OTHER)
    half = (0.5, 0.5, 0.5)
    names = tuple(map(str, range(classes)))
    return DatasetInfo(settings.dataset, names, ((0, 0, 0),) * classes, half, half)


def measured(name: str, settings: Settings, device: torch.device, steps: int) -> dict[str, Any]:
    """Return a row of the table."""
    about, info = methods.get(settings.method), info_of(settings)
    pairs = settings.pairs or about.pairs
    plain = about.load()(Setup(settings, info, pairs, LABELED))
    told = sum(estimate(settings, plain, info, about).values())
    operations = step_operations(settings, plain, info, about, last=True)
    del plain
    setup = Setup(
        settings, info, pairs, LABELED, finish=lambda net: ready_to_train(net, settings, device)
    )
    engine = Engine(about.load()(setup), settings, info, device)
    engine.iteration = max(0, settings.train.iterations - WARM_UP - steps)  # all has begun
    labeled, unlabeled = make_batches(settings, len(info.classes), device)
    more = unlabeled if about.unlabeled else None
    for _ in range(WARM_UP):
        engine(labeled, more)
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for _ in range(steps):
        engine(labeled, more)
    wait(device)
    seconds = (time.perf_counter() - start) / steps
    cuda = device.type == "cuda"
    row = {
        "recipe": name,
        "device": device_name(device),
        "amp": settings.train.amp,
        "images": settings.data.batch_size * (2 if about.unlabeled else 1),
        "step_ms": round(1000 * seconds, 1),
        "memory_mib": round(torch.cuda.max_memory_allocated(device) / MEBI) if cuda else None,
        "estimated_mib": round(told / MEBI),
        "tflop": None if operations is None else float(f"{operations / TERA:.3g}"),
        "of_peak": share_of_peak(operations, seconds, settings, device),
        "iterations": settings.train.iterations,
        "hours": round(seconds * settings.train.iterations / HOUR, 1),
    }
    del engine
    if cuda:
        torch.cuda.empty_cache()
    return row


def share_of_peak(
    operations: float | None, seconds: float, settings: Settings, device: torch.device
) -> float | None:
    """Return what share of the card's peak a step reaches; None where it is not known."""
    name = device_name(device).lower().replace(" ", "")
    card = next((c for short, c in CARDS.items() if short in name), None)
    if operations is None or card is None or device.type != "cuda":
        return None
    peak = card.single if settings.train.amp == "off" else card.half
    return round(operations / seconds / (peak * TERA), 3)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="what a recipe costs; hours are those of all its iterations on one device")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("recipe", "device") else "right")
    for row in rows:
        table.add_row(*("" if row[c] is None else str(row[c]) for c in COLUMNS))
    return table


if __name__ == "__main__":
    main()
