"""Virtual adversarial training beside a rendering of its equations."""

import copy

import pytest
import torch

from ctt.data.digits import INFO
from ctt.methods.vat import NOISE, differences
from ctt.settings import Settings
from tests.methods.rendering import Scene, mean_cross_entropy, no_gradient, scores, surer


def test_half_the_difference_of_the_neighbours() -> None:
    ramp = torch.arange(5.0).expand(1, 3, 4, 5)  # rises by 1 to the right
    found = differences(ramp)
    assert float(found.square().sum()) == pytest.approx(3 * 4 * 3)


@pytest.mark.parametrize("pairs", [1, 2])
def test_vat(tiny: Settings, pairs: int) -> None:
    options = {"weight": 3.0, "radius": 0.4, "threshold": 0.2}
    scene = Scene(tiny, "vat", {"options": options}, pairs, alter=surer)
    std = torch.tensor(INFO.std).double()[:, None, None]
    noise = NOISE * torch.special.ndtri(scene.drawn("noise").clamp(1e-6, 1 - 1e-6)).double()
    valid, sup, ct = ~scene.padding, 0, 0
    for teacher, student in zip(scene.method.teachers, scene.method.students, strict=True):
        still = copy.deepcopy(student).eval()
        r = noise.clone().requires_grad_()
        answer = no_gradient(still, scene.more)
        moved = scores(still, scene.more + r / std).softmax(dim=1)
        (g,) = torch.autograd.grad((((moved - answer) ** 2).sum(dim=1))[valid].sum(), r)
        images = scene.more.clone()
        for i in range(3):
            x = scene.more[i] * std  # up to a constant, the image in 0..1
            across, down = (x[:, :, 2:] - x[:, :, :-2]) / 2, (x[:, 2:] - x[:, :-2]) / 2
            length = 0.4 * (across.square().sum() + down.square().sum()).sqrt()
            images[i] += length * g[i] / g[i].norm() / std
        soft = no_gradient(teacher, scene.more)
        out = scores(student, torch.cat([scene.images, images]))
        distance = ((out[3:].softmax(dim=1) - soft) ** 2).sum(dim=1)[valid].mean()
        share = (soft.max(dim=1).values[valid] >= 0.2).double().mean()
        assert 0.02 < share < 0.98, share
        ct += distance * share
        sup += mean_cross_entropy(out[:3], scene.label)
    scene.check({"sup": (1.0, sup), "ct": (3.0, ct)})
