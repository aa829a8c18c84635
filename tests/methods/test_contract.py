"""What the engine promises for every method, tried with each."""

import copy
import dataclasses
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ctt
from ctt import checkpoint, methods
from ctt.cli import evaluate, export, predict
from ctt.cli import train as program
from ctt.data.dataset import IGNORE
from ctt.errors import UserError
from ctt.models.base import Output
from ctt.settings import Settings, update
from ctt.train.distributed import join
from ctt.train.engine import Engine
from ctt.train.plan import Plan
from tests.conftest import leave_out_figures
from tests.train.processes import finish, shown, start
from tests.train.steps import (
    CPU,
    batch,
    beside_labeled,
    double,
    exactly,
    make,
    run,
    unlabelled,
    with_small_critics,
    with_teacher,
)

EVERY = pytest.mark.parametrize("name", methods.names())
STEPS = 5
# terms with a mean over what a student chooses, or of no sum over images, which is that of the part
BY_PART = {
    "advsemiseg": ("semi",),
    "s4gan": ("fm", "st"),
    "semiseg-contrastive": ("contrast",),
}
BETWEEN_ROUNDS = ("st++", "dmt")  # when their copies of networks are made, and never else
# with which all terms take part in a few small steps
EARLY: dict[str, dict[str, Any]] = {
    "c3-semiseg": {"start": 0, "anchors": 2},
    "u2pl": {"start": 0},
    "semiseg-contrastive": {"start": 0},
}


def settings_of(name: str, tiny: Settings, change: dict[str, Any] | None = None) -> Settings:
    common = {
        "data": {"batch_size": 4},
        "loss": {"confidence_weight": "none"},
        "train": {"iterations": 400},
        "options": EARLY.get(name, {}),
    }
    settings = with_small_critics(tiny.with_method(name))
    return update(update(settings, common, "test"), change or {}, "test")


def in_last_round(engine: Engine) -> Engine:
    """Return an engine whose next step is the first of its last round."""
    engine.iteration = engine.rounds.starts[-2]
    return engine


def train_exactly(settings: Settings, size: int, file: Path, fixed_norms: bool = False) -> None:
    """Write what the steps give and what the method holds after them."""
    train_each_exactly({file: settings}, size, fixed_norms)


def train_each_exactly(runs: dict[Path, Settings], size: int, fixed_norms: bool = False) -> None:
    """Train one after the other, and write of each what its steps give and what it holds then."""
    with exactly(), join() as world:
        for file, settings in runs.items():
            engine = in_last_round(double(make, settings, 0, CPU, world))
            for module in engine.method.modules() if fixed_norms else ():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            seen = run(engine, size, STEPS)
            held = {"seen": seen, "method": engine.method.state_dict()}
            torch.save(held, f"{file}-{world.rank}.pt")


