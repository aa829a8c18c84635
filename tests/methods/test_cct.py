"""Cross-consistency training beside a rendering of its equations."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.errors import UserError
from ctt.methods import cct
from ctt.settings import Settings, update
from tests.methods.rendering import Scene, mean_cross_entropy, scores
from tests.train.steps import batch, make, run, unlabelled


def said(decoder: nn.Module, z: Tensor) -> Tensor:
    """Return the probabilities of a 1x1 convolution."""
    weight = decoder.weight.flatten(1)  # type: ignore[operator, union-attr]
    logits = torch.einsum("cd,bdhw->bchw", weight, z) + decoder.bias[:, None, None]  # type: ignore[index]
    return logits.exp() / logits.exp().sum(dim=1, keepdim=True)


def virtual_adversary(decoder: nn.Module, z: Tensor, direction: Tensor) -> Tensor:
    """Return the noise of length 2 that one power iteration by autograd finds."""
    z = z.detach()
    step = (1e-4 * (direction - 0.5)).expand_as(z).clone().requires_grad_()
    p = said(decoder, z).detach()
    divergence = (p * (p.log() - said(decoder, z + step).log())).sum()
    (found,) = torch.autograd.grad(divergence, step)
    return torch.stack([2 * image / image.norm() for image in found])


def perturbations(scene: Scene, k: int, z: Tensor, main: Tensor) -> Iterator[Tensor]:
    """Give z as the decoders see it, kind by kind."""
    decoders = scene.method.decoders[k]
    for i in range(2):
        yield z + virtual_adversary(decoders[i], z, scene.drawn(f"direction {k}")[i].double())
    for i in range(6):
        keep = scene.drawn(f"channels {k}")[:, i] >= 0.5
        yield torch.where(keep[:, :, None, None], 2 * z, 0)
    foreground = (main.max(dim=1).indices != 3)[:, None]
    for seen in (foreground, foreground, ~foreground, ~foreground):
        yield torch.where(seen, z, 0)
    for i in range(6):
        share = 0.7 + 0.2 * scene.drawn(f"threshold {k}")[i]
        attention = z.abs().sum(dim=1)
        peak = attention.flatten(1).max(dim=1).values[:, None, None]
        yield torch.where((attention < share * peak)[:, None], z, 0)
    for i in range(6):
        yield z + z * (0.6 * scene.drawn(f"noise {k}")[i].double() - 0.3)


@pytest.mark.parametrize("pairs", [1, 2])
def test_the_objective(tiny: Settings, pairs: int) -> None:
    change = {"options": {"ramp": 0.8, "background": 3}, "loss": {"sup": 0.5}}
    scene = Scene(tiny, "cct", change, pairs)
    sup, consistency = torch.zeros(()), torch.zeros(())
    for k, student in enumerate(scene.method.students):
        sup = sup + mean_cross_entropy(scores(student, scene.images), scene.label)
        z = student(scene.more).features
        main = said(student.classifier, z).detach()
        shown = ~scene.padding[:, ::2, ::2]  # the network's stride
        parts = [
            ((said(decoder, x) - main) ** 2).mean(dim=1)[shown].mean()
            for decoder, x in zip(
                scene.method.decoders[k], perturbations(scene, k, z, main), strict=True
            )
        ]
        assert len(parts) == 24
        consistency = consistency + sum(parts) / 24
    rise = math.exp(-5 * (1 - (2 / 6) / 0.8) ** 2)  # before the third step of six
    scene.check({"sup": (0.5, sup), "consistency": (30 * rise, consistency)})


def test_the_main_decoder_learns_from_labels_alone(tiny: Settings) -> None:
    engine = make(update(tiny.with_method("cct"), {"loss": {"sup": 0.0}}, "test"))
    (student,), (decoders,) = engine.method.students, engine.method.decoders
    run(engine, 3, 1)
    assert all((p.grad == 0).all() for p in student.classifier.parameters())
    assert all((p.grad != 0).any() for p in student.stem.parameters())
    assert all((decoder.bias.grad != 0).any() for decoder in decoders)


def test_equal_decoders_of_unperturbed_features_agree(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(tiny.with_method("cct"))
    for decoder in engine.method.decoders[0]:
        decoder.load_state_dict(engine.method.students[0].classifier.state_dict())
    monkeypatch.setattr(engine.method, "perturbations", lambda k, z, *_: [z] * 24)
    assert float(engine(batch(), unlabelled())["consistency"]) < 1e-12


def test_without_a_background_no_decoder_sees_objects_alone(tiny: Settings) -> None:
    settings = update(tiny.with_method("cct"), {"options": {"background": -1}}, "test")
    engine = make(settings)
    assert len(engine.method.decoders[0]) == 20
    assert float(run(engine, 3, 1)[0]["consistency"]) > 0
    with pytest.raises(UserError, match=r"`options\.background` 11: the data has 11 classes"):
        make(update(settings, {"options": {"background": 11}}, "test"))


def test_noise_is_of_length_1_and_lowers_agreement() -> None:
    """More than the random direction that it starts from."""
    torch.manual_seed(0)
    z, start = torch.randn(3, 8, 5, 6).double(), torch.randn(8, 5, 6).double()
    decoder = nn.Conv2d(8, 4, 1).double()
    worst = cct.worst_direction(z, decoder, start)
    torch.testing.assert_close(worst.flatten(1).norm(dim=1), torch.ones(3).double())

    def distance(direction: Tensor) -> Tensor:
        p, q = (decoder(x).log_softmax(dim=1) for x in (z, z + 0.1 * direction))
        return F.kl_div(q, p, log_target=True, reduction="sum")

    with torch.no_grad():
        assert distance(worst) > 2 * distance((start / start.norm()).expand_as(z))
