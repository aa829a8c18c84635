from typing import Any

import pytest
import torch
from torch import Tensor

from ctt import methods
from ctt.methods import losses
from ctt.settings import Settings, update
from ctt.train.memory import ACTIVATIONS, _forward, estimate, size_of
from tests.train.steps import make, student


def test_networks_banks_and_optimiser_are_those_of_a_run(tiny: Settings) -> None:
    engine = make(tiny, 2)
    method: Any = engine.method
    parts = estimate(tiny, method, 11, methods.get("cross-teacher"))
    for name, networks in (("students", method.students), ("teachers", method.teachers)):
        tensors = [x for net in networks for x in (*net.parameters(), *net.buffers())]
        assert parts[name] == sum(map(size_of, tensors))
    held = engine.optimizers["students"].state.values()
    momenta = [x for state in held for x in state.values()]
    assert parts["their momenta"] == parts["their gradients"] == sum(map(size_of, momenta))
    banks = [x for bank in method.banks for x in bank.buffers()]
    assert parts["banks and other modules"] == sum(map(size_of, banks))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_activations_are_those_that_autograd_keeps(tiny: Settings, amp: str) -> None:
    settings = update(tiny, {"train": {"amp": amp}}, "test")
    network = student(settings)
    own = {x.untyped_storage().data_ptr() for x in (*network.parameters(), *network.buffers())}
    held: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        label = torch.zeros(6, 24, 24, dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp != "off"):
            out = network(torch.rand(6, 3, 24, 24))
        losses.pixel_cross_entropy(out.logits, network.stride, label, losses.valid_pixels(label))
    expected = sum(x.untyped_storage().nbytes() for x in held.values())
    kept, features = _forward(network, settings, (6, 3, 24, 24))
    assert sum(kept) == pytest.approx(expected, rel=0.02)
    assert features == 4 * out.features.numel()


def test_activations_grow_with_the_batch_and_shrink_with_its_parts(tiny: Settings) -> None:
    method, about = make(tiny, 2).method, methods.get("cross-teacher")
    sizes = [
        estimate(update(tiny, change, "test"), method, 11, about)[ACTIVATIONS]
        for change in (
            {"data": {"batch_size": 4}},
            {"data": {"batch_size": 8}},
            {"data": {"batch_size": 8}, "train": {"accumulate": 2}},
        )
    ]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.05)
    assert sizes[2] == sizes[0]


def test_methods_without_contrast_need_no_memory_for_it(tiny: Settings) -> None:
    method = make(tiny, 2).method
    with_it, without = (
        estimate(tiny, method, 11, methods.get(name)) for name in ("cross-teacher", "dual-teachers")
    )
    assert with_it[ACTIVATIONS] > without[ACTIVATIONS]
