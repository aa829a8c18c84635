"""`pair_info_nce`, equation (8): every backend against the reference in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctt.ops import MemoryBank, pair_info_nce
from tests.ops.common import (
    BIG,
    DTYPES,
    Contrast,
    Loss,
    check_loss,
    contrast,
    dense_low_level,
    evaluate,
    examples,
    low_level,
    reference_low_level,
    refuses_other_derivatives,
    runs,
    same_dtype,
    skip_unfit,
)

RUNS = pytest.mark.parametrize(("backend", "device"), runs("pair_info_nce"))
REDUCTIONS = ("class", "mean", "none")
SIZES = (  # N, C, V, D
    (0, 2, 1, 19),
    (1, 2, 1, 19),
    (123, 2, 128, 64),
    (123, 19, 7, 256),
    (123, 150, 1, 19),
)


def check(backend: str, case: Contrast, reduction: str = "class") -> None:
    plain = same_dtype(backend, case, reference_low_level, dense_low_level)
    check_loss(low_level(backend), plain, reference_low_level, case, reduction)


@RUNS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_formula(
    backend: str, device: str, size: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    skip_unfit(backend, device, dtype)
    plain = contrast(*size, dtype, device)
    hard = contrast(*size, dtype, device, partly=True, masked=True, seed=1)
    for reduction in REDUCTIONS:
        check(backend, plain, reduction)
        check(backend, hard, reduction)


@RUNS
def test_at_the_size_of_a_step(backend: str, device: str) -> None:
    skip_unfit(backend, device, torch.float32, pixels=BIG)
    check(backend, contrast(BIG, 19, 8, 64, device=device, partly=True, masked=True))


@RUNS
@settings(max_examples=examples(12))
@given(data=st.data())
def test_any_input(backend: str, device: str, data: st.DataObject) -> None:
    def size(name: str, most: int) -> int:
        return data.draw(st.integers(1, most), name)

    case = contrast(
        data.draw(st.integers(0, 40), "N"),
        size("C", 6),
        size("V", 9),
        data.draw(st.integers(2, 33), "D"),  # in one dimension a cosine has no gradient
        data.draw(st.sampled_from((torch.float32, torch.float64)), "dtype"),
        device,
        partly=data.draw(st.booleans(), "partly"),
        masked=data.draw(st.booleans(), "masked"),
        seed=data.draw(st.integers(0, 1 << 30), "seed"),
    )
    if data.draw(st.booleans(), "one bank"):
        case = replace(case, second=None)
    case = replace(case, temperature=data.draw(st.sampled_from((0.02, 0.1, 0.5, 7)), "temperature"))
    check(backend, case, data.draw(st.sampled_from(REDUCTIONS), "reduction"))


@RUNS
def test_one_three_and_unequal_banks(backend: str, device: str) -> None:
    case = contrast(30, 5, 4, 16, device=device, partly=True)
    check(backend, replace(case, second=None), "none")
    check(backend, replace(case, second=(case.keys[:, :1].nan_to_num(0.1), None)), "none")
    banks = [*case.banks, (case.keys.nan_to_num(0.5).flip(2), None)]

    def value(backend: str, q: torch.Tensor) -> torch.Tensor:
        assert case.positive is not None
        return pair_info_nce(
            q, case.positive.to(q), case.label, banks, temperature=0.2, backend=backend
        )

    expected = value("reference", case.query.double())
    torch.testing.assert_close(value(backend, case.query).double(), expected, rtol=1e-5, atol=0)


@RUNS
def test_a_class_with_an_empty_queue_counts(backend: str, device: str) -> None:
    case = contrast(12, 3, 4, 16, device=device)
    count = torch.tensor([0, 4, 2], device=device)
    case = replace(case, count=count, second=None)
    check(backend, case, "none")
    value, _ = evaluate(low_level(backend), case, "none")
    assert bool((value > 0).all())


@RUNS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["all masked", "all ignored", "no other class holds a key"])
def test_zero_where_no_pixel_counts(backend: str, device: str, kind: str, reduction: str) -> None:
    case = replace(contrast(30, 5, 4, 16, device=device), second=None)
    if kind == "all masked":
        nothing = torch.zeros_like(case.label, dtype=torch.bool)
        case = replace(case, query=torch.full_like(case.query, torch.nan), mask=nothing)
    elif kind == "all ignored":
        case = replace(case, label=torch.full_like(case.label, 255))
    else:
        count = torch.tensor([0, 4, 0, 0, 0], device=device)
        case = replace(case, label=torch.ones_like(case.label), count=count)
    value, grad = evaluate(low_level(backend), case, reduction)
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(grad, torch.zeros_like(grad))


@RUNS
def test_vectors_without_direction(backend: str, device: str) -> None:
    case = contrast(6, 3, 4, 16, device=device)
    assert case.positive is not None
    case.query[0], case.query[1], case.positive[2] = 0, 1e-14, 0
    check(backend, case, "none")
    _, grad = evaluate(low_level(backend), case, "none")
    assert torch.equal(grad[:2], torch.zeros_like(grad[:2]))


@RUNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_feature_maps_without_a_copy(backend: str, device: str, dtype: torch.dtype) -> None:
    case = contrast(60, 5, 6, 32, dtype, device)
    assert case.positive is not None
    strided = replace(
        case,
        query=case.query.T.contiguous().T,
        positive=case.positive.repeat_interleave(2, dim=1)[:, ::2],
    )
    assert not strided.query.is_contiguous()
    check(backend, strided)
    check(backend, strided, "none")


@RUNS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_beyond_the_range_of_float16(backend: str, device: str, dtype: torch.dtype) -> None:
    skip_unfit(backend, device, dtype)
    case = contrast(40, 5, 6, 64, dtype, device)
    assert case.positive is not None

    def long(x: torch.Tensor) -> torch.Tensor:
        return (x / x.abs().amax(dim=1, keepdim=True) * 60000).to(dtype)

    check(backend, replace(case, query=long(case.query), positive=long(case.positive)), "none")


@RUNS
def test_positive_of_another_dtype(backend: str, device: str) -> None:
    case = contrast(20, 5, 6, 32, device=device)
    assert case.positive is not None
    half = case.positive.half()
    value, grad = evaluate(low_level(backend), replace(case, positive=half))
    expected = evaluate(low_level("reference"), replace(case, positive=half.float()))
    torch.testing.assert_close((value, grad), expected, rtol=1e-4, atol=1e-6)


@RUNS
def test_no_gradient_reaches_the_positive(backend: str, device: str) -> None:
    case = contrast(9, 3, 4, 16, device=device)
    assert case.positive is not None
    positive = case.positive.requires_grad_()
    query = case.query.clone().requires_grad_()
    low_level(backend)(query, case, "class").backward()
    assert query.grad is not None
    assert positive.grad is None
    assert not low_level(backend)(case.query, case, "class").requires_grad


@RUNS
def test_a_scaled_loss_keeps_small_gradients_of_float16(backend: str, device: str) -> None:
    """Before the scale of a GradScaler they are below the smallest number of float16."""
    case = contrast(1000, 5, 4, 16, torch.float16, device)
    case = replace(case, query=case.query * 8192, temperature=7)

    def scaled(loss: Loss) -> Loss:
        return lambda q, c, reduction: loss(q, c, reduction) * 2.0**20

    plain = same_dtype(backend, case, scaled(reference_low_level), scaled(dense_low_level))
    check_loss(scaled(low_level(backend)), plain, scaled(reference_low_level), case, "class")
    _, grad = evaluate(low_level(backend), case)
    assert float(grad.abs().max()) < 1e-6  # float16 steps by 6e-8


@RUNS
def test_other_derivatives_are_refused(backend: str, device: str) -> None:
    """They would be 0 without a word."""
    case = contrast(9, 3, 4, 16, device=device)
    refuses_other_derivatives(
        lambda query: low_level(backend)(query, case, "class"), case.query, "pair_info_nce"
    )


def test_errors_name_the_argument() -> None:
    case = contrast(6, 3, 4, 16)
    good = {
        "query": case.query,
        "positive": case.positive,
        "label": case.label,
        "banks": [(case.keys, None)],
        "temperature": 0.1,
    }
    pair_info_nce(**good)
    ones = torch.ones(3, dtype=torch.int64)
    bad = [
        (TypeError, "query", {"query": case.query.long()}),
        (ValueError, "positive", {"positive": case.query[:5]}),
        (TypeError, "positive", {"positive": None}),
        (TypeError, "label", {"label": case.label.int()}),
        (ValueError, "banks", {"banks": []}),
        (TypeError, r"banks must be a list of", {"banks": MemoryBank(3, 5, 16)}),
        (TypeError, r"banks\[0\] must be \(keys, count\)", {"banks": (case.keys, None)}),
        (TypeError, r"banks\[0\] must be \(keys, count\)", {"banks": [MemoryBank(3, 5, 16)]}),
        (ValueError, r"banks\[0\]\[0\]", {"banks": [(case.keys[..., :3], None)]}),
        (ValueError, r"banks\[1\]\[0\]", {"banks": [(case.keys, None), (case.keys[:2], None)]}),
        (ValueError, r"banks\[0\]\[1\]", {"banks": [(case.keys, ones[:2])]}),
        (TypeError, r"banks\[0\]\[1\]", {"banks": [(case.keys, ones.float())]}),
        (TypeError, "mask", {"mask": case.label}),
        (ValueError, "temperature", {"temperature": -1}),
        (ValueError, "reduction", {"reduction": None}),
        (ValueError, "backend", {"backend": "fastest"}),
    ]
    for error, name, change in bad:
        with pytest.raises(error, match=rf"^pair_info_nce: .*{name}"):
            pair_info_nce(**(good | change))
