import subprocess
import sys

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
    assert all(name.strip(" []'").startswith("ctt.ops") for name in run(code).split(","))


def test_package_itself_loads_nothing() -> None:
    assert run("import sys, ctt; print('torch' in sys.modules, ctt.__version__)") == "False 0.1.0"
