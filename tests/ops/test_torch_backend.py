"""The `torch` backend as it runs on a GPU, checked on a CPU: fixed shapes, no look at values."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctt.ops import class_topk, ema_update_, queue_push_
from ctt.ops.backends import torch as blocked
from tests.ops import test_info_nce, test_pair_info_nce
from tests.ops.common import DTYPES, contrast, evaluate, high_level, low_level

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal"}


class NoWait(TorchDispatchMode):
    """Raises where a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        assert name not in WAITS, f"{name} waits for the device"
        assert not by_mask, "boolean indexing waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_may_look", lambda device: False)
    # small blocks, the last of them not full
    monkeypatch.setattr(blocked, "_SCORE_BYTES", {"cpu": 50 << 10})


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["class", "mean", "none"])
def test_fixed_shapes_equal_the_formula(reduction: str, dtype: torch.dtype) -> None:
    for size in ((1, 2, 1, 19), (123, 19, 7, 64)):
        for hard in (False, True):
            case = contrast(*size, dtype, partly=hard, masked=hard)
            test_info_nce.check("torch", case, reduction)
            test_pair_info_nce.check("torch", case, reduction)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("reduction", ["class", "mean", "none"])
@pytest.mark.parametrize("kind", ["all masked", "all ignored", "all queues empty"])
def test_zero_where_no_pixel_counts(kind: str, reduction: str) -> None:
    case = test_info_nce.nothing_counts(contrast(30, 5, 4, 16), kind)
    value, grad = evaluate(high_level("torch"), case, reduction)
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_waits(dtype: torch.dtype) -> None:
    case = contrast(60, 5, 4, 16, dtype, partly=True, masked=True)
    assert case.positive is not None
    keys, count = case.keys.clone(), torch.zeros(5, dtype=torch.int64)
    teacher, student = [keys.clone(), keys.clone().half()], [keys, keys]
    with NoWait():
        for loss in (high_level("torch"), low_level("torch")):
            evaluate(loss, case, "class")
        index, _ = class_topk(case.query[:, 0], case.label, 6, 5, backend="torch")
        queue_push_(keys, count, count.clone(), case.query, index, backend="torch")
        ema_update_(teacher, student, torch.tensor(0.9), backend="torch")


def test_memory_is_bounded_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor as large as the scores of all pixels with all keys is ever made."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, list | tuple) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    monkeypatch.setattr(blocked, "_SCORE_BYTES", {"cpu": 100 << 10})
    case = contrast(2000, 10, 20, 16)
    with Watch():
        evaluate(high_level("torch"), case)
        evaluate(low_level("torch"), case)
    assert largest <= 2000 * 16 * 4  # the gradient
