"""The optimiser of the students and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ctt.errors import UserError
from ctt.methods.sharding import own_states, sharded
from ctt.models.base import BackboneModel, SegmentationModel

if TYPE_CHECKING:
    from ctt.settings import OptimSettings, Settings

Group = dict[str, Any]
Maker = Callable[..., torch.optim.Optimizer]


def make_optimizer(
    students: Iterable[nn.Module], settings: Settings, *extra: Iterable[nn.Module]
) -> torch.optim.Optimizer:
    """Return the optimiser over groups of every student: the body, and the head with its own rate.

    Args:
        extra: further modules of the students, as many of each, those of the first student first.
            They are trained as its head is.
    """
    optim, networks = settings.optim, list(students)
    groups: list[Group] = []
    factors, heads = [], []
    for k, student in enumerate(networks):
        assert isinstance(student, SegmentationModel)
        factors.append(_of_pair(k, optim.pair_lr, optim.lr) / optim.lr)
        heads.append(_of_pair(k, optim.pair_head_lr_factor, optim.head_lr_factor))
        for group in _of_student(student, optim, heads[k]):
            groups.append(group | {"lr_factor": factors[k] * group["lr_factor"]})
    for modules in map(list, extra):
        for i, module in enumerate(modules):
            k = i * len(networks) // len(modules)
            if parameters := list(module.parameters()):
                groups.append({"params": parameters, "lr_factor": factors[k] * heads[k]})
    if not optim.decay_vectors:
        groups = [part for group in groups for part in _by_decay(group, optim)]
    made = sharded if settings.train.shard_optimizer else _whole
    if optim.name == "adamw":
        return _adamw(groups, settings, made)
    return _sgd(groups, optim, made)


def _of_pair(k: int, values: Sequence[float], default: float) -> float:
    return values[k % len(values)] if values else default


def _of_student(
    student: SegmentationModel, optim: OptimSettings, head_factor: float
) -> Iterator[Group]:
    head = list(student.head_parameters())
    in_head = {id(p) for p in head}
    body = [p for p in student.parameters() if id(p) not in in_head and p.requires_grad]
    if optim.layer_decay < 1:
        backbone = student.backbone if isinstance(student, BackboneModel) else None
        yield from _by_layer(backbone, body, optim.layer_decay)
    else:
        yield {"params": body, "lr_factor": 1.0}
    yield {"params": head, "lr_factor": head_factor}


def _by_layer(
    backbone: nn.Module | None, body: list[nn.Parameter], decay: float
) -> Iterator[Group]:
    """Yield the parameters of a backbone by layers, of which each learns slower than the next.

    Raises:
        UserError: timm does not tell the backbone's layers apart, or there is no backbone.
    """
    from timm.optim import param_groups_layer_decay

    trained = {id(p) for p in body}
    merged: dict[float, list[nn.Parameter]] = {}
    if backbone is not None and hasattr(backbone, "group_matcher"):
        for group in param_groups_layer_decay(backbone, layer_decay=decay):
            some = [p for p in group["params"] if id(p) in trained]
            merged.setdefault(float(group["lr_scale"]), []).extend(some)
    if len(merged) < 2:
        raise UserError(
            f"`optim.layer_decay` {decay}: the layers of this network are not known; they are of "
            f"the ViTs of `model.name` vit and dpt. Leave it out."
        )
    for factor, params in merged.items():
        yield {"params": params, "lr_factor": factor}


def _by_decay(group: Group, optim: OptimSettings) -> Iterator[Group]:
    """Yield matrices and kernels, and then what has one axis, which is not decayed."""
    params = group["params"]
    yield {**group, "params": [p for p in params if p.ndim > 1]}
    yield {**group, "params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}


def _whole(
    kind: type[torch.optim.Optimizer], groups: list[Group], **options: Any
) -> torch.optim.Optimizer:
    return kind(groups, **options)


def _sgd(groups: list[Group], optim: OptimSettings, made: Maker) -> torch.optim.Optimizer:
    optimizer = made(
        torch.optim.SGD,
        groups,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,  # one pass over all tensors; a GradScaler then needs no sync with the host
    )
    if optim.momentum:
        # of a first step that a GradScaler skips, the fused form would leave them unwritten
        own = own_states(optimizer)
        for parameter in (p for group in own.param_groups for p in group["params"]):
            if parameter.requires_grad:
                own.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _adamw(groups: list[Group], settings: Settings, made: Maker) -> torch.optim.Optimizer:
    optim, graph = settings.optim, settings.train.cuda_graph
    optimizer = made(
        torch.optim.AdamW,
        groups,
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        fused=True,
        capturable=graph,
    )
    # it would warn of the ordinary steps that come before the recording
    own_states(optimizer)._warned_capturable_if_run_uncaptured = graph
    return optimizer


def learning_rate(optim: OptimSettings, iterations: int, iteration: int) -> float:
    """Return the rate of a step: linear warm-up, then lr times the decay that the settings name,
    (1 - t / T) ** power or (1 + cos(pi t / T)) / 2.

    Args:
        iterations: T, of the run.
        iteration: t, steps before this one.
    """
    if iteration < optim.warmup:
        return optim.lr * (iteration + 1) / optim.warmup
    if optim.schedule == "cosine":
        return optim.lr * (1 + math.cos(math.pi * iteration / iterations)) / 2
    return float(optim.lr * (1 - iteration / iterations) ** optim.power)
