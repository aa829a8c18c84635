"""`info_nce` and `pair_info_nce` by chunks of pixels: matrix products of PyTorch, Triton between.

The triton backend hands over what its one-pass kernel leaves out: float32 whose products must not
be in TF32, and features of more than 256 channels. The scores of a chunk stay in the cache of the
device. Nothing waits for the device and no shape depends on values, so that a CUDA graph can
capture it; the products therefore also compute pixels that do not count. It has not yet run on a
GPU.

Precision, by the dtype of the query (sums are in float32; `keys` and `positive` may have any
dtype, keys are rounded to the query's once per call):

    float32   products as PyTorch's own, which follow `torch.set_float32_matmul_precision`
    float16, bfloat16   products of half-precision operands into float32: scores that were rounded
              to bfloat16 would be wrong by up to 0.4 %, so e^s by 6 % at a temperature of 0.07,
              and products of queries that are not normalised may pass what float16 holds. The
              coefficients of the gradient are rounded to the dtype of the query, as the weights of
              the one-pass kernel are. PyTorch before 2.8 multiplies float32 copies instead.
    float64   by the torch backend, as are a temperature that takes a gradient or lies on the
              device, and features of more than 4096 channels

With TRITON_INTERPRET=1 in the environment it runs on CPU tensors, for tests.
"""

from typing import Any

import torch
from torch import Tensor

from ctt.ops._library import gradient_dtype, without_autocast
from ctt.ops.backends import torch as blocked
from ctt.ops.backends import triton

_Result = tuple[Tensor, Tensor | None, Tensor | None]

# Scores of a chunk in float32: a third of the cache of the cards that have most of it.
_SCORE_BYTES = 16 << 20
# So many rows at least, and multiples of it: products of fewer read all keys for little work.
_ROWS = 128
# Operands of matrix products have sizes and strides that are multiples of this.
_ALIGNED = 16

why_not = triton.why_not


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
    options = (mask, temperature, reduction, need_grad)
    if _takes(query, temperature, need_slope):
        return (*_contrast(query, None, label, [keys], [count], *options), None)
    return blocked.info_nce(query, label, keys, count, *options, need_slope)


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
    options = (mask, temperature, reduction, need_grad)
    if _takes(query, temperature, need_slope):
        return (*_contrast(query, positive, label, keys, counts, *options), None)
    return blocked.pair_info_nce(query, positive, label, keys, counts, *options, need_slope)


def _takes(query: Tensor, temperature: float | Tensor, need_slope: bool) -> bool:
    if need_slope or isinstance(temperature, Tensor) or query.dtype == torch.float64:
        return False
    return query.shape[1] <= int(triton._kernels("chunked").MAX_DIM)


def _contrast(
    query: Tensor,
    positive: Tensor | None,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: Any,  # a number
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Equation (6), or equation (8) where `positive` is given."""
    n, dim = query.shape
    per_pixel = reduction == "none"
    loss = query.new_empty(n, dtype=torch.float32)
    grad = query.new_empty(n, dim, dtype=gradient_dtype(query)) if need_grad else None
    if n == 0:
        return (loss if per_pixel else loss.new_zeros(())), grad
    plan = _plan(n, dim)
    with triton._on(query.device), without_autocast(query.device):
        label = label.contiguous()
        bank = triton._pack(keys, counts, query.dtype, plan)
        rows = triton._order(label, mask, bank, reduction, own_must_hold=positive is None)
        given: dict[str, object] = {
            "start_ptr": bank.start,
            "rows_ptr": rows.order,
            "ends_ptr": rows.ends,
            "label_ptr": label,
            "weight_ptr": rows.weight,
            "loss_ptr": loss,
            "push_ptr": torch.empty_like(loss),
            "grad_ptr": query if grad is None else grad,  # not written without NEED_GRAD
            "n": n,
            "num_blocks": rows.num_blocks,
            "inverse_tau": 1 / temperature,
            "C": keys[0].shape[0],
            "D": dim,
            "DIM_PADDED": plan.dim_padded,
            "PAIR": positive is not None,
            "NEED_GRAD": need_grad,
            "PER_PIXEL": per_pixel,
            "BLOCK_M": plan.tile.block_m,
        }
        gather = triton._kernels("gather").gather_queries
        given |= triton._gather(query, positive, plan, _arguments(gather, given))
        _sweep(given, _operand(bank, keys))
    return (loss if per_pixel else loss.sum()), grad


def _plan(n: int, dim: int) -> triton._Plan:
    """What packing and gathering need to know; the products have tiles of their own."""
    block = 32  # a multiple of the rows that a program gathers
    tile = triton._kernels("tiles").Tile(block, _ALIGNED, _ALIGNED, num_warps=8, num_stages=1)
    dim_padded = max(_ALIGNED, triton._power_of_2(dim))
    return triton._Plan(tile, dim_padded, "ieee", triton._cdiv(n, block), processors=1)


def _operand(bank: triton._Bank, keys: list[Tensor]) -> Tensor:
    """The keys (columns, width) for the matrix products, all zeros beyond those that are held:
    a coefficient of 0 would not stop the NaN that memory may hold."""
    num_classes, _, dim = keys[0].shape
    beyond = torch.arange(len(bank.packed), device=bank.packed.device) >= bank.start[-1]
    bank.packed.masked_fill_(beyond[:, None], 0)
    places = num_classes * sum(k.shape[1] for k in keys)
    return bank.packed[: max(_ALIGNED, _aligned(places)), : _aligned(dim)]


def _sweep(given: dict[str, Any], keys: Tensor) -> None:
    """Compute loss and gradient chunk by chunk, from what the kernels are given."""
    kernels = triton._kernels("chunked")
    queries, (columns, width) = given["gathered_ptr"][:, : keys.shape[1]], keys.shape
    n, need_grad = given["n"], given["NEED_GRAD"]
    size = min(n, max(1, _SCORE_BYTES // (4 * columns * _ROWS)) * _ROWS)
    score = queries.new_empty(size, columns, dtype=torch.float32)
    in_place = queries.dtype == score.dtype or not need_grad
    coefficient = score if in_place else torch.empty_like(score, dtype=queries.dtype)
    product = score.new_empty(size if need_grad else 0, width)
    given |= {"score_ptr": score, "coefficient_ptr": coefficient, "columns": columns}
    given |= {"product_ptr": product, "width": width}
    tile = kernels.INTERPRETER_TILE if triton._interpreted() else kernels.tile(columns)
    weigh = {**_arguments(kernels.weigh_keys, given), **tile._asdict()}
    block = triton._rows_at_a_time(given["DIM_PADDED"])
    finish = {**_arguments(kernels.finish_rows, given), "BLOCK": block}
    for first in range(0, n, size):
        chunk = min(size, n - first)
        part = {"first": first, "chunk": chunk}
        _multiply(queries[first : first + chunk], keys.T, score[:chunk])
        grid = (triton._cdiv(chunk, tile.ROWS),)
        triton._launch(kernels.weigh_keys, grid, **weigh, **part, num_warps=4)
        if need_grad:
            _multiply(coefficient[:chunk], keys, product[:chunk])
            grid = (triton._cdiv(chunk, block),)
            triton._launch(kernels.finish_rows, grid, **finish, **part, num_warps=8)


def _aligned(size: int) -> int:
    return triton._cdiv(size, _ALIGNED) * _ALIGNED


def _arguments(kernel: Any, given: dict[str, object]) -> dict[str, object]:
    """Those of `given` that the kernel takes."""
    return {name: given[name] for name in kernel.arg_names if name in given}


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
