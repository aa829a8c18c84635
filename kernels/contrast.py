"""Pixel contrast against class queues, loss and gradient in one sweep over the keys.

For a query q of class c with u = q/|q| and scores s = u . key / tau, let Z be the sum of e^s over
the keys of the other classes and O = sum of e^s key. No score is above b = max |key| / tau, so the
kernel sums e^(s - b), which loses nothing as long as the smallest, e^(-2 b), is a normal number;
for lower temperatures, and in float16, it gathers both online as attention does it. Then

    info_nce: loss = mean over own keys of softplus(log Z - s+), w+ = sigmoid(log Z - s+),
              d loss / d u = (mean(w+) O / Z - mean(w+ key)) / tau
    pair:     one positive v instead of the own keys,
              d loss / d u = w+ (O / Z - v) / tau
    d loss / d q = (g - (g . u) u) / |q|   with g = d loss / d u

so two matrix products in all, and backward only scales. The raw q goes into the products and 1/|q|
onto the scores: q is then never rounded again.

The launches of one call, in order: `pack_keys` for each bank, `assign_buckets`, a running sum of
the histogram, `order_rows`, `gather_queries`, `contrast_kernel`. Rows are ordered by class, so that
a program meets one class or a few; rows that do not count come last and get zeros.
"""

import triton
import triton.language as tl

from .bucket import class_sizes, place_in_bucket, store_histogram

