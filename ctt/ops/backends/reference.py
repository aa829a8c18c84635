"""The plain formulas of `ctt.ops.reference` as a backend; the gradient is PyTorch's own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctt.ops import reference
from ctt.ops._library import gradient_dtype
from ctt.ops._plans import Plan
from ctt.ops.reference import class_topk, queue_push_

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
    temperature: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    def loss(q: Tensor) -> Tensor:
        return reference.info_nce(
            q, label, keys, count, temperature=temperature, mask=mask, reduction=reduction
        )

    return _with_gradient(loss, query, need_grad)


def pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: float,
    reduction: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    def loss(q: Tensor) -> Tensor:
        banks = list(zip(keys, counts, strict=True))
        return reference.pair_info_nce(
            q, positive, label, banks, temperature=temperature, mask=mask, reduction=reduction
        )

    return _with_gradient(loss, query, need_grad)


def _with_gradient(
    loss: Callable[[Tensor], Tensor], query: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    # autocast would turn the matrix products into half precision behind the caller's back
    with torch.autocast(query.device.type, enabled=False):
        if not need_grad:
            return loss(query.detach()), None

        # inside an operator the dispatcher has autograd switched off
        autograd = torch._C.DispatchKey.AutogradFunctionality
        with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
            leaf = query.detach().to(gradient_dtype(query)).requires_grad_()
            value = loss(leaf)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad
