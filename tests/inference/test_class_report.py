import csv
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ctt.cli.evaluate import _main as evaluate
from ctt.data.digits import INFO, Digits
from ctt.inference.class_report import class_rows, class_table
from ctt.settings import Settings, update
from ctt.train.loop import train


def test_rows_say_how_much_there_is_and_what_it_is_taken_for() -> None:
    matrix = torch.zeros(11, 11, dtype=torch.int64)
    matrix[0, 0], matrix[0, 1], matrix[0, 2] = 70, 10, 20
    matrix[1, 1] = 5
    matrix[2, 0] = 4
    matrix[3, 3] = 0  # neither labelled nor predicted
    images = torch.arange(11)
    rows = class_rows(matrix, images, INFO)
    zero, one, two, three = rows[:4]
    assert (zero.pixels, zero.images, zero.taken_for, zero.taken) == (100, 0, INFO.classes[2], 20)
    assert zero.iou == pytest.approx(100 * 70 / 104)
    assert zero.precision == pytest.approx(100 * 70 / 74)
    assert zero.recall == pytest.approx(70)
    assert (one.pixels, one.images, one.recall, one.taken_for, one.taken) == (5, 1, 100, "", 0)
    assert one.iou == one.precision == pytest.approx(100 / 3)
    assert (two.iou, two.precision, two.recall, two.taken) == (0, 0, 0, 100)
    assert two.taken_for == INFO.classes[0]
    assert all(math.isnan(v) for v in (three.iou, three.precision, three.recall, three.taken))
    assert three.taken_for == ""
    console = Console(width=120, record=True)
    console.print(class_table(rows, "ensemble"))
    assert "most often taken for" in console.export_text()


def test_a_run_and_its_evaluation_report_each_class(
    tiny: Settings, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {"train": {"iterations": 2, "eval_every": 2, "tensorboard": False}}
    settings = update(tiny.with_method("supervised"), change, "test")
    train(settings, out=out)
    assert "Classes as" in capsys.readouterr().out
    assert evaluate([str(out), "--out", str(tmp_path / "eval"), "--workers", "0"]) == 0
    assert "Classes as" in capsys.readouterr().out
    dataset = Digits(24, 6)
    labels = [dataset.label(name) for name in dataset.eval_ids()]
    for folder in (out, tmp_path / "eval"):
        summary = json.loads((folder / "summary.json").read_text())
        rows = list(csv.DictReader((folder / "classes.csv").open(encoding="utf-8")))
        assert {row["network"] for row in rows} == set(summary["miou"])
        for c, name in enumerate(INFO.classes):
            told = summary["classes"]["student_1"][name]
            assert told["pixels"] == sum(int((label == c).sum()) for label in labels)
            assert told["images"] == sum(bool((label == c).any()) for label in labels)
            assert told["iou"] == summary["class_iou"]["student_1"][name]
