"""The package as another project sees it: installed without extras, used from a script."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKED = ("matplotlib", "rich", "safetensors", "timm", "torchvision", "tyro")


def sources(folder: Path) -> Path:
    """A copy of what is in the repository."""
    ignored = shutil.ignore_patterns("*.so", "build", "runs", ".*", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, folder / "ctt", ignore=ignored))


def sdist_of(folder: Path, **changes: str) -> Path:
    """Return the sdist of the sources."""
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    command, environment = [sys.executable, "-c", code, str(folder)], os.environ | changes
    subprocess.run(command, cwd=sources(folder), env=environment, check=True)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def wheel_of(folder: Path, **changes: str) -> Path:
    """Return the wheel of the sdist of the sources, built in isolation in an empty folder."""
    sdist = sdist_of(folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    environment = os.environ | {"CTT_CUDA": "0", **changes}
    subprocess.run([*pip, str(folder), str(sdist)], env=environment, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, with the C++ kernels."""
    return wheel_of(tmp_path_factory.mktemp("source"), CTT_CPU="1")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, installed from the wheel."""
    target = tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


def test_every_file_is_installed(installed: Path) -> None:
    for room in ("ctt", "kernels"):
        files = [p.relative_to(ROOT / room) for p in (ROOT / room).rglob("*.py")]
        name = {"kernels": "ctt_kernels"}.get(room, room)
        assert [f for f in files if not (installed / name / f).is_file()] == []
    recipes = {p.name for p in (ROOT / "ctt" / "recipes").glob("*.yaml")}
    assert recipes == {p.name for p in (installed / "ctt" / "recipes").glob("*.yaml")}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_the_examples_of_the_operations_run(installed: Path, tmp_path: Path, page: str) -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert found is not None
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in BLOCKED)
    script = tmp_path / "example.py"
    script.write_text(f"import sys\n{block}{found[1]}", "utf-8")
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss \d\.\d+, keys held \[32, 32, 32, 32, 32\]\n", done.stdout)


COMPILER = """#!/bin/sh
# writes what a compiler would: the object that is asked for, and on which headers it depends
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out="$2" ;;
    -MF) needs="$2" ;;
    *.cpp) source="$1" ;;
  esac
  shift
done
date +%N > "$out"
if [ -n "$needs" ]; then echo "$out: $source $(dirname "$source")/ops.h" > "$needs"; fi
"""


@pytest.mark.skipif(os.name != "posix", reason="the compiler of this test is a shell script")
def test_what_has_not_changed_is_not_built_again(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    source = sources(tmp_path)
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    tools = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), str(compiler))
    changes = {"CTT_CPU": "1", "CTT_CUDA": "0", **tools}
    # ninja itself need not be on the PATH
    changes["PATH"] = "/usr/bin:/bin" if not Path("/usr/bin/ninja").exists() else "/bin"

    def build() -> dict[str, int]:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=source, env=os.environ | changes, check=True)
        objects = {p.stem: p.stat().st_mtime_ns for p in (source / "build").rglob("*.o")}
        assert list((source / "ctt").glob("_cpu*"))
        return objects

    def newer(before: dict[str, int], after: dict[str, int]) -> list[str]:
        return sorted(name for name in after if after[name] != before[name])

    first = build()
    assert set(first) == {p.stem for p in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert newer(first, again := build()) == []
    (source / "csrc" / "cpu" / "ema.cpp").touch()
    assert newer(again, third := build()) == ["ema"]
    (source / "csrc" / "cpu" / "ops.h").touch()
    assert newer(third, build()) == sorted(first)


def test_the_sdist_holds_every_source_whatever_is_built_where_it_is_made(tmp_path: Path) -> None:
    with tarfile.open(sdist_of(tmp_path, CTT_CPU="0", CTT_CUDA="0")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert needed <= names


@pytest.mark.parametrize("compiler", [True, False])
def test_the_wheel_of_the_sdist_in_isolation(
    tmp_path: Path, compiler: bool, request: pytest.FixtureRequest
) -> None:
    """Everything that a build needs is in the sdist, and pip fetches the rest by itself."""
    if compiler:
        built: Path = request.getfixturevalue("wheel")
    else:
        built = wheel_of(tmp_path, CC="/nowhere/cc", CXX="/nowhere/c++", CTT_CPU="auto")
    names = zipfile.ZipFile(built).namelist()
    assert any(name.startswith("ctt/_cpu.cpython") for name in names) is compiler
    assert not any(name.startswith(("csrc", "tests", "benchmarks")) for name in names)
    for room, package in (("ctt", "ctt"), ("kernels", "ctt_kernels")):
        files = [p.relative_to(ROOT / room).as_posix() for p in (ROOT / room).rglob("*.py")]
        assert {f"{package}/{file}" for file in files} <= set(names)
