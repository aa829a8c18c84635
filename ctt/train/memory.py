"""How much memory a run takes, worked out without taking it.

A step runs on tensors without data, and what autograd keeps for the backward pass is counted. Left
out, because it depends on the device: the context of CUDA (about half a GiB), workspaces of
convolutions, what the allocator loses to gaps, and the savings of torch.compile.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.hooks import RemovableHandle

from ctt.data.dataset import DatasetInfo
from ctt.data.views import constant
from ctt.methods import About
from ctt.methods.base import Batch, Method
from ctt.settings import Settings
from ctt.train.batches import batch_of, split_batch
from ctt.train.compiling import repeated_blocks
from ctt.train.context import StepContext
from ctt.train.distributed import World

MEBI = 1 << 20
FLOAT = 4  # bytes
ACTIVATIONS = "activations"  # grow with the batch
MOMENTA = "momenta"


def estimate(settings: Settings, method: Method, info: DatasetInfo, about: About) -> dict[str, int]:
    """Return the bytes of each part of what a process holds when a step is at its largest.

    Args:
        method: with its networks on the CPU; not to be trained afterwards, as its counters move.

    Returns:
        of each part; without `ACTIVATIONS` if a step cannot be run without data.
    """
    height, width = settings.data.crop
    held, teachers = bytes_of(method.students), bytes_of(method.teachers)
    parts = {
        "students": held,
        "gradients": sum(size_of(p) for p in method.parameters() if p.requires_grad),
        MOMENTA: momenta(method),
        "teachers": teachers,
        "banks and other modules": bytes_of(method) - held - teachers,
    }
    # probabilities of every teacher at full size. Their mean (ClassMix, or a student of several
    # teachers) needs a stacked copy of all and the result; without one, the logits of the last
    # teacher lie beside its probabilities
    scores = FLOAT * settings.data.unlabeled_images * len(info.classes) * height * width
    pairs = len(method.students)
    averaged = settings.views.mix == "classmix" or pairs > 2
    labeling = (2 * pairs + 1 if averaged else pairs + 1) * scores if about.unlabeled else 0
    try:
        ends = {0, len(method.rounds()) - 1}
        kept = max((kept_by_step(settings, method, info, about, r) for r in ends), key=sum)
    except Exception:  # a method may look at its numbers
        return parts
    # gradients of the input and the output of a layer pass through the widest one
    return parts | {ACTIVATIONS: max(sum(kept) + 2 * max(kept), labeling)}


def momenta(method: Method) -> int:
    """Return the bytes of what the optimisers remember of each weight."""
    total = 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        for optimizer in method.optimizers().values():
            for group in optimizer.param_groups:
                copies = 2 if "betas" in group else int(group.get("momentum", 0) > 0)
                total += copies * sum(size_of(p) for p in group["params"] if p.requires_grad)
    return total


def kept_by_step(
    settings: Settings, method: Method, info: DatasetInfo, about: About, number: int
) -> list[int]:
    """Return the bytes of each tensor that a part of a step keeps for its backward pass.

    Args:
        number: of the round of the run, from 0.
    """
    mode, kept = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Tensor]()
    # as the mode takes them; by the tensors, so that no two have one address
    weights = [mode.from_tensor(x) for x in (*method.parameters(), *method.buffers())]
    own = {storage_of(x) for x in (*weights, *method.parameters(), *method.buffers())}
    inside: list[dict[int, Tensor]] = []  # of blocks that are computed again

    def keep(x: Tensor) -> Tensor:
        if storage_of(x) not in own:
            (inside[-1] if blocks.running else kept)[storage_of(x)] = x
        return x

    def enter(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        inside.append({})
        kept.update((storage_of(x), x) for x in inputs if isinstance(x, Tensor))

    again = settings.train.gradient_checkpointing
    blocks = Blocks(method.students if again else [], enter)

    with step_without_data(settings, method, info, about, number, mode) as (b, step):
        _, part = prepared(settings, method, b, step)
        with blocks, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            method.losses(part, step)
    largest = max((list(x.values()) for x in inside), key=held, default=[])
    return [x.untyped_storage().nbytes() for x in (*kept.values(), *largest)]


@contextlib.contextmanager
def step_without_data(
    settings: Settings,
    method: Method,
    info: DatasetInfo,
    about: About,
    number: int,
    mode: FakeTensorMode,
    iteration: int | None = None,
) -> Iterator[tuple[Batch, StepContext]]:
    """Enter the mode, and give the batch of a step, before `Method.prepare`, and the step.

    Args:
        number: of the round of the run, from 0.
        mode: in which tensors have no data.
        iteration: steps before it; None: it is the last one, when all that a method does has begun.
    """
    method.train().round = number
    kind = method.rounds()[number]
    size, data = settings.data.crop, settings.data
    schedules = {"rate": lambda iteration: settings.optim.lr, **method.schedules()}
    step = StepContext(settings, info, torch.device("cpu"), World(), schedules)
    step.begin(settings.train.iterations - 1 if iteration is None else iteration)
    try:
        with mode:
            kind_of = torch.float32 if info.bands else torch.uint8

            def made_up(images: int) -> list[Tensor]:
                pixels = torch.zeros(images, info.channels, *size, dtype=kind_of)
                return [pixels, torch.zeros(images, *size).byte()]

            labeled, more = made_up(data.batch_size), []
            if about.unlabeled:
                pixels, padding = made_up(data.unlabeled_images)
                more = [pixels, padding.int()]
            external = settings.masks.folder is not None
            given = [*labeled, *more] if kind.images != "none" else labeled
            yield batch_of(given, kind, external), step
    finally:
        constant.cache_clear()  # those made meanwhile have no data


def prepared(
    settings: Settings, method: Method, b: Batch, step: StepContext
) -> tuple[Batch, Batch]:
    """Return a batch that is prepared as a whole, and the first part of it."""
    with torch.no_grad():
        b = method.prepare(b | method.labeled.totals(b["label"], step), step)
    step.whole = False
    return b, next(split_batch(b, settings.train.accumulate))


def held(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors none of which is a view of another."""
    return sum(x.untyped_storage().nbytes() for x in tensors)


