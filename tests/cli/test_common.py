import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctt.cli import evaluate, export, predict, report, sweep
from ctt.cli.common import BAD_INPUT, CLOSED_PIPE, run_program
from ctt.console import plain_console
from ctt.errors import AlreadyReportedError, UserError
from ctt.text import printable, say


def test_a_full_disk_is_one_line_wherever_it_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    def body(number: int) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit) as stop:
        run_program("ctt-x", lambda: body(errno.ENOSPC))
    assert stop.value.code == BAD_INPUT
    assert capsys.readouterr().err == "ctt-x: No space left on device.\n"
    with pytest.raises(OSError, match="Bad file descriptor"):  # a fault of the program
        run_program("ctt-x", lambda: body(errno.EBADF))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", ["print('x' * 10**6)", "sys.exit(print('x'))"])
def test_a_pipe_that_nobody_reads_ends_the_program_quietly(body: str, unbuffered: str) -> None:
    """While it prints, and at its end."""
    code = f"import sys; from ctt.cli.common import run_program; run_program('a', lambda: {body})"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, b"")


def test_other_pipes_are_no_closed_ones() -> None:
    def body() -> int:
        raise BrokenPipeError(errno.EPIPE, "of another process")

    with pytest.raises(BrokenPipeError, match="of another process"):
        run_program("ctt-x", body)


def test_messages_name_options_where_libraries_name_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`ctt.train` shows what one types in Python, the program what one types in a shell."""
    text = "`model.output_stride` 3, `method`, `options.my_own`: `range` of `ctt-data check`, `a.b`"

    def body() -> int:
        say("`data.batch_size`")
        plain_console().print("`resume`")
        raise UserError(text)

    with pytest.raises(SystemExit):
        run_program("ctt-x", body)
    shown = capsys.readouterr()
    assert shown.out.split() == ["--data.batch-size", "--resume"]
    options = "--model.output-stride 3, --method, --options.my-own: `range` of `ctt-data check`, "
    assert shown.err.split() == ["ctt-x:", *options.split(), "`a.b`"]
    assert printable(text) == text  # the program has ended


def test_a_tilde_is_the_home_folder_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shells replace it at the front of a word alone; no program may make a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    given = ["tiles", "~/a b", "--to=~/x=1", "--side=~", "~kept.png", "x/~/y", "--note=a~b"]
    monkeypatch.setattr(sys, "argv", ["ctt-x", *given])
    seen = []
    with pytest.raises(SystemExit):
        run_program("ctt-x", lambda: seen.append(sys.argv[1:]) or 0)
    moved = [str(tmp_path / "a b"), f"--to={tmp_path / 'x=1'}", f"--side={tmp_path}"]
    assert seen == [["tiles", *moved, *given[4:]]]
    monkeypatch.setattr(sys, "argv", ["ctt-x", "--out=~nobody-of-this-name/x"])
    with pytest.raises(SystemExit) as stop:
        run_program("ctt-x", lambda: 0)
    assert stop.value.code == BAD_INPUT
    assert "--out ~nobody-of-this-name/x: it is not known which folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (evaluate, ["run"]),
        (predict, ["run", "photos", "--out", "new"]),
        (export, ["run"]),
        (report, ["runs"]),
        (sweep, ["tau", "--out", "new"]),
    ],
)
def test_programs_that_are_to_run_once_refuse_torchrun(
    program: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for place, error in (("0", UserError), ("1", AlreadyReportedError)):
        monkeypatch.setenv("RANK", place)
        with pytest.raises(error, match="to run once" if error is UserError else None):
            program._main(arguments)
    assert list(tmp_path.iterdir()) == []
