"""`info_nce` and `pair_info_nce` in Triton's interpreter; run by test_interpreter.py."""

from typing import Any

import pytest
import torch
from ctt_kernels import contrast, tiles
from torch import Tensor
from torch.nn import functional as F

from ctt.ops import info_nce, pair_info_nce, reference
from ctt.ops.backends import chunked

BACKENDS = pytest.mark.parametrize("backend", ["triton", "chunked"])
# bound on the error against float64, relative to the largest value
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
SIZES = (  # N, C, V, D
    (0, 3, 2, 8),
    (1, 2, 1, 19),
    (123, 5, 7, 19),
    (67, 3, 128, 64),
    (70, 3, 33, 256),
    (90, 150, 1, 5),
)
FEW_CLASSES = (*SIZES[:5], (90, 40, 1, 5))  # packing and ordering are those of the other backend
WIDE = ((33, 4, 20, 300), (20, 3, 9, 600))  # too wide for the one-pass kernel
RUNS = [
    *(
        (backend, *run)
        for backend, sizes in (("triton", SIZES), ("chunked", FEW_CLASSES))
        for run in (
            *((size, "class", torch.float32) for size in sizes),
            *((SIZES[2], reduction, torch.float32) for reduction in ("mean", "none")),
            *((size, "class", torch.float16) for size in (SIZES[2], SIZES[3])),
        )
    ),
    *(("chunked", size, "class", dtype) for size in WIDE for dtype in TOLERANCE),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_SCORE_BYTES", 1)
    monkeypatch.setattr(chunked, "_ROWS", 40)


def case(
    size: tuple[int, int, int, int], dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, positive, label, keys, count, mask; NaN in all that must not be read."""
    n, c, v, d = size
    g = torch.Generator().manual_seed(seed)
    query, positive = (torch.randn(n, d, generator=g).to(dtype) for _ in range(2))
    keys = F.normalize(torch.randn(c, v, d, generator=g), dim=2)
    count = torch.randint(0, v + 1, (c,), generator=g)
    count[:2] = v
    empty = torch.arange(v) >= count[:, None]
    keys[empty] = torch.where(torch.rand(c, v, 1, generator=g) < 0.5, torch.nan, torch.inf)[empty]
    label = torch.randint(-1, c + 1, (n,), generator=g)
    label[label == c] = 1 << 40
    mask = torch.rand(n, generator=g) > 0.3
    query[~mask], positive[~mask] = torch.nan, torch.inf
    return query, positive, label, keys, count, mask


def plain(keys: Tensor) -> Tensor:
    """In float64 and with nothing in the places that hold no key."""
    return keys.double().nan_to_num(0, 0, 0)


def check(ours: Tensor, truth: Tensor, query: Tensor, wide: Tensor) -> None:
    tolerance = TOLERANCE[query.dtype]
    for result, expected in (
        (ours, truth),
        (torch.autograd.grad(ours.sum(), query)[0], torch.autograd.grad(truth.sum(), wide)[0]),
    ):
        scale = expected.abs().max().item() if expected.numel() else 0.0
        assert result.shape == expected.shape
        torch.testing.assert_close(
            result.double(), expected.double(), rtol=0, atol=tolerance * scale
        )


@pytest.mark.parametrize(("backend", "size", "reduction", "dtype"), RUNS, ids=str)
def test_info_nce(
    backend: str, size: tuple[int, int, int, int], reduction: str, dtype: torch.dtype
) -> None:
    query, _, label, keys, count, mask = case(size, dtype, seed=sum(size))
    query.requires_grad_()
    wide = query.detach().double().requires_grad_()
    options = {"temperature": 0.1, "mask": mask, "reduction": reduction}
    ours = info_nce(query, label, keys, count, backend=backend, **options)
    truth = reference.info_nce(wide, label, plain(keys), count, **options)
    check(ours, truth, query, wide)


@pytest.mark.parametrize(("backend", "size", "reduction", "dtype"), RUNS, ids=str)
def test_pair_info_nce(
    backend: str, size: tuple[int, int, int, int], reduction: str, dtype: torch.dtype
) -> None:
    query, positive, label, keys, count, mask = case(size, dtype, seed=sum(size))
    second = case((0, size[1], size[2] + 3, size[3]), dtype, seed=1)[3].nan_to_num(0, 0, 0)
    query.requires_grad_()
    wide = query.detach().double().requires_grad_()
    options = {"temperature": 0.5, "mask": mask, "reduction": reduction}
    ours = pair_info_nce(
        query, positive, label, [(keys, count), (second, None)], backend=backend, **options
    )
    banks = [(plain(keys), count), (plain(second), None)]
    truth = reference.pair_info_nce(wide, positive.double(), label, banks, **options)
    check(ours, truth, query, wide)


@BACKENDS
@pytest.mark.parametrize("kind", ["all masked", "no label", "empty queues", "one class", "all own"])
def test_nothing_counts(kind: str, backend: str) -> None:
    query, _, label, keys, count, mask = case((40, 3, 4, 8), torch.float32, seed=0)
    if kind == "all masked":
        mask = torch.zeros_like(mask)
    elif kind == "no label":
        label = torch.full_like(label, 255)
    elif kind == "empty queues":
        count = torch.zeros_like(count)
    elif kind == "one class":
        keys, count = keys[:1], count[:1]
    else:
        count, label = torch.tensor([4, 0, 0]), torch.zeros_like(label)
    query.requires_grad_()
    for reduction in ("class", "mean", "none"):
        loss = info_nce(
            query, label, keys, count, temperature=0.1, mask=mask, reduction=reduction,
            backend=backend,
        )  # fmt: skip
        assert not loss.any()
        assert not torch.autograd.grad(loss.sum(), query)[0].any()


@BACKENDS
def test_without_direction_and_gradient(backend: str) -> None:
    query, positive, label, keys, count, mask = case((40, 3, 5, 8), torch.float32, seed=2)
    query = torch.where(mask[:, None], query, 0)
    query[::3] = 0
    query[1] = 1e-13
    positive = torch.where(mask[:, None], positive, 0)
    query.requires_grad_()
    for run in (
        lambda q, k, b: info_nce(q, label, k, count, temperature=0.1, reduction="none", backend=b),
        lambda q, k, b: pair_info_nce(
            q, positive.to(q.dtype), label, [(k, count)], temperature=0.1, reduction="none",
            backend=b,
        ),
    ):  # fmt: skip
        wide = query.detach().double().requires_grad_()
        ours = run(query, keys, backend)
        check(ours, run(wide, plain(keys), "reference"), query, wide)
        assert torch.equal(run(query.detach(), keys, backend), ours)


@BACKENDS
@pytest.mark.parametrize("layout", ["columns", "every other", "expanded keys"])
def test_strides(layout: str, backend: str) -> None:
    query, positive, label, keys, count, mask = case((50, 4, 6, 19), torch.float32, seed=3)
    if layout == "columns":
        query, positive = query.T.contiguous().T, positive.T.contiguous().T
        keys = keys.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "every other":
        query = query.repeat_interleave(2, dim=0)[::2]
        label, mask = label.repeat_interleave(3)[::3], mask.repeat_interleave(2)[::2]
        count = count.repeat_interleave(2)[::2]
    else:
        keys = keys[:, :1].expand(-1, 6, -1)
    query.requires_grad_()
    wide = query.detach().double().requires_grad_()
    options = {"temperature": 0.1, "mask": mask}
    check(
        info_nce(query, label, keys, count, backend=backend, **options),
        reference.info_nce(wide, label, plain(keys), count, **options),
        query,
        wide,
    )
    check(
        pair_info_nce(query, positive, label, [(keys, count)], backend=backend, **options),
        reference.pair_info_nce(wide, positive.double(), label, [(plain(keys), count)], **options),
        query,
        wide,
    )


@BACKENDS
@pytest.mark.parametrize("temperature", [0.01, 0.07, 5.0])
def test_temperatures_and_large_half_values(temperature: float, backend: str) -> None:
    query, _, label, keys, count, _ = case((60, 4, 9, 32), torch.float16, seed=4)
    query = (query.nan_to_num() * 10_000).clamp(-60_000, 60_000).requires_grad_()
    wide = query.detach().double().requires_grad_()
    ours = info_nce(query, label, keys, count, temperature=temperature, backend=backend)
    truth = reference.info_nce(wide, label, plain(keys), count, temperature=temperature)
    torch.testing.assert_close(ours.double(), truth, rtol=5e-3, atol=0)


@BACKENDS
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 8), (torch.float32, 4100)], ids=str)
def test_what_the_kernels_leave_to_others(dtype: torch.dtype, dim: int, backend: str) -> None:
    query, _, label, keys, count, mask = case((30, 3, 4, dim), dtype, seed=5)
    options = {"temperature": 0.1, "mask": mask}
    ours = info_nce(query, label, plain(keys).to(dtype), count, backend=backend, **options)
    truth = reference.info_nce(query, label, plain(keys).to(dtype), count, **options)
    torch.testing.assert_close(ours, truth)


@BACKENDS
def test_a_learned_temperature(backend: str) -> None:
    query, positive, label, keys, count, mask = case((30, 3, 4, 8), torch.float32, seed=8)
    keys = plain(keys).float()
    slopes = []
    for name in (backend, "reference"):
        tau = torch.nn.Parameter(torch.tensor(0.2))
        options = {"temperature": tau, "mask": mask, "backend": name}
        loss = info_nce(query, label, keys, count, **options)
        loss = loss + pair_info_nce(query, positive, label, [(keys, count)], **options)
        slopes.append(torch.autograd.grad(loss, tau)[0])
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=0)


def test_the_one_pass_kernel_leaves_wide_features_to_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, _, label, keys, count, mask = case((30, 3, 4, 257), torch.float32, seed=7)
    ran = []
    multiply = chunked._multiply
    monkeypatch.setattr(chunked, "_multiply", lambda *a: (ran.append(a), multiply(*a)))
    info_nce(
        query[:, :256], label, keys[..., :256], count, temperature=1, mask=mask, backend="triton"
    )
    assert not ran
    info_nce(query, label, keys, count, temperature=1, mask=mask, backend="triton")
    assert ran


@BACKENDS
def test_a_first_bank_without_places(backend: str) -> None:
    query, positive, label, keys, _, mask = case((30, 3, 4, 8), torch.float32, seed=6)
    query, keys = query.detach(), plain(keys).float()
    banks = [(keys[:, :0], None), (keys, None)]
    options = {"temperature": 0.1, "mask": mask}
    ours = pair_info_nce(query, positive, label, banks, backend=backend, **options)
    truth = reference.pair_info_nce(query, positive, label, banks, **options)
    torch.testing.assert_close(ours, truth, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("temperature", "longest"), [(0.01, 1.0), (0.03, 1.0), (0.1, 3.0), (0.1, 30.0), (5.0, 1.0)]
)
def test_scores_far_below_their_bound(temperature: float, longest: float) -> None:
    """The bound is that of the longest key, which is far from most queries; by it the sums are
    gathered with a fixed reference, or online where that would leave no normal numbers."""
    query, positive, label, keys, count, mask = case((60, 4, 9, 19), torch.float32, seed=8)
    keys = keys * torch.rand(keys.shape[:2], generator=torch.Generator().manual_seed(0))[..., None]
    keys[1, 0] *= longest / keys[1, 0].norm()
    query[mask] -= 2 * (query[mask] @ keys[1, 0]).clamp(min=0)[:, None] * keys[1, 0] / longest**2
    query.requires_grad_()
    wide = query.detach().double().requires_grad_()
    options = {"temperature": temperature, "mask": mask, "reduction": "none"}
    check(
        info_nce(query, label, keys, count, backend="triton", **options),
        reference.info_nce(wide, label, plain(keys), count, **options),
        query,
        wide,
    )
    check(
        pair_info_nce(query, positive, label, [(keys, count)], backend="triton", **options),
        reference.pair_info_nce(wide, positive.double(), label, [(plain(keys), count)], **options),
        query,
        wide,
    )


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Into how many parts the keys were split, once for each program that added them up."""
    found = []
    add = contrast._add_parts
    monkeypatch.setattr(contrast, "_add_parts", lambda *a: (found.append(int(a[3])), add(*a))[1])
    monkeypatch.setattr(tiles, "TILES_OF_A_PART", 1)
    return found


@pytest.mark.parametrize("temperature", [0.02, 0.1])
@pytest.mark.parametrize(
    ("processors", "expected"), [(1, []), (2, [2, 2]), (5, [5, 5]), (50, [14, 14])]
)
def test_keys_are_split_where_few_pixels_count(
    temperature: float,
    processors: int,
    expected: list[int],
    parts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "INTERPRETER_PROCESSORS", processors)
    query, positive, label, keys, count, mask = case((70, 4, 60, 19), torch.float32, seed=10)
    keys, count = plain(keys).float(), torch.tensor([60, 60, 50, 60])  # 14 tiles
    mask &= mask.cumsum(0) <= 30  # one tile of the three counts
    options = {"temperature": temperature, "mask": mask, "reduction": "none"}
    compare(query, positive, label, keys, count, options)
    assert parts == expected * 2  # of two losses


@pytest.mark.parametrize(
    ("size", "reduction", "split"),
    [((150, 3, 30, 130), "class", 4), ((150, 3, 30, 130), "none", 4), ((65, 3, 30, 20), "mean", 3)],
    ids=str,
)
def test_several_tiles_of_rows_and_pieces_of_columns(
    size: tuple[int, int, int, int],
    reduction: str,
    split: int,
    parts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "INTERPRETER_PROCESSORS", 9)
    monkeypatch.setattr(tiles, "INTERPRETER_TILE", tiles.Tile(64, 16, 16, 4, 1))
    query, positive, label, keys, count, mask = case(size, torch.float32, seed=11)
    options = {"temperature": 0.1, "mask": mask, "reduction": reduction}
    compare(query, positive, label, keys, count, options)
    assert set(parts) == {split}
    found = len(parts)
    ours = info_nce(query, label, keys, count, backend="triton", **options)
    truth = reference.info_nce(query.double(), label, plain(keys), count, **options)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=1e-5)
    assert len(parts) > found  # without a gradient too


@pytest.mark.parametrize("own", [0, 1])
def test_parts_without_negatives(
    own: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One class holds nearly all keys, and they are the own keys of every pixel."""
    monkeypatch.setattr(tiles, "INTERPRETER_PROCESSORS", 7)
    query, positive, label, keys, count, mask = case((40, 2, 100, 20), torch.float32, seed=12)
    count[1 - own], label[:] = 3, own
    keys = plain(keys).float()
    compare(query, positive, label, keys, count, {"temperature": 0.1, "mask": mask})
    assert set(parts) == {6}


def compare(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor,
    options: dict[str, Any],
) -> None:
    """Check both losses of the one-pass kernel and their gradients against float64."""
    query = query.requires_grad_()
    wide = query.detach().double().requires_grad_()
    ours = info_nce(query, label, keys, count, backend="triton", **options)
    check(ours, reference.info_nce(wide, label, plain(keys), count, **options), query, wide)
    ours = pair_info_nce(query, positive, label, [(keys, count)], backend="triton", **options)
    banks = [(plain(keys), count)]
    truth = reference.pair_info_nce(wide, positive.double(), label, banks, **options)
    check(ours, truth, query, wide)


@pytest.mark.parametrize("processors", [1, 7])
def test_a_key_of_nan_shows_in_the_loss(
    processors: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "INTERPRETER_PROCESSORS", processors)
    query, _, label, keys, _, mask = case((60, 4, 9, 19), torch.float32, seed=9)
    keys = plain(keys).float()
    keys[2, 3, 5] = torch.nan
    query, mask = query.nan_to_num(), mask & (label == 0)
    loss = info_nce(
        query, label, keys, temperature=0.1, mask=mask, reduction="none", backend="triton"
    )
    assert mask.any()
    assert loss[mask].isnan().all()
    assert bool(parts) == (processors > 1)
