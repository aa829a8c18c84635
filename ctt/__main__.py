"""`python -m ctt`: what is installed, which backends can run here, and why the others cannot."""

import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

import ctt
from ctt.ops._registry import BACKENDS, OPERATIONS, select, why_not


def main() -> None:
    print("\n".join([*versions(), "", *backends()]))


def versions() -> list[str]:
    """Return one line for each program, and for each device."""
    return [
        f"ctt       {ctt.__version__}",
        f"python    {platform.python_version()}",
        f"torch     {torch.__version__}, built for CUDA {torch.version.cuda or 'none'}",
        f"triton    {_package('triton')}",
        f"nvcc      {_nvcc()}",
        f"cpu       {torch.get_num_threads()} threads",
        *_accelerators(),
    ]


def backends() -> list[str]:
    """Return a block for each kind of device and operation, with a line for each backend."""
    lines: list[str] = []
    for device in devices():
        for operation in OPERATIONS:
            lines.append(f"{operation} on {device.type}: auto takes {_auto(operation, device)}")
            lines += [f"  {b:9} {_state(operation, b, device)}" for b in BACKENDS]
    return lines


def devices() -> list[torch.device]:
    """Return the kinds of device that are here."""
    kinds = ["cpu"]
    if torch.accelerator.is_available():
        kinds.append(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
    return [torch.device(kind) for kind in kinds]


def _accelerators() -> list[str]:
    if not torch.accelerator.is_available():
        return ["gpu       none"]
    kind = devices()[-1].type
    if kind != "cuda":
        return [f"{kind:9} {torch.accelerator.device_count()}"]
    return [
        f"cuda:{i}    {torch.cuda.get_device_name(i)}, "
        f"compute capability {'.'.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    ]


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not found"
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run ({error})"
    found = re.search(r"release ([\d.]+)", text)
    return f"{found.group(1) if found else 'unknown version'}, {path}"


def _state(operation: str, backend: str, device: torch.device) -> str:
    reason = _reason(operation, backend, device)
    return "runs" if reason is None else f"no: {reason}"


def _reason(operation: str, backend: str, device: torch.device) -> str | None:
    try:
        return why_not(operation, backend, device)
    except Exception as error:  # a diagnosis must survive what it diagnoses
        return f"it fails to load: {error}"


def _auto(operation: str, device: torch.device) -> str:
    return select(operation, "auto", device).__name__.rpartition(".")[2]


if __name__ == "__main__":
    main()
