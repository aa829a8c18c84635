"""The operations as torch.library operators `ctt::*`: schemas, kernels for tracing, autograd.

Eager calls do not come through here: the dispatcher costs more than a small operation. The public
functions use these operators while torch.compile or torch.export traces them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ctt.ops._plans import plan_of
from ctt.ops._registry import select

_library = torch.library.Library("ctt", "DEF")
_library.define(
    "ema_update_(Tensor(a!)[] teacher, Tensor[] student, Tensor decay, str backend) -> ()"
)
_library.define(
    "class_topk(Tensor confidence, Tensor label, SymInt k, SymInt num_classes, Tensor? valid, "
    "str backend) -> (Tensor, Tensor)"
)
_library.define(
    "queue_push_(Tensor(a!) keys, Tensor(b!) count, Tensor(c!) cursor, Tensor features, "
    "Tensor index, str backend) -> ()"
)
_library.define(
    "info_nce(Tensor query, Tensor label, Tensor keys, Tensor? count, Tensor? mask, "
    "float temperature, str reduction, bool need_grad, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "pair_info_nce(Tensor query, Tensor positive, Tensor label, Tensor[] keys, Tensor[] counts, "
    "Tensor? mask, float temperature, str reduction, bool need_grad, str backend) "
    "-> (Tensor, Tensor)"
)


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd of writes past it, so that a graph that saved the old values complains."""
    try:
        increment_version(tensors)
    except RuntimeError:  # some are inference tensors, which have no version
        increment_version([t for t in tensors if not t.is_inference()])


def loss_dtype(query: Tensor) -> torch.dtype:
    """float64 for float64 queries, else float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def gradient_dtype(query: Tensor) -> torch.dtype:
    """In which the gradient is kept until backward: that of the query, but float32 for float16.

    A mean over many pixels makes gradients too small for float16. They are stored before the
    scale of a GradScaler reaches them, so the scale could not bring them back.
    """
    return torch.float32 if query.dtype == torch.float16 else query.dtype


def _ema_update_(teacher: list[Tensor], student: list[Tensor], decay: Tensor, backend: str) -> None:
    run = select("ema_update_", backend, teacher[0].device).ema_update_
    run(teacher, student, decay, plan_of(teacher, student))


def _class_topk(
    confidence: Tensor, label: Tensor, k: int, num_classes: int, valid: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    run = select("class_topk", backend, label.device).class_topk
    result: tuple[Tensor, Tensor] = run(confidence, label, k, num_classes, valid)
    return result


def _queue_push_(
    keys: Tensor, count: Tensor, cursor: Tensor, features: Tensor, index: Tensor, backend: str
) -> None:
    select("queue_push_", backend, keys.device).queue_push_(keys, count, cursor, features, index)


def _info_nce(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = select("info_nce", backend, query.device).info_nce
    loss, grad = run(query, label, keys, count, mask, temperature, reduction, need_grad)
    return loss, _or_empty(grad, query)


def _pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor],
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = select("pair_info_nce", backend, query.device).pair_info_nce
    loss, grad = run(query, positive, label, keys, counts, mask, temperature, reduction, need_grad)
    return loss, _or_empty(grad, query)


def _or_empty(grad: Tensor | None, query: Tensor) -> Tensor:
    return query.new_empty(0, dtype=gradient_dtype(query)) if grad is None else grad


for _name, _kernel in (
    ("ema_update_", _ema_update_),
    ("class_topk", _class_topk),
    ("queue_push_", _queue_push_),
    ("info_nce", _info_nce),
    ("pair_info_nce", _pair_info_nce),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("ctt::ema_update_", lib=_library)
def _(teacher: list[Tensor], student: list[Tensor], decay: Tensor, backend: str) -> None:
    return None


@torch.library.register_fake("ctt::class_topk", lib=_library)
def _(
    confidence: Tensor, label: Tensor, k: int, num_classes: int, valid: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return label.new_empty(num_classes, k), label.new_empty(num_classes)


@torch.library.register_fake("ctt::queue_push_", lib=_library)
def _(
    keys: Tensor, count: Tensor, cursor: Tensor, features: Tensor, index: Tensor, backend: str
) -> None:
    return None


def _fake_loss(query: Tensor, reduction: str, need_grad: bool) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0],) if reduction == "none" else ()
    grad = query.new_empty(query.shape if need_grad else 0, dtype=gradient_dtype(query))
    return query.new_empty(shape, dtype=loss_dtype(query)), grad


@torch.library.register_fake("ctt::info_nce", lib=_library)
def _(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _fake_loss(query, reduction, need_grad)


@torch.library.register_fake("ctt::pair_info_nce", lib=_library)
def _(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor],
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _fake_loss(query, reduction, need_grad)


def scale_gradient(grad_loss: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Chain rule for a stored gradient; grad_loss is () or (N,), grad (N, D), dtype the query's."""
    factor = grad_loss[:, None] if grad_loss.dim() else grad_loss
    return (factor * grad.to(grad_loss.dtype)).to(dtype)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.inputs, ctx.dtype = len(inputs), inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad_loss)


def _gradients(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    rest = (None,) * (ctx.inputs - 1)
    return (None if grad_loss is None else scale_gradient(grad_loss, grad, ctx.dtype), *rest)


@torch.autograd.function.once_differentiable
def _pair_backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    grad_query, grad_positive, grad_label, *_rest = _gradients(ctx, grad_loss)
    lists = ([None] * ctx.banks, [None] * ctx.banks)
    return (grad_query, grad_positive, grad_label, *lists, *(None,) * 5)


def _keep_pair_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _keep_gradient(ctx, inputs, output)
    ctx.banks = len(inputs[3])


torch.library.register_autograd(
    "ctt::info_nce", _backward, setup_context=_keep_gradient, lib=_library
)
torch.library.register_autograd(
    "ctt::pair_info_nce", _pair_backward, setup_context=_keep_pair_gradient, lib=_library
)


class StoredGradient(torch.autograd.Function):
    """Eager twin of the registered autograd: a loss whose gradient was made together with it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.dtype = query.dtype
        return loss.view_as(loss)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        if grad.dtype == grad_loss.dtype and not _graph_is_kept():
            # nobody reads it again: a second (N, D) costs more than the product itself
            factor = grad_loss[:, None] if grad_loss.dim() else grad_loss
            return grad.mul_(factor).to(ctx.dtype), None, None
        return scale_gradient(grad_loss, grad, ctx.dtype), None, None


def _graph_is_kept() -> bool:
    """Whether the backward that runs may run again (retain_graph)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())
