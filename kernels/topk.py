"""Selection of the k most confident pixels of every class.

The launches of one call, in order: `make_sort_keys`, a stable ascending sort of the keys,
`assign_buckets` over the sorted pixels, a running sum of the histogram, `store_topk`. The sort puts
equal confidences by index, and the counting sort by class keeps that order.
"""

import triton
import triton.language as tl

from .bucket import class_sizes, place_in_bucket, store_histogram


# sizes that change from call to call: no new compilation for each divisibility
@triton.jit(do_not_specialize=["n"])
def make_sort_keys(confidence_ptr, key_ptr, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Store an integer that rises as the confidence falls, with -0.0 equal to 0.0.

    WIDE is for float64, whose keys need 64 bits.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < n
    confidence = tl.load(confidence_ptr + pixel, mask=inside, other=0.0)
    if WIDE:
        bits = confidence.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
    else:
        bits = confidence.to(tl.float32).to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
    tl.store(key_ptr + pixel, tl.where(bits < 0, magnitude, -magnitude), mask=inside)


@triton.jit(do_not_specialize=["n", "num_blocks"])
def assign_buckets(
    order_ptr,
    confidence_ptr,
    label_ptr,
    valid_ptr,
    bucket_ptr,
    histogram_ptr,
    n,
    num_blocks,
    C: tl.constexpr,
    BINS: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the class of each pixel in sorted order, C where it is no candidate."""
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    pixel = tl.load(order_ptr + place, mask=inside, other=0)
    label = tl.load(label_ptr + pixel, mask=inside, other=-1)
    confidence = tl.load(confidence_ptr + pixel, mask=inside, other=0.0)
    candidate = (label >= 0) & (label < C) & (confidence == confidence)
    if HAS_VALID:
        candidate = candidate & (tl.load(valid_ptr + pixel, mask=inside, other=0) != 0)
    bucket = tl.where(candidate, label, C).to(tl.int32)
    tl.store(bucket_ptr + place, bucket, mask=inside)
    store_histogram(histogram_ptr, bucket, inside, block, num_blocks, C, BINS)


@triton.jit(do_not_specialize=["n", "num_blocks", "k"])
def store_topk(
    order_ptr,
    bucket_ptr,
    histogram_ptr,
    ends_ptr,
    index_ptr,  # (C, k), filled with -1
    count_ptr,  # (C,)
    n,
    num_blocks,
    k,
    C: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    bucket = tl.load(bucket_ptr + place, mask=inside, other=C + 1)
    sorted_place = place_in_bucket(histogram_ptr, ends_ptr, bucket, inside, block, num_blocks)
    first = tl.load(ends_ptr + bucket * num_blocks - 1, mask=inside & (bucket > 0), other=0)
    rank = sorted_place - first
    pixel = tl.load(order_ptr + place, mask=inside, other=0)
    taken = inside & (bucket < C) & (rank < k)
    tl.store(index_ptr + bucket.to(tl.int64) * k + rank, pixel, mask=taken)
    if block == 0:
        c = tl.arange(0, BINS)
        pixels = class_sizes(ends_ptr, num_blocks, C, BINS).to(tl.int64)
        tl.store(count_ptr + c, tl.minimum(pixels, k), mask=c < C)
