"""Thousands of inputs that nobody meant: a minute.

CTT_INPUTS sets another number of inputs than 5000, over all kinds; `-s` shows how many were taken.
"""

import dataclasses
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.fuzz.targets import TARGETS, fuzz

pytestmark = pytest.mark.timeout(3600)
INPUTS = int(os.environ.get("CTT_INPUTS", "5000"))
SLOWEST = 30  # seconds of a processor that one input may take
WAITED = 600  # seconds on the clock, where others keep the machine busy
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod")
_watched: list[Path] = []  # the folder that may be written to, while an input is read
_written: list[str] = []  # files elsewhere


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what Python writes outside of the folder; an audit hook stays for good."""
    if not _watched or (event != "open" and event not in CHANGING):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
        return
    for path in arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]:
        if isinstance(path, str | bytes | os.PathLike) and str(path) != os.devnull:
            whole = os.path.realpath(os.fsdecode(path))
            if not Path(whole).is_relative_to(_watched[0]):
                _written.append(f"{event} {whole}")


def hang(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"an input takes more than {SLOWEST} seconds of a processor, or {WAITED}")


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(watch)


@pytest.mark.parametrize("name", TARGETS)
def test_no_traceback_no_hang_no_file_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CTT_MAX_PIXELS", "1000000")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))  # made when it is imported
    monkeypatch.setenv("TMPDIR", str(folder))  # where libraries put what they soon delete
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    target = TARGETS[name]

    def timed(content: Any, folder: Path) -> None:
        signal.setitimer(signal.ITIMER_PROF, SLOWEST)
        signal.alarm(WAITED)
        _watched[:] = [folder]
        try:
            target.read(content, folder)
        finally:
            _watched.clear()
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    monkeypatch.setitem(TARGETS, name, dataclasses.replace(target, read=timed))
    alarms = (signal.SIGALRM, signal.SIGPROF)
    before = [signal.signal(number, hang) for number in alarms]
    _written.clear()
    try:
        counts = fuzz(name, INPUTS // len(TARGETS), folder)
    finally:
        for number, handler in zip(alarms, before, strict=True):
            signal.signal(number, handler)
    print(f"\n{name}: {', '.join(f'{count} {kind}' for kind, count in counts.most_common())}")
    assert counts["refused at length"] == 0
    assert _written == []
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
