"""The C++ kernels under the address and the undefined-behaviour sanitizer: ten minutes.

The tests of the operations run on a build of its own, in which an access to memory that is not the
kernel's, or anything else that C++ leaves undefined, ends the program with a report. Fresh memory
holds NaN, so that a kernel that reads what it never wrote gives wrong results.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_install import sources

pytestmark = pytest.mark.timeout(3600)
LIBRARIES = ("libasan.so", "libstdc++.so")  # to be loaded before Python, in this order
TESTS = ("test_cpu_backend.py", "test_ema.py", "test_plans.py", "test_queue_push.py")
ASAN = (
    "detect_leaks=0",  # Python frees much at its end only
    "allocator_may_return_null=1",  # PyTorch tells of sizes that nobody has
    "max_malloc_fill_size=2147483647",
    "malloc_fill_byte=255",  # which are NaN in all floating-point types
)
POKE = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
place = libc.malloc(5000)
print(set(ctypes.string_at(place, 5000)), flush=True)
ctypes.memset(place, 0, 5001)
"""


def call(folder: Path, arguments: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | changes,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def options() -> dict[str, str]:
    """Return the environment of a sanitized program; skip where the compiler has no sanitizers."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++, whose sanitizers these are, is not here")
    paths = []
    for name in LIBRARIES:
        ask = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_file():
            pytest.skip(f"g++ has no {name}")
        paths.append(path)
    return {
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": ":".join(ASAN),
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


@pytest.fixture(scope="module")
def sanitized(options: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of this package whose C++ part is built with both sanitizers."""
    folder = sources(tmp_path_factory.mktemp("sanitized"))
    changes = {"CTT_SANITIZE": "address,undefined", "CTT_CPU": "1", "CTT_CUDA": "0"}
    done = call(folder, ["setup.py", "--quiet", "build_ext", "--inplace"], **changes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def test_the_sanitizer_sees_a_byte_too_much(options: dict[str, str], tmp_path: Path) -> None:
    done = call(tmp_path, ["-c", POKE], **options)
    assert done.stdout == "{255}\n"
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("name", TESTS)
def test_no_sanitizer_reports_anything(sanitized: Path, options: dict[str, str], name: str) -> None:
    quiet = ["-q", "-p", "no:cacheprovider", "--timeout=0"]
    arguments = ["-m", "pytest", *quiet, f"tests/ops/{name}"]
    done = call(sanitized, arguments, PYTHONPATH=str(sanitized), **options)
    print(done.stdout[-100:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "runtime error" not in done.stderr
