"""The forward part of each method's step never waits for a GPU.

It is run on tensors of a GPU that have a shape and no data, so it needs no GPU. What a GPU itself
refuses (`torch.cuda.set_sync_debug_mode`) is tested in test_gpu_step.py.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ctt import methods, recipes
from ctt.data import views
from ctt.settings import Settings, update
from ctt.train import context
from ctt.train.engine import Engine
from tests.conftest import TINY
from tests.train import steps

GPU = torch.device("cuda", 0)
# the sizes of what these give depend on the numbers in a tensor, or the number itself is read
READING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "bincount",
    "histc",
    "repeat_interleave.Tensor",
    "aten.equal.default",
)
# so that a step reaches what a method does later in the run
EARLY: dict[str, dict[str, Any]] = {
    "c3-semiseg": {"start": 0, "anchors": 2},
    "u2pl": {"start": 0},
    "semiseg-contrastive": {"start": 0},
}


class RefuseWaiting(TorchDispatchMode):
    """Fails where an operation waits for the GPU, or where the GPU would have to be waited for."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, str(function)
        assert not any(part in name for part in READING), name
        if name.startswith("aten.copy_"):
            across = args[0].device != args[1].device
            assert not across or kwargs.get("non_blocking") or args[2:] == (True,), name
        if name.startswith("aten._to_copy"):
            across = torch.device(kwargs.get("device") or args[0].device) != args[0].device
            assert not across or kwargs.get("non_blocking"), name
        if name.startswith(("aten.index.", "aten.index_put")):
            for index in args[1]:
                assert index is None or (index.is_cuda and index.dtype != torch.bool), name
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def without_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave out what a tensor without data cannot do: gradients, steps of the optimiser and what
    the host pins."""
    monkeypatch.setattr(context, "upload", lambda x, device: x.to(device, non_blocking=True))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: None)
    monkeypatch.setattr(Tensor, "backward", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, x, **kwargs: (torch.zeros_like(x),))
    monkeypatch.setattr(nn.Module, "to", lambda module, *args, **kwargs: module)
    monkeypatch.setattr(Engine, "_optimize", lambda engine: None)
    monkeypatch.setattr(steps, "ready_to_train", lambda network, *args: network)
    views.constant.cache_clear()
    yield
    views.constant.cache_clear()


def images(kept: bool = False) -> steps.Images:
    label = torch.int32 if kept else torch.uint8
    return (
        torch.zeros(4, 3, 24, 24, dtype=torch.uint8, device=GPU),
        torch.zeros(4, 24, 24, dtype=label, device=GPU),
    )


@pytest.mark.parametrize("name", methods.names())
def test_a_step_waits_for_nothing(name: str) -> None:
    change = {
        "data": {"batch_size": 4},
        "loss": {"confidence_weight": "none"},
        "train": {"iterations": 400, "deterministic": False},
        "options": EARLY.get(name, {}),
    }
    digits = update(update(Settings(), recipes.load("digits"), "recipe"), TINY, "test")
    settings = update(steps.with_small_critics(digits.with_method(name)), change, "test")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            engine = steps.make(settings, device=GPU)
        engine.iteration = max(engine.rounds.starts[-2], 5)  # in the last round, with all terms
        round_ = engine.rounds.rounds[engine.rounds.at(engine.iteration)]
        unlabeled = None if round_.images == "none" else images(round_.images == "kept")
        engine(images(), unlabeled)
        # as a recorded step has them: numbers that change from step to step are in tensors
        numbers = engine.step.tensors()
        engine.step.read(numbers)
        with RefuseWaiting():
            engine._run([*images(), *(unlabeled or ())])
    assert engine.step.forwards[True] > 0


def test_what_waits_is_found() -> None:
    with FakeTensorMode():
        mask = torch.ones(3, dtype=torch.bool, device=GPU)
        values = torch.ones(3, device=GPU)
        waiting = (
            lambda: values.cpu(),
            lambda: values[mask],
            lambda: values.index_put((mask,), values[:1]),
            lambda: values.copy_(torch.ones(3)),
            lambda: torch.nonzero(mask),
        )
        for operation in waiting:
            with pytest.raises(AssertionError), RefuseWaiting():
                operation()
