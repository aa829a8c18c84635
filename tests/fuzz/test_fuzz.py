"""Whatever is in a file or on the command line, it is read or refused with a word."""

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_nobody_meant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CTT_MAX_PIXELS", "1000000")
    counts = fuzz(name, 20 if name == "command line" else 60, tmp_path)
    assert counts.total() > 0
