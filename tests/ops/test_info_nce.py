"""`info_nce`, equation (6): every backend against the reference in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctt.ops import info_nce
from tests.ops.common import (
    BIG,
    DTYPES,
    Contrast,
    Loss,
    check_loss,
    contrast,
    dense_high_level,
    evaluate,
    examples,
    high_level,
    reference_high_level,
    refuses_other_derivatives,
    runs,
    same_dtype,
    skip_unfit,
)

RUNS = pytest.mark.parametrize(("backend", "device"), runs("info_nce"))
REDUCTIONS = ("class", "mean", "none")
SIZES = (  # N, C, V, D
    (0, 2, 1, 19),
    (1, 2, 1, 19),
    (123, 2, 128, 64),
    (123, 19, 7, 64),
    (123, 21, 7, 256),
    (123, 150, 1, 19),
)


def check(backend: str, case: Contrast, reduction: str = "class") -> None:
    plain = same_dtype(backend, case, reference_high_level, dense_high_level)
    check_loss(high_level(backend), plain, reference_high_level, case, reduction)


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
    check(backend, contrast(BIG, 19, 16, 64, device=device, partly=True, masked=True))


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
    case = replace(case, temperature=data.draw(st.sampled_from((0.02, 0.1, 0.5, 7)), "temperature"))
    check(backend, case, data.draw(st.sampled_from(REDUCTIONS), "reduction"))


def nothing_counts(case: Contrast, kind: str) -> Contrast:
    if kind == "all masked":
        return replace(
            case,
            query=torch.full_like(case.query, torch.nan),
            mask=torch.zeros_like(case.label, dtype=torch.bool),
        )
    if kind == "all ignored":
        return replace(case, label=torch.full_like(case.label, 255))
    held = 0 if kind == "all queues empty" else case.keys.shape[1]
    count = torch.zeros(case.keys.shape[0], dtype=torch.int64, device=case.keys.device)
    count[1] = held
    return replace(case, count=count)


@RUNS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "kind", ["all masked", "all ignored", "all queues empty", "one queue filled"]
)
def test_zero_where_no_pixel_counts(backend: str, device: str, kind: str, reduction: str) -> None:
    case = nothing_counts(contrast(30, 5, 4, 16, device=device), kind)
    value, grad = evaluate(high_level(backend), case, reduction)
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(grad, torch.zeros_like(grad))


@RUNS
def test_a_bank_of_one_class_has_no_negatives(backend: str, device: str) -> None:
    value, grad = evaluate(high_level(backend), contrast(9, 1, 4, 16, device=device))
    assert float(value) == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@RUNS
def test_a_query_without_direction_takes_no_gradient(backend: str, device: str) -> None:
    case = contrast(6, 3, 4, 16, device=device)
    case.query[0], case.query[1] = 0, 1e-14
    check(backend, case, "none")
    _, grad = evaluate(high_level(backend), case, "none")
    assert torch.equal(grad[:2], torch.zeros_like(grad[:2]))
    assert bool((grad[2:] != 0).any(dim=1).all())


@RUNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_feature_map_without_a_copy(backend: str, device: str, dtype: torch.dtype) -> None:
    """(D, h, w) seen as (h * w, D), every second pixel of it, and keys in another order."""
    case = contrast(60, 5, 6, 32, dtype, device)
    maps = torch.full((32, 120), torch.nan, dtype=dtype, device=device)
    maps[:, ::2] = case.query.T
    labels = torch.full((120,), 255, device=device)
    labels[::2] = case.label
    keys = case.keys.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided = replace(case, query=maps.T[::2], label=labels[::2], keys=keys)
    assert not strided.query.is_contiguous()
    check(backend, strided)
    check(backend, strided, "none")


@RUNS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_norms_beyond_the_range_of_float16(backend: str, device: str, dtype: torch.dtype) -> None:
    skip_unfit(backend, device, dtype)
    case = contrast(40, 5, 6, 64, dtype, device)
    query = (case.query / case.query.abs().amax(dim=1, keepdim=True) * 60000).to(dtype)
    assert bool((query.float().norm(dim=1) > 65504).any())
    # a gradient of 1 / 60000 falls below the range of float16 unless it is summed
    check(backend, replace(case, query=query), "none")


@RUNS
def test_bank_in_half_precision(backend: str, device: str) -> None:
    case = contrast(40, 5, 6, 64, torch.float16, device, partly=True)
    check(backend, replace(case, keys=case.keys.half()))


@RUNS
def test_low_temperature_stays_finite(backend: str, device: str) -> None:
    case = replace(contrast(40, 5, 6, 32, device=device), temperature=0.005)
    case.query[::2] *= -1  # as far from the positives as can be
    check(backend, case, "none")


@RUNS
def test_a_loss_that_vanishes_has_no_gradient(backend: str, device: str) -> None:
    """Positives equal to the query, many negatives opposite to it: e^(-200) in float32."""
    keys = torch.zeros(4, 32, 8, device=device)
    keys[0, :, 0], keys[1:, :, 0] = 1, -1
    query = torch.zeros(3, 8, device=device)
    query[:, 0] = 2
    label = torch.zeros(3, dtype=torch.int64, device=device)
    value, grad = evaluate(high_level(backend), Contrast(query, label, keys, temperature=0.01))
    assert float(value) == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@RUNS
@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 0.01), (torch.float64, 0.001)])
def test_gradients_shortly_before_they_vanish(
    backend: str, device: str, dtype: torch.dtype, temperature: float
) -> None:
    """Slopes from e^-60 (e^-680 in float64) down to 0: a quotient by their sum may overflow."""
    wins = torch.linspace(60, 95, 71, dtype=dtype, device=device)
    cosine = (wins + (620 if dtype == torch.float64 else 0)) * temperature
    query = torch.zeros(len(cosine), 4, dtype=dtype, device=device)
    query[:, 0], query[:, 1] = cosine, (1 - cosine**2).sqrt()
    keys = torch.zeros(2, 64, 4, dtype=dtype, device=device)
    keys[0, :, 0], keys[1, :, 2] = 1, 1
    label = torch.zeros(len(cosine), dtype=torch.int64, device=device)
    count = torch.tensor([1, 64], device=device)
    case = Contrast(query, label, keys, count, temperature=temperature)
    skip_unfit(backend, device, dtype)
    value, grad = evaluate(high_level(backend), case)
    assert float(value) < 1e-20
    assert grad.abs().max() < 1e-15  # false for NaN, too


@RUNS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_chain_rule(backend: str, device: str, reduction: str) -> None:
    case = contrast(30, 5, 4, 16, device=device, masked=True)
    query = case.query.clone().requires_grad_()
    value = high_level(backend)(query, case, reduction)
    weight = torch.randn(value.shape, device=device)
    (value * weight).sum().backward()
    _, grad = evaluate(high_level(backend), case, reduction)
    expected = grad * (weight[:, None] if weight.dim() else weight)
    torch.testing.assert_close(query.grad, expected)


@RUNS
def test_no_gradient_is_made_unasked(backend: str, device: str) -> None:
    case = contrast(9, 3, 4, 16, device=device)
    keys = case.keys.requires_grad_()
    assert not high_level(backend)(case.query, case, "class").requires_grad
    query = case.query.clone().requires_grad_()
    with torch.no_grad():
        assert not high_level(backend)(query, case, "class").requires_grad
    value = high_level(backend)(query, case, "class")
    with_gradient, without = value.detach(), high_level(backend)(case.query, case, "class")
    torch.testing.assert_close(with_gradient, without.detach())
    value.backward()
    assert keys.grad is None


@RUNS
def test_inputs_are_left_alone(backend: str, device: str) -> None:
    case = contrast(20, 3, 4, 16, device=device, partly=True, masked=True)
    assert case.count is not None
    assert case.mask is not None
    parts = (case.query, case.label, case.keys, case.count, case.mask)
    before = [x.clone() for x in parts]
    evaluate(high_level(backend), case)
    for x, was in zip(parts, before, strict=True):
        torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)


@RUNS
def test_a_scaled_loss_keeps_small_gradients_of_float16(backend: str, device: str) -> None:
    """Before the scale of a GradScaler they are below the smallest number of float16."""
    case = contrast(1000, 5, 4, 16, torch.float16, device)
    case = replace(case, query=case.query * 8192, temperature=7)

    def scaled(loss: Loss) -> Loss:
        return lambda q, c, reduction: loss(q, c, reduction) * 2.0**20

    plain = same_dtype(backend, case, scaled(reference_high_level), scaled(dense_high_level))
    check_loss(scaled(high_level(backend)), plain, scaled(reference_high_level), case, "class")
    _, grad = evaluate(high_level(backend), case)
    assert float(grad.abs().max()) < 1e-6  # float16 steps by 6e-8


@RUNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_may_run_again(backend: str, device: str, dtype: torch.dtype) -> None:
    case = contrast(9, 3, 4, 16, dtype, device)
    query = case.query.clone().requires_grad_()
    loss = 8 * high_level(backend)(query, case, "class")
    first, second, last = (
        torch.autograd.grad(loss, query, retain_graph=again)[0].clone()
        for again in (True, True, False)
    )
    assert first.any()
    assert torch.equal(first, second)
    assert torch.equal(first, last)


@RUNS
def test_other_derivatives_are_refused(backend: str, device: str) -> None:
    """They would be 0 without a word."""
    case = contrast(9, 3, 4, 16, device=device)
    refuses_other_derivatives(
        lambda query: high_level(backend)(query, case, "class"), case.query, "info_nce"
    )


def test_errors_name_the_argument() -> None:
    case = contrast(6, 3, 4, 16)
    good = {"query": case.query, "label": case.label, "keys": case.keys, "temperature": 0.1}
    info_nce(**good)
    meta = torch.empty(6, dtype=torch.int64, device="meta")
    bad = [
        (TypeError, "query", {"query": [1.0]}),
        (TypeError, "query", {"query": case.label[:, None]}),
        (ValueError, "query", {"query": case.query[0]}),
        (ValueError, "query", {"query": case.query[:, :0], "keys": case.keys[..., :0]}),
        (TypeError, "label", {"label": case.label.int()}),
        (TypeError, "label", {"label": case.label.float()}),
        (ValueError, "label", {"label": case.label[:5]}),
        (ValueError, "label", {"label": meta}),
        (TypeError, "keys", {"keys": case.keys.long()}),
        (ValueError, "keys", {"keys": case.keys[..., :15]}),
        (ValueError, "keys", {"keys": case.keys.flatten(0, 1)}),
        (TypeError, "count", {"count": torch.ones(3)}),
        (ValueError, "count", {"count": torch.ones(4, dtype=torch.int64)}),
        (TypeError, "mask", {"mask": torch.ones(6)}),
        (ValueError, "mask", {"mask": torch.ones(5, dtype=torch.bool)}),
        (ValueError, "temperature", {"temperature": 0}),
        (ValueError, "temperature", {"temperature": -0.1}),
        (ValueError, "temperature", {"temperature": float("nan")}),
        (TypeError, "temperature", {"temperature": "warm"}),
        (ValueError, "reduction", {"reduction": "sum"}),
        (ValueError, "backend", {"backend": "fastest"}),
    ]
    for error, name, change in bad:
        with pytest.raises(error, match=rf"^info_nce: .*{name}"):
            info_nce(**(good | change))
