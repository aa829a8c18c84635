"""Runs of equal cost."""

from pathlib import Path
from typing import Any

import pytest

from ctt.cli import sweep, train
from ctt.experiments import budgets, catalog
from ctt.experiments.results import BACKWARD
from ctt.settings import Settings, update
from tests.train.steps import batch, make, unlabelled


@pytest.mark.parametrize("row", [v.name for v in catalog.LADDER])
@pytest.mark.parametrize(
    ("values", "unlabeled"),
    [
        ({}, 3),
        ({"data": {"unlabeled_batch_size": 5}}, 5),
        ({"data": {"batch_size": 4}, "bank": {"every": 3}}, 4),
        ({"pairs": 3}, 3),
        ({"pairs": 1, "loss": {"hc": 0.0}}, 3),  # the low-level contrast needs a peer
    ],
)
def test_a_step_costs_what_the_engine_counts(
    tiny: Settings, row: str, values: dict[str, Any], unlabeled: int
) -> None:
    variant = next(v for v in catalog.LADDER if v.name == row)
    settings = update(update(tiny, values, "test"), {"method": variant.method}, "test")
    if variant is catalog.CROSS_TEACHER:
        settings = update(settings, {"loss": {"hc": 0.0, "lc": 0.0}}, "test")
    engine = make(settings, settings.pairs)
    takes = variant.method != "supervised"
    engine(batch(settings.data.batch_size), unlabelled(unlabeled) if takes else None)
    counted = (1 + BACKWARD) * engine.trained + engine.untrained
    assert budgets.forwards(settings) == counted


@pytest.mark.parametrize("method", ["mean-teacher", "cross-teacher", "classmix", "supervised"])
def test_steps_before_unlabelled_images_join_cost_less(tiny: Settings, method: str) -> None:
    change = {"method": method, "loss": {"ct_after": 0.25}, "train": {"iterations": 4}}
    settings = update(tiny, change, "test")
    engine = make(settings)
    for _ in range(4):
        engine(batch(), unlabelled() if method != "supervised" else None)
    counted = (1 + BACKWARD) * engine.trained + engine.untrained
    assert 4 * budgets.forwards(settings) == counted


@pytest.mark.parametrize("options", [[], ["--data.unlabeled-batch-size", "24"]])
def test_runs_of_a_budget_cost_the_same_and_have_all_phases(
    options: list[str], tmp_path: Path
) -> None:
    given = [
        *options,
        "--train.iterations",
        "1600",
        "--loss.ct-ramp",
        "160",
        "--loss.ct-after",
        "0.4",
        "--bank.start-after",
        "500",
    ]
    runs = list(sweep.plan(sweep.Arguments("cost", seeds=(0,)), given, tmp_path))
    equal = [r for r in runs if r.budget == "equal iterations"]
    assert {r.settings.train.iterations for r in equal} == {1600}
    most = max(budgets.forwards(r.settings) for r in equal)
    for budget, share in (("cost 1/4", 0.25), ("cost 1/2", 0.5), ("cost 1", 1.0)):
        for r in (r for r in runs if r.budget == budget):
            length = r.settings.train.iterations
            spent = length * budgets.forwards(r.settings)
            assert spent == pytest.approx(share * 1600 * most, rel=0.01)
            if r.variant == "cross teacher and contrast":
                assert r.settings.bank.start_after == pytest.approx(500 / 1600 * length, abs=1)
            if r.variant != "supervised":
                assert r.settings.loss.ct_ramp == pytest.approx(0.1 * length, abs=1)
            assert train.read(list(r.arguments))[1].hash() == r.folder.name


def test_a_row_that_is_wanted_alone_has_the_same_budget(tmp_path: Path) -> None:
    whole = sweep.plan(sweep.Arguments("cost", seeds=(0,)), [], tmp_path)
    alone = sweep.plan(sweep.Arguments("cost", seeds=(0,), only=("supervised",)), [], tmp_path)
    assert list(alone) == [r for r in whole if r.variant == "supervised"]
