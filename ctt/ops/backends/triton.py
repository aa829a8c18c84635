"""Triton kernels for CUDA devices of compute capability 8.0 and later.

Nothing here waits for the device, and all of it can be captured in a CUDA graph after one eager
call on the same tensors (which compiles the kernels and makes the table of `ema_update_`).

Precision of `info_nce` and `pair_info_nce`, by the dtype of the query (sums are in float32; `keys`
and `positive` may have any dtype, keys are rounded to the query's once per call):

    bfloat16  products in bfloat16: loss 2e-3, gradient 1e-2, relative to float64 of the same input
    float16   products in float16: loss 5e-4, gradient 2e-3
    float32   products in TF32 (loss 1e-3, gradient 4e-3) where
              `torch.backends.cuda.matmul.fp32_precision` is "tf32", however it was set; else exact,
              by the chunked backend: exact products of a whole feature do not fit the registers
              here, and no features of more than 256 channels do, which go there too
    float64   by the torch backend, and so is a temperature that lies on the device

With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, float32 exactly; this is
for tests: slow, and silently wrong in bfloat16.
"""

import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctt.ops import reference
from ctt.ops._library import gradient_dtype, mark_written
from ctt.ops._plans import Plan

_Result = tuple[Tensor, Tensor | None, Tensor | None]
_HALF = (torch.float16, torch.bfloat16)


def why_not(operation: str, device: torch.device) -> str | None:
    for name, package in (("triton", "triton"), ("ctt_kernels", "ctt")):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install {package}"
    if not hasattr(importlib.import_module("triton"), "knobs"):
        return "this Triton is older than 3.4: install a newer PyTorch"
    if _interpreted():
        if device.type == "cpu":
            return None
        return "TRITON_INTERPRET=1 runs kernels on CPU tensors only: unset it"
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type} (TRITON_INTERPRET=1 allows the CPU)"
    if not torch.cuda.is_available():
        return "no CUDA device can be used"
    if torch.version.hip is not None:
        return "its tile sizes are for NVIDIA devices"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, this device has {major}.{minor}"
    return None


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
    plan = _plan(query)
    if plan is None or isinstance(temperature, Tensor) or need_slope:
        every = (mask, temperature, reduction, need_grad, need_slope)
        result: _Result = _others().info_nce(query, label, keys, count, *every)
        return result
    options = (mask, temperature, reduction, need_grad)
    return (*_contrast(plan, query, None, label, [keys], [count], *options), None)


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
    plan = _plan(query)
    if plan is None or isinstance(temperature, Tensor) or need_slope:
        every = (mask, temperature, reduction, need_grad, need_slope)
        result: _Result = _others().pair_info_nce(query, positive, label, keys, counts, *every)
        return result
    options = (mask, temperature, reduction, need_grad)
    return (*_contrast(plan, query, positive, label, keys, counts, *options), None)


