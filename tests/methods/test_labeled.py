"""The loss of labelled images against its formulas, pixel by pixel in Python."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctt import methods
from ctt import run as runs
from ctt.cli.train import _main
from ctt.data.digits import INFO
from ctt.errors import UserError
from ctt.methods import losses
from ctt.methods.labeled import LabeledLoss, class_weights
from ctt.methods.labeled_settings import LabeledSettings
from ctt.models.base import Grid
from ctt.settings import Settings, update
from ctt.train.context import StepContext
from ctt.train.distributed import World, join
from ctt.train.loop import train
from ctt.train.memory import ACTIVATIONS, estimate
from tests.train.processes import finish, shown, start
from tests.train.steps import CPU, double, exactly, make, run

CLASSES = 4
WEIGHTS = (0.5, 2.0, 1.0, 3.0)
FORMS: list[dict[str, Any]] = [
    {"weights": WEIGHTS},
    {"focal": 2.0},
    {"focal": 1.0},
    {"dice": 0.7},
    {"ohem": 0.3, "ohem_kept": 0},
    {"ohem": 0.1, "ohem_kept": 9},
    {"ohem": 0.1, "ohem_kept": 10_000},
    {"weights": WEIGHTS, "focal": 2.0, "dice": 1.0, "ohem": 0.3, "ohem_kept": 4},
]


def step_of(settings: Settings) -> StepContext:
    return StepContext(settings, INFO, CPU, World(), {})


def value(form: dict[str, Any], logits: Tensor, label: Tensor, stride: int = 1) -> Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        loss = LabeledLoss(LabeledSettings(**form), CLASSES, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    step = step_of(Settings())
    b = {"label": label, "pixels": losses.valid_pixels(label)}
    result: Tensor = loss(logits, Grid(stride), b | loss.totals(label, step), step)
    return result


def rendering(form: dict[str, Any], logits: Tensor, label: Tensor) -> Tensor:
    s = LabeledSettings(**form)
    pixels = []  # probability of the own class, and the class
    for image, classes in zip(logits, label, strict=True):
        for y in range(classes.shape[0]):
            for x in range(classes.shape[1]):
                c = int(classes[y, x])
                if c != 255:
                    scores = image[:, y, x]
                    pixels.append(((scores[c] - scores.logsumexp(0)).exp(), c))
    if s.ohem:
        ordered = sorted(p.item() for p, _ in pixels)
        wanted = s.ohem_kept * len(label)
        threshold = s.ohem
        if wanted:
            threshold = max(threshold, ordered[wanted - 1] if wanted <= len(ordered) else 1.0)
        pixels = [(p, c) for p, c in pixels if p.item() <= threshold]
    weights = s.weights or (1.0,) * CLASSES
    total = sum((-weights[c] * (1 - p) ** s.focal * p.log() for p, c in pixels), torch.zeros(()))
    mean = total / sum(weights[c] for _, c in pixels)
    dices = []
    for image, classes in zip(logits.softmax(dim=1), label, strict=True):
        for c in range(CLASSES):
            own = classes == c
            if own.any():
                p = image[c][classes != 255]
                shared = image[c][own].sum()
                dices.append(1 - (2 * shared + 1) / (p.sum() + own.sum() + 1))
    return mean + s.dice * sum(dices, torch.zeros(())) / len(dices)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_loss_equals_its_formula(form: dict[str, Any]) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, CLASSES, 5, 7, generator=rng, dtype=torch.float64)
    label = torch.randint(0, 3, (3, 5, 7), generator=rng)  # class 3 is absent
    label[0, :2] = 255
    label[2] = 255
    mine, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = value(form, mine, label), rendering(form, plain, label)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(found, mine)
    (wanted,) = torch.autograd.grad(expected, plain)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_ignored_crops_give_0_not_nan(form: dict[str, Any]) -> None:
    logits = torch.randn(2, CLASSES, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = value(form, logits, torch.full((2, 8, 8), 255), stride=2)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_the_default_is_the_mean_cross_entropy() -> None:
    logits = torch.randn(2, CLASSES, 4, 4)
    label = torch.randint(0, CLASSES, (2, 4, 4))
    expected = losses.pixel_cross_entropy(logits, Grid(1), label, losses.valid_pixels(label))
    assert torch.equal(value({}, logits, label), expected)


def test_class_weights() -> None:
    pixels, images = [600, 300, 0, 100], [10, 5, 0, 2]

    def of(rule: str, beta: float = 0.9) -> list[float]:
        return list(class_weights(rule, pixels, images, beta))

    def scaled(values: list[float]) -> list[float]:  # mean 1; class 2 is shown nowhere
        mean = sum(values) / 3
        return [values[0] / mean, values[1] / mean, 1.0, values[2] / mean]

    assert of("inverse") == pytest.approx(scaled([1 / 0.6, 1 / 0.3, 1 / 0.1]), abs=1e-5)
    enet = [1 / math.log(1.02 + share) for share in (0.6, 0.3, 0.1)]
    assert of("enet") == pytest.approx(scaled(enet), abs=1e-5)
    effective = [0.1 / (1 - 0.9**n) for n in (10, 5, 2)]
    assert of("effective") == pytest.approx(scaled(effective), abs=1e-5)
    assert of("effective", 0.0) == [1, 1, 1, 1]
    assert class_weights("enet", [0, 0], [0, 0], 0.9) == (1, 1)
    assert min(class_weights("inverse", [10**9, 3], [9, 1], 0.9)) == 1e-6  # learnt, if little


EVERYTHING = {
    "labeled": {
        "weights": [1 + c / 4 for c in range(11)],
        "focal": 2.0,
        "dice": 0.5,
        "ohem": 0.05,
        "ohem_kept": 100,
    }
}


def train_exactly(settings: Settings, size: int, file: Path) -> None:
    with exactly(), join() as world:
        engine = double(make, settings, 0, CPU, world)
        for module in engine.method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        seen = run(engine, size, 3)
    torch.save({"seen": seen, "method": engine.method.state_dict()}, f"{file}-{world.rank}.pt")


def same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, wanted in zip(state["seen"], expected["seen"], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-10)
    for name, wanted in expected["method"].items():
        torch.testing.assert_close(state["method"][name], wanted, rtol=1e-8, atol=1e-9, msg=name)


def test_two_processes_equal_one_with_twice_the_batch(tiny: Settings, tmp_path: Path) -> None:
    settings = update(tiny.with_method("supervised"), EVERYTHING, "test")
    both = start(2, tmp_path / "log", train_exactly, settings, 4, tmp_path / "two")
    train_exactly(settings, 4, tmp_path / "one")
    assert finish(both) == [0, 0], shown(tmp_path / "log")
    one, *two = (torch.load(tmp_path / f"{file}.pt") for file in ("one-0", "two-0", "two-1"))
    for state in two:
        same(state, one)


def test_a_batch_in_two_parts_is_the_batch_but_for_hard_pixels(
    tiny: Settings, tmp_path: Path
) -> None:
    change = {"data": {"batch_size": 4}, "labeled": {"ohem": 0}}
    whole = update(update(tiny.with_method("supervised"), EVERYTHING, "test"), change, "test")
    train_exactly(whole, 4, tmp_path / "whole")
    train_exactly(update(whole, {"train": {"accumulate": 2}}, "test"), 4, tmp_path / "parts")
    same(torch.load(tmp_path / "parts-0.pt"), torch.load(tmp_path / "whole-0.pt"))


def test_hard_pixels_of_parts_are_a_mean_over_them() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 6, 6, generator=rng, dtype=torch.float64)
    label = torch.randint(0, CLASSES, (2, 6, 6), generator=rng)
    form = {"ohem": 0.2, "ohem_kept": 5}
    parts = LabeledLoss(LabeledSettings(**form), CLASSES, 2)
    step = step_of(Settings())
    b = {"pixels": losses.valid_pixels(label), **parts.totals(label, step)}
    found = [
        parts(logits[i : i + 1], Grid(1), b | {"label": label[i : i + 1]}, step) for i in (0, 1)
    ]
    alone = [value(form, logits[i : i + 1], label[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(found[0] + found[1], (alone[0] + alone[1]) / 2)


def test_a_run_keeps_the_weights_that_it_began_with(tiny: Settings, out: Path) -> None:
    change = {"labeled": {"class_weights": "enet"}, "train": {"iterations": 2, "eval_every": 2}}
    settings = update(tiny.with_method("supervised"), change, "test")
    train(settings, out=out)
    begun = runs.read_settings(out)
    assert len(begun.labeled.weights) == 11
    assert max(begun.labeled.weights) > 1.1
    assert begun.hash() == settings.hash()
    odd = (9.0, *begun.labeled.weights[1:])  # as if the masks had changed since
    changed = update(begun, {"labeled": {"weights": odd}}, "test")
    runs.write_settings(out, update(changed, {"train": {"iterations": 3}}, "test"))
    train(runs.read_settings(out), resume=out)
    assert runs.read_settings(out).labeled.weights == odd


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--labeled.focal 0.5", "`labeled.focal` must be 0 or at least 1"),
        ("--labeled.weights -1 2", "`labeled.weights` must be at least 0"),
        ("--labeled.beta 1", "`labeled.beta`"),
        ("--labeled.weights 1 2", "has 2 numbers, but the data has 11 classes"),
        ("--labeled.weights 1 2 --labeled.class-weights enet", "changes nothing with"),
    ],
)
def test_bad_settings_are_told(arguments: str, message: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run"), "--train.iterations", "1"]
    with pytest.raises(UserError, match=message):
        _main([*arguments.split(), *out])
    assert not (tmp_path / "run").exists()


def test_the_dry_run_knows_these_losses(tiny: Settings) -> None:
    plain = tiny.with_method("supervised")
    kept = []
    for settings in (plain, update(plain, EVERYTHING, "test")):
        about = methods.get("supervised")
        kept.append(estimate(settings, make(settings).method, INFO, about)[ACTIVATIONS])
    assert kept[1] > kept[0]
