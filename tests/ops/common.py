"""Makers of inputs and the rule of tolerance, shared by the tests of the operations."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from benchmarks import dense
from ctt.ops import info_nce, pair_info_nce, reference
from ctt.ops._registry import BACKENDS, why_not

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IGNORED = (-1, 255, -100, 1 << 40)  # labels without a class
TEMPERATURE = 0.1
BIG = 8580  # the pixels of one step at the paper's Cityscapes size


def runs(operation: str) -> list[object]:
    """Every backend on the CPU and on a GPU; what cannot run is skipped with its reason."""
    cpu = [pytest.param(b, "cpu", marks=_unfit(operation, b, "cpu")) for b in BACKENDS]
    if not torch.cuda.is_available():
        return [*cpu, pytest.param("auto", "cuda", marks=pytest.mark.skip("no CUDA device"))]
    return cpu + [
        pytest.param(b, "cuda", marks=[pytest.mark.gpu, *_unfit(operation, b, "cuda")])
        for b in BACKENDS
    ]


def _unfit(operation: str, backend: str, device: str) -> list[pytest.MarkDecorator]:
    reason = why_not(operation, backend, torch.device(device))
    return [] if reason is None else [pytest.mark.skip(f"{backend} on {device}: {reason}")]


def skip_unfit(backend: str, device: str, dtype: torch.dtype, pixels: int = 0) -> None:
    """Triton's interpreter rounds bfloat16 wrongly and takes minutes over a large input."""
    interpreted = backend in ("triton", "chunked") and device == "cpu"
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not round bfloat16")
    if interpreted and pixels > 1000:
        pytest.skip("too large for Triton's interpreter")


