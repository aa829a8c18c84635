"""The operations under PyTorch's own machinery: torch.library, compilation, autocast, dispatch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ctt.ops
from ctt.ops import available_backends, class_topk, ema_update_, queue_push_
from ctt.ops._registry import BACKENDS, OPERATIONS, why_not
from tests.ops.common import contrast, high_level, low_level, runs

Arguments = tuple[Any, ...]


def ema_arguments(device: str) -> list[Arguments]:
    def lists(seed: int, dtype: torch.dtype) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)
        return [torch.randn(s, generator=g).to(device, dtype) for s in ((3, 4), (5,))]

    decay = torch.tensor(0.9)
    return [(lists(0, torch.float32), lists(1, d), decay) for d in (torch.float32, torch.float16)]


def topk_arguments(device: str) -> list[Arguments]:
    confidence, label = torch.rand(20).to(device), torch.arange(20, device=device) % 4
    return [(confidence, label, 3, 3, None), (confidence.double(), label, 9, 3, confidence > 0.3)]


def push_arguments(device: str) -> list[Arguments]:
    index = torch.tensor([[0, 3, -1], [2, -1, 4]], device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    return [
        (
            torch.zeros(2, 4, 5, device=device),
            zeros,
            zeros.clone(),
            torch.randn(6, 5).to(device),
            index,
        )
    ]


def info_nce_arguments(device: str) -> list[Arguments]:
    full = contrast(12, 3, 4, 8, device=device)
    hard = contrast(12, 3, 4, 8, torch.float16, device, partly=True, masked=True)
    rest = [
        (full, (0.1, "class", True)),
        (full, (0.1, "none", True)),
        (hard, (0.1, "mean", False)),
    ]

    def given(c: Any, grad: bool) -> tuple[Any, ...]:
        count = torch.full((3,), 4, device=device) if c.count is None else c.count
        return _leaf(c.query, grad), None, c.label, [_finite(c.keys)], [count], c.mask

    cases = [(*given(c, grad), t, None, r, grad, False) for c, (t, r, grad) in rest]
    tau = torch.tensor(0.2, device=device, requires_grad=True)
    cases += [(*given(full, grad), 1.0, tau, "none", grad, True) for grad in (True, False)]
    return cases


def pair_info_nce_arguments(device: str) -> list[Arguments]:
    c = contrast(12, 3, 4, 8, device=device, partly=True, masked=True)
    assert c.positive is not None
    assert c.second is not None
    assert c.mask is not None
    query, positive = _finite(c.query), _finite(c.positive)
    keys, counts = [_finite(c.keys), _finite(c.second[0])], [c.count, c.second[1]]
    return [
        (_leaf(query, g), positive, c.label, keys, counts, c.mask, 0.1, None, reduction, g, False)
        for reduction, g in (("class", True), ("none", True), ("mean", False))
    ]


def _leaf(x: Tensor, grad: bool) -> Tensor:
    return _finite(x).requires_grad_(grad)


def _finite(x: Tensor) -> Tensor:
    """opcheck compares inputs before and after, and holds NaN unequal to itself."""
    return x.detach().nan_to_num(0.25, 0.25, 0.25)


MAKERS: dict[str, Callable[[str], list[Arguments]]] = {
    "ema_update_": ema_arguments,
    "class_topk": topk_arguments,
    "queue_push_": push_arguments,
    "info_nce": info_nce_arguments,
    "pair_info_nce": pair_info_nce_arguments,
}
EVERY = pytest.mark.parametrize(
    ("operation", "backend", "device"),
    [
        pytest.param(name, *run.values, marks=run.marks)  # type: ignore[attr-defined]
        for name in OPERATIONS
        for run in runs(name)
    ],
)


@EVERY
def test_operator_passes_opcheck(operation: str, backend: str, device: str) -> None:
    name = "contrast" if "info_nce" in operation else operation
    operator = getattr(torch.ops.ctt, name).default
    for arguments in MAKERS[operation](device):
        torch.library.opcheck(operator, (*arguments, backend))


def compiled(function: Callable[..., Any], compiler: str = "aot_eager") -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=compiler)


def run_everything(backend: str, device: str, wrap: Callable[..., Any]) -> list[Tensor]:
    """The five operations in one function, each with some arithmetic around it."""
    c = contrast(20, 3, 4, 8, device=device, partly=True, masked=True)
    assert c.positive is not None
    # where an operation lacks this backend, the choice is left to the dispatch
    fits = {n: backend != "auto" and _runs(n, backend, device) for n in OPERATIONS}
    names = {n: backend if fits[n] else "auto" for n in OPERATIONS}
    query = c.query.clone().requires_grad_()
    keys, count = c.keys.nan_to_num(0), torch.full((3,), 2, device=device)
    cursor = count.clone()
    confidence = torch.linspace(0, 1, 20, device=device)
    teacher, student = [keys.clone(), confidence.clone()], [keys + 1, confidence.flip(0)]

    def step(query: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index, taken = class_topk(confidence * 2, c.label, 2, 3, backend=names["class_topk"])
        queue_push_(keys, count, cursor, positive, index, backend=names["queue_push_"])
        ema_update_(teacher, student, 0.9, backend=names["ema_update_"])
        high = high_level(names["info_nce"])(query * 2, c, "class")
        low = low_level(names["pair_info_nce"])(query * 2, c, "none")
        return index, taken, high, low

    index, taken, high, low = wrap(step)(query, c.positive.nan_to_num(1, 1, 1))
    (high * 3 + low.sum()).backward()
    assert query.grad is not None
    state = [keys, count, cursor, *teacher]
    return [index, taken, high.detach(), low.detach(), query.grad, *state]


def _runs(operation: str, backend: str, device: str) -> bool:
    return why_not(operation, backend, torch.device(device)) is None


@pytest.mark.parametrize(("backend", "device"), runs("info_nce"))
def test_compiled_equals_eager(backend: str, device: str) -> None:
    eager = run_everything(backend, device, lambda f: f)
    for got, want in zip(run_everything(backend, device, compiled), eager, strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_by_inductor_equals_eager() -> None:
    eager = run_everything("auto", "cpu", lambda f: f)
    got = run_everything("auto", "cpu", lambda f: compiled(f, "inductor"))
    for have, want in zip(got, eager, strict=True):
        torch.testing.assert_close(have, want)


def test_compiled_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    function = torch.compile(high_level("auto"), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9, 14):
        c = contrast(n, 3, 4, 8)
        torch.testing.assert_close(
            function(c.query, c, "mean"), high_level("auto")(c.query, c, "mean")
        )


@pytest.mark.parametrize(("backend", "device"), runs("info_nce"))
@pytest.mark.parametrize("loss", [high_level, low_level])
def test_autocast_changes_nothing(
    backend: str, device: str, loss: Callable[[str], Callable[..., Tensor]]
) -> None:
    """Products are accumulated in float32 as without autocast, eager and compiled."""
    operation = "info_nce" if loss is high_level else "pair_info_nce"
    if not _runs(operation, backend, device):
        pytest.skip(f"the {backend} backend has no {operation}")
    c = contrast(20, 3, 4, 32, device=device)

    def value_and_gradient(
        function: Callable[..., Tensor], enabled: bool
    ) -> tuple[Tensor, Tensor | None]:
        query = c.query.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            value = function(query, c, "class")
        value.backward()
        assert value.dtype == torch.float32
        return value.detach(), query.grad

    plain = value_and_gradient(loss(backend), False)
    torch.testing.assert_close(value_and_gradient(loss(backend), True), plain, rtol=0, atol=0)
    torch.testing.assert_close(
        value_and_gradient(compiled(loss(backend)), True), plain, rtol=0, atol=0
    )


def test_operator_refuses_a_second_derivative() -> None:
    """Otherwise its part that goes through the query would be missing without a word."""
    (query, *rest), *_ = info_nce_arguments("cpu")
    loss = torch.ops.ctt.contrast(query, *rest, "auto")[0]
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, query, create_graph=True)


def test_available_backends() -> None:
    here = available_backends()
    assert list(here) == list(OPERATIONS)
    for operation, names in here.items():
        assert {"torch", "reference"} <= set(names) <= set(BACKENDS), operation
    assert available_backends(torch.device("cpu")) == here
    assert ctt.ops.__all__ == sorted(ctt.ops.__all__)


def test_a_backend_that_cannot_run_here() -> None:
    case = contrast(4, 2, 2, 4)
    for backend in set(BACKENDS) - set(available_backends()["info_nce"]):
        with pytest.raises(RuntimeError, match=rf"info_nce: backend '{backend}' cannot run on cpu"):
            high_level(backend)(case.query, case, "class")


def test_a_backend_that_fails_to_load_gives_way_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ctt.ops import _registry

    def broken(operation: str, backend: str, device: torch.device) -> str | None:
        if backend == "cpu":
            raise OSError("no such symbol")
        return why_not(operation, backend, device)

    monkeypatch.setattr(_registry, "why_not", broken)
    _registry._auto.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cpu backend failed to load"):
            chosen = _registry.select("info_nce", "auto", torch.device("cpu"))
        assert chosen.__name__ == "ctt.ops.backends.torch"
    finally:
        _registry._auto.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_in_a_cuda_graph(backend: str) -> None:
    """A step of all operations is recorded once and replayed on new inputs, without a wait."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend == "reference":
        pytest.skip("the reference looks at values on the host")
    names = {n: backend if _runs(n, backend, "cuda") else "auto" for n in OPERATIONS}
    c = contrast(200, 5, 4, 16, device="cuda", masked=True)
    query = c.query.nan_to_num(0, 0, 0).requires_grad_()
    keys, count, cursor = c.keys.clone(), *torch.zeros(2, 5, dtype=torch.int64, device="cuda")
    confidence = torch.rand(200, device="cuda")
    teacher, student = [torch.zeros(100, device="cuda")], [torch.ones(100, device="cuda")]
    decay = torch.tensor(0.9, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        index, _ = class_topk(confidence, c.label, 2, 5, backend=names["class_topk"])
        queue_push_(keys, count, cursor, query, index, backend=names["queue_push_"])
        ema_update_(teacher, student, decay, backend=names["ema_update_"])
        loss = high_level(names["info_nce"])(query, c, "class")
        loss = loss + low_level(names["pair_info_nce"])(query, c, "class")
        (grad,) = torch.autograd.grad(loss, query)
        return loss.detach(), grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        query.copy_(torch.randn_like(query))
    graph.replay()
    replayed = [x.clone() for x in recorded]
    torch.testing.assert_close(replayed, list(step()))


def test_tensors_without_data_give_shapes() -> None:
    """A kernel would read memory that is not there."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        features, label = torch.rand(20, 8, requires_grad=True), torch.zeros(20, dtype=torch.int64)
        keys, zeros = torch.zeros(3, 4, 8), torch.zeros(3, dtype=torch.int64)
        index, count = class_topk(torch.rand(20), label, 2, 3)
        assert (index.shape, count.shape) == ((3, 2), (3,))
        queue_push_(keys, zeros, zeros.clone(), features, index)
        ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)
        loss = ctt.ops.info_nce(features, label, keys, temperature=0.1)
        other = ctt.ops.pair_info_nce(
            features, features, label, [(keys, None)], temperature=0.1, reduction="none"
        )
        assert (loss.shape, other.shape) == ((), (20,))
        (loss + other.sum()).backward()
        assert features.grad.shape == features.shape