def close(state: dict[str, Any], expected: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for mine, wanted in zip(state["seen"], expected["seen"], strict=True):
        for term in wanted.keys() - but:
            value = wanted[term]
            torch.testing.assert_close(mine[term], value, rtol=1e-6, atol=1e-8, msg=term)
    for name, value in expected["method"].items():
        torch.testing.assert_close(
            state["method"][name], value, rtol=1e-5, atol=1e-7, msg=name, equal_nan=True
        )


# most of the time goes into starting processes, so that a pair of them trains many methods
@pytest.mark.parametrize("names", [methods.names()[i::4] for i in range(4)], ids="-".join)
def test_two_processes_equal_one_with_twice_the_batch(
    tiny: Settings, tmp_path: Path, names: list[str]
) -> None:
    change = {"model": {"sync_batch_norm": True}}
    settings = {name: settings_of(name, tiny, change) for name in names}
    two = {tmp_path / f"two-{name}": chosen for name, chosen in settings.items()}
    both = start(2, tmp_path / "log", train_each_exactly, two, 4)
    train_each_exactly({tmp_path / f"one-{n}": chosen for n, chosen in settings.items()}, 4)
    assert finish(both) == [0, 0], shown(tmp_path / "log")
    for name in names:
        one = torch.load(tmp_path / f"one-{name}-0.pt")
        for rank in range(2):
            close(torch.load(tmp_path / f"two-{name}-{rank}.pt"), one)


@EVERY
def test_a_batch_in_two_parts_is_the_batch(tiny: Settings, tmp_path: Path, name: str) -> None:
    """Where no batch norm stands between its images, and no mean is over pixels that the students
    choose: those of the other part are not known yet."""
    other = BY_PART.get(name, ())
    off = {"loss": {"hc": 0, "lc": 0}, "options": dict.fromkeys(other, 0)}
    whole = settings_of(name, tiny, off)
    train_exactly(whole, 4, tmp_path / "whole", True)
    in_two = update(whole, {"train": {"accumulate": 2}}, "test")
    train_exactly(in_two, 4, tmp_path / "parts", True)
    parts, expected = (torch.load(tmp_path / f"{file}-0.pt") for file in ("parts", "whole"))
    close(parts, expected, other)


@EVERY
def test_stopped_and_resumed_equals_undisturbed(tiny: Settings, tmp_path: Path, name: str) -> None:
    settings = settings_of(name, tiny)
    undisturbed = in_last_round(make(settings))
    run(undisturbed, 4, 3)
    checkpoint.save(tmp_path / "last.pt", undisturbed.state_dict())
    expected = run(undisturbed, 4, 3, first=3)
    resumed = make(update(settings, {"seed": settings.seed}, "test"))
    resumed.load_state_dict(checkpoint.load(tmp_path / "last.pt"))
    for one, other in zip(run(resumed, 4, 3, first=3), expected, strict=True):
        assert {k: float(v) for k, v in one.items()} == {k: float(v) for k, v in other.items()}
    assert_same(resumed.state_dict(), undisturbed.state_dict())


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


@EVERY
def test_nothing_but_ignored_pixels_teaches_nothing(tiny: Settings, name: str) -> None:
    engine = in_last_round(make(settings_of(name, tiny)))
    run(engine, 4, 2)  # so that banks and running numbers hold something
    images, label = batch(4)
    more, padding = unlabelled(beside_labeled(engine, 4))
    terms = engine(
        (images, torch.full_like(label, IGNORE)), (more, torch.full_like(padding, IGNORE))
    )
    assert {term: float(terms[term]) for term in engine.method.terms} == dict.fromkeys(
        engine.method.terms, 0.0
    )
    weights = engine.method.state_dict().values()
    assert all(bool(x.isfinite().all()) for x in weights if x.is_floating_point())


@EVERY
def test_cells_without_numbers_teach_nothing(tiny: Settings, name: str) -> None:
    """As a teacher gives them whose features leave the range of half precision in places."""

    def overflow(network: nn.Module, images: tuple[Tensor], out: Output) -> Output:
        hole = torch.zeros_like(out.logits[:, :1], dtype=torch.bool)
        hole[:, :, :2, 1] = True
        return Output(out.logits.masked_fill(hole, nan), out.features.masked_fill(hole, inf))

    engine = in_last_round(make(settings_of(name, tiny)))
    for teacher in getattr(engine.method, "teachers", ()):
        teacher.register_forward_hook(overflow)
    seen = run(engine, 4, 3)
    assert all(bool(x.isfinite()) for terms in seen for x in terms.values())
    state = engine.method.state_dict().values()
    assert all(bool(x.isfinite().all()) for x in state if x.is_floating_point())


@pytest.mark.parametrize("name", [n for n in methods.names() if n not in BETWEEN_ROUNDS])
def test_what_follows_moves_in_every_step(tiny: Settings, name: str) -> None:
    engine = in_last_round(make(settings_of(name, tiny)))
    run(engine, 4, 1)
    followers = [(n, net) for n in engine.method.following for net in getattr(engine.method, n)]
    before = copy.deepcopy([net.state_dict() for _, net in followers])
    run(engine, 4, 1, first=1)
    for (kind, net), old in zip(followers, before, strict=True):
        assert any(not torch.equal(x, old[n]) for n, x in net.named_parameters()), kind


@EVERY
def test_every_term_and_number_is_told(tiny: Settings, name: str) -> None:
    """What `terms` and `logged` name are the columns of metrics.csv."""
    engine = in_last_round(make(settings_of(name, tiny)))
    seen = run(engine, 4, 2)[-1].keys() | engine.method.report().keys()
    assert seen == {*engine.method.terms, *engine.method.logged, "total"}


@EVERY
def test_from_training_to_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    out = str(tmp_path / "run")
    iterations = 24 if "rounds" in methods.get(name).extra else 4
    quick = (
        f"--method {name} --ratio 6 --data.labeled-pool 24 --data.eval-images 6 "
        "--data.batch-size 2 --model.width 4 --model.features 8 --train.threads 1 "
        f"--train.iterations {iterations} --train.eval-every {iterations} --train.no-tensorboard "
        "--out"
    )
    if name != "cross-teacher":  # the figures of one method are like those of another
        leave_out_figures(monkeypatch)
    shaped = update(Settings().with_method(name), {"model": {"width": 4, "features": 8}}, "test")
    teacher = with_teacher(shaped, tmp_path).teacher
    given = ["--teacher", str(teacher)] if teacher else []
    assert program._main([*quick.split(), out, *given]) == 0
    assert evaluate._main([out, "--out", str(tmp_path / "scores"), "--workers", "0"]) == 0
    picture = tmp_path / "picture.png"
    Image.fromarray(batch(1)[0][0].permute(1, 2, 0).numpy()).save(picture)
    assert predict._main([out, str(picture), "--out", str(tmp_path / "masks")]) == 0
    assert len(list((tmp_path / "masks").rglob("picture*.png"))) > 0
    best = tmp_path / "net.safetensors"
    assert export._main([out, "--format", "safetensors", "--out", str(best)]) == 0
    assert ctt.load(best).classes == ctt.load(out).classes


@EVERY
def test_a_step_in_mixed_precision(tiny: Settings, name: str) -> None:
    engine = in_last_round(make(settings_of(name, tiny, {"train": {"amp": "bf16"}})))
    assert all(bool(x.isfinite()) for terms in run(engine, 4, 3) for x in terms.values())


def test_a_method_that_waits_is_refused_with_a_cuda_graph(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.of(tiny, None)
    graph = update(tiny, {"train": {"cuda_graph": True}}, "test")
    monkeypatch.setattr(plan.about.load(), "recordable", False)
    with pytest.raises(UserError, match="a step of `method` cross-teacher waits for the device"):
        dataclasses.replace(plan, settings=graph).build()
