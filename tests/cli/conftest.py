import functools
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctt.cli import data as program
from ctt.cli import train

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests leave it as it is."""
    out = tmp_path_factory.mktemp("runs") / "run"
    quick = (
        "--ratio 6 --data.labeled-pool 24 --data.eval-images 6 --data.batch-size 2 "
        "--model.width 4 --model.features 8 --train.threads 1 --train.iterations 3"
    )
    assert train._main([*shlex.split(quick), "--out", str(out)]) == 0
    return out


@pytest.fixture
def ctt_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs ctt-data; gives its exit code, what it printed, and its paragraph on stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ctt-data", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as stop:
            program.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return int(stop.value.code or 0), shown.out, re.sub(r"[\s│]+", " ", shown.err)

    return run


@pytest.fixture
def call(ctt_data: Call) -> Call:
    """Runs `ctt-data convert`."""
    return functools.partial(ctt_data, "convert")


def mask_of(folder: Path, name: str = "photo 0") -> np.ndarray:
    found = [*folder.rglob(f"masks/**/{name}.png")]
    assert len(found) == 1
    return np.asarray(Image.open(found[0]))
