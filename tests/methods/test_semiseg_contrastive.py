"""SemiSeg-Contrastive beside a rendering of its equations, in plain loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ctt.data import mixing
from ctt.data.dataset import IGNORE
from ctt.methods.class_memory import Selectors, part_of_weighted_mean
from ctt.settings import Settings, update
from tests.methods.rendering import Scene, cross_entropies, mean_cross_entropy, mixed, scores
from tests.methods.test_u2pl import ALONE
from tests.train.steps import batch, make, unlabelled


def test_equal_weights_give_the_mean() -> None:
    values = torch.rand(3, 7)
    found = part_of_weighted_mean(torch.full((3, 7), 0.4), values, ALONE)
    torch.testing.assert_close(found, values.mean(dim=1))


def test_the_gradient_is_that_of_the_mean() -> None:
    weight, values = (torch.rand(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    own = part_of_weighted_mean(weight, values, ALONE).sum()
    plain = ((weight * values).sum(dim=1) / weight.sum(dim=1)).sum()
    for one, other in zip(
        torch.autograd.grad(own, (weight, values)),
        torch.autograd.grad(plain, (weight, values)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def selected(selectors: Selectors, c: int, x: Tensor) -> Tensor:
    """Return the weight of a vector (D,) of class c."""
    hidden = selectors.norm(x @ selectors.first[c])
    return torch.sigmoid(torch.where(hidden > 0, hidden, 0.2 * hidden) @ selectors.second[c])


def fill(method: Any) -> None:
    rng = torch.Generator().manual_seed(3)
    for memory in method.memories:
        keys = torch.randn(memory.bank.keys.shape, generator=rng, dtype=torch.float64)
        memory.bank.keys.copy_(keys / keys.norm(dim=2, keepdim=True))
        memory.bank.count.fill_(memory.bank.capacity)
        memory.bank.count[2], memory.bank.count[5] = 3, 0


@pytest.mark.parametrize("pairs", [1, 2])
def test_every_term_and_gradient(tiny: Settings, pairs: int) -> None:
    options = {"start": 0.0, "capacity": 6, "pixels": 8, "mix": 1.0, "power": 2.0, "sure": 0.0}
    options |= {"entropy": 0.3, "contrast": 0.2}
    scene = Scene(tiny, "semiseg-contrastive", {"options": options}, pairs, 3, fill)
    terms = {"sup": 0, "ct": 0, "entropy": 0, "contrast": 0}
    with torch.no_grad():
        given = [scores(t, scene.more).softmax(dim=1) for t in scene.method.teachers]
    shown = torch.stack(given).mean(dim=0).argmax(dim=1).masked_fill(scene.padding, IGNORE)
    keep = mixing.classmix_mask(shown, scene.drawn("mix"), True)
    images = torch.cat([scene.images, mixed(scene.more, keep)])
    for k, student in enumerate(scene.method.students):
        confidence, label = given[k].max(dim=1)
        label, confidence = (
            mixed(label.masked_fill(scene.padding, IGNORE), keep),
            mixed(confidence, keep),
        )
        out = scores(student, images)
        terms["sup"] += mean_cross_entropy(out[:3], scene.label)
        terms["ct"] += (confidence**2 * cross_entropies(out[3:], label)).sum() / label.numel()
        p = out[3:].softmax(dim=1)
        # of 11 classes at most log2(11) bits, by which the program divides
        terms["entropy"] += -(p * p.log2()).sum(dim=1)[label != IGNORE].mean() / math.log2(11)
        features = student(images).features
        features = scene.method.predictions[k](scene.method.projections[k](features))
        memory, stride = scene.method.memories[k], student.stride
        for kind, maps, truth in (
            ("label", features[:3], scene.label),
            ("more", features[3:], label),
        ):
            own = truth[:, ::stride, ::stride].flatten()
            ticket = scene.drawn(f"{kind} {k}").flatten()
            maps, means = maps.movedim(1, -1).flatten(0, 2), []
            for c in range(11):
                chosen = sorted(
                    (own == c).nonzero().flatten().tolist(), key=lambda i: -float(ticket[i])
                )[:8]
                held = int(memory.bank.count[c])
                if not chosen or not held:
                    means.append(torch.zeros(()).double())
                    continue
                pairs_, weights = [], []
                for i in chosen:
                    f = maps[i] / maps[i].norm()
                    for j in range(held):
                        m = memory.bank.keys[c, j].double()
                        w = selected(memory.of_pixels, c, f.detach()) * selected(
                            memory.of_vectors, c, m
                        )
                        pairs_.append(w * (1 - f @ m))
                        weights.append(w)
                means.append(sum(pairs_) / sum(weights))
            terms["contrast"] += torch.stack(means).mean()
    weights = {"sup": 1.0, "ct": 1.0, "entropy": 0.3, "contrast": 0.2}
    scene.check({name: (weights[name], value) for name, value in terms.items()})


def test_the_memory_takes_what_the_selectors_rank_highest(tiny: Settings) -> None:
    options = {"start": 0.0, "capacity": 60, "pixels": 50, "mix": 0.0, "sure": 0.0}
    scene = Scene(tiny, "semiseg-contrastive", {"options": options}, 1, 2)
    done: Any = scene.engine.method
    memory, before = done.memories[0], scene.method.memories[0]
    (teacher,), stride, pushed = done.teachers, done.teachers[0].stride, 0
    with torch.no_grad():
        out = teacher(scene.images)
        maps = done.slow_projections[0](out.features).movedim(1, -1).flatten(0, 2)
        predicted = out.logits.argmax(dim=1).flatten()
        truth = scene.label[:, ::stride, ::stride].flatten()
        for c in range(11):
            right = ((truth == c) & (predicted == c)).nonzero().flatten()
            f = [maps[i] / maps[i].norm() for i in right]
            ticket = scene.drawn("memory 0").flatten()[right]
            f = [f[int(i)] for i in ticket.argsort(descending=True)[:50]]
            f.sort(key=lambda x: -float(selected(memory.slow[0], c, x)))
            old = int(before.bank.count[c])
            held = int(memory.bank.count[c]) - old
            assert held == min(len(f), 3 * done.per_class)  # of three images
            for i in range(held):
                torch.testing.assert_close(memory.bank.keys[c, old + i].double(), f[i])
            pushed += held
    assert pushed > 0


def test_the_contrast_of_equal_parts_is_that_of_one(tiny: Settings) -> None:
    change = {
        "views": {"mix": "none", "jitter": 0, "blur_probability": 0},
        "optim": {"lr": 1e-9},
        "options": {"start": 0.0, "sure": 0.0, "mix": 0.0, "pixels": 4096, "capacity": 8},
    }
    settings = update(tiny.with_method("semiseg-contrastive"), change, "test")
    found = []
    for parts in (1, 2, 4):
        engine = make(update(settings, {"train": {"accumulate": parts}}, "test"))
        engine.method.eval()
        for i in range(3):
            four = [torch.cat([x] * 4) for x in (*batch(1, seed=i), *unlabelled(1, seed=i))]
            terms = engine((four[0], four[1]), (four[2], four[3]))
        found.append(float(terms["contrast"]))
    assert found[0] > 0
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)
