"""The operations as torch.library operators `ctt::*`: schemas, kernels for tracing, autograd.

Eager calls do not come through here: the dispatcher costs more than a small operation. The public
functions use these operators while torch.compile or torch.export traces them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.graph import increment_version

from ctt.ops import _checks
from ctt.ops._nvtx import named_range
from ctt.ops._plans import plan_of
from ctt.ops._registry import select, select_for

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
# equation (8) where `positive` is given, else (6); a learned temperature takes the number's place
_library.define(
    "contrast(Tensor query, Tensor? positive, Tensor label, Tensor[] keys, Tensor[] counts, "
    "Tensor? mask, float temperature, Tensor? learned, str reduction, bool need_grad, "
    "bool need_slope, str backend) -> (Tensor, Tensor, Tensor)"
)


def is_traced(x: Tensor) -> bool:
    """Return whether an operation on x is traced (torch.compile, or tensors without data) rather
    than computed."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd of writes past it, so that a graph that saved the old values complains."""
    try:
        increment_version(tensors)
    except RuntimeError:  # some are inference tensors, which have no version
        increment_version([t for t in tensors if not t.is_inference()])


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, which would turn matrix products into half precision
    behind the caller's back."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def loss_dtype(query: Tensor) -> torch.dtype:
    """Return float64 for float64 queries, else float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def gradient_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype of the stored gradient: that of the query, but float32 for float16.

    A mean over many pixels makes gradients too small for float16. They are stored before the
    scale of a GradScaler reaches them, so the scale could not bring them back.
    """
    return torch.float32 if query.dtype == torch.float16 else query.dtype


def _ema_update_(teacher: list[Tensor], student: list[Tensor], decay: Tensor, backend: str) -> None:
    plan = plan_of(teacher, student)
    if plan.averaged is not None:
        teacher, student = ([x[i] for i in plan.averaged] for x in (teacher, student))
    run = select("ema_update_", backend, teacher[0].device).ema_update_
    run(teacher, student, decay, plan)


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


