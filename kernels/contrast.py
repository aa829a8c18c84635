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

The launches of one call, in order: those of gather.py, and `contrast_kernel` twice. Where the
pixels that count are too few to keep all processors of the device busy, the first launch splits the
keys among its programs, and the second adds up what they found and finishes the rows; elsewhere the
first finishes them and the second does nothing.
The device decides, for only it knows how many pixels count.
"""

import triton
import triton.language as tl

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
def _load_keys(packed_ptr, first, BLOCK: tl.constexpr, DIM_PADDED: tl.constexpr):
    place = (first + tl.arange(0, BLOCK)).to(tl.int64)
    return tl.load(packed_ptr + place[:, None] * DIM_PADDED + tl.arange(0, DIM_PADDED)[None, :])


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
def _store_columns(
    pointer, x, place, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM_PADDED: tl.constexpr
):
    """Store the columns of rows from FIRST on, a piece at a time: they change their registers."""
    if WIDTH > PIECE:
        left, right = _halves(x, WIDTH)
        _store_columns(pointer, left, place, FIRST, WIDTH // 2, DIM_PADDED)
        _store_columns(pointer, right, place, FIRST + WIDTH // 2, WIDTH // 2, DIM_PADDED)
    else:
        d = FIRST + tl.arange(0, WIDTH)
        tl.store(pointer + place[:, None] * DIM_PADDED + d[None, :], x)


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
    part,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    ONLINE: tl.constexpr,
):
    """log2 Z (BLOCK_M,), and O / Z (BLOCK_M, DIM_PADDED) where the gradient is wanted.

    Of one part of the keys; a row that has no negatives there gets -inf and 0. Tiles that lie
    wholly in skip_start..skip_end are the own keys of every row and are left out.
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
    tiles = tl.cdiv(num_keys, BLOCK_N) - skipped
    for i in range(tiles * part // parts, tiles * (part + 1) // parts):
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
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    return top + tl.log2(total), acc


@triton.jit
def _sweep(
    q,
    scale,
    longest,
    inverse_tau,
    own_start,
    own_end,
    packed_ptr,
    num_keys,
    skip_start,
    skip_end,
    part,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`_sweep_negatives` by the bound of the scores, online where it is too high for that."""
    bound = tl.sqrt(longest) * (inverse_tau * (LOG2E * ROUNDING))
    # of a float16 too few bits would be left where the largest score is far below the bound
    if packed_ptr.dtype.element_ty != tl.float16 and bound <= MOST_BOUND:
        log2_z, mean = _sweep_negatives(
            q,
            scale,
            bound,
            own_start,
            own_end,
            packed_ptr,
            num_keys,
            skip_start,
            skip_end,
            part,
            parts,
            BLOCK_M,
            BLOCK_N,
            DIM_PADDED,
            NEED_GRAD,
            PRECISION,
            False,
        )
    else:
        log2_z, mean = _sweep_negatives(
            q,
            scale,
            bound,
            own_start,
            own_end,
            packed_ptr,
            num_keys,
            skip_start,
            skip_end,
            part,
            parts,
            BLOCK_M,
            BLOCK_N,
            DIM_PADDED,
            NEED_GRAD,
            PRECISION,
            True,
        )
    return log2_z, mean


@triton.jit
def _tile(first_row, num_rows, rows_ptr, label_ptr, start_ptr, BLOCK_M: tl.constexpr):
    """Of BLOCK_M rows: place, whether it counts, where its own keys begin and end.

    Then where the own keys of any row begin and end, and the end of those that are own keys of
    every row, which begin at the same place.
    """
    place = first_row + tl.arange(0, BLOCK_M)
    live = place < num_rows
    row = tl.load(rows_ptr + place, mask=live, other=0)
    label = tl.load(label_ptr + row, mask=live, other=0)
    own_start = tl.load(start_ptr + label, mask=live, other=0)
    own_end = tl.load(start_ptr + label + 1, mask=live, other=0)
    # rows are ordered by class: the own keys of the tile lie between these two
    first_class = tl.load(label_ptr + tl.load(rows_ptr + first_row))
    last_row = tl.minimum(first_row + BLOCK_M, num_rows) - 1
    last_class = tl.load(label_ptr + tl.load(rows_ptr + last_row))
    tile_start = tl.load(start_ptr + first_class)
    tile_end = tl.load(start_ptr + last_class + 1)
    skip_end = tl.where(first_class == last_class, tile_end, tile_start)
    return place, live, own_start, own_end, tile_start, tile_end, skip_end


@triton.jit
def _parts(num_rows, num_keys, wanted, BLOCK_M: tl.constexpr, KEYS_OF_A_PART: tl.constexpr):
    """Into how many parts the keys are split for each tile of rows, to make `wanted` programs."""
    idle = wanted // tl.maximum(tl.cdiv(num_rows, BLOCK_M), 1)
    return tl.maximum(tl.minimum(idle, num_keys // KEYS_OF_A_PART), 1)


@triton.jit
def _add_columns(
    part_log2_ptr,
    part_mean_ptr,
    log2_z,
    first,
    parts,
    PART_M: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """O / Z of a tile from those of its parts, a piece of the columns at a time."""
    if WIDTH > PIECE:
        left = _add_columns(
            part_log2_ptr,
            part_mean_ptr,
            log2_z,
            first,
            parts,
            PART_M,
            FIRST,
            WIDTH // 2,
            DIM_PADDED,
        )
        right = _add_columns(
            part_log2_ptr,
            part_mean_ptr,
            log2_z,
            first,
            parts,
            PART_M,
            FIRST + WIDTH // 2,
            WIDTH // 2,
            DIM_PADDED,
        )
        mean = tl.join(left, right).permute(0, 2, 1).reshape(first.shape[0], WIDTH)
    else:
        mean = tl.zeros((first.shape[0], WIDTH), tl.float32)
        for part in range(parts):
            place = first + part * PART_M
            share = tl.exp2(tl.load(part_log2_ptr + place) - log2_z)
            x = _load_columns(part_mean_ptr, place, FIRST, WIDTH, DIM_PADDED)
            mean += share[:, None] * x
    return mean


@triton.jit
def _add_parts(
    part_log2_ptr,
    part_mean_ptr,
    first_row,
    parts,
    BLOCK_M: tl.constexpr,
    PART_M: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    NEED_GRAD: tl.constexpr,
):
    """log2 Z and O / Z of BLOCK_M rows from those of the parts of their tile of PART_M rows."""
    first = first_row // PART_M * parts * PART_M + first_row % PART_M + tl.arange(0, BLOCK_M)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(part_log2_ptr + first + part * PART_M))
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in range(parts):
        total += tl.exp2(tl.load(part_log2_ptr + first + part * PART_M) - top)
    log2_z = top + tl.log2(total)
    if NEED_GRAD:
        mean = _add_columns(
            part_log2_ptr, part_mean_ptr, log2_z, first, parts, PART_M, 0, DIM_PADDED, DIM_PADDED
        )
    else:
        mean = tl.zeros((BLOCK_M, DIM_PADDED), tl.float32)
    return log2_z, mean


@triton.jit
def _softplus_and_sigmoid(z):
    """softplus(ln2 z) and its derivative, for z in units of log2."""
    e = tl.exp2(-tl.abs(z))
    softplus = (tl.maximum(z, 0.0) + tl.log2(1.0 + e)) * LN2
    return softplus, tl.where(z >= 0, 1.0, e) / (1.0 + e)


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


@triton.jit(do_not_specialize=["n", "num_blocks", "wanted"])
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
    part_log2_ptr,  # (wanted * PART_M,)
    part_mean_ptr,  # (wanted * PART_M, DIM_PADDED) float32
    loss_ptr,  # (N,), or (programs of the first launch,), which are no fewer
    grad_ptr,  # (N, D) contiguous
    n,
    num_blocks,
    wanted,
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
    ADD_PARTS: tl.constexpr,
    PART_M: tl.constexpr,
    KEYS_OF_A_PART: tl.constexpr,
):
    """Compare BLOCK_M queries with all keys; store losses by pixel, or weighted sums by program.

    ADD_PARTS says which of the two launches it is, PART_M is BLOCK_M of the first.
    """
    num_rows = tl.load(ends_ptr + C * num_blocks - 1)
    num_keys = tl.load(start_ptr + C)
    parts = _parts(num_rows, num_keys, wanted, PART_M, KEYS_OF_A_PART)
    if ADD_PARTS:
        if parts == 1:
            return
        first_row = tl.program_id(0) * BLOCK_M
    else:
        first_row = tl.program_id(0) // parts * BLOCK_M
    if first_row >= num_rows:
        if not PER_PIXEL:
            tl.store(loss_ptr + tl.program_id(0), 0.0)
        return

    place, live, own_start, own_end, tile_start, tile_end, skip_end = _tile(
        first_row, num_rows, rows_ptr, label_ptr, start_ptr, BLOCK_M
    )
    q = _load_columns(gathered_ptr, place, 0, DIM_PADDED, DIM_PADDED)
    inverse_norm = tl.load(inverse_norm_ptr + place)
    scale = inverse_norm * (inverse_tau * LOG2E)
    if ADD_PARTS:
        log2_z, g = _add_parts(
            part_log2_ptr, part_mean_ptr, first_row, parts, BLOCK_M, PART_M, DIM_PADDED, NEED_GRAD
        )
    else:
        log2_z, g = _sweep(
            q,
            scale,
            tl.load(longest_ptr),
            inverse_tau,
            own_start,
            own_end,
            packed_ptr,
            num_keys,
            tile_start,
            skip_end,
            tl.program_id(0) % parts,
            parts,
            BLOCK_M,
            BLOCK_N,
            DIM_PADDED,
            NEED_GRAD,
            PRECISION,
        )
        if parts > 1:
            row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(part_log2_ptr + row, log2_z)
            if NEED_GRAD:
                _store_columns(part_mean_ptr, g, row, 0, DIM_PADDED, DIM_PADDED)
            if not PER_PIXEL:
                tl.store(loss_ptr + tl.program_id(0), 0.0)
            return

    # read here and not before the sweep, which needs all registers
    rows = tl.load(rows_ptr + place, mask=live, other=0).to(tl.int64)
    label = tl.load(label_ptr + rows, mask=live, other=0)
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
