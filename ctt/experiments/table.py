"""The table of an experiment, which keeps the finished runs that it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ctt import __version__
from ctt.experiments import results
from ctt.experiments.results import CURVES, DONE, Row
from ctt.experiments.runs import Run
from ctt.files import atomic_write, waiting_lock
from ctt.settings import WITHOUT_EFFECT, Settings, to_dict
from ctt.text import from_yaml

PLACE = ("share", "budget", "variant", "seed")  # columns of a run's place in an experiment
POINT = (*PLACE, "iteration", "last")  # columns of the curves


@dataclass(frozen=True)
class Entry:
    """A run as the table and the files beside it tell of it.

    Attributes:
        row: without its settings.
        settings: those that change a result, but for the seed, by their dotted names.
        points: of its curve.
    """

    row: Row
    settings: Mapping[str, Any]
    points: Sequence[Row]

    @property
    def key(self) -> tuple[str, ...]:
        """Return what tells this run from the others of a table."""
        return (*place(self.row), self.row["settings_hash"])

    def at(self, row: Row) -> Entry:
        """Return the same run at the place of another row: experiments may have a run twice."""
        where = {name: row[name] for name in PLACE}
        return replace(self, row=self.row | where, points=[p | where for p in self.points])


def place(row: Row) -> tuple[str, ...]:
    """Return the place of a row, or of a point of a curve, in its experiment."""
    return tuple(row[name] for name in PLACE)


def write_results(path: Path, runs: Sequence[Run], command: Sequence[str]) -> list[Row]:
    """Write the table, the scores during the runs beside it and, in a YAML file, what all share.

    Sweeps that write the same table at a time wait for each other. Finished runs that the table has
    stay in it: those whose folders are gone, and those of another sweep that began meanwhile.

    Args:
        path: the CSV.
        command: that made them.

    Returns:
        the rows of the table.

    Raises:
        UserError: the table that is there cannot be read, or a file cannot be written.
    """
    with waiting_lock(path):
        return _write(path, runs, command)


def _write(path: Path, runs: Sequence[Run], command: Sequence[str]) -> list[Row]:
    found = {entry.key: entry for entry in map(entry_of, runs)}
    settings = {name for entry in found.values() for name in entry.settings}
    planned = list(found)
    for earlier in finished(path, settings):
        same = [key for key in planned if key[-1] == earlier.key[-1]]
        for key in same or [earlier.key]:
            entry = found.get(key, earlier)
            found[key] = entry if entry.row["status"] == DONE else earlier.at(entry.row)
    shared, others = split([entry.settings for entry in found.values()])
    rows = [
        entry.row | {name: str(value) for name, value in own.items()}
        for entry, own in zip(found.values(), others, strict=True)
    ]
    columns = [*results.COLUMNS, *dict.fromkeys(name for own in others for name in own)]
    results.write(path, rows, columns)
    results.write(curves_beside(path), [p for e in found.values() for p in e.points], POINT)
    told = {"command": list(command), "ctt": __version__, "settings": shared}
    with atomic_write(path.with_suffix(".yaml")) as part:
        part.write_text(yaml.safe_dump(told, sort_keys=False), "utf-8")
    return rows


def curves_beside(path: Path) -> Path:
    """Return the file of the curves of a table."""
    return path.with_name(f"{path.stem}{CURVES}")


def entry_of(r: Run) -> Entry:
    """Return what the folder of a run tells."""
    from ctt.train.record import read_rows

    row, points = r.row(), []
    if row["status"] == DONE:
        metrics = read_rows(r.folder / "metrics.csv")
        row |= results.inside(metrics)
        where = {name: row[name] for name in PLACE}
        points = [
            {**where, "iteration": str(iteration), "last": f"{value:.2f}"}
            for iteration, value in results.curve(metrics)
        ]
    return Entry(row, flat(r.settings), points)


def finished(path: Path, settings: Iterable[str]) -> list[Entry]:
    """Return the finished runs of a table that was written before; none if there is no table.

    Args:
        settings: names of settings, which may be columns of the table.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        return []
    rows, curves, points = results.read(path), curves_beside(path), []
    if curves.is_file():
        points = results.read_table(curves, POINT)
    shared = shared_settings(path.with_suffix(".yaml"))
    names = {*settings, *shared} - {*results.COLUMNS}
    found = []
    for row in (row for row in rows if row["status"] == DONE):
        own = {n: v for n, v in row.items() if n in names or n.startswith("options.")}
        rest = {n: v for n, v in row.items() if n not in own}
        curve = [point for point in points if place(point) == place(row)]
        # a method lacks the settings of others, whose columns are empty
        found.append(Entry(rest, shared | {n: v for n, v in own.items() if v}, curve))
    return found


def shared_settings(path: Path) -> dict[str, Any]:
    """Return the settings that all runs of a table have, by the file beside it; none without it."""
    try:
        told = from_yaml(path.read_text("utf-8", "replace"), str(path))
    except FileNotFoundError:
        return {}
    settings = told.get("settings") if isinstance(told, dict) else None
    return settings if isinstance(settings, dict) else {}


def flat(settings: Settings) -> dict[str, Any]:
    """Return the settings that change a result, but for the seed, by their dotted names."""
    values = to_dict(settings)
    del values["seed"]
    for group, names in WITHOUT_EFFECT.items():
        for name in names:
            del (values[group] if group else values)[name]
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name}.{key}".rstrip("."): item for key, item in inner}
    return found


def split(each: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings that all runs have, and of each run the others."""
    names = dict.fromkeys(name for settings in each for name in settings)
    shared = {
        name: each[0][name]
        for name in names
        # a table has the values as text
        if all(name in s and str(s[name]) == str(each[0].get(name)) for s in each)
    }
    return shared, [{n: v for n, v in s.items() if n not in shared} for s in each]
