"""Networks that judge predictions, and how an objective uses them.

A term that trains a student calls the critic `frozen`; the critic's own term is given predictions
without their gradient. So one backward pass serves both, and neither moves the other's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.data.dataset import IGNORE
from ctt.methods import losses
from ctt.methods.base import Batch, Method, Modules, Setup, Step, Terms
from ctt.methods.options import Options
from ctt.models.base import pad_to_multiple, wide
from ctt.ranges import ABOVE_0, Range

if TYPE_CHECKING:
    from ctt.settings import Settings

BETAS = (0.9, 0.99)  # of Adam, in the programs of AdvSemiSeg, s4GAN and GCT
GROWTH = (1, 2, 4, 8)  # channels of the layers, as multiples of those of the first


def frozen(critic: nn.Module) -> Callable[..., Any]:
    """Return the critic as a function that gives its parameters no gradient."""
    tensors = chain(critic.named_parameters(), critic.named_buffers())
    fixed = {name: x.detach() for name, x in tensors}
    return lambda *inputs: torch.func.functional_call(critic, fixed, inputs)


def make_adam(critics: nn.Module, rate: float, settings: Settings) -> torch.optim.Adam:
    """Return the critics' optimiser, whose rate falls as that of the students does.

    Args:
        rate: the learning rate that it starts from.
    """
    graph = settings.train.cuda_graph
    group = {"params": list(critics.parameters()), "lr_factor": rate / settings.optim.lr}
    adam = torch.optim.Adam([group], lr=rate, betas=BETAS, fused=True, capturable=graph)
    # it would warn of the ordinary steps that come before the recording
    adam._warned_capturable_if_run_uncaptured = graph
    return adam


def judged(logits: Tensor, real: bool, mask: Tensor, count: Tensor) -> Tensor:
    """Return the binary cross-entropy of critics' logits, 0 where nothing is judged.

    Args:
        logits: of any shape.
        real: what they should say.
        mask: of the same shape, which of them count.
        count: (), how many those are in the whole batch.
    """
    loss = F.softplus(-logits if real else logits)
    return loss.masked_fill(~mask, 0).sum() / count


def counted(b: Batch, step: Step) -> Batch:
    """Return the batch with how many pixels of all processes have a label, `pixels` (), belong to
    an unlabelled image, `seen` (), and one or the other, `both` (); each at least 1."""
    pixels, seen = step.total(torch.stack([(b["label"] != IGNORE).sum(), (~b["padding"]).sum()]))
    counts = {"pixels": pixels, "seen": seen, "both": pixels + seen}
    return b | {name: count.clamp(min=1) for name, count in counts.items()}


def one_hot(label: Tensor, like: Tensor) -> Tensor:
    """Return label (B, H, W) as probabilities of the shape (B, C, H, W) and type of `like`.

    Pixels that are ignored have no class at all.
    """
    classes = torch.arange(like.shape[1], device=label.device)
    return (label[:, None] == classes[:, None, None]).to(like.dtype)


def layer(inputs: int, outputs: int, stride: int = 2) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=4, stride=stride, padding=1)


def at_pixels(scores: Tensor, padded: Tensor, maps: Tensor) -> Tensor:
    """Return scores (B, 1, h, w) of `padded` at every pixel of `maps`, in float32: (B, H, W).

    The corners of both grids lie on each other, as in the programs.
    """
    size = (padded.shape[-2], padded.shape[-1])
    scores = F.interpolate(wide(scores), size, mode="bilinear", align_corners=True)
    return scores[:, 0, : maps.shape[-2], : maps.shape[-1]]


class Discriminator(nn.Module):
    """Judges class maps at every pixel (Hung et al., 2018): five convolutions of stride 2.

    Args:
        channels: of the maps.
        width: channels of the first layer.
    """

    SMALLEST = 32  # height and width of maps of which the last layer still gives a value

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        ends = (channels, *(width * times for times in GROWTH))
        for inputs, outputs in pairwise(ends):
            layers += [layer(inputs, outputs), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, layer(ends[-1], 1))

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C, H, W) -> logits (B, H, W), above 0 where the maps look like masks."""
        padded = pad_to_multiple(maps, 1, self.SMALLEST)
        return at_pixels(self.layers(padded), padded, maps)


