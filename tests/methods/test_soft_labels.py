"""Methods with soft labels beside a rendering of their equations."""

import math

import pytest
import torch

from ctt.data import mixing
from ctt.data.digits import INFO
from ctt.methods import losses, ramps
from ctt.models.base import Grid
from ctt.settings import Settings
from tests.methods.rendering import (
    SIZE,
    Scene,
    mean_cross_entropy,
    mixed,
    no_gradient,
    scores,
    surer,
)
from tests.train.steps import exactly


def test_the_distance_of_two_probabilities() -> None:
    """(0.7, 0.3) and (1, 0) differ by 0.18."""
    logits = torch.tensor([[0.7, 0.3]]).log()[:, :, None, None]
    soft = torch.tensor([[1.0, 0.0]])[:, :, None, None]
    distance = losses.squared_distance(logits, Grid(1), soft, torch.ones(1, 1, 1, dtype=torch.bool))
    assert float(distance) == pytest.approx(0.18)


def test_ramps() -> None:
    assert ramps.sigmoid(0, 0.5) == pytest.approx(math.exp(-5))
    assert ramps.sigmoid(0.5, 0.5) == ramps.sigmoid(0.9, 0.5) == ramps.sigmoid(0, 0) == 1
    assert ramps.linear(0.1, 0.4) == pytest.approx(0.25)
    assert ramps.linear(0.5, 0.4) == ramps.linear(0, 0) == 1


@pytest.mark.parametrize("pairs", [1, 2])
def test_mean_teacher(tiny: Settings, pairs: int) -> None:
    change = {"options": {"weight": 7.0, "ramp": 0.5}, "views": {"mix": "half-width"}}
    scene = Scene(tiny, "mean-teacher-soft", change, pairs)
    keep = mixing.half_width_mask(SIZE, scene.drawn("mix"))
    valid, sup, ct = mixed(~scene.padding, keep), 0, 0
    for teacher, student in zip(scene.method.teachers, scene.method.students, strict=True):
        soft = mixed(no_gradient(teacher, scene.more), keep)
        out = scores(student, torch.cat([scene.images, mixed(scene.more, keep)]))
        sup += mean_cross_entropy(out[:3], scene.label)
        distance = ((out[3:].softmax(dim=1) - soft) ** 2).mean(dim=1)
        ct += distance[valid].mean()
    rise = math.exp(-5 * (1 - (2 / 6) / 0.5) ** 2)  # before the third step of six
    scene.check({"sup": (1.0, sup), "ct": (7.0 * rise, ct)})


@pytest.mark.parametrize("mask", ["cutmix", "cowmix", "cutout"])
def test_french(tiny: Settings, mask: str) -> None:
    change = {"options": {"mask": mask, "threshold": 0.2, "weight": 2.0}}
    scene = Scene(tiny, "french", change, alter=surer)
    (teacher,), (student,) = scene.method.teachers, scene.method.students
    soft, valid, images = no_gradient(teacher, scene.more), ~scene.padding, scene.more
    if mask == "cutout":
        keep = mixing.cutout_mask(SIZE, scene.drawn("cutout"))
        valid, images = valid & keep, torch.where(keep[:, None], images, 0)
    else:
        if mask == "cutmix":
            keep = mixing.half_area_mask(SIZE, scene.drawn("mix"))
        else:
            keep = mixing.cow_mask(scene.drawn("mix noise"), scene.drawn("mix"))
        valid, images, soft = mixed(valid, keep), mixed(images, keep), mixed(soft, keep)
    out = scores(student, torch.cat([scene.images, images]))
    distance = (((out[3:].softmax(dim=1) - soft) ** 2).sum(dim=1) * valid).mean()
    share = (soft.max(dim=1).values >= 0.2).double().mean()  # both of all pixels
    assert valid.double().mean() < 0.98
    assert 0.02 < share < 0.98
    sup = mean_cross_entropy(out[:3], scene.label)
    scene.check({"sup": (1.0, sup), "ct": (2.0, distance * share)})


def test_an_erased_box_has_the_mean_colour(tiny: Settings) -> None:
    """Which is 0 once it is normalised, also where there are as many classes as colours."""
    scene = Scene(tiny, "french", {"options": {"mask": "cutout"}}, steps=1)
    engine = scene.engine
    engine.step.begin(0)
    b = {"images": torch.rand(3, 3, *SIZE), "label": scene.label, "padding": scene.padding}
    with torch.no_grad(), exactly():
        made = engine.method.prepare(b | {"unlabeled": torch.rand(3, 3, *SIZE) + 2}, engine.step)
    keep = mixing.cutout_mask(SIZE, engine.step.rand("cutout", (4, 3), 1))
    erased = made["mixed"].movedim(1, -1)[~keep]
    torch.testing.assert_close(erased, torch.tensor(INFO.mean).expand_as(erased))
