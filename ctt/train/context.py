"""What the engine offers a method during a step: networks, random numbers, counts, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ctt.data import mixing
from ctt.data.dataset import IGNORE, DatasetInfo
from ctt.data.seeding import generator
from ctt.data.views import PhotometricView, normalize
from ctt.methods.base import Schedule
from ctt.methods.losses import mean_of, valid_pixels
from ctt.models.base import Output, SegmentationModel, upsample
from ctt.settings import Settings
from ctt.train.compiling import of_networks
from ctt.train.contract import checked_log
from ctt.train.distributed import World
from ctt.train.phases import Phases

T = TypeVar("T")
Shape = tuple[int, ...]
DOUBLE = ("decay",)  # schedules of which 1 - value needs more digits than float32 has


class StepContext:
    """The `ctt.methods.base.Step` of the engine.

    All that differs from step to step, random numbers and schedules, is made before the step from
    the seed and the number of the step alone: it is the same on every device, for any number of
    processes, after a resume, and for a recorded graph that is replayed with other numbers.
    """

    def __init__(
        self,
        settings: Settings,
        info: DatasetInfo,
        device: torch.device,
        world: World,
        schedules: Mapping[str, Schedule],
    ) -> None:
        self.settings, self.info, self.device, self.world = settings, info, device, world
        self.rank, self.processes, self.alone = world.rank, world.size, world.size == 1
        self.schedules, self.iteration = schedules, 0
        self.phase = Phases(device)
        self.whole = True  # whether the method sees the whole batch, or a part of it
        self.logged: dict[str, Tensor] = {}
        self.forwards = {True: 0, False: 0}  # images through networks, with and without gradient
        self._plan: dict[str, tuple[list[Shape], int | None]] = {}  # random numbers by name
        self._random: dict[str, list[Tensor]] = {}
        self._values: dict[str, float | Tensor] = {}
        how = settings.train.compile
        self._encode = of_networks(encode, how)
        self._decode = of_networks(SegmentationModel.finish, how)
        v = settings.views
        self.photometric = PhotometricView(
            v.jitter,
            v.jitter_probability,
            v.blur_probability,
            v.blur_sigma,
            v.grey_probability,
            v.hue,
            colours=not info.bands,
        )

    def forget(self) -> None:
        """Forget which random numbers the steps so far have asked for; others may follow."""
        self._plan, self._random = {}, {}

    def begin(self, iteration: int) -> None:
        """Make the numbers of a step."""
        self.iteration = iteration
        self._values = {name: value(iteration) for name, value in self.schedules.items()}
        plan = self._plan.items()
        drawn = [x.flatten() for name, known in plan for x in self._draw(name, *known)]
        self._bind(upload(torch.cat(drawn), self.device) if drawn else None)

    def tensors(self) -> list[Tensor]:
        """Return the numbers of this step as tensors, for a graph that reads them."""
        dtypes = (torch.float64 if name in DOUBLE else torch.float32 for name in self._values)
        values = [
            torch.full((), float(value), dtype=dtype, device=self.device)
            for value, dtype in zip(self._values.values(), dtypes, strict=True)
        ]
        drawn = [x.flatten() for some in self._random.values() for x in some]
        return [*values, torch.cat(drawn) if drawn else torch.empty(0, device=self.device)]

    def read(self, tensors: Sequence[Tensor]) -> None:
        """Take the numbers of this step from what `tensors` returned, or a copy of it."""
        *values, drawn = tensors
        self._values = dict(zip(self._values, values, strict=True))
        self._bind(drawn)

    def __getitem__(self, name: str) -> float | Tensor:
        return self._values[name]

    def rand(self, name: str, shape: Sequence[int], axis: int | None = None) -> Tensor:
        return self.rand_each(name, [shape], axis)[0]

    def rand_each(
        self, name: str, shapes: Sequence[Sequence[int]], axis: int | None = None
    ) -> list[Tensor]:
        wanted = [tuple(shape) for shape in shapes]
        if name not in self._random:  # the first step that asks for it
            self._plan[name] = wanted, axis
            self._random[name] = [upload(x, self.device) for x in self._draw(name, wanted, axis)]
        known = [tuple(x.shape) for x in self._random[name]]
        if known != wanted:
            raise ValueError(f"{name}: drawn as {known}, then asked for as {wanted}")
        return self._random[name]

    def _draw(self, name: str, shapes: Sequence[Shape], axis: int | None) -> Iterator[Tensor]:
        rng = generator(name, self.settings.seed, self.iteration)
        for shape in shapes:
            if axis is None:
                yield torch.rand(shape, generator=rng)
                continue
            own, whole = shape[axis], list(shape)
            whole[axis] *= self.processes
            yield torch.rand(whole, generator=rng).narrow(axis, self.rank * own, own)

    def _bind(self, drawn: Tensor | None) -> None:
        if drawn is None:
            return
        every = [shape for shapes, _ in self._plan.values() for shape in shapes]
        parts = iter(drawn.split_with_sizes([math.prod(shape) for shape in every]))
        self._random = {
            name: [next(parts).view(shape) for shape in shapes]
            for name, (shapes, _) in self._plan.items()
        }

    def normalize(self, images: Tensor) -> Tensor:
        return normalize(images, self.info)

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.settings.train.amp)

    def forward(self, network: nn.Module, images: Tensor) -> Output:
        """Return the output for images (B, 3, H, W) in 0..1; a whole batch goes in parts."""
        return Output(*self._in_parts(network, images))

    def encode(self, network: SegmentationModel, images: Tensor) -> list[Tensor]:
        return self._in_parts(partial(self._encode, network), images)

    def decode(self, network: SegmentationModel, stages: list[Tensor]) -> Output:
        return self._run(self._decode, network, stages)

    def _in_parts(
        self, function: Callable[[Tensor], Iterable[Tensor]], images: Tensor
    ) -> list[Tensor]:
        """Return what a function gives for images (B, 3, H, W) in 0..1, once normalised."""
        parts = self.settings.train.accumulate if self.whole else 1
        self.forwards[torch.is_grad_enabled()] += len(images)
        found = []
        for some in images.chunk(parts):
            with self.phase("views"):
                batch = self.normalize(some)
            found.append(list(self._run(function, batch)))
        return found[0] if len(found) == 1 else [torch.cat(x) for x in zip(*found, strict=True)]

    def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what belongs to a network in the run's precision."""
        trained = torch.is_grad_enabled()
        with self.phase("students" if trained else "teachers"), self.autocast():
            return function(*arguments)

    def probability(self, network: SegmentationModel, images: Tensor) -> Tensor:
        logits = self.forward(network, images).logits
        with self.phase("teachers"):
            size = (images.shape[-2], images.shape[-1])
            return upsample(logits, size, network.grid).softmax(dim=1)

    def strong(self, images: Tensor, draw: Tensor) -> Tensor:
        with self.phase("views"):
            return self.photometric(images, draw.T)

    def mixer(
        self,
        probability: Sequence[Tensor],
        padding: Tensor,
        rule: str = "",
        name: str = "mix",
    ) -> Callable[[Tensor], Tensor]:
        """Return what mixes: parts of an image that are not kept come from the image before it,
        also across processes."""
        rule, images = rule or self.settings.views.mix, len(padding)
        size = (padding.shape[-2], padding.shape[-1])
        if rule == "none":
            return lambda values: values
        if rule in mixing.BOXES:
            mask, numbers = mixing.BOXES[rule]
            keep = mask(size, self.rand(name, (numbers, images), 1))
        elif rule == "cowmix":
            noise = self.rand(f"{name} noise", (images, *size), 0)
            keep = mixing.cow_mask(noise, self.rand(name, (images,), 0))
        else:
            label = mean_of(probability).max(dim=1).indices.masked_fill(padding, IGNORE)
            draw = self.rand(name, (images, probability[0].shape[1]), 0)
            keep = mixing.classmix_mask(label, draw, rule == "classmix-fewer")
        return lambda values: mixing.mix(values, self.roll(values), keep)

    def count(self, label: Tensor) -> Tensor:
        return valid_pixels(label, self.total)

    def total(self, values: Tensor) -> Tensor:
        return self.world.total(values)

    def roll(self, values: Tensor) -> Tensor:
        return self.world.roll(values)

    def log(self, name: str, value: Tensor) -> None:
        value = checked_log(self.settings, name, value)
        self.logged[name] = self.logged[name] + value if name in self.logged else value


def encode(network: SegmentationModel, images: Tensor) -> list[Tensor]:
    """Return the stages of normalised images (B, 3, H, W)."""
    return network.encode(images)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the context of mixed precision: `off`, `bf16` or `fp16`."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """Return the numbers on the device, copied there behind the work that it has."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)
