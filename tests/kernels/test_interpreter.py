"""Every kernel on the CPU, through the public functions, in Triton's interpreter.

The interpreter must be chosen before triton is imported, so the cases run in processes of their
own. float32 and float16 only: it is silently wrong in bfloat16.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# the interpreter of 3.5 writes histograms past the end of their tensor
pytest.importorskip("triton", minversion="3.6")
pytest.importorskip("ctt_kernels")


@pytest.mark.parametrize("cases", ["interpreted_contrast.py", "interpreted_bank.py"])
def test_in_interpreter(cases: str) -> None:
    file = Path(__file__).with_name(cases)
    options = ["-q", "-p", "no:cacheprovider", "--no-header"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