class FlawDetector(nn.Module):
    """Tells at every pixel how wrong a class map of an image is (Ke et al., 2020).

    Args:
        channels: of image and class map together.
        width: channels of the first layer.
    """

    SMALLEST = 60

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for times in GROWTH:
            for stride in (2, 1) if times > 1 else (2,):
                outputs = width * times
                layers += [layer(inputs, outputs, stride), HalfNorm(outputs), nn.LeakyReLU(0.2)]
                inputs = outputs
        self.layers = nn.Sequential(*layers, layer(inputs, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, 3 + C, H, W) -> flaws (B, H, W), of any size."""
        padded = pad_to_multiple(maps, 1, self.SMALLEST)
        return at_pixels(self.layers(padded), padded, maps)


class HalfNorm(nn.Module):
    """Batch norm of the first half of the channels, instance norm of the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(channels // 2)
        self.instance_norm = nn.InstanceNorm2d(channels - channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.tensor_split((self.batch_norm.num_features,), dim=1)
        return torch.cat([self.batch_norm(one), self.instance_norm(other)], dim=1)


class ImageCritic(nn.Module):
    """Judges a class map together with its image as a whole (Mittal et al., 2019).

    Args:
        channels: of class map and image together.
        width: channels of the first layer.
    """

    SMALLEST = 16
    DRAWS = sum(GROWTH[:-1])  # random numbers that an image takes, as a multiple of the width

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        widths = [width * times for times in GROWTH]
        self.dropping = widths[:-1]  # channels that may drop
        self.layers = nn.ModuleList(layer(*ends) for ends in pairwise((channels, *widths)))
        self.score = nn.Linear(widths[-1], 1)

    def forward(self, maps: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logit (B,) of being a mask, and the features (B, 8 * width) of it.

        Args:
            maps: (B, C + 3, H, W).
            draw: (B, DRAWS * width) in 0..1; below 0.5 a channel drops.
        """
        x = pad_to_multiple(maps, 1, self.SMALLEST)
        drops: list[Tensor | None] = [*draw.split_with_sizes(self.dropping, dim=1), None]
        for convolution, numbers in zip(self.layers, drops, strict=True):
            x = F.leaky_relu(convolution(x), 0.2)
            if numbers is not None:
                x = x * (2 * (numbers >= 0.5))[:, :, None, None].to(x.dtype)
        features = x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        return self.score(features)[:, 0].to(features.dtype), features


@dataclass(frozen=True)
class CriticOptions(Options):
    """Settings of methods whose critic judges predictions."""

    critic_lr: Annotated[float, ABOVE_0] = 1e-4
    """Learning rate of the critic at the start; it falls as that of the students does."""
    critic_width: Annotated[int, Range(2)] = 64
    """Channels of the critic's first layer; the last has eight times as many."""


class Judged(Method):
    """Students that are judged, each by a critic of its own.

    A method of this kind says what a critic is, and the terms of one student and their weights.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        critics = []
        for k in range(setup.pairs):
            with setup.seeded("critic", k):
                critics.append(self.new_critic(setup, k))
        self.critics = Modules[nn.Module](critics)

    def new_critic(self, setup: Setup, k: int) -> nn.Module:
        """Return the critic of student k, as it trains."""
        raise NotImplementedError

    def weights(self, step: Step) -> dict[str, float | Tensor]:
        """Return the weights of the terms, in the order of `terms`."""
        raise NotImplementedError

    def of_student(self, k: int, b: Batch, step: Step) -> dict[str, Tensor]:
        """Return the terms of student k and its critic."""
        raise NotImplementedError

    def losses(self, b: Batch, step: Step) -> Terms:
        found = [self.of_student(k, b, step) for k in range(len(self.students))]
        weighted = self.weights(step).items()
        return {t: (weight, losses.sum_of([terms[t] for terms in found])) for t, weight in weighted}


class Adversarial(Judged):
    """Students whose critics are small networks, trained by Adam."""

    options: CriticOptions

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        adam = make_adam(self.critics, self.options.critic_lr, self.settings)
        return {**super().optimizers(), "critics": adam}
