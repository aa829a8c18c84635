"""Checks of arguments: dtype, shape and device only, so that nothing waits for a GPU."""

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

REDUCTIONS = ("class", "mean", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what backends read


def tensor(
    operation: str,
    name: str,
    value: object,
    shape: tuple[int | str, ...],
    dtype: torch.dtype | None,
    device: torch.device | None = None,
) -> None:
    """Check a tensor: `shape` holds sizes or letters (free sizes); `dtype` None: see `floating`.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another shape or on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{operation}: {name} must be a tensor, got {type(value).__name__}")
    if dtype is None:
        floating(operation, name, value)
    elif value.dtype != dtype:
        raise TypeError(f"{operation}: {name} must be {dtype}, got {value.dtype}")
    if value.dim() != len(shape) or any(
        isinstance(want, int) and want != have
        for want, have in zip(shape, value.shape, strict=True)
    ):
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{operation}: {name} must have shape ({wanted}), got {tuple(value.shape)}"
        )
    if device is not None and value.device != device:
        raise ValueError(f"{operation}: {name} must be on {device}, got {value.device}")


def floating(operation: str, name: str, value: Tensor) -> None:
    """Refuse a tensor that is not of one of `FLOATS`, such as integers and 8-bit floats.

    Raises:
        TypeError: it is none.
    """
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{operation}: {name} must be floating point of 16, 32 or 64 bits, got {value.dtype}"
        )


def pairs(operation: str, name: str, what: str, value: object) -> None:
    """Check a list of pairs.

    Args:
        what: a pair, as in the message.

    Raises:
        TypeError: it is no list or tuple of pairs.
        ValueError: it is empty.
    """
    many = (list, tuple)
    if not isinstance(value, many):
        found = type(value).__name__
        raise TypeError(f"{operation}: {name} must be a list of {what}, got {found}")
    for i, pair in enumerate(value):
        if not isinstance(pair, many) or len(pair) != 2:
            found = type(pair).__name__
            raise TypeError(f"{operation}: {name}[{i}] must be {what}, got {found}")
    if not value:
        raise ValueError(f"{operation}: {name} must hold at least one {what}, got none")


def number(operation: str, name: str, value: object) -> float:
    """Return a scalar of any usual kind, such as NumPy's, as a number.

    Raises:
        TypeError: it is none.
    """
    # numbers of Python, and symbolic ones under torch.compile, stay what they are
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{operation}: {name} must be a number, got {value!r}") from None


def untransformed(operation: str, tensors: Iterable[Tensor]) -> None:
    """Refuse tensors inside torch.func transforms, which have no memory of their own.

    Raises:
        RuntimeError: there is one.
    """
    if not torch._C._are_functorch_transforms_active():
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise RuntimeError(
            f"{operation} cannot run inside torch.func.grad, vmap and the like, on their tensors; "
            f"call it outside of the transformed function"
        )


def temperature(operation: str, value: object) -> float:
    """Return a temperature of any usual kind of scalar as a number."""
    tau = number(operation, "temperature", value)
    # a comparison, because torch.compile with dynamic shapes cannot trace math.isfinite
    if not 0 < tau < math.inf:
        raise ValueError(f"{operation}: temperature must be a finite number above 0, got {value!r}")
    return tau


def learned_temperature(operation: str, value: Tensor, device: torch.device) -> Tensor:
    """Return a temperature that is a tensor with shape ()."""
    if value.dtype not in FLOATS or value.numel() != 1:
        raise ValueError(
            f"{operation}: temperature must be a number or a floating-point tensor of one value, "
            f"got {value.dtype} {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{operation}: temperature must be on {device}, got {value.device}")
    return value.reshape(())


def reduction(operation: str, value: str) -> None:
    if value not in REDUCTIONS:
        raise ValueError(f"{operation}: reduction must be one of {REDUCTIONS}, got {value!r}")


def positive_int(operation: str, name: str, value: object) -> int:
    """Return an integer of any usual kind, such as NumPy's, as a number.

    Raises:
        TypeError: it is none.
        ValueError: it is below 1.
    """
    # under torch.compile with dynamic shapes a size may be a symbolic integer
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            kind = type(value).__name__
            raise TypeError(f"{operation}: {name} must be an integer, got {kind}") from None
    if value < 1:
        raise ValueError(f"{operation}: {name} must be at least 1, got {value}")
    return value  # type: ignore[return-value]