def class_topk(
    confidence: Tensor, label: Tensor, k: int, num_classes: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    n = label.shape[0]
    index = label.new_full((num_classes, k), -1)
    if n == 0:
        return index, label.new_zeros(num_classes)
    kernels, bucket_kernels = _kernels("topk"), _kernels("bucket")
    with _on(label.device):
        confidence, label = confidence.contiguous(), label.contiguous()
        wide = confidence.dtype == torch.float64
        sort_key = torch.empty(n, dtype=torch.int64 if wide else torch.int32, device=label.device)
        _launch(
            kernels.make_sort_keys,
            (_cdiv(n, 1024),),
            confidence,
            sort_key,
            n,
            WIDE=wide,
            BLOCK=1024,
        )
        order = sort_key.sort(stable=True).indices

        block = bucket_kernels.BLOCK
        num_blocks, bins = _cdiv(n, block), _bins(num_classes)
        bucket, histogram = _buckets(n, num_classes, num_blocks, label.device)
        sizes = {"C": num_classes, "BINS": bins, "BLOCK": block}
        _launch(
            kernels.assign_buckets,
            (num_blocks,),
            order,
            confidence,
            label,
            label if valid is None else valid.contiguous(),
            bucket,
            histogram,
            n,
            num_blocks,
            HAS_VALID=valid is not None,
            **sizes,
        )
        ends = histogram.flatten().cumsum(0, dtype=torch.int32)
        count = label.new_empty(num_classes)
        _launch(
            kernels.store_topk,
            (num_blocks,),
            order,
            bucket,
            histogram,
            ends,
            index,
            count,
            n,
            num_blocks,
            k,
            **sizes,
        )
    return index, count


def queue_push_(
    keys: Tensor, count: Tensor, cursor: Tensor, features: Tensor, index: Tensor
) -> None:
    if index.numel() == 0 or features.numel() == 0:
        return
    num_classes, capacity, dim = keys.shape
    dim_padded = _power_of_2(dim)
    with _on(keys.device):
        _launch(
            _kernels("push").queue_push_kernel,
            (num_classes,),
            keys,
            count,
            cursor,
            features,
            index.contiguous(),
            features.shape[0],
            index.shape[1],
            count.stride(0),
            cursor.stride(0),
            *keys.stride(),
            *features.stride(),
            V=capacity,
            D=dim,
            DIM_PADDED=dim_padded,
            BLOCK=_rows_at_a_time(dim_padded),
            WIDE=features.dtype == torch.float64,
            num_warps=8,
        )
    mark_written((keys, count, cursor))


def _rows_at_a_time(dim_padded: int) -> int:
    """Rows of a program of 256 threads that normalises: 32 values for each thread."""
    return max(2, min(32, 8192 // dim_padded))


def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor, plan: Plan
) -> None:
    if isinstance(decay, Tensor) and decay.device != teacher[0].device:
        decay = float(decay)  # a value that lies on the host: nothing is waited for
    kernels = _kernels("ema")
    table = _ema_table(teacher, student, kernels.BLOCK, plan)
    weights: tuple[object, ...]
    with _on(teacher[0].device):
        for group in table.groups:
            if isinstance(decay, Tensor):
                weights = (0.0, 0.0, decay)
            else:
                weights = (float(decay), 1 - float(decay), group.chunks)
            _launch(
                kernels.ema_kernel,
                (group.chunks.shape[1],),
                group.chunks,
                group.chunks.shape[1],
                *weights,
                TEACHER=_triton_dtype(group.teacher),
                STUDENT=_triton_dtype(group.student),
                DECAY_ON_DEVICE=isinstance(decay, Tensor),
                ALIGNED=group.aligned,
                BLOCK=kernels.BLOCK,
                num_warps=8,
            )
    mark_written(teacher)
    if table.rest:
        reference.ema_update_(
            [teacher[i] for i in table.rest], [student[i] for i in table.rest], decay
        )


class _EmaGroup(NamedTuple):
    """Tensors of one pair of dtypes, in chunks of equal size; rows as `ema_kernel` reads them."""

    teacher: torch.dtype
    student: torch.dtype
    aligned: bool
    chunks: Tensor  # (3, chunks) int64


class _EmaTable(NamedTuple):
    groups: list[_EmaGroup]
    rest: list[int]  # pairs that are not plain runs of memory in one order


# A few models' tables, by all that they were made from: for lists whose plans end with a call, such
# as new views of the same memory, which a capture may bring too.
_EMA_TABLES = 8
_ema_tables: OrderedDict[object, _EmaTable] = OrderedDict()
_SIGNATURE = (Tensor.data_ptr, Tensor.size, Tensor.stride, attrgetter("dtype"))
# a captured graph reads its table at every replay, also when others have taken its place
_captured_tables: list[_EmaTable] = []


def _ema_table(
    teacher: Sequence[Tensor], student: Sequence[Tensor], block: int, plan: Plan
) -> _EmaTable:
    table: _EmaTable | None = plan.tables.get("triton")
    if table is None:
        table = plan.tables["triton"] = _table_by_signature(teacher, student, block)
    if _capturing(teacher[0].device) and not any(table is t for t in _captured_tables):
        _captured_tables.append(table)
    return table


def _table_by_signature(
    teacher: Sequence[Tensor], student: Sequence[Tensor], block: int
) -> _EmaTable:
    key = tuple(
        part for tensors in (teacher, student) for read in _SIGNATURE for part in map(read, tensors)
    )
    table = _ema_tables.get(key)
    if table is None:
        if _capturing(teacher[0].device):
            raise RuntimeError(
                "ema_update_: the triton backend needs one call on these tensors before a CUDA "
                "graph is captured, to make its table of pointers"
            )
        table = _ema_tables[key] = _make_ema_table(teacher, student, block)
        if len(_ema_tables) > _EMA_TABLES:
            _ema_tables.popitem(last=False)
    _ema_tables.move_to_end(key)
    return table


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _make_ema_table(teacher: Sequence[Tensor], student: Sequence[Tensor], block: int) -> _EmaTable:
    members: dict[tuple[torch.dtype, torch.dtype, bool], list[Tensor]] = {}
    rest = []
    seen = set()
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if t.numel() == 0:
            continue
        # two views of one memory are updated one after the other
        places = t.data_ptr(), s.data_ptr()  # 0 of tensors without memory of their own (DTensor)
        if places[0] in seen or 0 in places or not _is_one_run(t, s):
            rest.append(i)
            continue
        seen.add(t.data_ptr())
        aligned = t.data_ptr() % 16 == 0 and s.data_ptr() % 16 == 0
        members.setdefault((t.dtype, s.dtype, aligned), []).append(_chunks(t, s, block))
    groups = [
        _EmaGroup(*kind, _to_device(torch.cat(chunks, dim=1), teacher[0].device))
        for kind, chunks in members.items()
    ]
    return _EmaTable(groups, rest)


def _is_one_run(t: Tensor, s: Tensor) -> bool:
    """Whether both fill a run of memory each, in one order, in dtypes that the kernel computes."""
    narrow = (torch.float32, *_HALF)
    dense = torch.ops.aten.is_non_overlapping_and_dense
    return t.dtype in narrow and s.dtype in narrow and t.stride() == s.stride() and dense(t)


def _chunks(t: Tensor, s: Tensor, block: int) -> Tensor:
    """(3, chunks) int64: address in the teacher, address in the student, values."""
    start = torch.arange(0, t.numel(), block, device="cpu")
    return torch.stack(
        [
            t.data_ptr() + start * t.element_size(),
            s.data_ptr() + start * s.element_size(),
            (t.numel() - start).clamp(max=block),
        ]
    )


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    # from pinned memory the copy keeps its place in the stream and the host goes on
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _triton_dtype(dtype: torch.dtype) -> Any:
    language = importlib.import_module("triton.language")
    return getattr(language, str(dtype).removeprefix("torch."))


class _Plan(NamedTuple):
    """How a call of the contrast is laid out."""

    tile: Any  # ctt_kernels.tiles.Tile
    dim_padded: int
    precision: str
    programs: int
    processors: int  # of the device


def _plan(query: Tensor) -> _Plan | None:
    """None where the kernels cannot compute this query to its precision."""
    tiles = _kernels("tiles")
    dim = query.shape[1]
    if _interpreted():
        if query.dtype == torch.float64 or dim > tiles.MAX_DIM:
            return None
        tile, precision, processors = tiles.INTERPRETER_TILE, "ieee", tiles.INTERPRETER_PROCESSORS
    else:
        kind = _kind_of_dot(query.dtype)
        if kind is None:
            return None
        device = torch.cuda.get_device_properties(query.device)
        arch = tiles.architecture(device.major, device.minor)
        tile, precision = tiles.find(arch, kind, dim), "tf32"
        if tile is None:
            return None
        processors = device.multi_processor_count
    programs = max(1, _cdiv(query.shape[0], tile.block_m))
    return _Plan(tile, max(16, _power_of_2(dim)), precision, programs, processors)


def _kind_of_dot(dtype: torch.dtype) -> str | None:
    if dtype in _HALF:
        return "half"
    # this setting follows allow_tf32 and set_float32_matmul_precision, which may not both be read
    matmul = torch.backends.cuda.matmul
    if dtype != torch.float32:
        return None
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else None
    return "tf32" if matmul.allow_tf32 else None  # PyTorch before 2.9


def _others() -> ModuleType:
    """The backend for what the one-pass kernel leaves out."""
    return importlib.import_module("ctt.ops.backends.chunked")


def _contrast(
    plan: _Plan,
    query: Tensor,
    positive: Tensor | None,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Equation (6), or equation (8) where `positive` is given."""
    n, dim = query.shape
    per_pixel = reduction == "none"
    parts = _parts(plan, keys)
    programs = max(plan.programs, parts.wanted, parts.programs)
    loss = query.new_empty(n if per_pixel else programs, dtype=torch.float32)
    grad = query.new_empty(n, dim, dtype=gradient_dtype(query)) if need_grad else None
    if n == 0:
        return (loss if per_pixel else loss.new_zeros(())), grad
    with _on(query.device):
        label = label.contiguous()
        bank = _pack(keys, counts, query.dtype, plan)
        rows = _order(label, mask, bank, reduction, own_must_hold=positive is None)
        shared: dict[str, object] = {
            "rows_ptr": rows.order,
            "ends_ptr": rows.ends,
            "loss_ptr": loss,
            "grad_ptr": query if grad is None else grad,  # not written without NEED_GRAD
            "n": n,
            "num_blocks": rows.num_blocks,
            "C": keys[0].shape[0],
            "D": dim,
            "DIM_PADDED": plan.dim_padded,
            "PAIR": positive is not None,
            "NEED_GRAD": need_grad,
            "PER_PIXEL": per_pixel,
            "BLOCK_M": plan.tile.block_m,
        }
        shared |= _gather(query, positive, plan, shared)
        shared |= {
            "packed_ptr": bank.packed,
            "start_ptr": bank.start,
            "longest_ptr": bank.longest,
            "label_ptr": label,
            "weight_ptr": rows.weight,
            "inverse_tau": 1 / temperature,
            "PRECISION": plan.precision,
            "BLOCK_N": plan.tile.block_n,
            "BLOCK_OWN": plan.tile.block_own,
            "wanted": parts.wanted,
            "KEYS_OF_A_PART": parts.keys,
            "PART_M": plan.tile.block_m,
        }
        room = parts.wanted * plan.tile.block_m
        shared["part_log2_ptr"] = loss.new_empty(room)
        shared["part_mean_ptr"] = loss.new_empty(room if need_grad else 0, plan.dim_padded)
        kernel = _kernels("contrast").contrast_kernel
        options = {"num_warps": plan.tile.num_warps, "num_stages": plan.tile.num_stages}
        _launch(kernel, (programs,), **shared, ADD_PARTS=False, **options)
        if parts.programs:
            # few rows, which leave room for more of their own keys at a time
            shared |= {"BLOCK_M": _kernels("tiles").ROWS_TO_ADD, "BLOCK_OWN": plan.tile.block_n}
            _launch(kernel, (parts.programs,), **shared, ADD_PARTS=True, num_warps=4, num_stages=2)
        return (loss if per_pixel else loss.sum()), grad


class _Parts(NamedTuple):
    """How the keys are split among programs where few pixels count."""

    wanted: int  # programs, if there are keys for so many; 1: the keys are too few to split
    programs: int  # of the launch that adds up the parts
    keys: int  # of a part at least, with the own keys of its rows


def _parts(plan: _Plan, keys: list[Tensor]) -> _Parts:
    tiles, tile = _kernels("tiles"), plan.tile
    least = tiles.TILES_OF_A_PART * tile.block_n
    most = keys[0].shape[0] * sum(k.shape[1] for k in keys) // least
    if most < 2:
        return _Parts(1, 0, least)
    # of more tiles of rows than half the processors, none is split
    split = min(plan.programs, plan.processors // 2)
    wanted = min(plan.processors, plan.programs * most)
    return _Parts(wanted, split * tile.block_m // tiles.ROWS_TO_ADD, least)


def _gather(
    query: Tensor, positive: Tensor | None, plan: _Plan, shared: dict[str, object]
) -> dict[str, object]:
    """The queries that count as the contrast kernel reads them: by class, in whole tiles."""
    room = plan.programs * plan.tile.block_m
    v = query if positive is None else positive
    gathered = query.new_empty(room, plan.dim_padded)
    scalars = query.new_empty(3, room, dtype=torch.float32)
    outputs: dict[str, object] = {
        "gathered_ptr": gathered,
        "inverse_norm_ptr": scalars[0],
        "gathered_positive_ptr": gathered
        if positive is None
        else positive.new_empty(room, plan.dim_padded),
        "positive_inverse_norm_ptr": scalars[1],
        "cosine_ptr": scalars[2],
    }
    block = _rows_at_a_time(plan.dim_padded)
    _launch(
        _kernels("gather").gather_queries,
        (_cdiv(room, block),),
        query_ptr=query,
        positive_ptr=v,
        query_stride_n=query.stride(0),
        query_stride_d=query.stride(1),
        positive_stride_n=v.stride(0),
        positive_stride_d=v.stride(1),
        BLOCK=block,
        num_warps=8,
        **outputs,
        **shared,
    )
    return outputs


class _Bank(NamedTuple):
    """The keys that are held in all banks, ordered by class."""

    held: Tensor  # (banks, C) int64
    packed: Tensor  # (all places + a tile, dim_padded)
    start: Tensor  # (C + 1,) int32: where a class begins
    longest: Tensor  # (1,) float32: the largest |key|^2


def _pack(
    keys: list[Tensor], counts: list[Tensor | None], dtype: torch.dtype, plan: _Plan
) -> _Bank:
    num_classes, _, dim = keys[0].shape
    device = keys[0].device
    held = torch.stack(
        [
            torch.full((num_classes,), k.shape[1], device=device)
            if count is None
            else count.clamp(0, k.shape[1])
            for k, count in zip(keys, counts, strict=True)
        ]
    )
    places = num_classes * sum(k.shape[1] for k in keys)
    pad = max(plan.tile.block_n, plan.tile.block_own)
    packed = torch.empty(places + pad, plan.dim_padded, dtype=dtype, device=device)
    start = torch.empty(num_classes + 1, dtype=torch.int32, device=device)
    longest = torch.zeros(1, dtype=torch.float32, device=device)
    block = _rows_at_a_time(plan.dim_padded)
    for bank, k in enumerate(keys):
        _launch(
            _kernels("gather").pack_keys,
            (num_classes, max(1, _cdiv(k.shape[1], block))),  # the first also writes `start`
            k,
            held,
            packed,
            start,
            longest,
            *k.stride(),
            D=dim,
            DIM_PADDED=plan.dim_padded,
            C=num_classes,
            BINS=_bins(num_classes),
            BANK=bank,
            BANKS=len(keys),
            PAD=pad,
            BLOCK=block,
        )
    return _Bank(held, packed, start, longest)


class _Rows(NamedTuple):
    """The pixels ordered by class, those that do not count last."""

    order: Tensor  # (N,) int32
    weight: Tensor  # (C,) float32: what the loss of a pixel of a class counts for
    ends: Tensor  # running sum of the histogram (C + 1, num_blocks)
    num_blocks: int


def _order(
    label: Tensor, mask: Tensor | None, bank: _Bank, reduction: str, *, own_must_hold: bool
) -> _Rows:
    n = label.shape[0]
    banks, num_classes = bank.held.shape
    kernels, block = _kernels("gather"), _kernels("bucket").BLOCK
    num_blocks = _cdiv(n, block)
    sizes = {"C": num_classes, "BINS": _bins(num_classes), "BLOCK": block}
    bucket, histogram = _buckets(n, num_classes, num_blocks, label.device)
    _launch(
        kernels.assign_buckets,
        (num_blocks,),
        label,
        label if mask is None else mask.contiguous(),
        bank.held,
        bucket,
        histogram,
        n,
        num_blocks,
        BANKS=banks,
        HAS_MASK=mask is not None,
        OWN_MUST_HOLD=own_must_hold,
        **sizes,
    )
    ends = histogram.flatten().cumsum(0, dtype=torch.int32)
    order = torch.empty_like(bucket)
    weight = torch.empty(num_classes, dtype=torch.float32, device=label.device)
    _launch(
        kernels.order_rows,
        (num_blocks,),
        bucket,
        histogram,
        ends,
        order,
        weight,
        n,
        num_blocks,
        REDUCTION=reduction,
        **sizes,
    )
    return _Rows(order, weight, ends, num_blocks)


def _buckets(
    n: int, num_classes: int, num_blocks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for the bucket (N,) of each pixel and the histogram (C + 1, num_blocks)."""
    bucket = torch.empty(n, dtype=torch.int32, device=device)
    histogram = torch.empty(num_classes + 1, num_blocks, dtype=torch.int32, device=device)
    return bucket, histogram


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **named: object) -> None:
    # fused multiply-add: stated, because its default is about to change
    kernel[grid](*arguments, enable_fp_fusion=True, **named)


def _bins(num_classes: int) -> int:
    """A bin for each class, for pixels of none and for places beyond the data; 32 for a warp."""
    return max(32, _power_of_2(num_classes + 2))


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"ctt_kernels.{name}")


@cache
def _interpreted() -> bool:
    interpreted: bool = importlib.import_module("triton").knobs.runtime.interpret
    return interpreted


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