@dataclass(frozen=True)
class Contrast:
    """Arguments of `info_nce` and `pair_info_nce`."""

    query: Tensor  # (N, D)
    label: Tensor  # (N,)
    keys: Tensor  # (C, V, D)
    count: Tensor | None = None  # (C,)
    mask: Tensor | None = None  # (N,)
    positive: Tensor | None = None  # (N, D)
    second: tuple[Tensor, Tensor | None] | None = None  # another bank, (C, V2, D) and (C,)
    temperature: float = TEMPERATURE

    @property
    def banks(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(self.keys, self.count), *([] if self.second is None else [self.second])]

    def widened(self) -> "Contrast":
        def wide(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.double()

        second = None if self.second is None else (self.second[0].double(), self.second[1])
        return replace(
            self,
            query=self.query.double(),
            keys=self.keys.double(),
            positive=wide(self.positive),
            second=second,
        )


def contrast(
    pixels: int,
    classes: int,
    capacity: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    partly: bool = False,
    masked: bool = False,
    seed: int = 0,
) -> Contrast:
    """Pixels and keys that scatter about a centre for each class.

    partly: queues hold 0..V keys, and NaN where they hold none. masked: a third of the pixels is
    masked and holds NaN or inf, and some labels have no class.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def bank(width: int) -> tuple[Tensor, Tensor | None]:
        keys = F.normalize(centre[:, None] + normal(classes, width, dim) / dim**0.5, dim=-1)
        if not partly:
            return keys.to(device), None
        count = torch.randint(0, width + 1, (classes,), generator=g)
        count[:2] = torch.tensor([width, (width + 1) // 2])[:classes]
        keys[torch.arange(width) >= count[:, None]] = torch.nan
        return keys.to(device), count.to(device)

    centre = F.normalize(normal(classes, dim), dim=1)
    label = torch.randint(0, classes, (pixels,), generator=g)
    length = normal(pixels, 1).mul(0.5).exp()
    query = (centre[label] + normal(pixels, dim) / dim**0.5) * length
    positive = (centre[label] + normal(pixels, dim) / dim**0.5) * length.flip(0)
    mask = None
    if masked:
        mask = torch.rand(pixels, generator=g) > 1 / 3
        query[~mask], positive[~mask] = torch.nan, torch.inf
        ignored = torch.rand(pixels, generator=g) < 0.1
        label[ignored] = torch.tensor(IGNORED)[torch.arange(int(ignored.sum())) % len(IGNORED)]
        query[ignored] = -torch.inf
        mask = mask.to(device)
    keys, count = bank(capacity)
    return Contrast(
        query=query.to(device, dtype),
        label=label.to(device),
        keys=keys,
        count=count,
        mask=mask,
        positive=positive.to(device, dtype),
        second=bank(capacity + 1),
    )


Loss = Callable[[Tensor, Contrast, str], Tensor]


def high_level(backend: str) -> Loss:
    """`info_nce` of `backend` as a function of (query, case, reduction)."""
    return lambda q, case, reduction: info_nce(
        q,
        case.label,
        case.keys,
        case.count,
        temperature=case.temperature,
        mask=case.mask,
        reduction=reduction,
        backend=backend,
    )


def low_level(backend: str) -> Loss:
    """`pair_info_nce` of `backend` as a function of (query, case, reduction)."""

    def loss(q: Tensor, case: Contrast, reduction: str) -> Tensor:
        assert case.positive is not None
        return pair_info_nce(
            q,
            case.positive,
            case.label,
            case.banks,
            temperature=case.temperature,
            mask=case.mask,
            reduction=reduction,
            backend=backend,
        )

    return loss


def dense_high_level(q: Tensor, case: Contrast, reduction: str) -> Tensor:
    return dense.info_nce(
        q,
        case.label,
        case.keys,
        case.count,
        temperature=case.temperature,
        mask=case.mask,
        reduction=reduction,
    )


def dense_low_level(q: Tensor, case: Contrast, reduction: str) -> Tensor:
    assert case.positive is not None
    return dense.pair_info_nce(
        q,
        case.positive,
        case.label,
        case.banks,
        temperature=case.temperature,
        mask=case.mask,
        reduction=reduction,
    )


def evaluate(loss: Loss, case: Contrast, reduction: str = "class") -> tuple[Tensor, Tensor]:
    """Value, and gradient of its sum by the query."""
    query = case.query.detach().requires_grad_()
    value = loss(query, case, reduction)
    (grad,) = torch.autograd.grad(value.sum(), query)
    return value.detach(), grad


def check_loss(fast: Loss, plain: Loss, truth: Loss, case: Contrast, reduction: str) -> None:
    """Value and gradient of `fast` against `truth` in float64, by the errors of `plain`."""
    value, grad = evaluate(fast, case, reduction)
    plain_value, plain_grad = evaluate(plain, case, reduction)
    true_value, true_grad = evaluate(truth, case.widened(), reduction)
    wide = torch.float64 if case.query.dtype == torch.float64 else torch.float32
    assert value.dtype == wide
    assert grad.dtype == case.query.dtype
    slack = 0.0
    if case.query.dtype in (torch.float16, torch.bfloat16) and value.numel():
        # rounding keys and queries moves a loss by this much, by which the plain formula may be
        # closer by luck
        size = max(1.0, float(true_value.abs().max()))
        slack = torch.finfo(case.query.dtype).eps / 2 * size
    assert_accurate(value, true_value, plain_value, 2, slack)
    assert_accurate(grad, true_grad, plain_grad, 3)


def assert_accurate(
    got: Tensor, truth: Tensor, plain: Tensor, factor: float, slack: float = 0.0
) -> None:
    """The largest error of `got` is at most `factor` times that of `plain`, the formula written in
    plain PyTorch in the same dtype, plus a few roundings and `slack`."""
    assert got.shape == truth.shape
    assert bool(got.isfinite().all()), "a result is NaN or inf"
    if truth.numel() == 0:
        return
    info = torch.finfo(got.dtype)
    floor = 16 * info.eps * float(truth.abs().max()) + info.smallest_normal
    limit = factor * _error(plain, truth) + floor + slack
    assert _error(got, truth) <= limit, f"error {_error(got, truth):.3g}, allowed {limit:.3g}"


def _error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).abs().max())


def same_dtype(backend: str, case: Contrast, plain: Loss, half: Loss) -> Loss:
    """The plain formula that `backend` is measured by.

    Tensor cores take half-precision inputs, and of float32 what tf32 keeps; a backend made for them
    may round as plain PyTorch on the same units does.
    """
    if case.query.dtype in (torch.float16, torch.bfloat16):
        return half
    if backend in ("triton", "cuda") and case.query.is_cuda and case.query.dtype == torch.float32:
        return _with_tensor_cores(plain)
    return plain


def _with_tensor_cores(loss: Loss) -> Loss:
    def run(q: Tensor, case: Contrast, reduction: str) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return loss(q, case, reduction)
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def reference_high_level(q: Tensor, case: Contrast, reduction: str) -> Tensor:
    return reference.info_nce(
        q,
        case.label,
        case.keys,
        case.count,
        temperature=case.temperature,
        mask=case.mask,
        reduction=reduction,
    )


def reference_low_level(q: Tensor, case: Contrast, reduction: str) -> Tensor:
    assert case.positive is not None
    return reference.pair_info_nce(
        q,
        case.positive,
        case.label,
        case.banks,
        temperature=case.temperature,
        mask=case.mask,
        reduction=reduction,
    )


def examples(most: int) -> int:
    """Hypothesis examples of a property; more with CTT_TEST_EXAMPLES=factor in the environment."""
    return most * int(os.environ.get("CTT_TEST_EXAMPLES", "1"))


def refuses_other_derivatives(loss: Callable[[Tensor], Tensor], query: Tensor, name: str) -> None:
    """Check that a loss refuses second derivatives and forward mode."""

    def penalty(query: Tensor) -> Tensor:
        return torch.func.grad(loss)(query).square().sum()

    refused = pytest.raises(RuntimeError, match=rf"^{name} has no second derivatives")
    leaf = query.clone().requires_grad_()
    with refused:
        torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    for transform in (torch.func.grad(penalty), torch.func.jacrev(torch.func.jacrev(loss))):
        with refused:
            transform(query)
    with refused:
        torch.func.jvp(loss, (query,), (query,))
    with forward_ad.dual_level(), refused:
        loss(forward_ad.make_dual(query, query))
