"""The launchers on a GPU: what neither interpreter nor ahead-of-time compilation can show."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.ops import class_topk, ema_update_, info_nce, pair_info_nce, queue_push_, reference
from ctt.ops._registry import why_not

DEVICE = torch.device("cuda")


def _reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return why_not("info_nce", "triton", torch.device("cuda", 0))


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason() is not None, reason=str(_reason()))]

# relative to the largest value: loss, gradient
TOLERANCE = {
    torch.bfloat16: (2e-3, 1e-2),
    torch.float16: (5e-4, 2e-3),
    torch.float32: (1e-3, 4e-3),
}
SCALE = 1024  # of a loss: the gradient of a mean over many pixels is below what float16 resolves
SIZES = [(123, 5, 7, 19), (8580, 19, 128, 256), (1000, 150, 11, 64), (700, 21, 128, 128)]
WIDE = [(500, 21, 30, 300), (3000, 19, 128, 600)]  # the one-pass kernel leaves them to chunks
BACKENDS = pytest.mark.parametrize(
    ("backend", "size"),
    [(b, size) for b in ("triton", "chunked") for size in SIZES] + [("chunked", s) for s in WIDE],
    ids=str,
)


@pytest.fixture
def tf32() -> object:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def case(n: int, c: int, v: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """query, positive, label, keys, count, mask; NaN in the masked rows."""
    torch.manual_seed(n)
    query, positive = (torch.randn(n, d, device=DEVICE).to(dtype) for _ in range(2))
    keys = F.normalize(torch.randn(c, v, d, device=DEVICE), dim=2)
    count = torch.randint(0, v + 1, (c,), device=DEVICE)
    count[:2] = v
    label = torch.randint(-1, c + 1, (n,), device=DEVICE)
    mask = torch.rand(n, device=DEVICE) > 0.3
    query[~mask], positive[~mask] = torch.nan, torch.nan
    return query, positive, label, keys, count, mask


Loss = Callable[[Tensor, Tensor, str], Tensor]


def losses(positive: Tensor, label: Tensor, count: Tensor, mask: Tensor) -> list[Loss]:
    """Of query, keys and backend."""

    def high(q: Tensor, keys: Tensor, backend: str) -> Tensor:
        return info_nce(q, label, keys, count, temperature=0.1, mask=mask, backend=backend)

    def low(q: Tensor, keys: Tensor, backend: str) -> Tensor:
        banks = [(keys, count), (keys, None)]
        return pair_info_nce(
            q, positive.to(q.dtype), label, banks, temperature=0.5, mask=mask, backend=backend
        )

    return [high, low]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@BACKENDS
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.usefixtures("tf32")
def test_contrast(
    backend: str, size: tuple[int, int, int, int], dtype: torch.dtype, columns: bool
) -> None:
    query, positive, label, keys, count, mask = case(*size, dtype)
    if columns:
        query = query.T.contiguous().T
    query.requires_grad_()
    for loss in losses(positive, label, count, mask):
        wide = query.detach().double().requires_grad_()
        ours = SCALE * loss(query, keys, backend)
        truth = SCALE * loss(wide, keys.double(), "reference")
        (grad,) = torch.autograd.grad(ours, query)
        (true_grad,) = torch.autograd.grad(truth, wide)
        for result, expected, tolerance in zip(
            (ours, grad), (truth, true_grad), TOLERANCE[dtype], strict=True
        ):
            error = (result.double() - expected).abs().max()
            assert error <= tolerance * expected.abs().max()
        again = SCALE * loss(query, keys, backend)
        assert torch.equal(ours, again)
        assert torch.equal(grad, torch.autograd.grad(again, query)[0])


@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_follows_the_setting(precision: str, backend: str) -> None:
    query, _, label, keys, count, mask = case(500, 5, 20, 64, torch.float32)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    options = {"temperature": 0.1, "mask": mask, "reduction": "none"}
    ours = info_nce(query, label, keys, count, backend=backend, **options)
    torch.backends.cuda.matmul.fp32_precision = before
    truth = reference.info_nce(query.double(), label, keys.double(), count, **options)
    error = (ours - truth).abs().max() / truth.abs().max()
    assert error < (1e-5 if precision == "ieee" else 1e-3)


def test_bank_and_teacher() -> None:
    torch.manual_seed(0)
    confidence = (torch.rand(9001, device=DEVICE) * 50).round() / 50
    label = torch.randint(-1, 22, (9001,), device=DEVICE)
    ours = class_topk(confidence, label, 40, 21, backend="triton")
    truth = reference.class_topk(confidence, label, 40, 21)
    assert torch.equal(ours[0], truth[0])
    assert torch.equal(ours[1], truth[1])

    features = torch.randn(9001, 256, device=DEVICE)
    rings = [
        (
            torch.zeros(21, 30, 256, device=DEVICE),
            *torch.zeros(2, 21, dtype=torch.int64, device=DEVICE),
        )
        for _ in range(2)
    ]
    for _ in range(3):
        queue_push_(*rings[0], features, ours[0], backend="triton")
        reference.queue_push_(*rings[1], features, ours[0])
    for one, other in zip(*rings, strict=True):
        torch.testing.assert_close(one, other)

    teacher = [torch.randn(n, device=DEVICE) for n in (1, 4096, 100_001)]
    teacher.append(torch.randn(50, device=DEVICE)[1:])
    student = [torch.randn_like(t).bfloat16() if i % 2 else t + 1 for i, t in enumerate(teacher)]
    copy = [t.clone() for t in teacher]
    for decay in (0.99, torch.tensor(0.5, device=DEVICE)):
        ema_update_(teacher, student, decay, backend="triton")
        reference.ema_update_(copy, student, decay)
    torch.testing.assert_close(teacher, copy)


@pytest.mark.parametrize(
    ("backend", "dim", "dtype"),
    [
        ("triton", 64, torch.bfloat16),
        ("chunked", 300, torch.bfloat16),
        ("chunked", 64, torch.float32),
    ],
    ids=str,
)
def test_graph_without_synchronisation(backend: str, dim: int, dtype: torch.dtype) -> None:
    query, positive, label, keys, count, mask = case(3000, 19, 128, dim, dtype)
    high, low = losses(positive, label, count, mask)
    confidence, cursor = torch.rand(3000, device=DEVICE), torch.zeros_like(count)
    teacher, student = [torch.zeros(9000, device=DEVICE)], [torch.ones(9000, device=DEVICE)]
    decay = torch.tensor(0.5, device=DEVICE)
    query = query.nan_to_num().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = high(query, keys, backend) + low(query, keys, backend)
        (grad,) = torch.autograd.grad(loss, query)
        index, _ = class_topk(confidence, label, 8, 19, valid=mask, backend="triton")
        queue_push_(keys, count, cursor, query.detach(), index, backend="triton")
        ema_update_(teacher, student, decay, backend="triton")
        return loss.detach(), grad

    counting = mask.clone()
    state = (keys, count, cursor, teacher[0])
    saved = [x.clone() for x in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    results = []
    for run in (step, lambda: (graph.replay(), captured)[1]):
        for x, y in zip(state, saved, strict=True):
            x.copy_(y)
        found: list[Tensor] = []
        for shown in (0, 1, 129, 3000):  # few pixels, whose keys the contrasts split, and many
            mask.copy_(counting & (torch.arange(3000, device=DEVICE) < shown))
            found += [x.clone() for x in run()]
        results.append([*found, *(x.clone() for x in state)])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)
