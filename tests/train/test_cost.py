"""What a dry run tells of the cost of a run."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ctt import methods, models
from ctt.data.digits import INFO
from ctt.errors import UserError
from ctt.methods.base import Setup
from ctt.settings import Settings, update
from ctt.train.cost import CARDS, card_of, cost_table, hours, step_operations
from ctt.train.dry_run import dry_run, per_process
from tests.train.steps import batch, make, unlabelled

VIT = {"model": {"name": "dpt", "backbone": ["test_vit"]}, "data": {"crop": [64, 64]}}


def operations(settings: Settings, pairs: int = 1) -> float:
    about = methods.get(settings.method)
    method = about.load()(Setup(settings, INFO, pairs, 6))
    found = step_operations(settings, method, INFO, about)
    assert found is not None
    assert all(p.grad is None for p in method.parameters())
    return found


def of_forward(settings: Settings, images: int) -> int:
    """Return the operations of a forward, of which matrix products alone are counted."""
    network: Any = models.build(num_classes=11, **settings.network(0)).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(images, 3, *settings.data.crop, device="meta"))
    return int(counter.get_total_flops())


def test_a_step_costs_forwards_of_teachers_and_three_of_students(tiny: Settings) -> None:
    settings = update(tiny, VIT, "test")
    plain = settings.with_method("mean-teacher")
    one, n = of_forward(plain, 1), plain.data.batch_size
    found = operations(plain)
    # the first layer has no gradient of its input, attention two and a half forwards
    assert found == pytest.approx((n + 3 * 2 * n) * one, rel=0.05)


def test_pairs_add_up_and_parts_make_the_whole(tiny: Settings) -> None:
    off = update(tiny, {"loss": {"hc": 0, "lc": 0}, "data": {"batch_size": 4}}, "test")
    whole = operations(off)
    assert operations(off, 2) == pytest.approx(2 * whole, rel=0.01)
    in_parts = update(off, {"train": {"accumulate": 2}}, "test")
    assert operations(in_parts) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("name", ["cross-teacher", "semiseg-contrastive", "mean-teacher"])
def test_all_that_a_real_step_computes_is_counted(tiny: Settings, name: str) -> None:
    change = {"train": {"iterations": 4}, "loss": {"ct_after": 0.5}, "bank": {"start_after": 2}}
    if name == "semiseg-contrastive":
        change = {"train": {"iterations": 4}}
    settings = update(tiny.with_method(name), change, "test")
    engine, images = make(settings), settings.data.batch_size
    found = 0
    for _ in range(settings.train.iterations):
        with FlopCounterMode(display=False) as counter:
            engine(batch(images), unlabelled(images))
        found += counter.get_total_flops()
    counted = operations(settings, len(engine.method.students))
    assert counted == pytest.approx(found / settings.train.iterations, rel=0.01)
    about, method = methods.get(name), make(settings).method
    last = step_operations(settings, method, INFO, about, last=True)
    assert last == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_blocks_computed_again_cost_another_forward(tiny: Settings) -> None:
    plain = update(tiny, VIT, "test").with_method("supervised")
    again = update(plain, {"train": {"gradient_checkpointing": True}}, "test")
    assert 1.15 * operations(plain) < operations(again) < 1.34 * operations(plain)


def test_hours_are_operations_over_a_share_of_the_peak() -> None:
    a100 = card_of("a100")
    assert hours(109.2e12, 36_000, a100, "bf16") == pytest.approx(10)
    assert hours(6.825e12, 36_000, a100, "off") == pytest.approx(10)
    with pytest.raises(UserError, match="`card` abacus: no such card"):
        card_of("abacus")
    assert all(card.source and card.half >= card.single for card in CARDS.values())


def test_cards_that_have_too_little_memory_are_told(tiny: Settings) -> None:
    table = cost_table(1e12, {1: 30 * 10**9, 8: 20 * 10**9}, tiny, 100, ["t4", "rtx4090", "a100"])
    cells = [list(column.cells) for column in table.columns]
    assert cells[2] == ["no", "on 8", "on 1 and 8"]
    assert float(cells[3][0]) == pytest.approx(8 * float(cells[4][0]), abs=0.5)


def test_a_card_without_bfloat16_has_no_hours_of_it(tiny: Settings) -> None:
    half = update(tiny, {"train": {"amp": "bf16"}}, "test")
    table = cost_table(1e15, {1: 1, 4: 1}, half, 100, ["v100", "a100"])
    on_one, on_four = (list(column.cells) for column in table.columns[3:5])
    assert [on_one[0], on_four[0]] == ["use fp16", "use fp16"]
    assert float(str(on_one[1])) > float(str(on_four[1])) > 0


def test_a_dry_run_tells_hours(tiny: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(tiny, card="a100", cards=4)
    shown = capsys.readouterr().out
    assert "TFLOP a step and process" in shown
    assert "A100 SXM 80 GB" in shown
    assert "GeForce" not in shown
    with pytest.raises(UserError, match="no such card"):
        dry_run(tiny, card="abacus")


def test_shared_states_take_a_part_of_the_memory(tiny: Settings) -> None:
    parts = {"momenta": 10, "students": 10}
    assert per_process(parts, tiny, 4) == parts
    sharded = update(tiny, {"train": {"shard_optimizer": True}}, "test")
    assert per_process(parts, sharded, 4) == {"momenta": 3, "students": 10}


def test_what_looks_at_its_numbers_has_no_count(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    method: Any = make(tiny).method
    monkeypatch.setattr(method, "losses", lambda b, step: {"sup": (float(b["label"].sum()), 0)})
    assert step_operations(tiny, method, INFO, methods.get("cross-teacher")) is None


def test_the_steps_that_are_timed_have_no_smaller_batches_than_batch_norms_take(
    tiny: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"crop": [8, 8], "batch_size": 8, "unlabeled_batch_size": 4}
    dry_run(update(tiny.with_method("fixmatch"), {"data": sizes}, "test"))
    assert "iterations take about" in capsys.readouterr().out
