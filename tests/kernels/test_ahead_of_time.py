"""Every kernel and every row of the tile table, compiled for cards that need not be there."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
tiles = pytest.importorskip("ctt_kernels.tiles")

ARCHITECTURES = (90, 80, 86)
# ptxas puts a few values on the stack even where it leaves half the registers unused
HARMLESS_STACK = 16


def compile_all(arch: int, words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """In a process of its own: nothing can be compiled where the interpreter is on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_rows.py")
    done = subprocess.run(
        [sys.executable, str(script), str(arch), *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def lines() -> dict[int, list[dict[str, Any]]]:
    # kernels without a row are the same for every card of a generation
    words = [("contrast ", "chunked") if arch == 86 else () for arch in ARCHITECTURES]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(compile_all, ARCHITECTURES, words), strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fits_the_card(lines: dict[int, list[dict[str, Any]]], arch: int) -> None:
    rows = sum(key[0] == arch for key in tiles.TILES)
    assert sum(line["case"].startswith("contrast ") for line in lines[arch]) == 4 * rows
    assert any(line["case"].startswith("chunked.") for line in lines[arch])
    for line in lines[arch]:
        assert line["shared"] <= tiles.SHARED_LIMIT[arch], line
        assert line["registers"] <= 255, line
        assert line["stack"] <= HARMLESS_STACK, line


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_uses_the_card(lines: dict[int, list[dict[str, Any]]], arch: int) -> None:
    for line in lines[arch]:
        if line["case"].startswith("contrast ") and "pair parts" not in line["case"]:
            assert line["tensor_core"] > 0, line
        if line["case"].startswith("chunked.weigh"):
            assert line["wide_loads"] > 0, line
        if line["case"].startswith("ema") and "aligned" in line["case"]:
            assert line["wide_loads"] > 0, line


def test_every_dimension_has_a_row() -> None:
    for arch in ARCHITECTURES:
        for kind in ("half", "tf32"):
            for dim in (1, 19, 64, 65, 128, 256):
                tile = tiles.find(arch, kind, dim)
                assert tile is not None
    assert tiles.find(90, "half", 257) is None
    assert tiles.find(90, "tf32", 257) is None
    known = {(8, 0): 80, (8, 6): 86, (8, 9): 86, (9, 0): 90, (10, 0): 90, (12, 0): 86}
    assert {key: tiles.architecture(*key) for key in known} == known
