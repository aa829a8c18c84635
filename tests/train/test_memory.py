import os
from typing import Any

import pytest
import torch
from torch import Tensor

from ctt import methods
from ctt.data.digits import INFO
from ctt.data.views import constant
from ctt.methods.base import Batch, Step, Terms
from ctt.settings import Settings, update
from ctt.train.memory import ACTIVATIONS, estimate, kept_by_step, memory_table, size_of
from tests.train.steps import CPU, batch, make, unlabelled, with_small_critics


def test_networks_banks_and_optimiser_are_those_of_a_run(tiny: Settings) -> None:
    engine = make(tiny, 2)
    method: Any = engine.method
    parts = estimate(tiny, method, INFO, methods.get("cross-teacher"))
    for name, networks in (("students", method.students), ("teachers", method.teachers)):
        tensors = [x for net in networks for x in (*net.parameters(), *net.buffers())]
        assert parts[name] == sum(map(size_of, tensors))
    held = engine.optimizers["students"].state.values()
    momenta = [x for state in held for x in state.values()]
    assert parts["momenta"] == parts["gradients"] == sum(map(size_of, momenta))
    others = [x for module in (*method.banks, method.labeled) for x in module.buffers()]
    assert parts["banks and other modules"] == sum(map(size_of, others))


def test_critics_and_what_their_optimiser_remembers(tiny: Settings) -> None:
    engine = make(with_small_critics(tiny.with_method("gct")))
    parts = estimate(engine.settings, engine.method, INFO, methods.get("gct"))
    engine(batch(), unlabelled())
    trained = [p for p in engine.method.parameters() if p.requires_grad]
    assert parts["gradients"] == sum(size_of(p.grad) for p in trained)
    held = [x for opt in engine.optimizers.values() for s in opt.state.values() for x in s.values()]
    assert parts["momenta"] == sum(size_of(x) for x in held if x.dim() > 0)
    assert parts["banks and other modules"] > 0


def kept(engine: Any) -> int:
    """Return the bytes that autograd keeps of a step with data."""
    own = [x.detach() for x in (*engine.method.parameters(), *engine.method.buffers())]
    fixed = {x.untyped_storage().data_ptr() for x in own}
    held: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in fixed:
            held[x.untyped_storage().data_ptr()] = x
        return x

    losses = engine.method.losses

    def watched(b: Batch, step: Step) -> Terms:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            terms: Terms = losses(b, step)
        return terms

    engine.method.losses = watched
    engine.iteration = engine.settings.train.iterations - 1
    engine(batch(), unlabelled())
    return sum(x.untyped_storage().nbytes() for x in held.values())


@pytest.mark.parametrize(
    ("name", "amp"),
    [
        ("cross-teacher", "off"),
        ("cross-teacher", "bf16"),
        ("unimatch", "off"),
        ("advsemiseg", "off"),
        ("s4gan", "off"),
        ("gct", "bf16"),
        ("ecs", "off"),
    ],
)
def test_activations_are_those_that_autograd_keeps(tiny: Settings, name: str, amp: str) -> None:
    settings = with_small_critics(update(tiny, {"train": {"amp": amp}}, "test").with_method(name))
    engine = make(settings)
    guess = sum(kept_by_step(settings, engine.method, INFO, methods.get(name), 0))
    assert guess == pytest.approx(kept(engine), rel=0.02)


@pytest.mark.parametrize("name", methods.names())
def test_the_memory_of_every_method_can_be_told(tiny: Settings, name: str) -> None:
    longer = update(tiny, {"train": {"iterations": 400}}, "test")  # for methods with many rounds
    settings, about = with_small_critics(longer.with_method(name)), methods.get(name)
    method = make(settings).method
    before = {key: x.clone() for key, x in method.state_dict().items() if x.dim() > 0}
    parts = estimate(settings, method, INFO, about)
    assert (ACTIVATIONS in parts) == method.recordable
    assert all(torch.equal(method.state_dict()[key], x) for key, x in before.items())
    assert type(constant((1.0, 2.0), CPU)) is Tensor  # none without data is left behind


def test_a_method_that_looks_at_its_numbers_has_no_estimate(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = make(tiny).method

    def waits(b: Batch, step: Step) -> Terms:
        return {"sup": (float(b["label"].sum()), torch.zeros(()))}

    monkeypatch.setattr(method, "losses", waits)
    parts = estimate(tiny, method, INFO, methods.get("cross-teacher"))
    assert ACTIVATIONS not in parts
    table = memory_table(parts, tiny, CPU)
    assert "unknown" in list(table.columns[1].cells)


def test_a_system_that_does_not_say_how_much_there_is(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sysconf")
    table = memory_table({ACTIVATIONS: 2**20}, tiny, CPU)
    assert [*table.columns[0].cells][-1] == "cpu has"
    assert [*table.columns[1].cells] == ["1", "1", "unknown"]


def test_activations_grow_with_the_batch_and_shrink_with_its_parts(tiny: Settings) -> None:
    method, about = make(tiny, 2).method, methods.get("cross-teacher")
    sizes = [
        estimate(update(tiny, change, "test"), method, INFO, about)[ACTIVATIONS]
        for change in (
            {"data": {"batch_size": 4}},
            {"data": {"batch_size": 8}},
            {"data": {"batch_size": 8}, "train": {"accumulate": 2}},
            {"data": {"batch_size": 4, "unlabeled_batch_size": 12}},
        )
    ]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.05)
    assert sizes[2] == pytest.approx(sizes[0], rel=0.05)
    assert sizes[3] == pytest.approx(sizes[1], rel=0.1)


def test_contrast_takes_memory(tiny: Settings) -> None:
    about = methods.get("cross-teacher")
    with_it, without = (
        estimate(settings, make(settings, 2).method, INFO, about)[ACTIVATIONS]
        for settings in (tiny, update(tiny, {"loss": {"hc": 0, "lc": 0}}, "test"))
    )
    assert with_it > without
