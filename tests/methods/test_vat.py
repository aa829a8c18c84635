"""Virtual adversarial training beside a rendering of its equations."""

import math

import pytest
import torch
from torch import Tensor

from ctt.data.views import to_unit
from ctt.methods import vat
from ctt.models.base import Grid
from ctt.settings import Settings
from tests.methods.rendering import (
    SIZE,
    Scene,
    labeled,
    mean_cross_entropy,
    no_gradient,
    scores,
    surer,
    unlabeled,
)
from tests.train.steps import make


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def length(x: Tensor) -> Tensor:
    return (x * x).sum().sqrt()


@pytest.mark.parametrize("pairs", [1, 2])
def test_the_objective(tiny: Settings, pairs: int) -> None:
    options = {"weight": 0.7, "radius": 1.5, "threshold": 0.14, "ramp": 0.5}
    scene = Scene(tiny, "vat", {"options": options}, pairs, alter=surer)
    valid, sup, ct = ~scene.padding, 0, 0
    for k in range(pairs):
        teacher, student = scene.method.teachers[k], scene.method.students[k]
        soft = no_gradient(teacher, scene.more)
        start = scene.drawn(f"direction {k}").double() - 0.5
        start = start / length(start)
        changed = []
        for x, p, seen in zip(scene.more, soft, valid, strict=True):
            near = x + 0.01 * math.sqrt(3 * SIZE[0] * SIZE[1]) * start
            near = near[None].clone().requires_grad_()
            cross = -(p * log_softmax(scores(teacher, near))[0]).sum(dim=0)
            (gradient,) = torch.autograd.grad(cross[seen].sum(), near)
            squares = torch.zeros((), dtype=torch.float64)
            for i in range(SIZE[0]):
                for j in range(SIZE[1]):
                    if 0 < i < SIZE[0] - 1:
                        squares += ((x[:, i + 1, j] - x[:, i - 1, j]) ** 2).sum()
                    if 0 < j < SIZE[1] - 1:
                        squares += ((x[:, i, j + 1] - x[:, i, j - 1]) ** 2).sum()
            radius = 1.5 * 0.5 * squares.sqrt()
            changed.append(x + radius * gradient[0] / length(gradient))
        out = scores(student, torch.cat([scene.images, torch.stack(changed)]))
        sup += mean_cross_entropy(out[:3], scene.label)
        divergence = (soft * (soft.log() - log_softmax(out[3:]))).sum(dim=1)  # over the classes
        share = (soft.max(dim=1).values >= 0.14).double().mean()  # both of all pixels
        assert 0.02 < share < 0.98
        ct += (divergence * valid).mean() * share
    rise = math.exp(-5 * (1 - (2 / 6) / 0.5) ** 2)  # before the third step of six
    scene.check({"sup": (1.0, sup), "ct": (0.7 * rise, ct)})


def test_the_divergence_of_two_probabilities() -> None:
    """From (1, 0) to (0.7, 0.3) it is -log 0.7; pixels that are not valid have none."""
    logits = torch.tensor([[0.7, 0.3]]).log()[:, :, None, None].expand(1, 2, 1, 2)
    soft = torch.tensor([[1.0, 0.0]])[:, :, None, None].expand(1, 2, 1, 2)
    valid = torch.tensor([[[True, False]]])
    assert float(vat.divergence(logits, Grid(1), soft, valid)) == pytest.approx(-math.log(0.7))


def test_an_even_image_has_no_texture_and_a_slope_its_own() -> None:
    slope = torch.arange(7.0).expand(1, 3, 5, 7)  # 1 from pixel to pixel, in 5 columns of 5 rows
    assert float(vat.texture(torch.full((1, 3, 5, 7), 2.0))) == 0
    assert float(vat.texture(slope)) == pytest.approx(math.sqrt(3 * 5 * 5))


def test_single_precision_finds_the_direction(tiny: Settings) -> None:
    """The exact one is the limit of small steps; a step as small as the program's is lost."""
    scene = Scene(tiny, "vat", {})
    method, step, seen = scene.engine.method, scene.engine.step, ~scene.padding
    start, soft = (
        scene.drawn("direction 0").double() - 0.5,
        no_gradient(method.teachers[0], scene.more),
    )
    near = (scene.more + 1e-6 * start).requires_grad_()
    cross = -(soft * log_softmax(scores(method.teachers[0], near))).sum(dim=1)
    (exact,) = torch.autograd.grad(cross[seen].sum(), near)
    images = to_unit(unlabeled(3, 102)[0])
    b = {"mixed": images, "valid 0": seen}
    found = method.float().worst_direction(0, step.normalize(images), b, step)
    assert found.dtype == torch.float32
    for one, other in zip(found.double(), exact, strict=True):
        assert float((one * other).sum() / length(other)) > 0.95


def test_a_teacher_without_numbers_changes_no_image(tiny: Settings) -> None:
    engine = make(tiny.with_method("vat"))
    with torch.no_grad():
        engine.method.teachers[0].classifier.bias[:] = math.nan
    seen = engine(labeled(3, 0), unlabeled(3, 1))
    assert float(seen["lost_pixels"]) == 1
    assert float(seen["ct"]) == 0
    assert float(seen["sup"]) > 0
    assert all(bool(p.isfinite().all()) for p in engine.method.students.parameters())
