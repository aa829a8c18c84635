"""Kernels that were compiled from other sources than those beside them are not used."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ctt.ops import _sources

ROOT = Path(__file__).parents[2]


def test_the_kernels_are_those_of_the_sources() -> None:
    _cpu = pytest.importorskip("ctt._cpu")
    with warnings.catch_warnings(action="error"):
        assert _sources.outdated("ctt._cpu", _cpu.sources, "cpu") is None


def test_other_sources_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = _sources.digest("cpu")
    monkeypatch.setattr(_sources, "SOURCES", tmp_path / "csrc")
    assert before == _sources.digest("cpu") != _sources.digest("cuda")
    (tmp_path / "csrc" / "cpu" / "ema.cpp~").write_text("left by an editor")
    assert before == _sources.digest("cpu")
    with (tmp_path / "csrc" / "cpu" / "rows.h").open("a") as header:
        header.write("// changed")
    with pytest.warns(UserWarning, match="from other sources than those in .*csrc.cpu"):
        reason = _sources.outdated("ctt._cpu", before, "cpu")
    assert reason is not None
    assert f"pip install -e {tmp_path}" in reason
    monkeypatch.setattr(_sources, "SOURCES", tmp_path / "site-packages" / "csrc")
    assert _sources.outdated("ctt._cpu", before, "cpu") is None  # nothing to compare with


def test_other_kernels_serve_then() -> None:
    pytest.importorskip("ctt._cpu")
    code = (
        "import warnings, ctt._cpu\n"
        "ctt._cpu.sources = 'of another version'\n"
        "from ctt.ops import available_backends\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    backends = available_backends()['info_nce']\n"
        "print(backends, len(told))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch', 'reference'] 1"
