"""The C++ kernels on other processors: cross-compiled, and run by an emulator of user programs."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_PYTHON = {"bindings.cpp", "layout.cpp"}
MACHINES = {  # compiler, and what runs its programs
    "this one": ("c++", []),
    "aarch64": ("aarch64-linux-gnu-g++", ["qemu-aarch64"]),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_kernels_compiled_for(machine: str, tmp_path: Path) -> None:
    compiler, emulator = MACHINES[machine]
    for program in (compiler, *emulator):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    kernels = ROOT / "csrc" / "cpu"
    sources = [p for p in sorted(kernels.glob("*.cpp")) if p.name not in NO_PYTHON]
    check = ROOT / "tests" / "ops" / "native" / "check.cpp"
    # all in the program, so that the emulator needs no libraries of that machine
    flags = ["-std=c++17", "-O3", "-fno-trapping-math", "-fopenmp", "-static", "-Wall", "-Werror"]
    target = str(tmp_path / "check")
    command = [compiler, *flags, f"-I{kernels}", *map(str, [check, *sources]), "-o", target]
    subprocess.run(command, check=True)
    done = subprocess.run([*emulator, target], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(": right\n")
