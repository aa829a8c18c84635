"""The package as another project sees it: installed without extras, used from a script."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKED = ("matplotlib", "rich", "safetensors", "timm", "torchvision", "tyro")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, built from a copy of the sources."""
    source = tmp_path_factory.mktemp("source") / "ctt"
    ignored = shutil.ignore_patterns("*.so", "build", "runs", ".*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    target = tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"CTT_CUDA": "0"}
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, env=environment)
    return target


def test_every_file_is_installed(installed: Path) -> None:
    for room in ("ctt", "kernels"):
        files = [p.relative_to(ROOT / room) for p in (ROOT / room).rglob("*.py")]
        name = {"kernels": "ctt_kernels"}.get(room, room)
        assert [f for f in files if not (installed / name / f).is_file()] == []
    recipes = {p.name for p in (ROOT / "ctt" / "recipes").glob("*.yaml")}
    assert recipes == {p.name for p in (installed / "ctt" / "recipes").glob("*.yaml")}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_example_of_the_readme_runs(installed: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    section = text[text.index("## The operations in another project") :]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
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
