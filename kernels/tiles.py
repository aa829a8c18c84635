"""Tile sizes of the contrast kernels by (architecture, kind of dot, padded D).

A table and no autotuner: every row can be compiled ahead of time and checked for spills and shared
memory on a machine without a GPU, and nothing is timed inside a captured graph.
"""

from typing import NamedTuple

# a wider accumulator row leaves no registers for tiles of more than 32 queries, and smaller tiles
# read all keys more often
MAX_DIM = 256


class Tile(NamedTuple):
    """A program holds block_m queries and walks over block_n keys at a time.

    block_own is the chunk of own-class keys: small, because it lives beside the accumulator.
    """

    block_m: int
    block_n: int
    block_own: int
    num_warps: int
    num_stages: int


# shared memory a program may use, bytes
SHARED_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448}

# every row is compiled in tests/kernels; no spill with Triton 3.6 and 3.9
TILES = {
    (90, "half", 64): Tile(128, 64, 32, 8, 3),
    (90, "half", 128): Tile(128, 64, 32, 8, 3),
    (90, "half", 256): Tile(128, 64, 16, 8, 2),
    (90, "tf32", 64): Tile(128, 64, 32, 8, 2),
    (90, "tf32", 128): Tile(128, 32, 32, 8, 2),
    (90, "tf32", 256): Tile(32, 32, 32, 8, 1),
    (80, "half", 64): Tile(128, 64, 32, 8, 2),
    (80, "half", 128): Tile(64, 64, 32, 8, 2),
    (80, "half", 256): Tile(64, 64, 32, 8, 2),
    (80, "tf32", 64): Tile(64, 64, 32, 8, 2),
    (80, "tf32", 128): Tile(64, 32, 32, 8, 2),
    (80, "tf32", 256): Tile(64, 32, 16, 8, 1),
    (86, "half", 64): Tile(128, 64, 32, 8, 2),
    (86, "half", 128): Tile(64, 64, 32, 8, 2),
    (86, "half", 256): Tile(64, 32, 32, 8, 2),
    (86, "tf32", 64): Tile(64, 64, 32, 8, 2),
    (86, "tf32", 128): Tile(64, 32, 32, 8, 1),
    (86, "tf32", 256): Tile(32, 16, 16, 8, 2),
}

# Tiles of keys of a part at least where few pixels count; adding up a part takes about the time of
# one or two. Estimated for an H100, not yet measured.
TILES_OF_A_PART = 8
# Rows of a program that adds up the parts; divides every block_m. Few, because it walks over the
# own keys of all classes that its rows have.
ROWS_TO_ADD = 16

# small and odd against each other, so that a few dozen pixels already cross every boundary
INTERPRETER_TILE = Tile(32, 16, 16, 4, 1)
INTERPRETER_PROCESSORS = 7


def architecture(major: int, minor: int) -> int:
    """Return the architecture of the table for a compute capability of at least 8.0."""
    if (major, minor) in ((8, 0), (8, 7)):
        return 80
    return 90 if major in (9, 10, 11) else 86


def find(arch: int, kind: str, dim: int) -> Tile | None:
    """Return the smallest row that holds `dim`, or None."""
    for width in (64, 128, MAX_DIM):
        if dim <= width and (arch, kind, width) in TILES:
            return TILES[arch, kind, width]
    return None