def contrast(
    query: Tensor,
    positive: Tensor | None,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: float,
    learned: Tensor | None,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, its gradient by the query, and its slope by the temperature, if needed."""
    name = _named(positive)
    tau: float | Tensor = temperature if learned is None else _value(name, learned)
    tensors = (query, positive, label, mask, *keys, *counts)
    module = select_for(name, backend, query.device, tensors)
    # kernels read memory, in which a view that negates it has the other sign
    query, keys = query.resolve_neg(), [k.resolve_neg() for k in keys]
    positive = None if positive is None else positive.resolve_neg()
    options = (mask, tau, reduction, need_grad, need_slope)
    with torch.no_grad(), named_range(name, payload=len(query)):
        if positive is None:
            loss, grad, slope = module.info_nce(query, label, keys[0], counts[0], *options)
        else:
            loss, grad, slope = module.pair_info_nce(query, positive, label, keys, counts, *options)
    if grad is None:
        grad = query.new_empty(0, dtype=gradient_dtype(query))
    return loss, grad, loss.new_empty(0) if slope is None else slope


def _contrast(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `contrast` does, with the gradient in the layout that the fake declares."""
    loss, grad, slope = contrast(*arguments)
    return loss, grad.contiguous(), slope


def _named(positive: Tensor | None) -> str:
    return "info_nce" if positive is None else "pair_info_nce"


def _value(operation: str, temperature: Tensor) -> float | Tensor:
    """Return the number where reading it waits for no device."""
    if temperature.device.type != "cpu":
        return temperature.detach()
    return _checks.temperature(operation, float(temperature))


for _name, _kernel in (
    ("ema_update_", _ema_update_),
    ("class_topk", _class_topk),
    ("queue_push_", _queue_push_),
    ("contrast", _contrast),
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


@torch.library.register_fake("ctt::contrast", lib=_library)
def _(
    query: Tensor,
    positive: Tensor | None,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: float,
    learned: Tensor | None,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (query.shape[0],) if reduction == "none" else ()
    loss = query.new_empty(shape, dtype=loss_dtype(query))
    grad = query.new_empty(query.shape if need_grad else 0, dtype=gradient_dtype(query))
    return loss, grad, loss.new_empty(shape if need_slope else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, positive, *_, learned = inputs[:8]
    ctx.operation = _named(positive)
    ctx.dtype, ctx.banks = query.dtype, len(inputs[3])
    ctx.learned = None if learned is None else learned.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def no_second_derivative(operation: str) -> RuntimeError:
    """Return the error to raise where autograd would silently give 0 for a second derivative."""
    return RuntimeError(
        f"{operation} has no second derivatives (create_graph=True, torch.func.hessian) and no "
        f"forward mode; ctt.ops.reference.{operation} has both"
    )


def _scale(
    ctx: Any, grad_loss: Tensor | None, in_place: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of the query and the temperature from those made with the loss."""
    grad, slope = ctx.saved_tensors[:2]
    by_query = by_temperature = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        factor = grad_loss[:, None] if grad_loss.dim() else grad_loss
        if in_place and grad.dtype == grad_loss.dtype and not _is_batched(grad_loss):
            # nobody reads it again: a second (N, D) costs more than the product itself
            by_query = grad.mul_(factor).to(ctx.dtype)
        else:
            by_query = (factor * grad.to(grad_loss.dtype)).to(ctx.dtype)
    if grad_loss is not None and ctx.learned is not None and slope.numel():
        by_temperature = (grad_loss * slope).sum().to(ctx.learned)
    return by_query, by_temperature


def _is_batched(x: Tensor) -> bool:
    """Return whether it stands for many tensors (torch.func.vmap, is_grads_batched=True)."""
    kind = torch._C._functorch
    return kind.is_batchedtensor(x) or kind.is_legacy_batchedtensor(x)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise no_second_derivative(ctx.operation)
    by_query, by_temperature = _scale(ctx, grad_loss, False)
    lists = ([None] * ctx.banks, [None] * ctx.banks)
    return (by_query, None, None, *lists, None, None, by_temperature, *(None,) * 4)


torch.library.register_autograd("ctt::contrast", _backward, setup_context=_keep, lib=_library)


class Contrast(torch.autograd.Function):
    """Eager twin of the operator, with its arguments: a dispatcher costs more than a small call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = contrast(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # by create_graph=True
            raise no_second_derivative(ctx.operation)
        by_query, by_temperature = _scale(ctx, grad_loss, not _graph_is_kept())
        return (by_query, *(None,) * 6, by_temperature, *(None,) * 4)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise no_second_derivative(ctx.operation)


class FirstDerivative(torch.autograd.Function):
    """Identity on gradients that refuses to be differentiated again.

    torch.func.grad asks for the graph of every backward, needed or not, so refusing that graph is
    no option.
    """

    @staticmethod
    def forward(operation: str, gradient: Tensor, *of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operation = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise no_second_derivative(ctx.operation)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise no_second_derivative(ctx.operation)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int | None]:
        return FirstDerivative.apply(*inputs), in_dims[1]


class TransformedContrast(Contrast):
    """`Contrast` in the form that torch.func needs, which costs 100 microseconds more a call."""

    forward = staticmethod(contrast)  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _keep(ctx, inputs, output)
        of = [x for x in (inputs[0], inputs[7]) if x is not None]
        ctx.save_for_backward(*output[1:], *of)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        of = ctx.saved_tensors[2:]
        by_query, by_temperature = (
            None if x is None else FirstDerivative.apply(ctx.operation, x, *of)
            for x in _scale(ctx, grad_loss, False)
        )
        return (by_query, *(None,) * 6, by_temperature, *(None,) * 4)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, tuple[int, ...]]:
        """Call for each of the batch in turn."""
        calls = [
            TransformedContrast.apply(
                *(_pick(x, dim, i) for x, dim in zip(inputs, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(x) for x in zip(*calls, strict=True)), (0, 0, 0)


def _pick(x: Any, dim: Any, i: int) -> Any:
    """Return element i of a batched argument."""
    if isinstance(x, (list, tuple)):
        return [_pick(y, d, i) for y, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, i)


def _graph_is_kept() -> bool:
    """Whether the backward that runs may run again (retain_graph)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())
