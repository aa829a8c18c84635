"""The optimiser of the students and its learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ctt.models.base import SegmentationModel

if TYPE_CHECKING:
    from ctt.settings import OptimSettings


def make_sgd(
    students: Iterable[nn.Module], optim: OptimSettings, extra: Iterable[nn.Module] = ()
) -> torch.optim.SGD:
    """Return SGD over two groups of every student: the body, and the head with its own rate.

    Args:
        extra: further modules, trained as heads are.
    """
    groups: list[dict[str, Any]] = []
    for student in students:
        assert isinstance(student, SegmentationModel)
        head = list(student.head_parameters())
        in_head = {id(p) for p in head}
        body = [p for p in student.parameters() if id(p) not in in_head and p.requires_grad]
        groups.append({"params": body, "lr_factor": 1.0})
        groups.append({"params": head, "lr_factor": optim.head_lr_factor})
    for module in extra:
        groups.append({"params": list(module.parameters()), "lr_factor": optim.head_lr_factor})
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
        for parameter in (p for group in groups for p in group["params"]):
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(optim: OptimSettings, iterations: int, iteration: int) -> float:
    """Return the rate of a step: linear warm-up, then polynomial decay lr (1 - t / T) ** power.

    Args:
        iterations: T, of the run. iteration: t, steps before this one.
    """
    if iteration < optim.warmup:
        return optim.lr * (iteration + 1) / optim.warmup
    return float(optim.lr * (1 - iteration / iterations) ** optim.power)
