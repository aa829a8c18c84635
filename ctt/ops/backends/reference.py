"""The plain formulas of `ctt.ops.reference` as a backend; the gradient is PyTorch's own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctt.ops import reference
from ctt.ops._library import gradient_dtype, loss_dtype, without_autocast
from ctt.ops._plans import Plan
from ctt.ops.reference import class_topk, queue_push_

Result = tuple[Tensor, Tensor | None, Tensor | None]

__all__ = ["class_topk", "ema_update_", "info_nce", "pair_info_nce", "queue_push_", "why_not"]


def why_not(operation: str, device: torch.device) -> str | None:
    return None


def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: float | Tensor, plan: Plan
) -> None:
    reference.ema_update_(teacher, student, decay)


def info_nce(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
) -> Result:
    def loss(q: Tensor, tau: float | Tensor) -> Tensor:
        return reference.info_nce(
            q, label, keys, count, temperature=tau, mask=mask, reduction=reduction
        )

    return _with_gradient(loss, query, temperature, need_grad, need_slope)


def pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    need_grad: bool,
    need_slope: bool,
) -> Result:
    def loss(q: Tensor, tau: float | Tensor) -> Tensor:
        banks = list(zip(keys, counts, strict=True))
        return reference.pair_info_nce(
            q, positive, label, banks, temperature=tau, mask=mask, reduction=reduction
        )

    return _with_gradient(loss, query, temperature, need_grad, need_slope)


def _with_gradient(
    loss: Callable[[Tensor, float | Tensor], Tensor],
    query: Tensor,
    temperature: float | Tensor,
    need_grad: bool,
    need_slope: bool,
) -> Result:
    with without_autocast(query.device):
        if not (need_grad or need_slope):
            return loss(query.detach(), temperature), None, None

        # inside an operator the dispatcher has autograd switched off
        autograd = torch._C.DispatchKey.AutogradFunctionality
        with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
            leaf = query.detach().to(gradient_dtype(query)).requires_grad_(need_grad)
            tau = torch.as_tensor(temperature, dtype=loss_dtype(query), device=query.device)
            tau = tau.detach().clone().requires_grad_(need_slope)
            value = loss(leaf, tau if need_slope else temperature)
            grad = slope = None
            if need_grad:
                (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=need_slope)
            if need_slope:
                # of every pixel: the derivative by its weight of that of the weighted sum
                weight = torch.ones_like(value).requires_grad_()
                (total,) = torch.autograd.grad((weight * value).sum(), tau, create_graph=True)
                (slope,) = torch.autograd.grad(total, weight)
        return value.detach(), grad, slope
