"""C++ kernels (csrc/cpu) for tensors in main memory.

All kernels use torch.get_num_threads() threads, and the best instruction set of the machine; with
CTT_CPU_ISA=x86-64-v3 (AVX2) or base in the environment a lower one, for tests and measurements.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ctt.ops import reference
from ctt.ops._library import gradient_dtype, mark_written
from ctt.ops._plans import Plan
from ctt.ops._sources import outdated

try:
    from ctt import _cpu
except ImportError as error:
    _MISSING: str | None = (
        f"ctt._cpu cannot be imported ({error}); install again with a C++17 compiler and "
        f"CTT_CPU=1, which makes the build say what it lacks"
    )
else:
    _MISSING = outdated("ctt._cpu", getattr(_cpu, "sources", ""), "cpu")

# The codes of csrc/cpu/common.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_Result = tuple[Tensor, Tensor | None, Tensor | None]
_NO_MATRIX = (0, 0, 0, 0)


def why_not(operation: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        works = "cuda, triton or torch" if device.type == "cuda" else "torch"
        return f"it serves tensors in main memory only; on {device.type} take {works}"
    return _MISSING


class _EmaTable(NamedTuple):
    """What `_cpu.ema_update` is passed, and the positions of the pairs that it does not take."""

    teacher: list[int]  # addresses
    student: list[int]
    size: list[int]
    teacher_dtype: list[int]
    student_dtype: list[int]
    rest: list[int]


def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor, plan: Plan
) -> None:
    table = plan.tables.get("cpu")
    if table is None:
        table = plan.tables["cpu"] = _ema_table(teacher, student)
    _cpu.ema_update(
        table.teacher,
        table.student,
        table.size,
        table.teacher_dtype,
        table.student_dtype,
        float(decay),
        torch.get_num_threads(),
    )
    mark_written(teacher)
    for i in table.rest:
        reference.ema_update_([teacher[i]], [student[i]], decay)


def _ema_table(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> _EmaTable:
    table, listed = _EmaTable([], [], [], [], [], []), set()
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        # two views of one memory are updated one after the other, not by two threads at once;
        # tensors without memory of their own, such as DTensor, are at address 0
        places = t.data_ptr(), s.data_ptr()
        if places[0] in listed or 0 in places or not _in_one_order(t, s):
            table.rest.append(i)
            continue
        listed.add(t.data_ptr())
        table.teacher.append(t.data_ptr())
        table.student.append(s.data_ptr())
        table.size.append(t.numel())
        table.teacher_dtype.append(_DTYPES[t.dtype])
        table.student_dtype.append(_DTYPES[s.dtype])
    return table


def class_topk(
    confidence: Tensor, label: Tensor, k: int, num_classes: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    confidence, label = confidence.contiguous(), label.contiguous()
    valid = None if valid is None else valid.contiguous()
    index = label.new_empty(num_classes, k)
    count = label.new_empty(num_classes)
    _cpu.class_topk(
        confidence.data_ptr(),
        _DTYPES[confidence.dtype],
        label.data_ptr(),
        0 if valid is None else valid.data_ptr(),
        label.shape[0],
        k,
        num_classes,
        index.data_ptr(),
        count.data_ptr(),
        min(torch.get_num_threads(), num_classes),
    )
    return index, count


def queue_push_(
    keys: Tensor, count: Tensor, cursor: Tensor, features: Tensor, index: Tensor
) -> None:
    state = (keys, count, cursor)
    flat = tuple(x.contiguous() for x in state)
    num_classes, capacity, dim = keys.shape
    index = index.contiguous()
    _cpu.queue_push(
        _matrix(features),
        features.shape[0],
        index.data_ptr(),
        index.shape[1],
        flat[0].data_ptr(),
        _DTYPES[keys.dtype],
        num_classes,
        capacity,
        dim,
        flat[1].data_ptr(),
        flat[2].data_ptr(),
        torch.get_num_threads(),
    )
    for original, copy in zip(state, flat, strict=True):
        if copy is not original:
            original.copy_(copy)
    mark_written(state)


def info_nce(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
) -> _Result:
    options = (mask, float(temperature), reduction, need_grad, need_slope)
    return _contrast(query, None, label, [keys], [count], *options)


def pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
) -> _Result:
    options = (mask, float(temperature), reduction, need_grad, need_slope)
    return _contrast(query, positive, label, keys, counts, *options)


def _contrast(
    query: Tensor,
    positive: Tensor | None,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
) -> _Result:
    """Equation (6), or (8) where there is a positive."""
    double = query.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    label = label.contiguous()
    held = torch.stack([_held(k, n) for k, n in zip(keys, counts, strict=True)])  # (banks, C)
    begin = held.flatten().cumsum(0) - held.flatten()  # (banks * C,) in the keys held
    parts = [_keys_held(k, n, dtype) for k, n in zip(keys, held, strict=True)]
    flat_keys = parts[0] if len(parts) == 1 else torch.cat(parts)  # (M, D)
    index, pixels = _select_pixels(label, mask, held, need_own=positive is None)

    loss = flat_keys.new_empty(index.shape[0])
    make = torch.empty_like if index.shape[0] == query.shape[0] else torch.zeros_like
    # the slope is found on the way to the gradient
    made = need_grad or need_slope
    grad = make(query, dtype=gradient_dtype(query)) if made else None
    slope = torch.zeros_like(loss) if need_slope else None
    weight = _class_weight(pixels, reduction)
    if index.shape[0]:
        run = _cpu.contrast_f64 if double else _cpu.contrast_f32
        run(
            _matrix(query),
            _NO_MATRIX if positive is None else _matrix(positive),
            _NO_MATRIX if grad is None else _matrix(grad),
            index.data_ptr(),
            index.shape[0],
            label.data_ptr(),
            weight.data_ptr(),
            query.shape[1],
            (begin.data_ptr(), held.data_ptr(), *held.shape, flat_keys.shape[0]),
            flat_keys.data_ptr(),
            loss.data_ptr(),
            temperature,
            torch.get_num_threads(),
            *(() if slope is None else (slope.data_ptr(),)),
        )
    if not need_grad:
        grad = None
    if reduction == "none":
        value = loss.new_zeros(label.shape[0]).index_copy_(0, index, loss)
        if slope is not None:
            slope = loss.new_zeros(label.shape[0]).index_copy_(0, index, slope)
        return value, grad, slope
    value = (loss.double() * weight[label[index]]).sum().to(dtype)
    return value, grad, None if slope is None else slope.double().sum().to(dtype)


def _select_pixels(
    label: Tensor, mask: Tensor | None, held: Tensor, need_own: bool
) -> tuple[Tensor, Tensor]:
    """The pixels that count (n,), and how many there are of each class (C,)."""
    mask = None if mask is None else mask.contiguous()
    banks, num_classes = held.shape
    index = torch.empty_like(label)
    pixels = label.new_empty(num_classes)
    n = _cpu.select_pixels(
        label.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        label.shape[0],
        held.data_ptr(),
        banks,
        num_classes,
        need_own,
        index.data_ptr(),
        pixels.data_ptr(),
    )
    return index[:n], pixels


def _class_weight(pixels: Tensor, reduction: str) -> Tensor:
    """(C,) float64: what the loss of one pixel of each class counts in the result."""
    if reduction == "none":
        return torch.ones(pixels.shape, dtype=torch.float64, device=pixels.device)
    if reduction == "mean":
        return (1 / pixels.sum().clamp(min=1).double()).expand(pixels.shape).contiguous()
    return 1 / (pixels.clamp(min=1) * (pixels > 0).sum().clamp(min=1)).double()


def _in_one_order(t: Tensor, s: Tensor) -> bool:
    """Whether both can be walked through as arrays in the same order."""
    if t.is_contiguous() and s.is_contiguous():
        return True
    channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return channels_last and t.stride() == s.stride()


def _held(keys: Tensor, count: Tensor | None) -> Tensor:
    """(C,) keys held by each queue."""
    num_classes, capacity, _ = keys.shape
    if count is None:
        return torch.full((num_classes,), capacity, device=keys.device)
    return count.clamp(0, capacity)


def _keys_held(keys: Tensor, held: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, D): the keys of all queues, class by class, without the places that hold none."""
    num_classes, capacity, dim = keys.shape
    if int(held.sum()) == num_classes * capacity:
        return keys.reshape(num_classes * capacity, dim).to(dtype).contiguous()
    return keys[torch.arange(capacity, device=keys.device) < held[:, None]].to(dtype)


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), _DTYPES[x.dtype], x.stride(0), x.stride(1)
