import subprocess
import sys
from pathlib import Path

TRAINER = ("matplotlib", "PIL", "rich", "safetensors", "sklearn", "timm", "torchvision")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_operations_need_torch_alone() -> None:
    block = "".join(f"sys.modules[{name!r}] = None;" for name in (*TRAINER, "tyro", "yaml"))
    use = "import torch; MemoryBank(2, 3, 4); print(sorted(available_backends()))"
    shown = run(f"import sys; {block} from ctt.ops import *; {use}")
    assert "info_nce" in shown


def test_operations_do_not_load_the_trainer() -> None:
    code = "import sys, ctt.ops; print([m for m in sys.modules if m.startswith('ctt.')])"
    own = ("ctt.ops", "ctt._cpu")  # the compiled part of the operations
    assert all(name.strip(" []'").startswith(own) for name in run(code).split(","))


def test_the_operations_are_an_attribute_of_the_package() -> None:
    assert run("import ctt; print(ctt.ops.info_nce.__name__)") == "info_nce"
    assert run("import ctt; print(hasattr(ctt, 'opts'))") == "False"
    assert run("import ctt; print(callable(ctt.train))") == "True"


def test_package_itself_loads_nothing() -> None:
    assert run("import sys, ctt; print('torch' in sys.modules, ctt.__version__)") == "False 0.1.0"


def test_no_module_hides_one_of_the_standard_library() -> None:
    """Python puts the folder of a script first on its path: a queue.py there breaks torch."""
    root = Path(__file__).resolve().parents[1]
    modules = {path for folder in ("ctt", "kernels") for path in (root / folder).rglob("*.py")}
    assert len(modules) > 50
    assert [path for path in modules if path.stem in sys.stdlib_module_names] == []


def test_packages_import_nothing_of_training() -> None:
    root = Path(__file__).resolve().parents[1] / "ctt"
    below = ("data", "inference", "methods", "models", "ops", "recipes")
    files = [*root.glob("*.py"), *(path for name in below for path in (root / name).rglob("*.py"))]
    assert len(files) > 50
    assert [path for path in files if "ctt.train" in path.read_text(encoding="utf-8")] == []
