"""How much memory a run takes, worked out without taking it.

The networks are run on tensors without data, and what autograd keeps for the backward
pass is counted. Left out, because it depends on the device: the context of CUDA (about half a GiB),
workspaces of convolutions, what the allocator loses to gaps, and the savings of torch.compile.
"""

import os

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ctt.methods import About, losses
from ctt.methods.base import Method
from ctt.models.base import SegmentationModel
from ctt.settings import Settings
from ctt.train.plan import images_at_once

MEBI = 1 << 20
FLOAT = 4  # bytes
ACTIVATIONS = "activations"  # grow with the batch


def estimate(settings: Settings, method: Method, classes: int, about: About) -> dict[str, int]:
    """Return the bytes of each part of what a process holds when a step is at its largest.

    Args:
        method: with its networks on the CPU.
    """
    height, width = settings.data.crop
    students, unlabeled = list(method.students), about.unlabeled
    seen, pairs = images_at_once(settings, unlabeled), len(students)
    terms = about.contrast * ((settings.loss.hc > 0) + (settings.loss.lc > 0) * (pairs - 1))
    held = trained = activations = widest = 0
    for student in students:
        trained += sum(size_of(p) for p in student.parameters() if p.requires_grad)
        held += bytes_of(student)
        kept, features = _forward(student.train(), settings, (seen, 3, height, width))
        # the contrast makes its gradients before the backward pass
        activations += sum(kept) + terms * features // settings.loss.contrast_stride**2
        widest = max(widest, *kept)
    # probabilities of every teacher at full size; ClassMix, and students of several teachers, take
    # a mean of them, and without one the logits of the last teacher lie beside its probabilities
    scores = FLOAT * settings.data.batch_size * classes * height * width
    averaged = settings.views.mix == "classmix" or pairs > 2
    labeling = (2 * pairs + 1 if averaged else pairs + 1) * scores if unlabeled else 0
    return {
        "students": held,
        "their gradients": trained,
        "their momenta": trained if settings.optim.momentum else 0,
        "teachers": bytes_of(method.teachers),
        "banks and other modules": bytes_of(method) - held - bytes_of(method.teachers),
        # gradients of the input and the output of a layer pass through the widest one
        ACTIVATIONS: max(activations + 2 * widest, labeling),
    }


def _forward(
    student: SegmentationModel, settings: Settings, shape: tuple[int, ...]
) -> tuple[list[int], int]:
    """Bytes of what the cross-entropy keeps for its backward pass, and of features in float32."""
    mode = FakeTensorMode()
    named = (*student.named_parameters(), *student.named_buffers())
    weights: dict[str, Tensor] = {name: mode.from_tensor(x) for name, x in named}
    own = set(map(storage_of, weights.values()))
    kept: dict[int, Tensor] = {}  # keeps them alive, so that no two have one address

    def keep(x: Tensor) -> Tensor:
        if storage_of(x) not in own:
            kept[storage_of(x)] = x
        return x

    amp = settings.train.amp
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        images = torch.empty(shape)
        label = torch.empty(shape[0], *shape[2:], dtype=torch.int64)
        with torch.autocast("cpu", dtype=dtype, enabled=amp != "off"):
            out = torch.func.functional_call(student, weights, (images,))
        losses.pixel_cross_entropy(out.logits, student.stride, label, losses.valid_pixels(label))
    return [x.untyped_storage().nbytes() for x in kept.values()], FLOAT * out.features.numel()


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers."""
    return sum(map(size_of, (*module.parameters(), *module.buffers())))


def storage_of(x: Tensor) -> int:
    """The address by which views of one tensor are told."""
    address: int = x.untyped_storage()._cdata
    return address


def size_of(x: Tensor) -> int:
    """Bytes."""
    return x.numel() * x.element_size()


def available(device: torch.device) -> int:
    """Bytes that the device has in all."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_table(parts: dict[str, int], settings: Settings, device: torch.device) -> Table:
    """The parts, their sum, and what fits on the device."""
    total, room = sum(parts.values()), available(device)
    table = Table(title="memory of a process at its largest, MiB")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for name, value in parts.items():
        table.add_row(name, f"{value / MEBI:,.0f}")
    table.add_section()
    table.add_row("all", f"{total / MEBI:,.0f}", style="bold")
    table.add_row(f"{device} has", f"{room / MEBI:,.0f}")
    fixed = total - parts[ACTIVATIONS]
    images = (room - fixed) * settings.data.batch_size // parts[ACTIVATIONS]
    table.add_row("largest --data.batch-size", f"{max(0, images):,}")
    return table
