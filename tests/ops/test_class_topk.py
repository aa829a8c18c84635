"""`class_topk`: every backend gives exactly what the reference gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctt.ops import class_topk, reference
from tests.ops.common import BIG, DTYPES, IGNORED, examples, runs, skip_unfit

RUNS = pytest.mark.parametrize(("backend", "device"), runs("class_topk"))


def check(
    backend: str,
    confidence: Tensor,
    label: Tensor,
    k: int,
    num_classes: int,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    got = class_topk(confidence, label, k, num_classes, valid=valid, backend=backend)
    expected = reference.class_topk(confidence, label, k, num_classes, valid)
    for have, want in zip(got, expected, strict=True):
        assert have.dtype == torch.int64
        assert torch.equal(have, want)
    return got


def pixels(n: int, num_classes: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Confidences with many ties, labels of which some have no class, and a mask."""
    g = torch.Generator().manual_seed(seed)
    confidence = torch.randn(n, generator=g).mul(8).round().div(8)
    label = torch.randint(0, num_classes, (n,), generator=g)
    ignored = torch.rand(n, generator=g) < 0.2
    label[ignored] = torch.tensor(IGNORED)[torch.arange(int(ignored.sum())) % len(IGNORED)]
    valid = torch.rand(n, generator=g) < 0.8
    confidence[torch.rand(n, generator=g) < 0.05] = torch.nan
    return confidence.to(device), label.to(device), valid.to(device)


@RUNS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 19, 21, 150])
@pytest.mark.parametrize("n", [0, 1, 123])
def test_equals_the_loop(
    backend: str, device: str, n: int, num_classes: int, dtype: torch.dtype
) -> None:
    skip_unfit(backend, device, dtype)
    confidence, label, valid = pixels(n, num_classes, device)
    for k in (1, 5, 200):
        check(backend, confidence.to(dtype), label, k, num_classes)
        check(backend, confidence.to(dtype), label, k, num_classes, valid)


@RUNS
@pytest.mark.parametrize("k", [1, 256])
def test_at_the_size_of_a_step(backend: str, device: str, k: int) -> None:
    skip_unfit(backend, device, torch.float32, pixels=BIG)
    confidence, label, valid = pixels(BIG, 19, device)
    check(backend, confidence, label, k, 19, valid)
    check(backend, torch.rand(BIG, device=device), label.clamp(0, 1), k, 19)  # two large classes


@RUNS
@settings(max_examples=examples(30))
@given(data=st.data())
def test_any_input(backend: str, device: str, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from((16, 32, 64)), "width")
    dtype = {16: torch.float16, 32: torch.float32, 64: torch.float64}[width]
    values = data.draw(st.lists(st.floats(width=width), max_size=40), "confidence")
    num_classes = data.draw(st.integers(1, 5), "C")
    labels = st.sampled_from((*range(num_classes), 0, *IGNORED))
    label = [data.draw(labels) for _ in values]
    valid = None
    if data.draw(st.booleans(), "masked"):
        mask = [data.draw(st.booleans()) for _ in values]
        valid = torch.tensor(mask, dtype=torch.bool, device=device)
    check(
        backend,
        torch.tensor(values, dtype=dtype, device=device),
        torch.tensor(label, dtype=torch.int64, device=device),
        data.draw(st.integers(1, 12), "k"),
        num_classes,
        valid,
    )


@RUNS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_special_values(backend: str, device: str, dtype: torch.dtype) -> None:
    skip_unfit(backend, device, dtype)
    inf, nan = torch.inf, torch.nan
    values = [-0.0, 0.0, -inf, nan, inf, -1.0, 0.0, -0.0, inf, 1.0, -nan, -inf, -1.0]
    confidence = torch.tensor(values, dtype=dtype, device=device)
    index, count = check(
        backend, confidence, torch.zeros(13, dtype=torch.int64, device=device), 13, 1
    )
    assert index[0].tolist() == [4, 8, 9, 0, 1, 6, 7, 5, 12, 2, 11, -1, -1]
    assert count.tolist() == [11]


@RUNS
def test_ties_go_to_the_lower_index(backend: str, device: str) -> None:
    label = torch.arange(600, device=device) % 3
    index, _ = check(backend, torch.full((600,), 0.5, device=device), label, 4, 3)
    assert index.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


@RUNS
def test_float64_beyond_float32(backend: str, device: str) -> None:
    """Values that are equal in float32, beyond its range and below it."""
    steps = torch.arange(50, dtype=torch.float64, device=device)
    label = torch.zeros(50, dtype=torch.int64, device=device)
    for confidence in (1 + steps * 1e-14, 1e300 * (1 + steps * 1e-14), 1e-300 * (1 + steps)):
        index, _ = check(backend, confidence, label, 5, 1)
        assert index.tolist() == [[49, 48, 47, 46, 45]]
        check(backend, -confidence, label, 5, 1)


@RUNS
def test_nothing_to_choose(backend: str, device: str) -> None:
    confidence = torch.full((20,), torch.nan, device=device)
    label = torch.zeros(20, dtype=torch.int64, device=device)
    for c, y in ((confidence, label), (confidence.nan_to_num(), label + 255)):
        index, count = check(backend, c, y, 3, 2)
        assert index.tolist() == [[-1] * 3] * 2
        assert count.tolist() == [0, 0]
    check(backend, confidence.nan_to_num(), label, 3, 2, torch.zeros_like(label, dtype=torch.bool))


@RUNS
def test_strided_inputs(backend: str, device: str) -> None:
    confidence, label, valid = pixels(240, 5, device)
    check(backend, confidence.view(20, 12).T[3], label[::2][:20], 4, 5, valid[1::3][:20])
    check(backend, confidence[:1].expand(240), label, 4, 5, valid[:1].expand(240))


@RUNS
def test_no_gradient_flows(backend: str, device: str) -> None:
    confidence, label, _ = pixels(20, 3, device)
    index, _ = class_topk(confidence.requires_grad_(), label, 2, 3, backend=backend)
    assert not index.requires_grad


def test_errors_name_the_argument() -> None:
    good = {
        "confidence": torch.rand(6),
        "label": torch.zeros(6, dtype=torch.int64),
        "k": 2,
        "num_classes": 3,
    }
    class_topk(**good)
    bad = [
        (TypeError, "confidence", {"confidence": good["label"]}),
        (ValueError, "confidence", {"confidence": torch.rand(5)}),
        (ValueError, "confidence", {"confidence": torch.rand(6, device="meta")}),
        (TypeError, "label", {"label": good["label"].int()}),
        (ValueError, "label", {"label": good["label"][:, None]}),
        (TypeError, "valid", {"valid": torch.ones(6)}),
        (ValueError, "valid", {"valid": torch.ones(7, dtype=torch.bool)}),
        (ValueError, "k", {"k": 0}),
        (ValueError, "k", {"k": -1}),
        (TypeError, "k", {"k": 2.0}),
        (TypeError, "k", {"k": True}),
        (ValueError, "num_classes", {"num_classes": 0}),
        (ValueError, "backend", {"backend": "fastest"}),
    ]
    for error, name, change in bad:
        with pytest.raises(error, match=rf"^class_topk: {name} "):
            class_topk(**(good | change))
