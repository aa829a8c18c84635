"""A batch to try an objective on, and what the engine's step makes of it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ctt.data.dataset import IGNORE
from ctt.data.digits import INFO
from ctt.data.views import normalize
from ctt.methods.base import Batch
from ctt.settings import Settings, update
from ctt.train.engine import Engine
from tests.methods.grids import at_pixels, first_cell
from tests.train.steps import double, exactly, make


def odd_batch(images: int = 3, height: int = 37, width: int = 43, seed: int = 0) -> Batch:
    """Sides that no stride divides, an image without label, ignored pixels, padding."""
    rng = torch.Generator().manual_seed(seed)
    b = {name: torch.rand(images, 3, height, width, generator=rng) for name in ("images", "more")}
    label = torch.randint(0, 11, (images, height, width), generator=rng)
    label[0] = IGNORE
    label[1, 5:9, :20] = IGNORE
    padding = torch.zeros(images, height, width, dtype=torch.bool)
    padding[1, :, :7], padding[2, 30:] = True, True
    return {"images": b["images"], "label": label, "unlabeled": b["more"], "padding": padding}


def objective(
    settings: Settings, b: Batch, iteration: int = 0, change: Callable[[Engine], None] | None = None
) -> tuple[Engine, dict[str, Tensor]]:
    """Return an engine in double precision whose weights hold the gradients of its objective, and
    each term, unweighted.

    Args:
        change: what is done to the engine first.
    """
    with exactly():
        engine = double(make, update(settings, {"data": {"batch_size": len(b["label"])}}, "test"))
        engine.step.begin(iteration)
        if change is not None:
            change(engine)
        with torch.no_grad():
            whole = engine.method.prepare(b, engine.step)
        engine.step.whole = False
        terms = engine.method.losses(whole, engine.step)
        torch.stack([weight * value for weight, value in terms.values()]).sum().backward()
    return engine, {name: value.detach() for name, (_, value) in terms.items()}


def normal(images: Tensor) -> Tensor:
    """Return images as networks take them."""
    return normalize(images, INFO).double()


def scores(student: Any, images: Tensor) -> Tensor:
    """Return a student's logits at every pixel."""
    logits = student(normal(images)).logits
    return at_pixels(logits, images.shape, student.stride, first_cell(student))


def has_gradient(modules: Iterable[nn.Module], loss: Tensor) -> None:
    """Compare the gradients that modules hold with those of `loss`."""
    weights = [w for module in modules for w in module.parameters()]
    expected = torch.autograd.grad(loss, weights, retain_graph=True)
    assert any(bool(g.abs().max() > 0) for g in expected)
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-9, atol=1e-10)
