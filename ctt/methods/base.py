"""The contract between a training method and the engine that runs it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ctt import models
from ctt.data.dataset import DatasetInfo
from ctt.data.seeding import derive_seed
from ctt.errors import UserError
from ctt.methods.catalog import About
from ctt.methods.labeled import LabeledLoss
from ctt.methods.optim import make_optimizer
from ctt.methods.options import Options
from ctt.models.base import BackboneModel, Output, SegmentationModel
from ctt.models.weights import published_input, start_from

if TYPE_CHECKING:
    from ctt.settings import EvalSettings, Settings

Batch = dict[str, Tensor]
"""Tensors by name: (B, ...) each, cut along the first axis into the parts of a step; a tensor of
shape () belongs to the batch as a whole and goes to every part."""

Terms = dict[str, tuple[float | Tensor, Tensor]]
"""Weight and value () of each term of the objective, by name."""

Schedule = Callable[[int], float]
"""Number that a step uses, of the number of steps before it."""


M = TypeVar("M", bound=nn.Module)


class Modules(nn.ModuleList, Generic[M]):
    """A list of modules of one class."""

    def __iter__(self) -> Iterator[M]:
        return super().__iter__()  # type: ignore[return-value]

    def __getitem__(self, k: int) -> M:  # type: ignore[override]
        return super().__getitem__(k)  # type: ignore[return-value]


class Networks(Modules[SegmentationModel]):
    """A list of segmentation networks."""


def unchanged(network: M) -> M:
    """Return the network as it is."""
    return network


class Finish(Protocol):
    """Puts a new network on its device, in the layout in which it trains."""

    def __call__(self, network: M) -> M: ...


@dataclass(frozen=True)
class Setup:
    """What a method is built from.

    Attributes:
        settings: of the run.
        info: facts of the dataset.
        pairs: K, how many students there are.
        labeled: how many labelled images the run has.
        initialize: whether students start from `model.weights`; needless before a checkpoint is
            loaded.
        finish: puts a new student, or other network to be trained, on its device, in the layout
            in which it trains.
        finished_teachers: networks of the finished run that teaches, and the dataset they know;
            None if there is none.
        origins: filled with a sentence for each student that starts from published weights.
    """

    settings: Settings
    info: DatasetInfo
    pairs: int
    labeled: int
    initialize: bool = True
    finish: Finish = unchanged
    finished_teachers: tuple[Sequence[SegmentationModel], DatasetInfo] | None = None
    origins: list[str] = field(default_factory=list)

    @property
    def classes(self) -> int:
        """Return C, how many classes the dataset has."""
        return len(self.info.classes)

    def student(self, k: int, attempt: int = 0) -> SegmentationModel:
        """Return student k, counted from 0; each starts from random weights of its own.

        Args:
            attempt: another number gives other random weights.

        Raises:
            UserError: no such network, or weights that cannot be found, read or fitted.
        """
        model = self.settings.model
        with self.seeded(f"weights {attempt}" if attempt else "weights", k):
            student = models.build(
                num_classes=self.classes, channels=self.info.channels, **self.settings.network(k)
            )
        weights = model.weights[k % len(model.weights)]
        if self.initialize and weights != "none":
            self.origins.append(start_from(student, weights))
        if isinstance(student, BackboneModel) and student.own_input:
            own = published_input(student.backbone_name)
            student.set_own_input((self.info.mean, self.info.std), own)
        if model.freeze_batch_norm:
            if not isinstance(student, BackboneModel):
                raise UserError(
                    f"`model.freeze_batch_norm`: the network {student.options['name']} has no "
                    f"backbone whose batch norms could be kept. Leave it out, or choose another "
                    f"`model.name`."
                )
            student.freeze_batch_norm()
        if model.freeze_backbone:
            if not isinstance(student, BackboneModel):
                raise UserError(
                    f"`model.freeze_backbone`: the network {student.options['name']} has no "
                    f"backbone. Leave it out, or choose another `model.name`."
                )
            student.freeze_backbone()
        return self.finish(student)

    def foreground(self, background: int) -> tuple[int, ...]:
        """Return the classes but that of the background; all where it is -1.

        Raises:
            UserError: no such class.
        """
        if background >= self.classes:
            raise UserError(
                f"`options.background` {background}: the data has {self.classes} classes, from 0 "
                f"on. Give one of them, or -1 if none is the background."
            )
        return tuple(c for c in range(self.classes) if c != background)

    @contextlib.contextmanager
    def seeded(self, purpose: str, k: int = 0) -> Iterator[None]:
        """Seed torch within the context, from the run's seed and this purpose alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(purpose, self.settings.seed, k))
            yield


