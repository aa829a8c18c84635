"""Pixel contrast by chunks of rows, between two matrix products of a library.

For features too wide for the accumulator of `contrast_kernel`, and for exact products of float32.
The launcher multiplies a chunk of gathered queries with all packed keys, `weigh_keys` turns these
scores into coefficients of the keys, the launcher multiplies coefficients with keys, and
`finish_rows` makes gradients of the result. With u = q/|q|, s = (q . key) / (|q| tau), Z the sum of
e^s over the keys of the other classes and V own keys,

    info_nce: loss = mean over own keys of softplus(log Z - s+), w+ = sigmoid(log Z - s+),
              W = mean(w+), coefficient = e^s / Z of a negative, -w+ / (V W) of an own key
    pair:     one positive v of cosine u . v / |v|; W = w+,
              coefficient = e^s / Z of a negative, 0 of an own key
    d loss / d u = (W / tau) (sum of coefficient * key [- v / |v| for pair])
    d loss / d q = (g - (g . u) u) / |q|   with g = d loss / d u

W is left to `finish_rows`: without it the coefficients of a sign sum to 1, or -1, however close to
0 the loss is, so that float16 holds them. They are also multiplied by 2**10: of the share of one
key among 100,000, float16 would keep few bits.

The launches of one call, in order: those of gather.py, and for each chunk a matrix product,
`weigh_keys`, a matrix product and `finish_rows`. Rows that do not count come last; the products
compute them, for only the device knows how many there are, and the kernels pass over them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .contrast import LOG2E, LOWEST, _softplus_and_sigmoid

MAX_DIM = 4096  # `finish_rows` holds two whole features at least
LOG2_SCALE = tl.constexpr(10.0)
SCALE = tl.constexpr(1024.0)
# below this the gradient of a pixel is 0 in every dtype, and a quotient by it stays finite
LEAST_PUSH = tl.constexpr(1e-30)


class Tile(NamedTuple):
    """The constants of `weigh_keys`: a program holds ROWS times BLOCK scores at a time."""

    ROWS: int
    BLOCK: int
    BLOCK_OWN: int


# small, so that few pixels and keys cross every boundary
INTERPRETER_TILE = Tile(16, 32, 16)


def tile(columns: int) -> Tile:
    """Return 1,024 scores of as many rows as that needs."""
    block = min(1024, triton.next_power_of_2(columns))
    return Tile(1024 // block, block, min(block, 128))


@triton.jit
def _scores(score_ptr, row, begin, end, scale, BLOCK: tl.constexpr):
    """Scores of a block of columns in units of log2, anything from column `end` on."""
    column = (begin + tl.arange(0, BLOCK))[None, :]
    score = tl.load(score_ptr + row[:, None] + column, mask=column < end, other=0.0)
    return score * scale[:, None]


@triton.jit
def _is_own(begin, own_start, own_end, BLOCK: tl.constexpr):
    column = (begin + tl.arange(0, BLOCK))[None, :]
    return (column >= own_start[:, None]) & (column < own_end[:, None])


@triton.jit
def _negatives(score, begin, num_keys, own_start, own_end, BLOCK: tl.constexpr):
    """The scores of keys of other classes, -inf elsewhere."""
    column = (begin + tl.arange(0, BLOCK))[None, :]
    is_own = _is_own(begin, own_start, own_end, BLOCK)
    return tl.where((column < num_keys) & ~is_own, score, float("-inf"))


@triton.jit(do_not_specialize=["first", "chunk", "num_blocks"])
def weigh_keys(
    score_ptr,  # (at least chunk, columns): q . key
    coefficient_ptr,  # (at least chunk, columns); may be the scores themselves
    inverse_norm_ptr,  # (at least N,)
    cosine_ptr,  # (at least N,)
    start_ptr,  # (C + 1,) int32
    rows_ptr,  # (N,) int32
    ends_ptr,  # running sum of the histogram (C + 1, num_blocks)
    label_ptr,  # (N,) int64
    weight_ptr,  # (C,)
    loss_ptr,  # (N,), by pixel, or weighted and by row
    push_ptr,  # (N,): W
    first,  # the row that the chunk begins with
    chunk,  # its rows
    columns,
    num_blocks,
    inverse_tau,
    C: tl.constexpr,
    PAIR: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """Store loss and W of ROWS rows, and their coefficients where the gradient is wanted."""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    place = first + row
    num_rows = tl.load(ends_ptr + C * num_blocks - 1)
    if not PER_PIXEL:
        dead = (row < chunk) & (place >= num_rows)
        tl.store(loss_ptr + place, tl.zeros((ROWS,), tl.float32), mask=dead)
    if first + first_row >= num_rows:
        return

    live = (row < chunk) & (place < num_rows)
    pixel = tl.load(rows_ptr + place, mask=live, other=0)
    label = tl.load(label_ptr + pixel, mask=live, other=0)
    own_start = tl.load(start_ptr + label, mask=live, other=0)
    own_end = tl.load(start_ptr + label + 1, mask=live, other=0)
    # rows are ordered by class: the own keys of all lie between these two
    first_own = tl.min(tl.where(live, own_start, columns))
    last_own = tl.max(own_end)
    num_keys = tl.load(start_ptr + C)
    scale = tl.load(inverse_norm_ptr + place, mask=live, other=0.0) * (inverse_tau * LOG2E)
    # a row beyond the chunk is read as its last one, so that no row needs a mask
    row = tl.minimum(row, chunk - 1).to(tl.int64) * columns

    # each column of the block keeps a maximum and a sum of its own until the end
    top = tl.full((ROWS, BLOCK), LOWEST, tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, num_keys, BLOCK):
        score = _scores(score_ptr, row, begin, columns, scale, BLOCK)
        score = _negatives(score, begin, num_keys, own_start, own_end, BLOCK)
        # one exponential serves both the old sum and the new score: the other factor is 1
        e = tl.exp2(-tl.abs(score - top))
        total = tl.where(score > top, total * e + 1.0, total + e)
        top = tl.maximum(top, score)
    highest = tl.max(top, axis=1)
    log2_z = highest + tl.log2(tl.sum(total * tl.exp2(top - highest[:, None]), axis=1))

    if PAIR:
        cosine = tl.load(cosine_ptr + place, mask=live, other=0.0)
        loss, push = _softplus_and_sigmoid(log2_z - cosine * (inverse_tau * LOG2E))
    else:
        loss = tl.zeros((ROWS,), tl.float32)
        sum_of_pushes = tl.zeros((ROWS,), tl.float32)
        for begin in range(first_own, last_own, BLOCK_OWN):
            score = _scores(score_ptr, row, begin, last_own, scale, BLOCK_OWN)
            is_own = _is_own(begin, own_start, own_end, BLOCK_OWN)
            softplus, w = _softplus_and_sigmoid(log2_z[:, None] - score)
            loss += tl.sum(tl.where(is_own, softplus, 0.0), axis=1)
            sum_of_pushes += tl.sum(tl.where(is_own, w, 0.0), axis=1)
        share = 1.0 / tl.maximum(own_end - own_start, 1).to(tl.float32)
        loss *= share
        push = sum_of_pushes * share
    if PER_PIXEL:
        tl.store(loss_ptr + pixel, loss, mask=live)
    else:
        weight = tl.load(weight_ptr + label, mask=live, other=0.0)
        tl.store(loss_ptr + place, loss * weight, mask=live)

    if NEED_GRAD:
        tl.store(push_ptr + place, push, mask=live)
        for begin in range(0, columns, BLOCK):
            score = _scores(score_ptr, row, begin, columns, scale, BLOCK)
            others = _negatives(score, begin, num_keys, own_start, own_end, BLOCK)
            value = tl.exp2(others - log2_z[:, None] + LOG2_SCALE)
            if not PAIR:
                holds_own = (begin < last_own) & (begin + BLOCK > first_own)
                if holds_own:
                    _, w = _softplus_and_sigmoid(log2_z[:, None] - score)
                    w = w / tl.maximum(sum_of_pushes, LEAST_PUSH)[:, None]
                    is_own = _is_own(begin, own_start, own_end, BLOCK)
                    value = tl.where(is_own, w * -SCALE, value)
            column = (begin + tl.arange(0, BLOCK))[None, :]
            tl.store(
                coefficient_ptr + row[:, None] + column,
                value.to(coefficient_ptr.dtype.element_ty),
                mask=live[:, None] & (column < columns),
            )


@triton.jit(do_not_specialize=["first", "chunk", "num_blocks"])
def finish_rows(
    product_ptr,  # (chunk, width) float32: coefficients @ keys
    gathered_ptr,  # (at least N, DIM_PADDED)
    inverse_norm_ptr,  # (at least N,)
    gathered_positive_ptr,  # (at least N, DIM_PADDED)
    positive_inverse_norm_ptr,  # (at least N,)
    push_ptr,  # (N,): W
    rows_ptr,  # (N,) int32
    ends_ptr,
    label_ptr,  # (N,) int64
    weight_ptr,  # (C,)
    grad_ptr,  # (N, D) contiguous
    first,  # the row that the chunk begins with
    chunk,  # its rows
    width,
    num_blocks,
    inverse_tau,
    C: tl.constexpr,
    D: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the gradients of the pixels of BLOCK rows."""
    num_rows = tl.load(ends_ptr + C * num_blocks - 1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = first + row
    live = (row < chunk) & (place < num_rows)
    pixel = tl.load(rows_ptr + place, mask=live, other=0).to(tl.int64)
    label = tl.load(label_ptr + pixel, mask=live, other=0)
    d = tl.arange(0, DIM_PADDED)
    shown = live[:, None] & (d < D)[None, :]

    g = tl.load(product_ptr + row[:, None] * width + d[None, :], mask=shown, other=0.0) / SCALE
    source = place.to(tl.int64)[:, None] * DIM_PADDED + d[None, :]
    if PAIR:
        v_inverse_norm = tl.load(positive_inverse_norm_ptr + place, mask=live, other=0.0)
        v = tl.load(gathered_positive_ptr + source, mask=shown, other=0.0)
        g -= v.to(tl.float32) * v_inverse_norm[:, None]
    inverse_norm = tl.load(inverse_norm_ptr + place, mask=live, other=0.0)
    q = tl.load(gathered_ptr + source, mask=shown, other=0.0)
    u = q.to(tl.float32) * inverse_norm[:, None]
    along = tl.sum(g * u, axis=1)
    factor = inverse_norm * inverse_tau
    factor *= tl.load(push_ptr + place, mask=live, other=0.0)
    factor *= tl.load(weight_ptr + label, mask=live, other=0.0)
    grad = (g - along[:, None] * u) * factor[:, None]
    address = grad_ptr + pixel[:, None] * D + d[None, :]
    tl.store(address, grad.to(grad_ptr.dtype.element_ty), mask=shown)
