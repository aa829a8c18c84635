"""Push of chosen features into the rings of keys: gather, normalise, scatter in one launch."""

import triton
import triton.language as tl

NORM_EPS_SQUARED = tl.constexpr(1e-24)


# sizes that change from call to call: no new compilation for each divisibility
@triton.jit(do_not_specialize=["n", "k"])
def queue_push_kernel(
    keys_ptr,  # (C, V, D)
    count_ptr,  # (C,) int64
    cursor_ptr,  # (C,) int64
    features_ptr,  # (N, D)
    index_ptr,  # (C, k) int64
    n,
    k,
    count_stride,
    cursor_stride,
    keys_stride_c,
    keys_stride_v,
    keys_stride_d,
    features_stride_n,
    features_stride_d,
    V: tl.constexpr,
    D: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Store entries in the queues; one program a class, which alone reads and moves the cursor.

    The entry of rank r among the valid ones goes to cursor + r modulo V. Of more than V only the
    last V are written: what is left of pushing them one after the other.
    """
    c = tl.program_id(0).to(tl.int64)
    cursor = tl.load(cursor_ptr + c * cursor_stride)
    d = tl.arange(0, DIM_PADDED)
    entry = tl.arange(0, BLOCK)
    pushed = tl.zeros((), tl.int64)
    for first in range(0, k, BLOCK):
        index = tl.load(index_ptr + c * k + first + entry, mask=first + entry < k, other=-1)
        pushed += tl.sum(((index >= 0) & (index < n)).to(tl.int64))
    before = tl.zeros((), tl.int64)
    for first in range(0, k, BLOCK):
        index = tl.load(index_ptr + c * k + first + entry, mask=first + entry < k, other=-1)
        valid = (index >= 0) & (index < n)
        rank = before + tl.cumsum(valid.to(tl.int64)) - 1
        before += tl.sum(valid.to(tl.int64))
        written = valid & (rank >= pushed - V)
        shown = written[:, None] & (d < D)[None, :]
        column = d.to(tl.int64)[None, :] * features_stride_d  # may pass 2**31
        source = features_ptr + index[:, None] * features_stride_n + column
        feature = tl.load(source, mask=shown, other=0.0).to(tl.float64 if WIDE else tl.float32)
        squared = tl.sum(feature * feature, axis=1)[:, None]
        # NaN and infinity have none, as in the plain formula
        has_direction = (squared > NORM_EPS_SQUARED) & (squared < float("inf"))
        squared_or_1 = tl.where(has_direction, squared, 1.0)
        if WIDE:
            unit = feature / tl.sqrt(squared_or_1)
        else:  # the default forms of float32 are approximations
            unit = tl.div_rn(feature, tl.sqrt_rn(squared_or_1))
        key = tl.where(has_direction, unit, 0.0)
        place = (cursor + rank) % V
        place = tl.where(place < 0, place + V, place)
        target = keys_ptr + c * keys_stride_c + place[:, None] * keys_stride_v
        target += d[None, :] * keys_stride_d
        tl.store(target, key.to(keys_ptr.dtype.element_ty), mask=shown)
    tl.debug_barrier()  # every warp has read the cursor
    if pushed > 0:
        tl.store(cursor_ptr + c * cursor_stride, (cursor + pushed) % V)
        tl.store(
            count_ptr + c * count_stride,
            tl.minimum(tl.load(count_ptr + c * count_stride) + pushed, V),
        )
