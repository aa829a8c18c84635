"""The device that a program computes on."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch

from ctt.errors import UserError
from ctt.processes import local_rank, world_size


def pick_device(name: str, option: str = "`train.device`") -> torch.device:
    """Return the device of that name; `auto` is a GPU where there is one.

    Under torchrun each process has a GPU of its own.

    Args:
        option: where the name comes from, for the message.

    Raises:
        UserError: not a device, or one that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and world_size() > 1:
            if name != device.type:
                raise RuntimeError("torchrun gives every process a device; leave the number out")
            if local_rank() >= (gpus := torch.cuda.device_count()):
                raise RuntimeError(
                    f"LOCAL_RANK is {local_rank()}, so this process is to have a GPU of that "
                    f"number, and it sees {gpus}, from number 0; start as many as there are GPUs"
                )
            device = torch.device("cuda", local_rank())
        elif name == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option} {name} cannot be used here ({reason}).") from None
    return device


def device_name(device: torch.device) -> str:
    """Return the name of a GPU; of a processor its name, family and model, and the instruction set
    used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told: dict[str, str] = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        pairs = [line.partition(":") for line in lines]
        told = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    name = told.get("model name") or platform.processor() or platform.machine()
    number = f" {told['cpu family']}/{told['model']}" if "cpu family" in told else ""
    return f"{name}{number} {_instruction_set()}"


def _instruction_set() -> str:
    """Return that of the C++ kernels, or what PyTorch takes where these are not built."""
    try:
        from ctt._cpu import instruction_set
    except ImportError:
        return torch.backends.cpu.get_cpu_capability()
    return instruction_set()
