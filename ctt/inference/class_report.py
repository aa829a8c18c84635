"""What an evaluation found of each class: how much of it there is, and what networks make of it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from ctt.data.dataset import DatasetInfo
from ctt.files import atomic_write


@dataclass(frozen=True)
class ClassRow:
    """One class as one network sees it; percent, NaN where nothing can be said.

    Attributes:
        pixels, images: labelled so, and showing it, among the images evaluated on.
        precision: share of the pixels predicted so that are labelled so.
        recall: share of the pixels labelled so that are predicted so.
        taken_for: the other class that most of its labelled pixels are predicted as; empty: none.
        taken: their share of its labelled pixels.
    """

    name: str
    pixels: int
    images: int
    iou: float
    precision: float
    recall: float
    taken_for: str
    taken: float


def class_rows(confusion: Tensor, images: Tensor, info: DatasetInfo) -> list[ClassRow]:
    """Return a row for each class.

    Args:
        confusion: (C, C) pixels, labels in rows.
        images: (C,), how many show each class.
    """
    matrix = confusion.cpu().double()
    hits, labeled, predicted = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    shares = {  # 0/0 is NaN: the class is absent
        "iou": hits / (labeled + predicted - hits),
        "precision": hits / predicted,
        "recall": hits / labeled,
    }
    wrong = matrix.clone().fill_diagonal_(0)
    rows = []
    for c, name in enumerate(info.classes):
        most = int(wrong[c].argmax())
        taken = float(wrong[c, most] / labeled[c]) if labeled[c] else float("nan")
        rows.append(
            ClassRow(
                name,
                int(labeled[c]),
                int(images[c]),
                **{key: 100 * float(share[c]) for key, share in shares.items()},
                taken_for=info.classes[most] if wrong[c, most] > 0 else "",
                taken=100 * taken,
            )
        )
    return rows


def class_table(rows: list[ClassRow], network: str) -> Table:
    """Return the rows as a table for the console."""
    table = Table(title=f"Classes as {network} sees them, %")
    table.add_column("class")
    for column in ("images", "pixels", "IoU", "precision", "recall"):
        table.add_column(column, justify="right")
    table.add_column("most often taken for")
    total = max(1, sum(row.pixels for row in rows))
    for row in rows:
        taken = f"{row.taken_for} {row.taken:.1f}" if row.taken_for else ""
        share = f"{100 * row.pixels / total:.2f}"
        numbers = (_shown(v) for v in (row.iou, row.precision, row.recall))
        table.add_row(row.name, str(row.images), share, *numbers, taken)
    return table


def write_classes(path: Path, networks: Mapping[str, list[ClassRow]]) -> None:
    """Write the rows of every network as CSV; what is NaN stays empty."""
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ["class", *(f.name for f in fields(ClassRow)[1:])]
        writer.writerow(["network", *names])
        for network, rows in networks.items():
            for row in rows:
                writer.writerow([network, *map(_cell, astuple(row))])


def classes_as_json(networks: Mapping[str, list[ClassRow]]) -> dict[str, Any]:
    """Return the rows by network and class, for summary.json; null: nothing can be said."""

    def of(row: ClassRow) -> dict[str, Any]:
        values = {f.name: getattr(row, f.name) for f in fields(row)[1:]}
        return {
            key: None if value != value else round(value, 2) if isinstance(value, float) else value
            for key, value in values.items()
        }

    return {"classes": {net: {row.name: of(row) for row in rows} for net, rows in networks.items()}}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.2f}"
    return str(value)


def _shown(value: float) -> str:
    return "" if value != value else f"{value:.2f}"
