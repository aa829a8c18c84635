from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods.base import Batch
from ctt.methods.critics import Discriminator, frozen, judged
from ctt.settings import Settings, update
from ctt.train.engine import Engine
from tests.methods.objectives import has_gradient, objective, odd_batch, scores
from tests.train.steps import batch, make, unlabelled

OPTIONS = {
    "adv": 0.7,
    "adv_unlabeled": 0.4,
    "semi": 0.9,
    "threshold": 0.5,
    "critic_width": 8,
    "start": 0.5,
}


@pytest.fixture
def adversarial(tiny: Settings) -> Settings:
    settings = update(
        tiny.with_method("advsemiseg"), {"options": OPTIONS | {"critic_width": 8}}, "test"
    )
    return update(settings, {"loss": {"sup": 1.3}}, "test")


def undecided(engine: Engine, b: Batch) -> None:
    """Make the critic's logits differ from place to place, around 0."""
    (student,), (critic,) = engine.method.students, engine.method.critics
    with torch.no_grad():
        for name, weight in critic.named_parameters():
            weight *= 0 if name.endswith("bias") else 3
        both = torch.cat([b["images"], b["unlabeled"]])
        critic.layers[-1].bias -= critic(scores(student, both).softmax(dim=1)).mean()


# 27 is below what the layers need
@pytest.mark.parametrize(("iteration", "begun", "size"), [(2, 0, (27, 35)), (3, 1, (37, 43))])
def test_the_objective_is_that_of_the_equations(
    adversarial: Settings, iteration: int, begun: int, size: tuple[int, int]
) -> None:
    b = odd_batch(3, *size)
    engine, terms = objective(adversarial, b, iteration, lambda engine: undecided(engine, b))
    (student,), (critic,) = engine.method.students, engine.method.critics
    y, n = b["label"], 3
    logits = scores(student, torch.cat([b["images"], b["unlabeled"]]))
    p = logits.softmax(dim=1)
    labelled, shown = y != IGNORE, ~b["padding"]
    valid = torch.cat([labelled, shown])

    def bce(mask, where, target):
        logit = critic(mask)[where]
        return F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target))

    mask = torch.stack([y == c for c in range(11)], dim=1).double()
    sup = F.cross_entropy(logits[:n], y, ignore_index=IGNORE)
    adv, adv_unlabeled = bce(p[:n], labelled, 1.0), bce(p[n:], shown, 1.0)
    own = p[n:].argmax(dim=1)
    own[(critic(p[n:]).sigmoid() < 0.5) | ~shown] = IGNORE
    assert 0.05 < float((own != IGNORE).double().mean()) < 0.95  # some are believed, some not
    semi = F.cross_entropy(logits[n:], own, ignore_index=IGNORE)
    told_apart = (bce(p.detach(), valid, 0.0) + bce(mask, labelled, 1.0)) / 2
    expected = (sup, adv, adv_unlabeled, semi, told_apart)
    names = ("sup", "adv", "adv_unlabeled", "semi", "critic")
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-9, atol=0, msg=name)
    weighted = 1.3 * sup + 0.7 * adv + 0.4 * adv_unlabeled + 0.9 * begun * semi
    has_gradient([student], weighted)
    has_gradient([critic], told_apart)
    believed = (own != IGNORE).sum() / shown.sum()
    torch.testing.assert_close(engine.step.logged["believed"], believed)


def test_a_frozen_critic_gets_no_gradient_and_gives_one() -> None:
    critic, maps = Discriminator(5, 8), torch.rand(2, 5, 40, 33, requires_grad=True)
    frozen(critic)(maps).sum().backward()
    assert all(w.grad is None for w in critic.parameters())
    assert maps.grad.abs().sum() > 0
    assert torch.equal(frozen(critic)(maps), critic(maps))


def test_the_discriminator_is_that_of_the_paper() -> None:
    """Five layers of stride 2: crops of 321 become 10 cells wide."""
    critic = Discriminator(21, 64)
    kernels = [tuple(w.shape) for name, w in critic.named_parameters() if name.endswith("weight")]
    widths = (21, 64, 128, 256, 512, 1)
    assert kernels == [(b, a, 4, 4) for a, b in pairwise(widths)]
    assert critic.layers(torch.zeros(1, 21, 321, 321)).shape == (1, 1, 10, 10)
    assert critic(torch.zeros(1, 21, 321, 321)).shape == (1, 321, 321)


def test_nothing_judged_is_0_even_of_logits_that_are_no_numbers() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert float(judged(torch.full((2, 3), torch.nan), True, nothing, torch.tensor(1))) == 0


def test_critics_learn_at_their_own_rate_which_falls_with_the_students(
    adversarial: Settings,
) -> None:
    change = {"options": {"critic_lr": 3e-3}, "optim": {"lr": 0.2, "power": 1.0}}
    engine = make(update(adversarial, change, "test"))
    for i, share in enumerate((1, 5 / 6, 4 / 6)):
        engine(batch(seed=i), unlabelled())
        (group,) = engine.optimizers["critics"].param_groups
        assert group["lr"] == pytest.approx(3e-3 * share)


def test_each_student_has_a_critic_of_its_own(adversarial: Settings) -> None:
    engine = make(adversarial, 2)
    one, other = (next(critic.parameters()) for critic in engine.method.critics)
    assert not torch.equal(one, other)
    terms = engine(batch(), unlabelled())
    alone = make(adversarial, 1)(batch(), unlabelled())
    assert float(terms["critic"]) == pytest.approx(2 * float(alone["critic"]), rel=0.2)
