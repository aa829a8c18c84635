"""A step of training in double precision, to hold beside a rendering of its equations."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ctt.data.dataset import IGNORE
from ctt.data.digits import INFO
from ctt.settings import Settings, update
from tests.methods.grids import at_pixels, first_cell
from tests.train.steps import double, exactly, make

SIZE = (21, 27)  # no multiple of the stride
PLAIN = {"jitter": 0, "blur_probability": 0}  # views that change nothing

Images = tuple[Tensor, Tensor]


def labeled(count: int, seed: int) -> Images:
    """Return random images and labels, some pixels of which are ignored."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, *SIZE), generator=rng, dtype=torch.uint8)
    label = torch.randint(0, 11, (count, 3, 3), generator=rng, dtype=torch.uint8)
    label = label.repeat_interleave(9, 1).repeat_interleave(9, 2)[:, : SIZE[0], : SIZE[1]].clone()
    label[:, 5:8, 3:20] = IGNORE
    return images, label


def unlabeled(count: int, seed: int) -> Images:
    """Return random images and where they are padding."""
    images, _ = labeled(count, seed)
    padding = torch.zeros(count, *SIZE, dtype=torch.uint8)
    padding[:, -3:], padding[0, :, :4] = IGNORE, IGNORE
    return images, padding


def kept(count: int, seed: int) -> Images:
    """Return random images and labels that were kept of them, some pixels of which have none."""
    images, label = labeled(count, seed)
    rng = torch.Generator().manual_seed(seed)
    confidence = torch.randint(0, 256, label.shape, generator=rng, dtype=torch.int32)
    return images, label.int() + 256 * confidence


class Scene:
    """The last of some steps: what it was given, what the networks were, and what it did.

    Attributes:
        method: as it was before the step. images, more: (B, 3, H, W) as networks take them.
        label: (B, H, W) int64. padding: (B, H, W) bool. kept, kept_confidence: (B, H, W), labels
            of the unlabelled images and their confidence, in rounds with such. terms: what the step
            gave.
    """

    def __init__(
        self,
        tiny: Settings,
        name: str,
        change: dict[str, Any],
        pairs: int = 0,
        steps: int = 3,
        alter: Callable[[Any], None] = lambda method: None,
    ) -> None:
        """Train.

        Args:
            alter: what is done to the method before the last step.
        """
        common = {"views": PLAIN, "data": {"batch_size": 3, "crop": list(SIZE)}}
        settings = update(update(tiny.with_method(name), common, "test"), change, "test")
        with exactly():
            engine = double(make, settings, pairs)
            engine.iteration = engine.rounds.starts[-2]
            is_kept = engine.rounds.rounds[-1].images == "kept"
            for i in range(steps):
                if i == steps - 1:
                    alter(engine.method)
                self.method: Any = copy.deepcopy(engine.method)
                first = labeled(3, i)
                second = kept(3, 100 + i) if is_kept else unlabeled(3, 100 + i)
                terms = engine(first, second)
        self.engine, self.settings = engine, settings
        self.images, self.more = (normalized(x) for x in (first[0], second[0]))
        self.label, self.padding = first[1].long(), second[1].int() % 256 == IGNORE
        self.kept = (second[1].int() % 256).long()
        self.kept_confidence = second[1].int() // 256 / 255
        self.terms = {name: value.double() for name, value in terms.items()}

    def drawn(self, name: str) -> Tensor:
        """Return the random numbers of the step."""
        return torch.cat(self.engine.step._random[name])

    def check(self, terms: dict[str, tuple[float, Tensor]]) -> None:
        """Compare the rendering's weights and values, and the gradients of all that is trained."""
        assert terms.keys() == {*self.engine.method.terms}
        for name, (_, value) in terms.items():
            torch.testing.assert_close(
                self.terms[name], value.detach().double(), rtol=1e-5, atol=1e-7
            )
        total = sum((weight * value for weight, value in terms.values()), torch.zeros(()))
        named = dict(self.method.named_parameters())
        trained = {n: p for n, p in named.items() if p.requires_grad}
        found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        done = dict(self.engine.method.named_parameters())
        for (name, p), gradient in zip(trained.items(), found, strict=True):
            expected = torch.zeros_like(p) if gradient is None else gradient
            seen = done[name].grad
            seen = torch.zeros_like(p) if seen is None else seen
            # the contrast is computed in float32, as its keys are
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=3e-6, msg=name)


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).double()[:, None, None] for x in (INFO.mean, INFO.std))
    return (images.float() / 255 - mean) / std


def surer(method: Any) -> None:
    """Spread what teachers say, which is even after a few steps, so that a threshold parts it."""
    for net in method.teachers:
        net.classifier.weight.data *= 10


def all_surer(method: Any) -> None:
    """Spread what teachers and students say."""
    surer(method)
    for net in method.students:
        net.classifier.weight.data *= 10


def scores(network: Any, images: Tensor) -> Tensor:
    """Return logits at every pixel."""
    return at_pixels(network(images).logits, SIZE, network.stride, first_cell(network))


def cross_entropies(logits: Tensor, label: Tensor) -> Tensor:
    """Return -log p of the label of each pixel (B, H, W), 0 where it is ignored."""
    log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
    chosen = log_p.gather(1, label.clamp(max=10)[:, None])[:, 0]
    return torch.where(label == IGNORE, 0, -chosen)


def mean_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return cross_entropies(logits, label).sum() / (label != IGNORE).sum().clamp(min=1)


def mixed(values: Tensor, keep: Tensor) -> Tensor:
    """Return each image with what is not kept out of the image before it."""
    out = values.clone()
    for i in range(len(values)):
        gone = ~keep[i]
        out[i][..., gone] = values[i - 1][..., gone]
    return out


def no_gradient(network: nn.Module, images: Tensor) -> Tensor:
    """Return probabilities at every pixel, for labels."""
    with torch.no_grad():
        return scores(network, images).softmax(dim=1)
