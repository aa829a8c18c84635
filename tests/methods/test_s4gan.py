from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods.base import Batch
from ctt.methods.critics import ImageCritic
from ctt.methods.s4gan import feature_matching
from ctt.settings import Settings, update
from ctt.train.engine import Engine
from tests.methods.objectives import has_gradient, objective, odd_batch, scores
from tests.train.steps import make

OPTIONS = {"fm": 0.7, "st": 0.9, "threshold": 0.5, "critic_width": 8}


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    options = {"options": OPTIONS, "loss": {"sup": 1.3}}
    return update(tiny.with_method("s4gan"), options, "test")


def undecided(engine: Engine, b: Batch) -> None:
    """Make the critic's logits differ from image to image, around 0."""
    (student,), (critic,) = engine.method.students, engine.method.critics
    with torch.no_grad():
        for name, weight in critic.named_parameters():
            weight *= 0 if name.endswith("bias") else 3
        p = scores(student, torch.cat([b["images"], b["unlabeled"]])).softmax(dim=1)
        made = torch.cat([p[len(b["label"]) :], b["unlabeled"]], dim=1)
        draw = engine.step.rand_each("dropout-0", [(56, 3)] * 4, 1)[0].T
        critic.score.bias -= critic(made, draw)[0][1:].mean()


def judge(critic: ImageCritic, maps: torch.Tensor, kept: torch.Tensor) -> tuple:
    """Score and features, layer by layer; a dropped channel is 0, the others count twice."""
    x, start = maps, 0
    for i, layer in enumerate(critic.layers):
        x = F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1), 0.2)
        if i < 3:
            x = 2 * x * kept[:, start : start + x.shape[1], None, None]
            start += x.shape[1]
    pooled = x.flatten(2).mean(dim=2)
    return F.linear(pooled, critic.score.weight, critic.score.bias)[:, 0], pooled


@pytest.mark.parametrize(("iteration", "begun"), [(0, 0), (1, 1)])
def test_the_objective_is_that_of_the_equations(
    settings: Settings, iteration: int, begun: int
) -> None:
    b = odd_batch()  # its first mask is nothing but ignored pixels
    b["padding"][0] = True
    engine, terms = objective(settings, b, iteration, lambda engine: undecided(engine, b))
    (student,), (critic,) = engine.method.students, engine.method.critics
    kept = [draw.T >= 0.5 for draw in engine.step.rand_each("dropout-0", [(56, 3)] * 4, 1)]
    y, n = b["label"], 3
    logits = scores(student, torch.cat([b["images"], b["unlabeled"]]))
    p = logits[n:].softmax(dim=1)
    made = torch.cat([p, b["unlabeled"]], dim=1)
    mask = torch.cat([torch.stack([y == c for c in range(11)], dim=1), b["images"]], dim=1).double()
    score, features = judge(critic, made, kept[0])
    wanted = judge(critic, mask, kept[1])[1]
    sup = F.cross_entropy(logits[:n], y, ignore_index=IGNORE)
    fm = (wanted[1:].mean(dim=0) - features[1:].mean(dim=0)).abs().mean()
    own = p.argmax(dim=1)
    own[b["padding"] | ~(score.sigmoid() > 0.5)[:, None, None]] = IGNORE
    chosen = (own != IGNORE).flatten(1).any(dim=1)
    assert 0 < int(chosen.sum()) < 2
    st = F.cross_entropy(logits[n:], own, ignore_index=IGNORE)
    told_apart = 0
    for maps, pattern, target in ((made.detach(), kept[2], 0.0), (mask, kept[3], 1.0)):
        logit = judge(critic, maps, pattern)[0][1:]
        bce = F.binary_cross_entropy(logit.sigmoid(), torch.full_like(logit, target))
        told_apart = told_apart + bce / 2
    for name, value in {"sup": sup, "fm": fm, "st": st, "critic": told_apart}.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-9, atol=0, msg=name)
    has_gradient([student], 1.3 * sup + 0.7 * fm + 0.9 * begun * st)
    has_gradient([critic], told_apart)
    assert float(engine.step.logged["images_chosen"]) == int(chosen.sum()) / 2


def test_equal_features_match(settings: Settings) -> None:
    step, features, every = make(settings).step, torch.rand(3, 512), torch.ones(3).bool()
    assert float(feature_matching(features, features.clone(), every, every, step)) == 0
    apart = feature_matching(features, features + 2, every, every, step)
    assert float(apart) == pytest.approx(2)
    assert float(feature_matching(features, features + 2, every, ~every, step)) == 0


def test_an_image_at_the_threshold_is_not_learnt(settings: Settings) -> None:
    def at_the_threshold(engine: Engine) -> None:
        for weight in engine.method.critics.parameters():
            weight.data.zero_()  # every score is exactly 0.5

    engine, terms = objective(settings, odd_batch(), 1, at_the_threshold)
    assert float(terms["st"]) == float(engine.step.logged["images_chosen"]) == 0


def test_the_critic_is_that_of_the_program() -> None:
    """Four layers 4x4 of stride 2, whose last is pooled: 20 cells of a crop of 321."""
    critic = ImageCritic(24, 64)
    kernels = [tuple(layer.weight.shape) for layer in critic.layers]
    assert kernels == [(b, a, 4, 4) for a, b in pairwise((24, 64, 128, 256, 512))]
    assert critic.score.weight.shape == (1, 512)
    score, features = critic(torch.zeros(2, 24, 8, 40), torch.rand(2, 448))
    assert (score.shape, features.shape) == ((2,), (2, 512))
