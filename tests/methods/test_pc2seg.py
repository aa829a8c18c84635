"""PC2Seg beside a rendering of its equations, in plain loops."""

from typing import Any

import pytest
import torch

from ctt.methods.pc2seg import distance
from ctt.models.base import Grid
from ctt.settings import Settings
from tests.methods.rendering import Scene, all_surer, mean_cross_entropy, scores


def test_equal_answers_are_at_no_distance() -> None:
    logits, valid = torch.randn(2, 11, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    found = distance(logits, Grid(1), logits.softmax(dim=1), valid)
    torch.testing.assert_close(found, torch.zeros(()), atol=1e-5, rtol=0)


def fill(method: Any) -> None:
    rng = torch.Generator().manual_seed(3)
    for bank in method.banks:
        keys = torch.randn(bank.keys.shape, generator=rng, dtype=torch.float64)
        bank.keys.copy_(keys / keys.norm(dim=2, keepdim=True))
        bank.count.fill_(bank.capacity)
        bank.count[2], bank.count[5] = 3, 0


@pytest.mark.parametrize("pairs", [1, 2])
def test_every_term_and_gradient(tiny: Settings, pairs: int) -> None:
    options = {"capacity": 6, "pushed": 2, "dim": 5, "consistency": 0.7, "contrast": 0.2}
    scene = Scene(tiny, "pc2seg", {"options": options}, pairs, 3, fill)
    terms: dict[str, Any] = {"sup": 0, "consistency": 0, "contrast": 0}
    both = torch.cat([scene.images, scene.more])
    for k, student in enumerate(scene.method.students):
        project, bank, stride = scene.method.projections[k], scene.method.banks[k], student.stride
        was = student.training
        with torch.no_grad():
            student.eval()
            soft, out = scores(student, scene.more).softmax(dim=1), student(scene.more)
            weak, own = project(out.features), out.logits.argmax(dim=1)
            student.train(was)
        answer = scores(student, both)
        terms["sup"] += mean_cross_entropy(answer[:3], scene.label)
        p, away = answer[3:].softmax(dim=1), []
        for i, y, x in (~scene.padding).nonzero().tolist():
            one, other = p[i, :, y, x], soft[i, :, y, x]
            away.append(1 - one @ other / one.norm() / other.norm())
        terms["consistency"] += torch.stack(away).mean()
        strong, told = project(student(both).features)[3:], []
        for i, y, x in (~scene.padding[:, ::stride, ::stride]).nonzero().tolist():
            f = strong[i, :, y, x] / strong[i, :, y, x].norm()
            same = torch.exp(f @ (weak[i, :, y, x] / weak[i, :, y, x].norm()) / 0.07)
            held = [bank.keys[c, : bank.count[c]] for c in range(11) if c != own[i, y, x]]
            others = torch.exp(torch.cat(held).double() @ f / 0.07).sum()
            told.append(-torch.log(same / (same + others)))
        terms["contrast"] += torch.stack(told).mean()
    weights = {"sup": 1.0, "consistency": 0.7, "contrast": 0.2}
    scene.check({name: (weights[name], value) for name, value in terms.items()})


def test_the_memory_takes_the_surest_pixels_of_the_weak_view(tiny: Settings) -> None:
    options = {"capacity": 40, "pushed": 4, "dim": 5}
    scene = Scene(tiny, "pc2seg", {"options": options}, 2, 2, all_surer)
    done: Any = scene.engine.method
    for k, student in enumerate(scene.method.students):
        bank, before, stride = done.banks[k], scene.method.banks[k], student.stride
        student.eval()
        with torch.no_grad():
            out = student(scene.more)
            known = scene.method.projections[k](out.features).movedim(1, -1).flatten(0, 2)
        confidence, own = out.logits.softmax(dim=1).max(dim=1)
        confidence, own = confidence.flatten(), own.flatten()
        shown = ~scene.padding[:, ::stride, ::stride].flatten()
        pushed, left_out = 0, 0
        for c in range(11):
            of_class = ((own == c) & shown).nonzero().flatten().tolist()
            of_class.sort(key=lambda i: -float(confidence[i]))
            left_out += len(of_class[4:])
            old, held = int(before.count[c]), int(bank.count[c])
            assert held - old == len(of_class[:4])
            torch.testing.assert_close(bank.keys[c, :old], before.keys[c, :old])
            for place, i in enumerate(of_class[:4], old):
                key = known[i] / known[i].norm()
                torch.testing.assert_close(bank.keys[c, place].double(), key, rtol=1e-5, atol=1e-6)
            pushed += held - old
        assert pushed > 4  # of more than one class
        assert left_out > 0
