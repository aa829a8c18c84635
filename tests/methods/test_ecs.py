import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.settings import Settings, update
from ctt.train.engine import Engine
from tests.methods.grids import at_pixels
from tests.methods.objectives import has_gradient, normal, objective, odd_batch, scores
from tests.train.steps import batch, make, unlabelled


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    options = {"agreement": 0.6, "semi": 0.9, "ramp": 1.0}
    change = {"options": options, "loss": {"sup": 1.3}}
    return update(tiny.with_method("ecs"), change, "test")


def undecided(engine: Engine) -> None:
    """Make corrections rare enough that both answers are found."""
    engine.method.critics[0].classifier.bias.data[11] += 0.6


def test_the_objective_is_that_of_the_equations(settings: Settings) -> None:
    b = odd_batch()
    engine, terms = objective(settings, b, 2, undecided)
    (student,), (corrector,) = engine.method.students, engine.method.critics
    y, n, images = b["label"], 3, torch.cat([b["images"], b["unlabeled"]])
    logits = scores(student, images)
    p = logits.softmax(dim=1)

    def findings(maps: torch.Tensor) -> torch.Tensor:
        grid = corrector(torch.cat([normal(images), maps], dim=1)).logits
        return at_pixels(grid, y.shape, 2)

    sup = F.cross_entropy(logits[:n], y, ignore_index=IGNORE)
    found, told = findings(p).log_softmax(dim=1), findings(p.detach())
    agreement = -found[:n, 11][y != IGNORE].mean()
    truth = torch.where(p[:n].argmax(dim=1) == y, 11, y)
    assert (truth == 11).any()
    corrector_loss = F.cross_entropy(told[:n], truth, ignore_index=IGNORE)
    certainty, answer = found[n:].detach().exp().max(dim=1)
    target = torch.where(answer == 11, p[n:].argmax(dim=1), answer)
    shown = ~b["padding"]
    assert 0.02 < float((answer == 11)[shown].double().mean()) < 0.98
    likely = logits[n:].log_softmax(dim=1).gather(1, target[:, None])[:, 0]
    semi = -(certainty * likely)[shown].mean()
    expected = {"sup": sup, "agreement": agreement, "semi": semi, "corrector": corrector_loss}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-9, atol=0, msg=name)
    ramp = math.exp(-5 * (1 - 2 / 6) ** 2)
    has_gradient([student], 1.3 * sup + 0.6 * agreement + 0.9 * ramp * semi)
    has_gradient([corrector], corrector_loss)
    corrected = ((answer != 11) & shown).sum() / shown.sum()
    torch.testing.assert_close(engine.step.logged["corrected"], corrected)


@pytest.mark.parametrize(
    ("name", "backbone"), [("small", ""), ("deeplabv3plus", "resnet18"), ("vit", "test_vit")]
)
def test_the_correction_network_reads_class_maps_and_has_a_class_more(
    settings: Settings, name: str, backbone: str
) -> None:
    model = {"name": name, "backbone": [backbone] if backbone else []}
    method = make(update(settings, {"model": model}, "test")).method
    (student,), (corrector,) = method.students, method.critics
    out = corrector.eval()(torch.rand(1, 3 + 11, 56, 56))
    assert out.logits.shape[1] == 12
    first, own = (
        next(x for x in net.modules() if isinstance(x, nn.Conv2d)) for net in (corrector, student)
    )
    assert first.weight.shape[1] == first.in_channels == 14
    assert not torch.equal(first.weight[:, :3], own.weight)
    larger, smaller = (sum(p.numel() for p in net.parameters()) for net in (corrector, student))
    kernel = own.kernel_size[0] * own.kernel_size[1] * own.out_channels
    assert larger - smaller == 11 * kernel + student.classifier.in_channels + 1


def test_both_networks_are_trained(settings: Settings) -> None:
    engine = make(settings)
    before = {name: w.clone() for name, w in engine.method.named_parameters()}
    engine(batch(), unlabelled())
    for name, weight in engine.method.named_parameters():
        assert not torch.equal(weight, before[name]), name


def test_a_backbone_with_its_own_normalisation_corrects_too(tiny: Settings) -> None:
    """Which is one of the image's channels, not of the probabilities that come with them."""
    model = {"name": "deeplabv3plus", "backbone": ["test_resnet"], "normalization": "weights"}
    engine = make(update(tiny.with_method("ecs"), {"model": model}, "test"))
    corrector = engine.method.critics[0]
    image, maps = torch.rand(2, 3, 24, 24), torch.rand(2, 11, 24, 24)
    expected = torch.cat([engine.method.students[0].adapted(image), maps], dim=1)
    assert torch.equal(corrector.adapted(torch.cat([image, maps], dim=1)), expected)
    terms = engine(batch(), unlabelled())
    assert all(bool(value.isfinite()) for value in terms.values())
