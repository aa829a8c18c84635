"""Which backend runs an operation, and why another cannot."""

import importlib
import warnings
from collections.abc import Iterable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

OPERATIONS = ("ema_update_", "class_topk", "queue_push_", "info_nce", "pair_info_nce")
BACKENDS = ("cuda", "triton", "chunked", "cpu", "torch", "reference")

_PLAIN = ("ctt.ops.backends.torch", "ctt.ops.backends.reference")  # others read memory

# What "auto" tries, first to last, by the type of the device; the reference runs everywhere.
_PREFERENCE = {"cuda": ("cuda", "triton", "chunked", "torch"), "cpu": ("cpu", "torch")}
_OTHER_DEVICE = ("torch",)


@cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"ctt.ops.backends.{backend}")


@cache
def why_not(operation: str, backend: str, device: torch.device) -> str | None:
    """Return None if `backend` can run `operation` on `device`, else why not and what would
    work."""
    module = _module(backend)
    if not hasattr(module, operation):
        return f"the {backend} backend does not implement {operation}"
    reason: str | None = module.why_not(operation, device)
    return reason


def available_backends(device: str | torch.device = "cpu") -> dict[str, list[str]]:
    """Return the backends that can run each operation on tensors of `device`.

    Returns:
        {operation: [backend, ...]}, for instance {"info_nce": ["reference"], ...}.
    """
    device = torch.device(device)
    return {
        operation: [b for b in BACKENDS if why_not(operation, b, device) is None]
        for operation in OPERATIONS
    }


_first = ""  # set by prefer_backend


def prefer_backend(name: str) -> None:
    """Make "auto" take this backend wherever it can run; "auto" returns to the measured order.

    Raises:
        ValueError: there is no backend of that name.
    """
    global _first
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {name!r}")
    _first = "" if name == "auto" else name
    _auto.cache_clear()


def preferred() -> str:
    """Return what `prefer_backend` was last given, or "auto"."""
    return _first or "auto"


@cache
def _auto(operation: str, device: torch.device) -> ModuleType:
    order = _PREFERENCE.get(device.type, _OTHER_DEVICE)
    for backend in (_first, *order) if _first else order:
        try:
            if why_not(operation, backend, device) is None:
                return _module(backend)
        except Exception as error:  # a broken fast path must not take the operation with it
            warnings.warn(f"ctt.ops: the {backend} backend failed to load ({error})", stacklevel=2)
    return _module("reference")


def select(operation: str, backend: str, device: torch.device) -> ModuleType:
    """Return the module that runs `operation`.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend that was asked for by name cannot run here.
    """
    if backend == "auto":
        return _auto(operation, device)
    if backend not in BACKENDS:
        raise ValueError(
            f"{operation}: backend must be one of {('auto', *BACKENDS)}, got {backend!r}"
        )
    reason = why_not(operation, backend, device)
    if reason is not None:
        works = ", ".join(available_backends(device)[operation])
        raise RuntimeError(
            f"{operation}: backend {backend!r} cannot run on {device}: {reason}; these can: {works}"
        )
    return _module(backend)


def select_for(
    operation: str, backend: str, device: torch.device, tensors: Iterable[Tensor | None]
) -> ModuleType:
    """Return the module that runs `operation` on these tensors.

    Raises:
        ValueError, RuntimeError: as `select`.
        TypeError: it reads memory, and one of the tensors has none of its own, as a DTensor.
    """
    module = select(operation, backend, device)
    if module.__name__ in _PLAIN:
        return module
    for x in tensors:
        if x is not None and x.numel() and not x.data_ptr():
            raise TypeError(
                f"{operation}: a {type(x).__name__} of shape {tuple(x.shape)} has no memory of its "
                f"own here. Pass plain tensors, such as x.to_local() of a DTensor."
            )
    return module
