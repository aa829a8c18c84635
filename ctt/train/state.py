"""Everything that changes while training: networks, optimiser, banks, iteration."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctt import models
from ctt.data.seeding import derive_seed
from ctt.errors import UserError
from ctt.models.base import BackboneModel, SegmentationModel
from ctt.models.weights import start_from
from ctt.ops import MemoryBank, ema_update_
from ctt.train.compiling import compile_networks
from ctt.train.distributed import World, synchronize_on_cpu
from ctt.train.settings import EmaSettings, Settings


class TrainState:
    """K students, their teachers and banks, one optimiser over all students.

    Students start from different random weights (with weights of a backbone, from different
    heads); a teacher starts as a copy of its student.

    Args:
        initialize: read `model.weights`; not needed where a checkpoint follows.
        world: the processes that share the batch; None: this one alone.
    """

    def __init__(
        self,
        settings: Settings,
        pairs: int,
        num_classes: int,
        device: torch.device,
        initialize: bool = True,
        world: World | None = None,
    ) -> None:
        self.students: list[SegmentationModel] = []
        self.origins: list[str] = []  # what was found in the weights that students start from
        for k in range(pairs):
            student, origin = make_student(settings, k, num_classes, initialize)
            self.origins += [origin] if origin else []
            if settings.model.sync_batch_norm:
                student = synchronized(student, device)
            # a quarter less time on the CPU, tensor cores on GPUs, pixels as rows without a copy
            self.students.append(student.to(memory_format=torch.channels_last).to(device))
        self.teachers = [copy.deepcopy(s).requires_grad_(False).eval() for s in self.students]
        if settings.train.compile != "off":
            compile_networks([*self.students, *self.teachers], settings.train.compile)
        self.replicas: list[nn.Module] = [*self.students]
        if world is not None and world.size > 1:
            self.replicas = [replicate(net, device) for net in self.replicas]
        self.averaged_buffers = [
            buffer
            for student in self.students
            for buffer in student.buffers()
            if buffer.is_floating_point() and not settings.model.sync_batch_norm
        ]
        self.banks = [
            MemoryBank(num_classes, settings.bank.capacity, settings.model.features).to(device)
            for _ in range(pairs)
        ]
        self.optimizer = make_optimizer(self.students, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.train.amp == "fp16")
        self.ema = EmaUpdate(self.teachers, self.students, settings.ema)
        self.iteration = 0
        self.drawn = 0  # labelled images of all steps and processes, and unlabelled ones as many

    @property
    def pairs(self) -> int:
        return len(self.students)

    @contextlib.contextmanager
    def keep_gradients(self, keep: bool) -> Iterator[None]:
        """Where `keep`, a backward pass leaves the gradients of this process unsummed."""
        with contextlib.ExitStack() as stack:
            for network in self.replicas:
                if keep and isinstance(network, DistributedDataParallel):
                    stack.enter_context(network.no_sync())
            yield

    def average_buffers(self, world: World) -> None:
        """Running statistics of the students, on every process the mean over the processes."""
        if world.size == 1 or not self.averaged_buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in self.averaged_buffers])
        mean = world.total(flat) / world.size
        parts = mean.split_with_sizes([buffer.numel() for buffer in self.averaged_buffers])
        views = [p.view_as(b) for p, b in zip(parts, self.averaged_buffers, strict=True)]
        torch._foreach_copy_(self.averaged_buffers, views)

    def networks(self) -> dict[str, SegmentationModel]:
        """student_1 .. student_K, teacher_1 .. teacher_K."""
        named = {f"student_{k + 1}": net for k, net in enumerate(self.students)}
        return named | {f"teacher_{k + 1}": net for k, net in enumerate(self.teachers)}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, in tensors, numbers and strings."""
        return {
            "iteration": self.iteration,
            "drawn": self.drawn,
            "students": [net.state_dict() for net in self.students],
            "teachers": [net.state_dict() for net in self.teachers],
            "banks": [bank.state_dict() for bank in self.banks],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, modules in (
            ("students", self.students),
            ("teachers", self.teachers),
            ("banks", self.banks),
        ):
            for module, saved in zip(cast("list[nn.Module]", modules), state[key], strict=True):
                module.load_state_dict(saved)
        options = [
            {k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # the settings of this run, not those of the one that was stopped
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.iteration, self.drawn = int(state["iteration"]), int(state["drawn"])


def replicate(network: nn.Module, device: torch.device) -> nn.Module:
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def make_student(
    settings: Settings, k: int, num_classes: int, initialize: bool
) -> tuple[SegmentationModel, str]:
    """Student k, counted from 0, on the CPU, and what was found in the weights it starts from.

    Raises:
        UserError: no such network, or weights that cannot be had or do not fit.
    """
    model = settings.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("weights", settings.seed, k))
        student = models.build(num_classes=num_classes, **model.of_pair(k))
    weights = model.weights[k % len(model.weights)]
    origin = start_from(student, weights) if initialize and weights != "none" else ""
    if model.freeze_batch_norm:
        if not isinstance(student, BackboneModel):
            raise UserError(
                f"--model.freeze-batch-norm: the network {model.name} has no backbone whose batch "
                f"norms could be kept. Leave it out, or choose another --model.name."
            )
        student.freeze_batch_norm()
    return student, origin


def synchronized(student: SegmentationModel, device: torch.device) -> SegmentationModel:
    """The student with batch norms that take the batches of all processes as one."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return student
    if device.type == "cpu":
        synchronize_on_cpu(student)
        return student
    from timm.layers import convert_sync_batchnorm  # knows timm's norms with an activation in them

    converted: SegmentationModel = convert_sync_batchnorm(student)
    return converted


def images_at_once(settings: Settings, unlabeled: bool) -> int:
    """How many a student of one process sees in one forward."""
    images = settings.data.batch_size // settings.train.accumulate
    return 2 * images if unlabeled else images


def check_batch_norm(student: SegmentationModel, settings: Settings, unlabeled: bool) -> None:
    """Refuse a batch of which a batch norm of the student gets a single value for a channel.

    Args:
        unlabeled: whether as many unlabelled images as labelled ones come with a step.
    """
    if images_at_once(settings, unlabeled) > 1:
        return
    probe = copy.deepcopy(student).train()
    device = student.classifier.weight.device
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            probe(torch.zeros(1, 3, *settings.data.crop, device=device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"--data.batch-size {settings.data.batch_size}: of one image at a time a batch norm of "
            f"{settings.model.name} gets a single value for a channel, which has no deviation. "
            f"Give at least two images to each part of a step (--train.accumulate "
            f"{settings.train.accumulate}), or a larger --data.crop."
        ) from None


def make_optimizer(students: list[SegmentationModel], settings: Settings) -> torch.optim.SGD:
    """SGD over two groups of every student: the body, and the head with its own learning rate."""
    optim = settings.optim
    groups = []
    for student in students:
        head = list(student.head_parameters())
        in_head = {id(p) for p in head}
        body = [p for p in student.parameters() if id(p) not in in_head and p.requires_grad]
        groups.append({"params": body, "lr_factor": 1.0})
        groups.append({"params": head, "lr_factor": optim.head_lr_factor})
    optimizer = torch.optim.SGD(
        groups,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,  # one pass over all tensors; a GradScaler then needs no word of the host
    )
    if optim.momentum:
        # of a first step that a GradScaler skips, the fused form would leave them unwritten
        for parameter in (p for student in students for p in student.parameters()):
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(settings: Settings, iteration: int) -> float:
    """Linear warm-up, then polynomial decay: lr (1 - t / T) ** power."""
    optim = settings.optim
    if iteration < optim.warmup:
        return optim.lr * (iteration + 1) / optim.warmup
    return float(optim.lr * (1 - iteration / settings.train.iterations) ** optim.power)


class EmaUpdate:
    """The teachers' update; the lists of tensors are made once, for all pairs together."""

    def __init__(
        self,
        teachers: list[SegmentationModel],
        students: list[SegmentationModel],
        settings: EmaSettings,
    ) -> None:
        self.settings = settings
        self.averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
        # by their dtype, as a GPU copies many at once of one dtype only
        self.copied: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for teacher, student in zip(teachers, students, strict=True):
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                self._add(self.averaged, t.data, s.data)
            for mean, own in zip(teacher.buffers(), student.buffers(), strict=True):
                average = settings.buffers == "average" and mean.is_floating_point()
                copied = self.copied.setdefault(mean.dtype, ([], []))
                self._add(self.averaged if average else copied, mean, own)

    @staticmethod
    def _add(lists: tuple[list[Tensor], list[Tensor]], teacher: Tensor, student: Tensor) -> None:
        lists[0].append(teacher)
        lists[1].append(student)

    def decay(self, iteration: int) -> float:
        """Of the update after optimiser step number `iteration`, counted from 1."""
        return min(1 - 1 / (iteration + 1), self.settings.decay)

    def step(self, decay: float | Tensor) -> None:
        """Teachers follow their students."""
        ema_update_(*self.averaged, decay)
        for teachers, students in self.copied.values():
            if teachers:
                torch._foreach_copy_(teachers, students)
