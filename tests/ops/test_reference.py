"""The reference against numbers worked out here by hand: two classes and three keys."""

import math

import pytest
import torch
from torch import Tensor

from ctt.ops import reference
from tests.ops.common import (
    contrast,
    dense_high_level,
    dense_low_level,
    evaluate,
    reference_high_level,
    reference_low_level,
)

TAU = 0.5
# Class 0 holds a and b, class 1 holds c (its second place holds nothing); the query is (3, 4) / 5.
A, B, C = (1.0, 0.0), (0.0, 1.0), (-0.6, 0.8)
COS_A, COS_B, COS_C = 3 / 5, 4 / 5, (-0.6 * 3 + 0.8 * 4) / 5


def e(cos: float) -> float:
    return math.exp(cos / TAU)


@pytest.fixture
def keys() -> Tensor:
    return torch.tensor([[A, B], [C, (math.nan, math.nan)]], dtype=torch.float64)  # (2, 2, 2)


@pytest.fixture
def count() -> Tensor:
    return torch.tensor([2, 1])


# equation (6), for a pixel of class 0 and for one of class 1, both with the query (3, 4)
HC_0 = (
    -math.log(e(COS_A) / (e(COS_A) + e(COS_C))) - math.log(e(COS_B) / (e(COS_B) + e(COS_C)))
) / 2
HC_1 = -math.log(e(COS_C) / (e(COS_C) + e(COS_A) + e(COS_B)))


def test_high_level_by_hand(keys: Tensor, count: Tensor) -> None:
    query = torch.tensor([[3.0, 4.0], [30.0, 40.0], [3.0, 4.0], [1.0, 1.0]], dtype=torch.float64)
    label = torch.tensor([0, 0, 1, 255])

    def loss(reduction: str, mask: Tensor | None = None) -> Tensor:
        return reference.info_nce(
            query, label, keys, count, temperature=TAU, mask=mask, reduction=reduction
        )

    assert loss("none").tolist() == pytest.approx([HC_0, HC_0, HC_1, 0], rel=1e-12)
    assert float(loss("mean")) == pytest.approx((2 * HC_0 + HC_1) / 3, rel=1e-12)
    assert float(loss("class")) == pytest.approx((HC_0 + HC_1) / 2, rel=1e-12)
    masked = torch.tensor([True, False, False, True])
    assert float(loss("class", masked)) == pytest.approx(HC_0, rel=1e-12)


def test_high_level_gradient_by_hand() -> None:
    """One positive a, one negative c: d loss / d v = w (c - a) / tau with w = 1 - probability."""
    keys = torch.tensor([[A], [C]], dtype=torch.float64)
    query = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    loss = reference.info_nce(query, torch.tensor([0]), keys, temperature=TAU)
    loss.backward()
    w = e(COS_C) / (e(COS_A) + e(COS_C))
    by_direction = [w * (c - a) / TAU for a, c in zip(A, C, strict=True)]
    v = (3 / 5, 4 / 5)
    along = sum(g * x for g, x in zip(by_direction, v, strict=True))
    expected = [(g - along * x) / 5 for g, x in zip(by_direction, v, strict=True)]  # |q| = 5
    assert query.grad is not None
    assert query.grad[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_low_level_by_hand(keys: Tensor, count: Tensor) -> None:
    query = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    positive = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    label = torch.tensor([0, 1])
    first = -math.log(e(COS_B) / (e(COS_B) + e(COS_C)))
    second = -math.log(e(COS_A) / (e(COS_A) + e(COS_A) + e(COS_B)))

    def loss(banks: list[tuple[Tensor, Tensor | None]]) -> list[float]:
        return reference.pair_info_nce(
            query, positive, label, banks, temperature=TAU, reduction="none"
        ).tolist()

    assert loss([(keys, count)]) == pytest.approx([first, second], rel=1e-12)
    # a second bank, whose only key is b, of class 1
    other = torch.tensor([[(0.0, 0.0)], [B]], dtype=torch.float64)
    both = -math.log(e(COS_B) / (e(COS_B) + e(COS_C) + e(COS_B)))
    assert loss([(keys, count), (other, torch.tensor([0, 1]))]) == pytest.approx(
        [both, second], rel=1e-12
    )


def test_no_gradient_reaches_the_positive(keys: Tensor, count: Tensor) -> None:
    query = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    positive = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0])
    reference.pair_info_nce(query, positive, label, [(keys, count)], temperature=TAU).backward()
    assert query.grad is not None
    assert positive.grad is None


def test_a_query_of_norm_zero_by_hand(keys: Tensor, count: Tensor) -> None:
    query = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    loss = reference.info_nce(query, torch.tensor([1]), keys, count, temperature=TAU)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3))  # three scores of 0, one of them positive
    assert query.grad is not None
    assert query.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("reduction", ["class", "mean", "none"])
@pytest.mark.parametrize("loss", [reference_high_level, reference_low_level])
def test_gradient_of_the_reference(loss: object, reduction: str) -> None:
    assert callable(loss)
    case = contrast(7, 3, 2, 5, torch.float64, partly=True)
    query = case.query.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: loss(q, case.widened(), reduction), query)


@pytest.mark.parametrize("reduction", ["class", "mean", "none"])
def test_the_dense_formulas_are_the_same(reduction: str) -> None:
    case = contrast(60, 5, 4, 19, torch.float64, partly=True, masked=True).widened()
    for fixed_shape, truth in (
        (dense_high_level, reference_high_level),
        (dense_low_level, reference_low_level),
    ):
        for got, want in zip(
            evaluate(fixed_shape, case, reduction), evaluate(truth, case, reduction), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_banks_without_places_give_nothing() -> None:
    query = torch.randn(5, 2, requires_grad=True)
    label = torch.zeros(5, dtype=torch.int64)
    loss = reference.info_nce(query, label, torch.empty(3, 0, 2), temperature=0.1)
    assert float(loss) == 0


def test_selection_by_hand() -> None:
    confidence = torch.tensor([0.5, 0.9, 0.9, math.nan, 0.1, 1.0])
    label = torch.tensor([0, 1, 1, 0, 0, 255])
    index, count = reference.class_topk(confidence, label, 2, 3)
    assert index.tolist() == [[0, 4], [1, 2], [-1, -1]]
    assert count.tolist() == [2, 2, 0]


def test_push_by_hand() -> None:
    keys, count, cursor = torch.zeros(1, 2, 2), torch.tensor([1]), torch.tensor([1])
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-5.0, 0.0]])
    reference.queue_push_(keys, count, cursor, features, torch.tensor([[0, -1, 1, 2]]))
    assert keys[0].flatten().tolist() == pytest.approx([0, 1, -1, 0])  # (3, 4) was pushed out
    assert (count.tolist(), cursor.tolist()) == ([2], [0])


def test_average_by_hand() -> None:
    teacher = [torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.bfloat16)]
    reference.ema_update_(teacher, [torch.tensor([3.0]), torch.tensor([4.0])], 0.75)
    assert [float(t) for t in teacher] == [1.5, 2.5]
