"""Temperatures of the two losses: kinds of scalars, tensors, and their gradient."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tests.ops.common import (
    Contrast,
    contrast,
    high_level,
    low_level,
    reference_high_level,
    reference_low_level,
    runs,
    skip_unfit,
)

RUNS = pytest.mark.parametrize(("backend", "device"), runs("info_nce"))
LOSSES = pytest.mark.parametrize(
    ("loss", "truth"),
    [(high_level, reference_high_level), (low_level, reference_low_level)],
    ids=["info_nce", "pair_info_nce"],
)
Loss = Callable[[Tensor, Contrast, str], Tensor]


def gradients(loss: Loss, case: Contrast, tau: Tensor, reduction: str) -> tuple[Tensor, ...]:
    """Value, and gradients of a weighted sum by the query and the temperature."""
    query = case.query.detach().requires_grad_()
    value = loss(query, replace(case, temperature=tau), reduction)  # type: ignore[arg-type]
    weight = torch.linspace(1, 2, value.numel(), device=value.device).view_as(value)
    by_query, by_tau = torch.autograd.grad((weight.to(value) * value).sum(), (query, tau))
    return value.detach(), by_query, by_tau


@RUNS
@LOSSES
@pytest.mark.parametrize("reduction", ["class", "mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_gradient_by_the_temperature(
    backend: str,
    device: str,
    loss: Callable[[str], Loss],
    truth: Loss,
    reduction: str,
    dtype: torch.dtype,
) -> None:
    skip_unfit(backend, device, dtype)
    case = contrast(60, 5, 4, 19, dtype, device, partly=True, masked=True)
    tau = torch.nn.Parameter(torch.tensor([0.2], device=device))
    want = gradients(truth, case.widened(), tau.detach().double().requires_grad_(), reduction)
    got = gradients(loss(backend), case, tau, reduction)
    assert got[2].shape == (1,)
    tolerance = 2e-3 if dtype == torch.float16 else 2e-5 if backend != "triton" else 1e-4
    for have, expected in zip(got, want, strict=True):
        torch.testing.assert_close(have.double(), expected, rtol=tolerance, atol=tolerance)


@LOSSES
def test_the_temperature_alone_takes_a_gradient(loss: Callable[[str], Loss], truth: Loss) -> None:
    case = contrast(30, 4, 3, 8, torch.float64).widened()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for backend in ("auto", "torch", "reference"):
        values = [
            torch.autograd.grad(f(case.query, replace(case, temperature=tau), "class"), tau)  # type: ignore[arg-type]
            for f in (loss(backend), truth)
        ]
        torch.testing.assert_close(*values)


@LOSSES
@pytest.mark.parametrize(
    "kind",
    [numpy.float32, numpy.float64, numpy.array, Fraction, torch.tensor, int],
    ids=lambda k: k.__name__,
)
def test_other_kinds_of_scalar(loss: Callable[[str], Loss], truth: Loss, kind: Any) -> None:
    case = contrast(30, 4, 3, 8)
    value = kind(1) if kind is int else kind(0.25)
    got = loss("auto")(case.query, replace(case, temperature=value), "class")
    want = loss("auto")(case.query, replace(case, temperature=float(value)), "class")
    assert torch.equal(got, want)


@LOSSES
def test_a_temperature_that_is_none(loss: Callable[[str], Loss], truth: Loss) -> None:
    case = contrast(5, 3, 2, 4)
    for bad, error, words in (
        ("0.5", TypeError, "temperature must be a number"),
        (None, TypeError, "temperature must be a number"),
        (0, ValueError, "temperature must be a finite number above 0"),
        (float("nan"), ValueError, "temperature must be a finite number above 0"),
        (torch.zeros(1, requires_grad=True), ValueError, "must be a finite number above 0"),
        (torch.ones(2, requires_grad=True), ValueError, "tensor of one value"),
        (
            torch.ones(1, device="meta", requires_grad=True),
            ValueError,
            "temperature must be on cpu",
        ),
    ):
        with pytest.raises(error, match=words):
            loss("auto")(case.query, replace(case, temperature=bad), "class")  # type: ignore[arg-type]


@LOSSES
def test_learned_under_compile(loss: Callable[[str], Loss], truth: Loss) -> None:
    torch._dynamo.reset()
    case = contrast(30, 4, 3, 8, partly=True, masked=True)
    tau = torch.nn.Parameter(torch.tensor(0.3))
    compiled = torch.compile(loss("auto"), fullgraph=True, backend="aot_eager")
    eager = gradients(loss("auto"), case, tau, "class")
    for got, want in zip(gradients(compiled, case, tau, "class"), eager, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@LOSSES
def test_under_torch_func(loss: Callable[[str], Loss], truth: Loss) -> None:
    case = contrast(20, 4, 3, 8, torch.float64, masked=True).widened()
    run = loss("auto")
    tau = torch.tensor(0.3, dtype=torch.float64)
    want = gradients(truth, case, tau.clone().requires_grad_(), "class")

    def value(query: Tensor, tau: Tensor) -> Tensor:
        return run(query, replace(case, temperature=tau), "class")  # type: ignore[arg-type]

    by_query, by_tau = torch.func.grad(value, argnums=(0, 1))(case.query, tau)
    torch.testing.assert_close(by_query, want[1])
    torch.testing.assert_close(by_tau, want[2])
    queries = torch.stack([case.query, case.query.flip(1), 2 * case.query])
    batched = torch.func.vmap(value, in_dims=(0, None))(queries, tau)
    torch.testing.assert_close(batched, torch.stack([value(q, tau) for q in queries]))
    per_sample = torch.func.vmap(torch.func.grad(value), in_dims=(0, None))(queries, tau)
    torch.testing.assert_close(
        per_sample, torch.stack([torch.func.grad(value)(q, tau) for q in queries])
    )
    (joined,) = torch.autograd.grad(
        torch.func.vmap(value, in_dims=(0, None))(queries.requires_grad_(), tau).sum(), queries
    )
    torch.testing.assert_close(joined, per_sample)
