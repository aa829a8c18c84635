"""Names that are no UTF-8, hold control codes, or letters that a terminal lacks."""

import io
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from rich.table import Table

from ctt.cli import data as program
from ctt.cli import evaluate, predict, train
from ctt.cli.common import run_program
from ctt.console import plain_console
from ctt.data import open_dataset
from ctt.data.dataset import DatasetInfo
from ctt.data.options import DatasetOptions
from ctt.errors import UserError
from ctt.inference.figures import draw_confusion
from ctt.settings import Settings, update, validate
from ctt.text import printable, say
from tests.data import trees

LATIN = os.fsdecode(b"caf\xe9")
QUICK = (
    "--dataset folder --recipe digits --model.width 4 --model.features 8 --data.crop 16 16 "
    "--data.batch-size 2 --data.workers 0 --train.iterations 2 --train.threads 1 --ratio 1/2"
)


def test_names_of_other_bytes_go_through_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = trees.write_folder(tmp_path / "data", labeled=4, unlabeled=2)
    try:
        for old in ("images/photo 0.jpg", "masks/photo 0.png", "val/images/photo 0.jpg"):
            (root / old).rename((root / old).with_stem(LATIN))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (root / "val/masks/photo 0.png").rename(root / "val/masks" / f"{LATIN}.png")
    lists, run = tmp_path / "lists", tmp_path / "run"
    base = ["--dataset", "folder", "--data-root", str(root)]
    assert program._main(["split", *base, "--ratio", "1/1", "--out", str(lists)]) == 0
    assert b"images/caf\xe9.jpg\n" in (lists / "labeled.txt").read_bytes()
    split = ["--split-labeled", str(lists / "labeled.txt")]
    arguments = [*shlex.split(QUICK), "--data-root", str(root), "--out", str(run)]
    assert train._main([*arguments, *split]) == 0
    assert (run / "split" / "labeled.txt").read_bytes() == (lists / "labeled.txt").read_bytes()
    assert train._main(["--resume", str(run), "--train.iterations", "3"]) == 0
    assert evaluate._main([str(run), "--out", str(tmp_path / "scores"), "--workers", "0"]) == 0
    (root / "images" / f"{LATIN}.jpg").write_bytes(b"")
    with pytest.raises(UserError):
        program._main(["check", *base])
    assert r"caf\xe9.jpg cannot be read" in capsys.readouterr().out


def test_a_name_of_two_lines_is_refused(tmp_path: Path) -> None:
    root = trees.write_folder(tmp_path)
    (root / "images" / "photo 0.jpg").rename(root / "images" / "a\nb.jpg")
    with pytest.raises(UserError, match=r"'images/a\\nb\.jpg' holds the end of a line"):
        program._main(["check", "--dataset", "folder", "--data-root", str(root)])


def test_control_codes_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name, shown = "a\x1b[2Jb\x07\x9b1m\u202egpj.exe", r"a\x1b[2Jb\x07\x9b1m\u202egpj.exe"

    def body() -> int:
        table = Table(title=name)
        table.add_column(name)
        table.add_row(name)
        plain_console().print(table, name, soft_wrap=True)
        say(name)
        raise UserError(name)

    with pytest.raises(SystemExit):
        run_program("ctt-x", body)
    out, err = capsys.readouterr()
    assert out.count(shown) == 5
    assert err == f"ctt-x: {shown}\n"
    assert printable("tab\tand\nlines, ü 猫") == "tab\tand\nlines, ü 猫"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_letters_that_a_terminal_lacks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def body() -> int:
        table = Table("Straße", "猫")
        plain_console().print(table)
        raise UserError("猫")

    with pytest.raises(SystemExit):
        run_program("ctt-x", body)
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    assert ("Straße" if encoding == "cp1252" else r"Stra\xdfe") in out
    assert r"\u732b" in out
    assert err.strip() == r"ctt-x: \u732b"


def test_classes_that_look_like_formulas(tmp_path: Path) -> None:
    info = DatasetInfo("x", ("$a^$", "b"), ((0, 0, 0),) * 2, (0.5,) * 3, (0.5,) * 3)
    draw_confusion(tmp_path / "c.png", torch.eye(2), info, "x")
    assert (tmp_path / "c.png").is_file()


@pytest.mark.parametrize("pattern", ["*.jpg", "**/*.jpg", "im[0-9].jpg", "[x]/*.jpg"])
def test_folders_with_brackets_in_a_pattern(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "a[1]" / "b*" / "[x]"
    folder.mkdir(parents=True)
    place = folder.parent if pattern.startswith("[x]") else folder
    for name in ("im1.jpg", "im2.jpg"):
        (folder / name).touch()
    jobs = predict.find_jobs([f"{place}/{pattern}"], tmp_path / "out", recursive=False)
    assert [job.file.name for job in jobs] == ["im1.jpg", "im2.jpg"]
    with pytest.raises(UserError, match="there is no such image or folder"):
        predict.find_jobs([f"{folder}/*.png"], tmp_path / "out", recursive=False)


def test_home_folders_that_nobody_knows() -> None:
    with pytest.raises(UserError, match="`data_root` ~nobodyknows/x: it is not known which folder"):
        open_dataset("folder", Path("~nobodyknows/x"), DatasetOptions())
    with pytest.raises(UserError, match=r"`data\.cache` ~nobodyknows"):
        validate(update(Settings(), {"data": {"cache": "~nobodyknows"}}, "test"))


@pytest.mark.parametrize("name", ["..jpg", "...jpg"])
def test_a_name_of_dots_writes_into_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (job,) = predict.find_jobs([str(tmp_path / name)], tmp_path / "out", recursive=False)
    assert job.target("mask") == tmp_path / "out" / f"{name}_mask.png"
