import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.errors import UserError
from ctt.methods.critics import FlawDetector, HalfNorm
from ctt.methods.gct import choose, flaw_truth
from ctt.settings import Settings, update
from ctt.train.engine import Engine
from tests.methods.objectives import has_gradient, normal, objective, odd_batch, scores
from tests.train.steps import make

OPTIONS = {"fc": 0.7, "dc": 30.0, "flaw": 5.0, "ramp": 1.0, "critic_width": 8}


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    options = {"options": OPTIONS, "loss": {"sup": 1.3}}
    return update(tiny.with_method("gct"), options, "test")


def gaussian(maps: Tensor, size: int) -> Tensor:
    """Blur by a square kernel."""
    size += size % 2 == 0
    offset = torch.arange(size) - (size - 1) / 2
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    kernel = torch.exp(-(offset[:, None] ** 2 + offset**2).double() / (2 * sigma**2))
    padded = F.pad(maps[:, None], [size // 2] * 4, mode="reflect")
    return F.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0]


def unit(one: Tensor) -> Tensor:
    return (one - one.min()) / (one.max() - one.min() + 1e-9)


def flawed(engine: Engine) -> None:
    """Make the detector see flaws, here and there."""
    with torch.no_grad():
        engine.method.detector.layers[-1].weight *= 30


def test_the_objective_is_that_of_the_equations(settings: Settings) -> None:
    b = odd_batch(3, 150, 163)  # the detector's grid is 3 x 4
    engine, terms = objective(settings, b, 3, flawed)
    students, detector, y, n = list(engine.method.students), engine.method.detector, b["label"], 3
    images = torch.cat([b["images"], b["unlabeled"]])
    valid = torch.cat([y != IGNORE, ~b["padding"]])
    p = [scores(net, images).softmax(dim=1) for net in students]
    sup = sum(F.nll_loss(q[:n].log(), y, ignore_index=IGNORE) for q in p)
    flaw = [detector(torch.cat([normal(images), q], dim=1)) for q in p]
    told = [detector(torch.cat([normal(images), q.detach()], dim=1))[:n] for q in p]
    own = 0
    for q, guess in zip(p, told, strict=True):
        true = torch.stack([y == c for c in range(11)], dim=1).double()
        wrong = 0.5 * (true - q[:n].detach()).abs().sum(dim=1) * valid[:n]
        spread = F.max_pool2d(F.pad(gaussian(wrong, 150 // 8), [1] * 4, mode="reflect"), 3, 1)
        truth = torch.stack([unit(one) for one in gaussian(spread, 150 // 4)])
        own = own + (guess - truth)[valid[:n]].square().mean() / 2
    smooth = [gaussian(f.detach().clamp(min=0), 150 // 16) for f in flaw]
    scaled = [torch.stack([unit(one) * float(one.max() > 0.1) for one in s]) for s in smooth]
    bad = [s > 0.6 for s in scaled]
    left, right = (torch.where(x, 1.0, s) for x, s in zip(bad, scaled, strict=True))
    both = bad[0] & bad[1] & valid
    target = [
        torch.where((left <= right)[:, None], p[0], p[1]).detach(),
        torch.where((right <= left)[:, None], p[1], p[0]).detach(),
    ]
    for case in (both, left < right, right < left, left == right):
        assert 0 < float((case & valid).sum() / valid.sum()) < 1
    fc = sum((f.square() * both).sum() / valid.sum() for f in flaw)
    dc = sum((q - t).square().mean(dim=1)[valid].mean() for q, t in zip(p, target, strict=True))
    for name, value in {"sup": sup, "fc": fc, "dc": dc, "flaw": own}.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-8, atol=0, msg=name)
    ramp = math.exp(-5 * (1 - 3 / 6) ** 2)
    has_gradient(students, 1.3 * sup + 0.7 * fc + 30 * ramp * dc)
    has_gradient([detector], 5 * own)
    torch.testing.assert_close(engine.step.logged["both_bad"], both.sum() / valid.sum())


def test_without_flaws_each_student_keeps_to_itself() -> None:
    p = [torch.rand(2, 5, 20, 20) for _ in range(2)]
    for flaw in (0.0, -1.0, 0.09):
        target, bad = choose(p, [torch.full((2, 20, 20), flaw)] * 2, 0.6)
        assert all(torch.equal(t, own) for t, own in zip(target, p, strict=True))
        assert not bad.any()


def test_the_student_without_flaws_teaches_the_other() -> None:
    p = [torch.rand(2, 5, 20, 20) for _ in range(2)]
    flaws = torch.zeros(2, 20, 20)
    flaws[:, :10] = 3.0
    (one, other), bad = choose(p, [flaws, torch.zeros(2, 20, 20)], 0.6)
    assert torch.equal(one[:, :, :8], p[1][:, :, :8])
    assert torch.equal(one[:, :, 12:], p[0][:, :, 12:])
    assert torch.equal(other, p[1])
    assert not bad.any()


def test_a_perfect_prediction_has_no_flaw() -> None:
    label = torch.randint(0, 5, (2, 40, 30))
    perfect = F.one_hot(label, 5).permute(0, 3, 1, 2).double()
    assert not flaw_truth(perfect, label).any()
    label[:, :10] = IGNORE
    assert not flaw_truth(perfect, label).any()


def test_one_wrong_place_is_the_worst_of_its_image() -> None:
    label = torch.zeros(1, 64, 64, dtype=torch.int64)
    probability = F.one_hot(label, 3).permute(0, 3, 1, 2).double()
    probability[:, :, 30:34, 40:44] = 1 / 3
    flaw = flaw_truth(probability, label)[0]
    assert float(flaw.min()) == 0
    assert float(flaw.max()) == pytest.approx(1, abs=1e-6)
    row, column = divmod(int(flaw.argmax()), 64)
    assert abs(row - 31.5) < 2
    assert abs(column - 41.5) < 2


def test_the_detector_is_that_of_the_program() -> None:
    layers = list(FlawDetector(24, 64).layers)
    convolutions = [x for x in layers if isinstance(x, nn.Conv2d)]
    widths = [24, 64, 128, 128, 256, 256, 512, 512, 1]
    assert [c.in_channels for c in convolutions] + [1] == widths
    assert [c.stride[0] for c in convolutions] == [2, 2, 1, 2, 1, 2, 1, 2]
    assert all(c.kernel_size == (4, 4) and c.padding == (1, 1) for c in convolutions)
    assert sum(isinstance(x, HalfNorm) for x in layers) == 7
    x = torch.rand(4, 6, 5, 5) * 3 + 1
    normed = HalfNorm(6)(x)
    for part, axes in ((normed[:, :3], (0, 2, 3)), (normed[:, 3:], (2, 3))):
        torch.testing.assert_close(
            part.mean(dim=axes), torch.zeros_like(part.mean(dim=axes)), atol=1e-5, rtol=0
        )
    assert normed[:, :3].mean(dim=(2, 3)).abs().max() > 0.01


def test_other_numbers_of_networks_are_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match="`pairs` 3: GCT compares two networks"):
        make(settings, 3)
