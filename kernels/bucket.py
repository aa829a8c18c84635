"""Stable counting sort of pixels by class on the device, with nothing read by the host.

A kernel of the caller writes the bucket (N,) of each pixel (its class, or C for "does not count")
and the histogram (C + 1, blocks) of each block of pixels; the inclusive running sum `ends` of the
flattened histogram then gives every pixel its place: those of earlier classes, those of its class
in earlier blocks, those of its class before it in its block.
"""

import triton
import triton.language as tl

BLOCK = 128  # pixels of a program: ranks within it come from a BLOCK x BLOCK comparison


@triton.jit
def store_histogram(
    histogram_ptr, bucket, inside, block, num_blocks, C: tl.constexpr, BINS: tl.constexpr
):
    """Store how many pixels bucket 0..C has each; BINS is a power of two above C + 1, the bin of
    places outside the data."""
    bins = tl.arange(0, BINS)
    pixels = tl.histogram(tl.where(inside, bucket, C + 1).to(tl.int32), BINS)
    tl.store(histogram_ptr + bins * num_blocks + block, pixels, mask=bins <= C)


@triton.jit
def place_in_bucket(histogram_ptr, ends_ptr, bucket, inside, block, num_blocks):
    """Return where each pixel goes when all are ordered by bucket, stably."""
    i = tl.arange(0, bucket.shape[0])
    earlier = (bucket[:, None] == bucket[None, :]) & (i[None, :] < i[:, None])
    slot = bucket * num_blocks + block
    end = tl.load(ends_ptr + slot, mask=inside, other=0)
    pixels = tl.load(histogram_ptr + slot, mask=inside, other=0)
    return end - pixels + tl.sum(earlier.to(tl.int32), axis=1)


@triton.jit
def class_sizes(ends_ptr, num_blocks, C: tl.constexpr, BINS: tl.constexpr):
    """Return the pixels in bucket 0..C-1, as a vector (BINS,) with zeros from C on."""
    c = tl.arange(0, BINS)
    end = tl.load(ends_ptr + c * num_blocks + num_blocks - 1, mask=c < C, other=0)
    start = tl.load(ends_ptr + c * num_blocks - 1, mask=(c > 0) & (c < C), other=0)
    return end - start
