"""The kernels of csrc/cuda, called through the C boundary of ctt/libctt_cuda.so.

Serves the averages and the bank: `ema_update_`, `class_topk` and `queue_push_`. The two contrast
losses are left to the Triton backend. No call waits for the device, and every call can be captured
in a CUDA graph.
"""

import ctypes
import itertools
import operator
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ctt.ops import reference
from ctt.ops._library import mark_written
from ctt.ops._plans import Plan
from ctt.ops._registry import select
from ctt.ops._sources import outdated

LIBRARY = Path(__file__).parents[2] / "libctt_cuda.so"
OLDEST_CAPABILITY = (8, 0)

# the numbers of `enum DType` in csrc/cuda/common.cuh
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

_POINTER, _INT, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_PLACE = [_INT, _POINTER]  # device, stream

# the entry points of csrc/cuda: result and arguments
SIGNATURES = {
    "ctt_cuda_sources": (ctypes.c_char_p, []),
    "ctt_cuda_error_text": (ctypes.c_char_p, [_INT]),
    "ctt_cuda_probe": (_INT, [_INT]),
    "ctt_cuda_ema_update": (_INT, [_POINTER, _LONG, _DOUBLE, _POINTER, _INT, *_PLACE]),
    "ctt_cuda_class_topk_workspace": (_LONG, [_LONG, _LONG, _LONG, _INT]),
    "ctt_cuda_class_topk": (
        _INT,
        [_POINTER, _INT, _LONG]  # confidence, dtype, stride
        + [_POINTER, _LONG] * 2  # label, valid with their strides
        + [_LONG] * 3  # pixels, classes, k
        + [_POINTER] * 3  # workspace, index, count
        + _PLACE,
    ),
    "ctt_cuda_queue_push": (
        _INT,
        [_POINTER, _INT, *[_LONG] * 3]  # keys, dtype, strides
        + [_POINTER, _LONG] * 2  # count, cursor with their strides
        + [_POINTER, _INT, *[_LONG] * 2]  # features, dtype, strides
        + [_POINTER, *[_LONG] * 2]  # index, strides
        + [_LONG] * 5  # classes, capacity, dim, rows, entries
        + _PLACE,
    ),
}


def why_not(operation: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its kernels run on CUDA devices, not on {device.type}"
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; install one that is"
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built; reinstall ctt where nvcc is found (PATH, CUDA_HOME)"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    name = torch.cuda.get_device_name(device)
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        needed, found = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
        return f"it needs compute capability {needed} or later, {name} has {found}"
    try:
        library = load(LIBRARY)
    except (OSError, AttributeError) as error:  # broken, or of another version
        return f"{LIBRARY.name} does not load ({error}); reinstall ctt"
    if reason := outdated(LIBRARY.name, library.ctt_cuda_sources().decode(), "cuda"):
        return reason
    index = torch.cuda.current_device() if device.index is None else device.index
    with _on(index):
        status = library.ctt_cuda_probe(index)
    if status:
        reason = _error_text(library, status)
        return f"{LIBRARY.name} cannot run on {name} ({reason}); update the driver or reinstall ctt"
    return None


class _EmaTable(NamedTuple):
    """What `ema_update_` passes on for one list of tensors."""

    pairs: bytes  # packed `EmaPair` structures of csrc/cuda/ema_update.cu
    taken: int
    irregular: list[int]  # positions of the pairs that the kernel does not take


_PAIR = struct.Struct("=QQqii")


def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor, plan: Plan
) -> None:
    table = plan.tables.get("cuda")
    if table is None:
        table = plan.tables["cuda"] = _ema_table(teacher, student)
    device = teacher[0].device
    if isinstance(decay, Tensor) and decay.device != device:
        decay = decay.item() if decay.device.type == "cpu" else decay.to(device, non_blocking=True)
    if table.taken:
        if isinstance(decay, Tensor):
            weight = (0.0, decay.data_ptr(), _DTYPES[decay.dtype])
        else:
            weight = (decay, 0, 0)
        _launch("ema_update_", device, table.pairs, table.taken, *weight)
    mark_written(teacher)
    # after the kernel, so that two views of one memory are updated one after the other
    for i in table.irregular:
        reference.ema_update_([teacher[i]], [student[i]], decay)