NORM_EPS_SQUARED = tl.constexpr(1e-24)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# columns that are finished at a time at the end, where the accumulator fills most registers
PIECE = tl.constexpr(64)
# below every score and yet finite: differences of running maxima never become NaN
LOWEST = tl.constexpr(-1e30)
# the largest bound of scores, in units of log2, up to which 2^(score - bound) >= 2^-100 is normal
MOST_BOUND = tl.constexpr(50.0)
ROUNDING = tl.constexpr(1.01)  # keys and scores that were rounded may pass the bound by less


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
    """rows (N,) lists the pixels by bucket; weight (C,) is what a pixel's loss counts for."""
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
    """Queries that count, in order of class, with 1/|q|; the others get a zero loss and gradient.

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


@triton.jit
def _load_keys(packed_ptr, first, BLOCK: tl.constexpr, DIM_PADDED: tl.constexpr):
    place = (first + tl.arange(0, BLOCK)).to(tl.int64)
    return tl.load(packed_ptr + place[:, None] * DIM_PADDED + tl.arange(0, DIM_PADDED)[None, :])


@triton.jit
def _sweep_negatives(
    q,  # (BLOCK_M, DIM_PADDED)
    scale,  # (BLOCK_M,): turns q . key into log2(e) cos / tau
    bound,  # of the scores, in units of log2
    own_start,
    own_end,
    packed_ptr,
    num_keys,
    skip_start,
    skip_end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """log2 Z (BLOCK_M,), and O / Z (BLOCK_M, DIM_PADDED) where the gradient is wanted.

    Tiles that lie wholly in skip_start..skip_end are the own keys of every row and are left out.
    """
    acc = tl.zeros((BLOCK_M, DIM_PADDED), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    n = tl.arange(0, BLOCK_N)
    first_skipped = tl.cdiv(skip_start, BLOCK_N)
    skipped = tl.maximum(skip_end // BLOCK_N - first_skipped, 0)
    if ONLINE:
        top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    else:
        top = tl.zeros((BLOCK_M,), tl.float32) + bound
    for i in range(tl.cdiv(num_keys, BLOCK_N) - skipped):
        first = (i + tl.where(i >= first_skipped, skipped, 0)) * BLOCK_N
        k = _load_keys(packed_ptr, first, BLOCK_N, DIM_PADDED)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        place = (first + n)[None, :]
        is_own = (place >= own_start[:, None]) & (place < own_end[:, None])
        left_out = is_own | (place >= num_keys)
        if ONLINE:
            score = tl.where(left_out, float("-inf"), product * scale[:, None])
            new_top = tl.maximum(top, tl.max(score, axis=1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(score - new_top[:, None])
            total *= shrink
            if NEED_GRAD:
                acc *= shrink[:, None]
            top = new_top
        else:
            p = tl.where(left_out, 0.0, tl.exp2(product * scale[:, None] - bound))
        total += tl.sum(p, axis=1)
        if NEED_GRAD:
            acc = tl.dot(p.to(k.dtype), k, acc, input_precision=PRECISION)
    if NEED_GRAD:
        acc = acc / total[:, None]
    return top + tl.log2(total), acc


@triton.jit
def _softplus_and_sigmoid(z):
    """softplus(ln2 z) and its derivative, for z in units of log2."""
    e = tl.exp2(-tl.abs(z))
    softplus = (tl.maximum(z, 0.0) + tl.log2(1.0 + e)) * LN2
    return softplus, tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _load_columns(
    pointer, place, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM_PADDED: tl.constexpr
):
    d = FIRST + tl.arange(0, WIDTH)
    return tl.load(pointer + place.to(tl.int64)[:, None] * DIM_PADDED + d[None, :])


@triton.jit
def _halves(x, WIDTH: tl.constexpr):
    """The left and the right half of the columns; a relabelling of registers."""
    return tl.reshape(x, (x.shape[0], 2, WIDTH // 2)).permute(0, 2, 1).split()


@triton.jit
def _dot_rows(
    g, pointer, place, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM_PADDED: tl.constexpr
):
    """Row by row g . x, a piece at a time: both as a whole do not fit the registers."""
    if WIDTH > PIECE:
        left, right = _halves(g, WIDTH)
        total = _dot_rows(left, pointer, place, FIRST, WIDTH // 2, DIM_PADDED)
        total += _dot_rows(right, pointer, place, FIRST + WIDTH // 2, WIDTH // 2, DIM_PADDED)
    else:
        x = _load_columns(pointer, place, FIRST, WIDTH, DIM_PADDED)
        total = tl.sum(g * x.to(tl.float32), axis=1)
    return total


@triton.jit
def _store_combination(
    grad_ptr,
    g,
    g_factor,  # (BLOCK_M,)
    query_ptr,
    q_factor,  # (BLOCK_M,)
    positive_ptr,
    v_factor,  # (BLOCK_M,)
    place,
    rows,
    live,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Store g_factor g - q_factor q - v_factor v into rows of grad, a piece at a time."""
    if WIDTH > PIECE:
        parts = _halves(g, WIDTH)
        for i in tl.static_range(2):
            _store_combination(
                grad_ptr,
                parts[i],
                g_factor,
                query_ptr,
                q_factor,
                positive_ptr,
                v_factor,
                place,
                rows,
                live,
                FIRST + i * (WIDTH // 2),
                WIDTH // 2,
                D,
                DIM_PADDED,
                PAIR,
            )
    else:
        q = _load_columns(query_ptr, place, FIRST, WIDTH, DIM_PADDED)
        grad = g * g_factor[:, None] - q.to(tl.float32) * q_factor[:, None]
        if PAIR:
            v = _load_columns(positive_ptr, place, FIRST, WIDTH, DIM_PADDED)
            grad -= v.to(tl.float32) * v_factor[:, None]
        d = FIRST + tl.arange(0, WIDTH)
        address = grad_ptr + rows[:, None] * D + d[None, :]
        shown = live[:, None] & (d < D)[None, :]
        tl.store(address, grad.to(grad_ptr.dtype.element_ty), mask=shown)


@triton.jit
def _own_weights(
    q, scale, log2_z, own_start, own_end, k, first, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """softplus(log Z - s+) and w+ of a chunk of own keys, 0 where a key is not the row's own."""
    place = (first + tl.arange(0, BLOCK))[None, :]
    is_own = (place >= own_start[:, None]) & (place < own_end[:, None])
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[:, None]
    softplus, w = _softplus_and_sigmoid(log2_z[:, None] - score)
    return tl.where(is_own, softplus, 0.0), tl.where(is_own, w, 0.0)


@triton.jit(do_not_specialize=["n", "num_blocks"])
def contrast_kernel(
    gathered_ptr,  # (at least N, DIM_PADDED)
    inverse_norm_ptr,  # (at least N,)
    gathered_positive_ptr,  # (at least N, DIM_PADDED)
    positive_inverse_norm_ptr,  # (at least N,)
    cosine_ptr,  # (at least N,)
    packed_ptr,  # (keys + pad, DIM_PADDED), in the dtype of the query
    start_ptr,  # (C + 1,) int32
    longest_ptr,  # (1,) float32: the largest |key|^2
    rows_ptr,  # (N,) int32
    ends_ptr,  # running sum of the histogram (C + 1, num_blocks)
    label_ptr,  # (N,) int64
    weight_ptr,  # (C,)
    loss_ptr,  # (N,) or (programs,)
    grad_ptr,  # (N, D) contiguous
    n,
    num_blocks,
    inverse_tau,
    C: tl.constexpr,
    D: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    PAIR: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):
    """BLOCK_M queries against all keys; loss is by pixel, or a weighted sum by program."""
    first_row = tl.program_id(0) * BLOCK_M
    num_rows = tl.load(ends_ptr + C * num_blocks - 1)
    if first_row >= num_rows:
        if not PER_PIXEL:
            tl.store(loss_ptr + tl.program_id(0), 0.0)
        return

    place = first_row + tl.arange(0, BLOCK_M)
    live = place < num_rows
    rows = tl.load(rows_ptr + place, mask=live, other=0).to(tl.int64)
    label = tl.load(label_ptr + rows, mask=live, other=0)
    own_start = tl.load(start_ptr + label, mask=live, other=0)
    own_end = tl.load(start_ptr + label + 1, mask=live, other=0)
    # rows are ordered by class: the own keys of the tile lie between these two
    first_class = tl.load(label_ptr + tl.load(rows_ptr + first_row))
    last_row = tl.minimum(first_row + BLOCK_M, num_rows) - 1
    last_class = tl.load(label_ptr + tl.load(rows_ptr + last_row))
    tile_start = tl.load(start_ptr + first_class)
    tile_end = tl.load(start_ptr + last_class + 1)

    q = _load_columns(gathered_ptr, place, 0, DIM_PADDED, DIM_PADDED)
    inverse_norm = tl.load(inverse_norm_ptr + place)
    scale = inverse_norm * (inverse_tau * LOG2E)
    bound = tl.sqrt(tl.load(longest_ptr)) * (inverse_tau * (LOG2E * ROUNDING))
    num_keys = tl.load(start_ptr + C)
    skip_end = tl.where(first_class == last_class, tile_end, tile_start)
    # of a float16 too few bits would be left where the largest score is far below the bound
    if packed_ptr.dtype.element_ty != tl.float16 and bound <= MOST_BOUND:
        log2_z, g = _sweep_negatives(
            q,
            scale,
            bound,
            own_start,
            own_end,
            packed_ptr,
            num_keys,
            tile_start,
            skip_end,
            BLOCK_M,
            BLOCK_N,
            DIM_PADDED,
            NEED_GRAD,
            PRECISION,
            False,
        )
    else:
        log2_z, g = _sweep_negatives(
            q,
            scale,
            bound,
            own_start,
            own_end,
            packed_ptr,
            num_keys,
            tile_start,
            skip_end,
            BLOCK_M,
            BLOCK_N,
            DIM_PADDED,
            NEED_GRAD,
            PRECISION,
            True,
        )

    if PAIR:
        loss, w_mean = _softplus_and_sigmoid(
            log2_z - tl.load(cosine_ptr + place) * (inverse_tau * LOG2E)
        )
    else:
        loss = tl.zeros((BLOCK_M,), tl.float32)
        w_mean = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(tile_start, tile_end, BLOCK_OWN):
            k = _load_keys(packed_ptr, first, BLOCK_OWN, DIM_PADDED)
            softplus, w = _own_weights(
                q, scale, log2_z, own_start, own_end, k, first, BLOCK_OWN, PRECISION
            )
            loss += tl.sum(softplus, axis=1)
            w_mean += tl.sum(w, axis=1)
        share = 1.0 / tl.maximum(own_end - own_start, 1).to(tl.float32)
        loss *= share
        w_mean *= share
    weight = tl.load(weight_ptr + label, mask=live, other=0.0)
    if PER_PIXEL:
        tl.store(loss_ptr + rows, loss, mask=live)
    else:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(live, loss * weight, 0.0)))

    if NEED_GRAD:
        g = g * w_mean[:, None]
        if not PAIR:
            # the weights are made a second time: kept, they would not fit beside the accumulator
            for first in range(tile_start, tile_end, BLOCK_OWN):
                k = _load_keys(packed_ptr, first, BLOCK_OWN, DIM_PADDED)
                _, w = _own_weights(
                    q, scale, log2_z, own_start, own_end, k, first, BLOCK_OWN, PRECISION
                )
                w = w * -share[:, None]
                g = tl.dot(w.to(k.dtype), k, g, input_precision=PRECISION)
        # through the normalisation: (g - (g . u) u) / |q|
        factor = weight * inverse_tau * inverse_norm
        along = _dot_rows(g, gathered_ptr, place, 0, DIM_PADDED, DIM_PADDED) * inverse_norm
        v_factor = factor
        if PAIR:
            along -= w_mean * tl.load(cosine_ptr + place)
            v_factor = factor * w_mean * tl.load(positive_inverse_norm_ptr + place)
        _store_combination(
            grad_ptr,
            g,
            factor,
            gathered_ptr,
            factor * along * inverse_norm,
            gathered_positive_ptr,
            v_factor,
            place,
            rows,
            live,
            0,
            DIM_PADDED,
            D,
            DIM_PADDED,
            PAIR,
        )
