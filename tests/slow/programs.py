"""The programs as a user starts them, for the slow tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN = "from ctt.cli.{} import main; main()"


def command(program: str, arguments: str) -> list[str]:
    """Return a command line: of `train` that of ctt-train, and so on."""
    return [sys.executable, "-c", BEGIN.format(program), *arguments.split()]


def environment() -> dict[str, str]:
    """Return the environment in which this checkout is imported from any folder."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def call(program: str, arguments: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(program, arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