def class_topk(
    confidence: Tensor, label: Tensor, k: int, num_classes: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    if confidence.dtype not in _DTYPES:
        confidence = confidence.float()
    dtype, (pixels,) = _DTYPES[confidence.dtype], label.shape
    scratch = _workspace_bytes(pixels, num_classes, k, dtype)
    if scratch < 0:
        sort = select("class_topk", "torch", label.device).class_topk
        result: tuple[Tensor, Tensor] = sort(confidence, label, k, num_classes, valid)
        return result
    index, count = label.new_empty(num_classes, k), label.new_empty(num_classes)
    workspace = label.new_empty(scratch // label.itemsize)
    _launch(
        "class_topk",
        label.device,
        *(confidence.data_ptr(), dtype, confidence.stride(0)),
        *(label.data_ptr(), label.stride(0)),
        *((0, 0) if valid is None else (valid.data_ptr(), valid.stride(0))),
        *(pixels, num_classes, k),
        *(workspace.data_ptr(), index.data_ptr(), count.data_ptr()),
    )
    return index, count


def queue_push_(
    keys: Tensor, count: Tensor, cursor: Tensor, features: Tensor, index: Tensor
) -> None:
    if keys.dtype not in _DTYPES or features.dtype not in _DTYPES:
        select("queue_push_", "torch", keys.device).queue_push_(
            keys, count, cursor, features, index
        )
        return
    num_classes, capacity, dim = keys.shape
    rows, entries = features.shape[0], index.shape[1]
    if not (num_classes and capacity and entries):
        return
    _launch(
        "queue_push_",
        keys.device,
        *(keys.data_ptr(), _DTYPES[keys.dtype], *keys.stride()),
        *(count.data_ptr(), count.stride(0)),
        *(cursor.data_ptr(), cursor.stride(0)),
        *(features.data_ptr(), _DTYPES[features.dtype], *features.stride()),
        *(index.data_ptr(), *index.stride()),
        *(num_classes, capacity, dim, rows, entries),
    )
    mark_written((keys, count, cursor))


@cache
def load(path: Path) -> ctypes.CDLL:
    """Return the library with the types of its entry points. Needs no driver."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _launch(operation: str, device: torch.device, *arguments: float | bytes) -> None:
    """Run the entry point of `operation` on the current stream of `device`."""
    library, index = load(LIBRARY), device.index
    with _on(index):
        stream = torch._C._cuda_getCurrentRawStream(index)
        status = getattr(library, f"ctt_cuda_{operation.rstrip('_')}")(*arguments, index, stream)
    if status:
        reason = _error_text(library, status)
        raise RuntimeError(f"{operation}: the CUDA kernel did not start on {device}: {reason}")


def _on(index: int) -> AbstractContextManager[object]:
    """Makes a device current; entering torch.cuda.device costs more than asking."""
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def _error_text(library: ctypes.CDLL, status: int) -> str:
    text: bytes = library.ctt_cuda_error_text(status)
    return f"CUDA error {status}, {text.decode()}"


@lru_cache(maxsize=256)
def _workspace_bytes(pixels: int, num_classes: int, k: int, dtype: int) -> int:
    size: int = load(LIBRARY).ctt_cuda_class_topk_workspace(pixels, num_classes, k, dtype)
    return size


def _ema_table(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> _EmaTable:
    packed, irregular, listed = [], [], set()
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if t.numel() == 0:
            continue
        address = t.data_ptr()
        if address in listed or not _kernel_takes(t, s):
            irregular.append(i)
            continue
        listed.add(address)
        types = _DTYPES[t.dtype], _DTYPES[s.dtype]
        packed.append(_PAIR.pack(address, s.data_ptr(), t.numel(), *types))
    return _EmaTable(b"".join(packed), len(packed), irregular)


def _kernel_takes(t: Tensor, s: Tensor) -> bool:
    """Whether both fill a block of memory without gaps, their elements in the same order."""
    if t.dtype not in _DTYPES or s.dtype not in _DTYPES:
        return False
    if not (t.data_ptr() and s.data_ptr()):  # a wrapper, whose memory is elsewhere
        return False
    if t.is_contiguous() and s.is_contiguous():
        return True
    axes = _axes(t)
    steps = itertools.accumulate((size for _, size, _ in axes), operator.mul, initial=1)
    return axes == _axes(s) and all(a[0] == step for a, step in zip(axes, steps, strict=False))


def _axes(x: Tensor) -> list[tuple[int, int, int]]:
    """(stride, size, axis) of the axes that have a stride, from the innermost to the outermost."""
    axes = enumerate(zip(x.stride(), x.shape, strict=True))
    return sorted((stride, size, axis) for axis, (stride, size) in axes if size > 1)
