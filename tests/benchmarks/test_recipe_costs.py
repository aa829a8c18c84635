"""The script that measures recipes, as a dry run on the CPU."""

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import recipes as benchmark
from ctt import recipes


def test_a_dry_run_measures_every_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    chosen = ["voc-classic-two-encoders", "digits", "released"]
    arguments = ["--device", "cpu", "--steps", "1", "--out", str(out), "--recipes", *chosen]
    monkeypatch.setattr(sys, "argv", ["recipes", *arguments])
    benchmark.main()
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == chosen[:2]  # `released` is put over others
    for row in rows:
        assert float(row["step_ms"]) > 0
        assert float(row["tflop"]) > 0
        assert float(row["estimated_mib"]) > 0
        expected = float(row["step_ms"]) * int(row["iterations"]) / 3.6e6
        assert float(row["hours"]) == pytest.approx(expected, abs=0.06)
    assert rows[0]["iterations"] == "39300"


def test_every_recipe_has_its_number_of_classes() -> None:
    import torch

    for name in recipes.names():
        settings = benchmark.settings_of(name, "off", torch.device("cpu"))
        if settings is not None:
            assert len(benchmark.info_of(settings).classes) >= 11
