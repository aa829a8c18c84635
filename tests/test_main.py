"""`python -m ctt`."""

import subprocess
import sys

import pytest
import torch

from ctt import __main__ as diagnosis
from ctt import __version__
from ctt.ops._registry import BACKENDS, OPERATIONS


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ctt"], capture_output=True, text=True, check=True, timeout=300
    )
    assert f"ctt       {__version__}" in done.stdout
    assert torch.__version__ in done.stdout
    for operation in OPERATIONS:
        assert f"{operation} on cpu: auto takes " in done.stdout


def test_every_backend_runs_or_says_why_not() -> None:
    lines = diagnosis.backends()
    assert len(lines) == len(diagnosis.devices()) * len(OPERATIONS) * (1 + len(BACKENDS))
    for line in lines:
        if line.startswith("  "):
            name, state = line.split(maxsplit=1)
            assert name in BACKENDS
            assert state == "runs" or len(state.removeprefix("no: ")) > 10, line


def test_survives_a_backend_that_fails_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(operation: str, backend: str, device: torch.device) -> str | None:
        raise OSError("undefined symbol")

    monkeypatch.setattr(diagnosis, "why_not", broken)
    assert "  cpu       no: it fails to load: undefined symbol" in diagnosis.backends()


@pytest.mark.parametrize("output", [None, "no version in here", "release 13.0, V13.0.48"])
def test_nvcc(monkeypatch: pytest.MonkeyPatch, output: str | None) -> None:
    def run(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        if output is None:
            raise PermissionError("nvcc")
        return subprocess.CompletedProcess([], 0, stdout=output)

    monkeypatch.setattr("shutil.which", lambda name: "/opt/nvcc")
    monkeypatch.setattr("subprocess.run", run)
    told = diagnosis._nvcc()
    expected = {None: "does not run", "release 13.0, V13.0.48": "13.0, /opt/nvcc"}
    assert expected.get(output, "unknown version") in told
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert diagnosis._nvcc() == "not found"