@dataclass(frozen=True)
class Round:
    """A part of a run.

    Attributes:
        share: of the run's iterations, among the shares of all rounds.
        images: which unlabelled images the steps have: `none`, `all`, or `kept`, those that the
            method has chosen and labelled before the round.
        restart: make the optimisers anew and start the learning rate's schedule again.
    """

    share: float
    images: str = "all"
    restart: bool = True


def round_starts(rounds: Sequence[Round], total: int) -> list[int]:
    """Return the first iteration of each round of a run of `total`, and `total` in the end."""
    done = itertools.accumulate((r.share for r in rounds), initial=0.0)
    whole = sum(r.share for r in rounds)
    return [round(total * share / whole) for share in done]


class Labeler(Protocol):
    """What the engine offers a method between two rounds.

    Attributes:
        unlabeled: names of the unlabelled images.
        used: those of them that the round before learnt from.
    """

    unlabeled: list[str]
    used: list[str]

    def probabilities(
        self, networks: Sequence[SegmentationModel], names: Sequence[str], settings: EvalSettings
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """Return the name of each image and what each network gives it: (C, H, W), NaN where the
        image has no data.

        With several processes each has its own share of the names.
        """

    def keep(self, name: str, label: Tensor, confidence: Tensor) -> None:
        """Keep a label (H, W), 255 where there is none, and its confidence in 0..1 for the next
        round."""

    def carry(self, names: Sequence[str]) -> None:
        """Keep the labels that these images had in the round before.

        Call it in every process with the same names; each writes its own share of them.
        """

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the processes."""

    def use(self, names: Sequence[str]) -> None:
        """Say which images, all of them with a kept label, the next round learns from."""


class Step(Protocol):
    """What the engine offers a method during a step. See `StepContext`."""

    iteration: int
    """Steps before this one."""
    rank: int
    """Number of this process, from 0."""
    processes: int
    """How many processes share the batch."""
    alone: bool
    """Whether this is the only process; then `total` and `roll` need no messages."""

    def __getitem__(self, name: str) -> float | Tensor:
        """Return the number of this step from the schedule of that name."""

    def rand(self, name: str, shape: Sequence[int], axis: int | None = None) -> Tensor:
        """Return uniform random numbers in 0..1 that this name, the seed and the step determine.

        Args:
            shape: with the images of this process.
            axis: the one that counts images, so that each process has the numbers of its own; None:
                all processes have the same.
        """

    def rand_each(
        self, name: str, shapes: Sequence[Sequence[int]], axis: int | None = None
    ) -> list[Tensor]:
        """Return several tensors of such numbers, which follow one another."""

    def forward(self, network: nn.Module, images: Tensor) -> Output:
        """Return the network's output for images (B, 3, H, W) in 0..1."""

    def encode(self, network: SegmentationModel, images: Tensor) -> list[Tensor]:
        """Return the stages of images (B, 3, H, W) in 0..1, to be perturbed and then decoded."""

    def decode(self, network: SegmentationModel, stages: list[Tensor]) -> Output:
        """Return the network's output for stages."""

    def probability(self, network: SegmentationModel, images: Tensor) -> Tensor:
        """Return the probabilities (B, C, H, W) that a network gives to every pixel."""

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Run modules in the run's precision within the context."""

    def normalize(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in 0..1 as networks take them."""

    def strong(self, images: Tensor, draw: Tensor) -> Tensor:
        """Return images with the colour jitter and blur that numbers (B, 8) draw."""

    def mixer(
        self, probability: Sequence[Tensor], padding: Tensor, rule: str = "", name: str = "mix"
    ) -> Callable[[Tensor], Tensor]:
        """Return the function that mixes images, labels and confidences by `views.mix`.

        Args:
            probability: of each teacher, (B, C, H, W).
            padding: (B, H, W), where no image is.
            rule: one of the choices of `views.mix`, instead of the run's.
            name: of the random numbers; another one gives another mix of the same step.
        """

    def count(self, label: Tensor) -> Tensor:
        """Return how many pixels of all processes are not 255, at least 1: ()."""

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the processes, without gradient."""

    def roll(self, values: Tensor) -> Tensor:
        """Return `values.roll(1, dims=0)` of the joined batch of all processes."""

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Name what runs inside, in profilers and in the table of `train.profile`."""

    def log(self, name: str, value: Tensor) -> None:
        """Write a number () to metrics.csv: this process's part of a mean over all.

        Numbers of one name add up in a step, such as those of its parts or of several students.
        """


class Method(nn.Module):
    """A training method: networks, the terms of its objective, and what follows a step.

    Whatever it registers (networks, banks, a discriminator) is on the device, in the checkpoint and
    averaged over processes without further code. The engine calls `prepare`, then `losses` and a
    backward pass for each part of the batch, then `after_step`.

    The batch holds `images` (B, 3, H, W) in 0..1 and `label` (B, H, W) int64 with 255 for ignored
    pixels. If the method takes unlabelled images, it holds as many of them, `unlabeled`
    (B, 3, H, W), and `padding` (B, H, W), which is true where there is no image; if `about.uses`
    names `loss.ct_after`, both are missing in the first steps that it asks for. In a round with
    kept labels, these are `kept` (B, H, W) and their confidence `kept confidence` (B, H, W), and
    `padding` is true where there is no label.

    Attributes:
        about: its source, how many pairs it has by default, and the class of its options.
        options: settings that the method alone has, of the class that `about` names.
        terms: names of the terms, in the order of the log.
        logged: names of other numbers that the method gives to `step.log` or `report`.
        labeled: the loss of labelled images, `self.labeled(logits, grid, b, step)`.
        students: the networks that are trained.
        teachers: those that follow them, always in evaluation mode.
        find_unused: whether a step may leave trainable parameters without a gradient.
        following: names of the modules that are never trained.
        round: number of the round, from 0.
        recordable: whether a step never waits for the device, so that it can be a CUDA graph.
    """

    about: ClassVar[About] = About()
    terms: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()
    find_unused = False
    recordable = True
    following: tuple[str, ...] = ("teachers",)
    round = 0
    options: Options
    students: Networks
    teachers: Networks

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.settings, self.options = setup.settings, setup.settings.options
        s = setup.settings
        self.labeled = LabeledLoss(s.labeled, setup.classes, s.train.accumulate)
        self.students = Networks(setup.student(k) for k in range(setup.pairs))
        self.teachers = Networks()

    def train(self, mode: bool = True) -> Method:
        """Set the mode of everything but what is never trained."""
        super().train(mode)
        for name in self.following:
            getattr(self, name).eval()
        return self

    def smallest_batch(self, labeled: int, unlabeled: int) -> int:
        """Return how many images the smallest batch has that students see in training mode.

        Args:
            labeled: how many labelled images a step has.
            unlabeled: how many unlabelled ones are beside them.
        """
        return labeled + unlabeled

    def prepare(self, b: Batch, step: Step) -> Batch:
        """Return the batch with what `losses` needs, for all parts together; without gradient."""
        return b

    def losses(self, b: Batch, step: Step) -> Terms:
        """Return the terms of the objective for a part of the batch."""
        raise NotImplementedError

    def after_step(self, b: Batch, step: Step) -> None:
        """Let teachers, banks and running numbers follow the optimiser's step."""

    def forward(self, b: Batch, step: Step) -> Terms:
        """Return `losses`, for the wrapper that averages gradients over processes."""
        return self.losses(b, step)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimisers by name.

        The learning rate of a group is that of the run, which changes from step to step, times its
        `lr_factor`. Without one, it is the group's own `lr` as a multiple of `optim.lr`.
        """
        return {"students": make_optimizer(self.students, self.settings)}

    def schedules(self) -> dict[str, Schedule]:
        """Return the numbers that change from step to step, besides the learning rate `rate`."""
        return {}

    def rounds(self) -> Sequence[Round]:
        """Return the rounds of a run, between which `begin_round` is called."""
        return [Round(1.0)]

    def begin_round(self, labeler: Labeler) -> None:
        """Choose and label images for the round `self.round`, which is not the first.

        The engine calls this without gradient, and once more if the run was stopped meanwhile.
        """

    def stage(self, iteration: int) -> int:
        """Return a number that changes when a step does other work than the one before.

        A CUDA graph is then recorded anew.
        """
        return 0

    def networks(self) -> dict[str, SegmentationModel]:
        """Return what is evaluated: student_1 .. student_K, teacher_1 .. teacher_K."""
        named = {f"student_{k + 1}": net for k, net in enumerate(self.students)}
        return named | {f"teacher_{k + 1}": net for k, net in enumerate(self.teachers)}

    def report(self) -> dict[str, float]:
        """Return numbers of the method's state for a row of metrics.csv."""
        return {}
