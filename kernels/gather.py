"""Bring keys and pixels into the order in which the kernels of the contrasts read them.

The launches of one call, in order: `pack_keys` for each bank, `assign_buckets`, a running sum of
the histogram, `order_rows`, `gather_queries`. Rows are ordered by class, so that a program meets
one class or a few; rows that do not count come last and get zeros.
"""

import triton
import triton.language as tl

from .bucket import class_sizes, place_in_bucket, store_histogram

NORM_EPS_SQUARED = tl.constexpr(1e-24)


@triton.jit
def pack_keys(
    keys_ptr,  # (C, V, D) of one bank
    held_ptr,  # (BANKS, C) int64
    packed_ptr,  # (at least all keys + PAD, DIM_PADDED)
    start_ptr,  # (C + 1,) int32
    longest_ptr,  # (1,) float32, at first 0
    stride_c,
    stride_v,
    stride_d,
    D: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    C: tl.constexpr,
    BINS: tl.constexpr,
    BANK: tl.constexpr,
    BANKS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Line up the keys that are held, class by class and within a class bank by bank.

    start[c] becomes the place of the first key of class c, start[C] how many there are. The PAD
    rows that follow are zeros, so that whole tiles can be read. longest becomes the largest
    |key|^2, infinite where a key is NaN.
    """
    c = tl.program_id(0)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PADDED)
    classes = tl.arange(0, BINS)
    start = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.int64)
    for bank in tl.static_range(BANKS):
        held = tl.load(held_ptr + bank * C + classes, mask=classes < C, other=0)
        start += tl.sum(tl.where(classes < c, held, 0))
        total += tl.sum(held)
    if tl.program_id(1) == 0 and BANK == 0:
        tl.store(start_ptr + c, start.to(tl.int32))
        if c == 0:
            tl.store(start_ptr + C, total.to(tl.int32))
            pad = total + tl.arange(0, PAD)
            zeros = tl.zeros((PAD, DIM_PADDED), packed_ptr.dtype.element_ty)
            tl.store(packed_ptr + pad[:, None] * DIM_PADDED + d[None, :], zeros)
    for bank in tl.static_range(BANK):
        start += tl.load(held_ptr + bank * C + c)
    is_held = v < tl.load(held_ptr + BANK * C + c)
    source = keys_ptr + c.to(tl.int64) * stride_c + v[:, None].to(tl.int64) * stride_v
    keys = tl.load(
        source + d[None, :] * stride_d, mask=is_held[:, None] & (d < D)[None, :], other=0.0
    )
    target = packed_ptr + (start + v)[:, None] * DIM_PADDED + d[None, :]
    tl.store(target, keys.to(packed_ptr.dtype.element_ty), mask=is_held[:, None])
    squared = tl.sum(keys.to(tl.float32) * keys.to(tl.float32), axis=1)
    squared = tl.where(squared == squared, squared, float("inf"))
    tl.atomic_max(longest_ptr, tl.max(squared, axis=0))


# sizes that change from call to call: no new compilation for each divisibility
@triton.jit(do_not_specialize=["n", "num_blocks"])
def assign_buckets(
    label_ptr,
    mask_ptr,
    held_ptr,
    bucket_ptr,
    histogram_ptr,
    n,
    num_blocks,
    C: tl.constexpr,
    BINS: tl.constexpr,
    BANKS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    OWN_MUST_HOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put each pixel that counts into the bucket of its class, the others into bucket C.

    It counts when mask and label say so, another class holds a key and, if asked, its own.
    """
    block = tl.program_id(0)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < n
    label = tl.load(label_ptr + pixel, mask=inside, other=-1)
    counts = (label >= 0) & (label < C)
    if HAS_MASK:
        counts = counts & (tl.load(mask_ptr + pixel, mask=inside, other=0) != 0)
    classes = tl.arange(0, BINS)
    held = tl.zeros((BINS,), tl.int64)
    own = tl.zeros((BLOCK,), tl.int64)
    for bank in tl.static_range(BANKS):
        held += tl.load(held_ptr + bank * C + classes, mask=classes < C, other=0)
        own += tl.load(held_ptr + bank * C + label, mask=counts, other=0)
    holding = tl.sum((held > 0).to(tl.int32))
    counts = counts & (holding - (own > 0).to(tl.int32) > 0)
    if OWN_MUST_HOLD:
        counts = counts & (own > 0)
    bucket = tl.where(counts, label, C).to(tl.int32)
    tl.store(bucket_ptr + pixel, bucket, mask=inside)
    store_histogram(histogram_ptr, bucket, inside, block, num_blocks, C, BINS)


@triton.jit(do_not_specialize=["n", "num_blocks"])
def order_rows(
    bucket_ptr,
    histogram_ptr,
    ends_ptr,
    rows_ptr,
    weight_ptr,
    n,
    num_blocks,
    C: tl.constexpr,
    BINS: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the pixels by bucket in rows (N,), and the weight of a pixel's loss by class (C,)."""
    block = tl.program_id(0)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < n
    bucket = tl.load(bucket_ptr + pixel, mask=inside, other=C + 1)
    place = place_in_bucket(histogram_ptr, ends_ptr, bucket, inside, block, num_blocks)
    tl.store(rows_ptr + place, pixel, mask=inside)
    if block == 0:
        pixels = class_sizes(ends_ptr, num_blocks, C, BINS).to(tl.float32)
        c = tl.arange(0, BINS)
        if REDUCTION == "class":
            present = tl.sum((pixels > 0).to(tl.float32))
            weight = 1.0 / tl.maximum(pixels * present, 1.0)
        elif REDUCTION == "mean":
            weight = tl.zeros((BINS,), tl.float32) + 1.0 / tl.maximum(tl.sum(pixels), 1.0)
        else:
            weight = tl.full((BINS,), 1.0, tl.float32)
        tl.store(weight_ptr + c, weight, mask=c < C)


@triton.jit
def _inverse_norm(x):
    """1/|x| of the rows, 0 where a row has no direction."""
    squared = tl.sum(x * x, axis=1)
    # a NaN stays one, so that it shows in the loss
    no_direction = squared <= NORM_EPS_SQUARED
    return tl.where(no_direction, 0.0, 1.0 / tl.sqrt(tl.where(no_direction, 1.0, squared)))


@triton.jit(do_not_specialize=["n", "num_blocks"])
def gather_queries(
    query_ptr,  # (N, D)
    positive_ptr,  # (N, D)
    rows_ptr,  # (N,) int32
    ends_ptr,
    gathered_ptr,  # (at least N, DIM_PADDED), in the dtype of the query
    inverse_norm_ptr,  # (at least N,)
    gathered_positive_ptr,  # (at least N, DIM_PADDED), in the dtype of the positive
    positive_inverse_norm_ptr,  # (at least N,)
    cosine_ptr,  # (at least N,)
    loss_ptr,  # (N,)
    grad_ptr,  # (N, D) contiguous
    n,
    num_blocks,
    query_stride_n,
    query_stride_d,
    positive_stride_n,
    positive_stride_d,
    C: tl.constexpr,
    D: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PAIR: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather the queries that count by class, with 1/|q|; set loss and gradient of others to 0.

    The contrast kernel has no registers to spare for gathering whole features from any strides and
    for squaring them. Its last tile is filled up with zeros.
    """
    first = tl.program_id(0) * BLOCK
    num_rows = tl.load(ends_ptr + C * num_blocks - 1)
    place = first + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM_PADDED)
    rows = tl.load(rows_ptr + place, mask=place < n, other=0).to(tl.int64)
    live = place < num_rows
    if first < tl.cdiv(num_rows, BLOCK_M) * BLOCK_M:
        shown = live[:, None] & (d < D)[None, :]
        target = place.to(tl.int64)[:, None] * DIM_PADDED + d[None, :]
        wide = d.to(tl.int64)  # of a map seen as pixels, D - 1 strides may pass 2**31
        source = query_ptr + rows[:, None] * query_stride_n + wide[None, :] * query_stride_d
        q = tl.load(source, mask=shown, other=0.0)
        inverse_norm = _inverse_norm(q.to(tl.float32))
        tl.store(gathered_ptr + target, q)
        tl.store(inverse_norm_ptr + place, inverse_norm)
        if PAIR:
            source = positive_ptr + rows[:, None] * positive_stride_n
            v = tl.load(source + wide[None, :] * positive_stride_d, mask=shown, other=0.0)
            v_inverse_norm = _inverse_norm(v.to(tl.float32))
            u = q.to(tl.float32) * inverse_norm[:, None]
            cosine = tl.sum(u * (v.to(tl.float32) * v_inverse_norm[:, None]), axis=1)
            tl.store(gathered_positive_ptr + target, v)
            tl.store(positive_inverse_norm_ptr + place, v_inverse_norm)
            tl.store(cosine_ptr + place, cosine)
    dead = (place >= num_rows) & (place < n)
    if PER_PIXEL:
        tl.store(loss_ptr + rows, tl.zeros((BLOCK,), tl.float32), mask=dead)
    if NEED_GRAD:
        zeros = tl.zeros((BLOCK, DIM_PADDED), grad_ptr.dtype.element_ty)
        address = grad_ptr + rows[:, None] * D + d[None, :]
        tl.store(address, zeros, mask=dead[:, None] & (d < D)[None, :])
