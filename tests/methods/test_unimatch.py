"""UniMatch and its second version beside renderings of their equations."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ctt.data import mixing
from ctt.data.dataset import IGNORE
from ctt.methods.base import Batch
from ctt.methods.followers import evaluating
from ctt.models.base import SegmentationModel
from ctt.settings import Settings, update
from tests.methods.grids import at_pixels, first_cell
from tests.methods.rendering import (
    SIZE,
    Scene,
    all_surer,
    cross_entropies,
    mean_cross_entropy,
    mixed,
    no_gradient,
    scores,
)
from tests.train.steps import batch, make, run, unlabelled

VIT = {"name": "vit", "backbone": "test_vit"}  # pads images, so that they are among its stages


def logits_of(network: SegmentationModel, stages: list[Tensor]) -> Tensor:
    """Return logits at every pixel."""
    features = network.decode(stages)
    grid = network.classifier(features)
    return at_pixels(grid, SIZE, network.stride, first_cell(network))


def labels(probability: Tensor, padding: Tensor, threshold: float) -> Tensor:
    """Return the class of what is sure, else 255; some pixels must be, and some not."""
    confidence, label = probability.max(dim=1)
    sure = confidence >= threshold
    assert 0.02 < sure[~padding].double().mean() < 0.98
    return torch.where(sure & ~padding, label, IGNORE)


def scaled(stages: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    """Return stages with factors (B, c) on their channels, but for the images."""
    return [
        x if x.shape[1] == 3 else x * f.double()[:, :, None, None]
        for x, f in zip(stages, factors, strict=True)
    ]


@pytest.mark.parametrize(("pairs", "model", "threshold"), [(2, {}, 0.23), (1, VIT, 0.4)])
def test_unimatch(tiny: Settings, pairs: int, model: dict[str, Any], threshold: float) -> None:
    options = {"threshold": threshold, "strong": 0.3, "features": 0.7, "dropout": 0.25}
    change = {"options": options, "model": model, "loss": {"sup": 2.0}}
    scene = Scene(tiny, "unimatch", change, pairs, alter=all_surer)
    keep = [mixing.small_box_mask(SIZE, scene.drawn(f"mix {v}")) for v in (0, 1)]
    assert not all(bool(k.all()) for k in keep)
    sup, strong, features = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for k, student in enumerate(scene.method.students):
        pasted = no_gradient(copy.deepcopy(student).eval(), scene.more)
        pasted = labels(pasted, scene.padding, threshold)
        stages = student.encode(torch.cat([scene.images, scene.more]))
        kept = scene.drawn(f"channels {k}") >= 0.25
        kept = list((kept / 0.75).split(student.stage_channels, dim=1))
        perturbed = scaled([x[3:] for x in stages], kept)
        out = logits_of(student, [torch.cat(x) for x in zip(stages, perturbed, strict=True)])
        sup = sup + mean_cross_entropy(out[:3], scene.label)
        own = labels(out[3:6].detach().softmax(dim=1), scene.padding, threshold)
        features = features + cross_entropies(out[6:], own).sum() / (~scene.padding).sum()
        views = scores(student, torch.cat([mixed(scene.more, m) for m in keep]))
        for v, said in enumerate(views.chunk(2)):
            partner = mixed(pasted, keep[v])
            label = torch.where(keep[v], own, partner)
            shown = ~mixed(scene.padding, keep[v])
            strong = strong + cross_entropies(said, label).sum() / shown.sum() / 2
    terms = {"sup": (1.0, sup), "strong": (0.15, strong), "features": (0.35, features)}
    scene.check(terms)


@pytest.mark.parametrize(("pairs", "model", "threshold"), [(2, {}, 0.23), (1, VIT, 0.4)])
def test_unimatch_v2(tiny: Settings, pairs: int, model: dict[str, Any], threshold: float) -> None:
    change = {"options": {"threshold": threshold, "weight": 0.8}, "model": model}
    scene = Scene(tiny, "unimatch-v2", change, pairs, alter=all_surer)
    keep = [mixing.small_box_mask(SIZE, scene.drawn(f"mix {v}")) for v in (0, 1)]
    sup, strong = torch.zeros(()), torch.zeros(())
    for k, student in enumerate(scene.method.students):
        sup = sup + mean_cross_entropy(scores(student, scene.images), scene.label)
        label = labels(no_gradient(scene.method.teachers[k], scene.more), scene.padding, threshold)
        twice = scene.drawn(f"channels {k}") < 0.5
        first = torch.where(twice, 2, 0)
        first[scene.drawn(f"whole {k}").argmin()] = 1  # of three images one keeps its channels
        stages = student.encode(torch.cat([mixed(scene.more, m) for m in keep]))
        channels = [x.shape[1] for x in stages]
        both = torch.cat([first, 2 - first])
        out = logits_of(student, scaled(stages, [both[:, :c] for c in channels]))
        for v, said in enumerate(out.chunk(2)):
            shown = ~mixed(scene.padding, keep[v])
            taught = cross_entropies(said, mixed(label, keep[v]))
            strong = strong + taught.sum() / shown.sum() / 2
    scene.check({"sup": (0.5, sup), "strong": (0.4, strong)})


def prepared(settings: Settings, size: int = 4) -> Batch:
    """Return the batch that the method makes of the first step."""
    engine = make(settings)
    seen: list[Batch] = []
    engine.method.after_step = lambda b, step: seen.append(b)  # type: ignore[method-assign]
    engine(batch(size), unlabelled(size))
    return seen[0]


def test_views_of_unimatch_v2_share_the_channels(tiny: Settings) -> None:
    """Both masks add up to 2, and half of the images keep all channels."""
    factor = prepared(tiny.with_method("unimatch-v2"), 5)["factor 0"]
    undropped = (factor == 1).all(dim=1)
    assert undropped.sum() == 2
    assert set(factor[~undropped].unique().tolist()) == {0, 2}
    assert factor.shape == (5, 16)  # of the widest stage


def test_nothing_unsure_is_taught_and_pixels_are_counted_all_the_same(tiny: Settings) -> None:
    settings = update(tiny.with_method("unimatch"), {"options": {"threshold": 1.0}}, "test")
    b = prepared(settings)
    assert (b["label 0 0"] == IGNORE).all()
    assert b["seen"] == 4 * 22 * 24
    terms = run(make(settings), 4, 1)[0]
    assert terms["strong"] == terms["features"] == 0


def test_half_of_the_views_have_a_box_of_their_own(tiny: Settings) -> None:
    b = prepared(tiny.with_method("unimatch"), 64)
    own = torch.stack([b["own 0"], b["own 1"]])
    assert 0.35 < own.all(dim=(2, 3)).double().mean() < 0.65
    assert not torch.equal(own[0], own[1])
    assert not torch.equal(b["draw 0"][:, 0], b["draw 0"][:, 1])  # the colours


def test_evaluation_mode_is_left_as_it_was_entered(tiny: Settings) -> None:
    student = make(tiny.with_method("unimatch")).method.students[0]
    student.stage1.eval()
    modes = [m.training for m in student.modules()]
    before = copy.deepcopy(student.state_dict())
    with evaluating(student):
        assert not any(m.training for m in student.modules())
        student(torch.rand(2, 3, 24, 24))
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())