class Blocks:
    """Watches the blocks that repeat in networks, while it is entered.

    Args:
        enter: called with the block and its inputs before each runs.

    Attributes:
        running: whether one of them is, with gradient.
    """

    def __init__(
        self,
        networks: Iterable[nn.Module],
        enter: Callable[[nn.Module, tuple[Any, ...]], None],
    ) -> None:
        self.blocks = [block for network in networks for block in repeated_blocks(network)]
        self.enter, self.running = enter, False
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for block in self.blocks:
            self.hooks.append(block.register_forward_pre_hook(self._before))
            self.hooks.append(block.register_forward_hook(self._after))

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.running = torch.is_grad_enabled()
        if self.running:
            self.enter(block, inputs)

    def _after(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.running = False


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers."""
    return sum(map(size_of, (*module.parameters(), *module.buffers())))


def storage_of(x: Tensor) -> int:
    """Return the address that identifies views of one tensor."""
    address: int = x.untyped_storage()._cdata
    return address


def size_of(x: Tensor) -> int:
    """Return the size in bytes."""
    return x.numel() * x.element_size()


def total_memory(device: torch.device) -> int | None:
    """Return the total memory of the device in bytes; None if the system does not say."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_table(parts: dict[str, int], settings: Settings, device: torch.device) -> Table:
    """Return the parts, their sum, and what fits on the device."""
    total, room = sum(parts.values()), total_memory(device)
    table = Table(title="memory of a process at its largest, MiB")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for name, value in parts.items():
        table.add_row(name, f"{value / MEBI:,.0f}")
    table.add_section()
    table.add_row("all", f"{total / MEBI:,.0f}", style="bold")
    table.add_row(f"{device} has", "unknown" if room is None else f"{room / MEBI:,.0f}")
    if ACTIVATIONS not in parts:
        table.add_row(ACTIVATIONS, "unknown")
    if ACTIVATIONS not in parts or room is None:
        return table
    fixed = total - parts[ACTIVATIONS]
    images = (room - fixed) * settings.data.batch_size // parts[ACTIVATIONS]
    table.add_row("largest `data.batch_size`", f"{max(0, images):,}")
    return table
