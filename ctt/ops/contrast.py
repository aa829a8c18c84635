"""Pixel contrast against per-class queues: equations (6) and (8) of the paper."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctt.ops import _checks
from ctt.ops._library import StoredGradient
from ctt.ops._nvtx import named_range
from ctt.ops._registry import select


def info_nce(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None = None,
    *,
    temperature: float,
    mask: Tensor | None = None,
    reduction: str = "class",
    backend: str = "auto",
) -> Tensor:
    """High-level contrast, equation (6): pull a pixel to all keys of its class, push from the rest.

    For a pixel v of class c, with Q_c the queue of c and cos the cosine similarity:

        hc(v) = mean over k+ in Q_c of
                -log( e^{cos(v,k+)/tau} / (e^{cos(v,k+)/tau} + sum over k- of e^{cos(v,k-)/tau}) )

    where k- runs over the keys of all other classes. A pixel counts when its mask is true, its
    label is in 0..C-1, its own queue holds a key and another class holds one.

    Args:
        query: (N, D) floating point, not normalised (done here); takes the gradient. A query of
            norm 0 has cosine 0 to every key and takes no gradient.
        label: (N,) int64; labels outside 0..C-1 (255) do not count.
        keys: (C, V, D) floating point, L2-normalised as `queue_push_` stores them; no gradient.
        count: (C,) int64, how many of the V keys of a class are held (the first ones); None: all.
        temperature: tau > 0.
        mask: (N,) bool; pixels where it is false do not count, whatever they hold.
        reduction: "class" (mean over the pixels of a class, then over the classes present),
            "mean" (over the pixels that count) or "none" ((N,), 0 where a pixel does not count).
        backend: "auto" or a name from `ctt.ops.available_backends()`.

    Returns:
        () or (N,), in float32 (float64 for float64 queries). 0 with zero gradient where no pixel
        counts. Half-precision inputs are accumulated in float32, under autocast too. The gradient
        is made together with the loss: a second derivative is not offered, asking for one raises.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range.
        RuntimeError: the backend that was asked for cannot run here.
    """
    _checks.tensor("info_nce", "query", query, ("N", "D"), None)
    dim = query.shape[1]
    _checks.tensor("info_nce", "keys", keys, ("C", "V", dim), None, query.device)
    if count is not None:
        _checks.tensor("info_nce", "count", count, (keys.shape[0],), torch.int64, query.device)
    _check_common("info_nce", query, label, mask, temperature, reduction)
    keys = keys.detach()
    need_grad = query.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.ctt.info_nce(
            query, label, keys, count, mask, temperature, reduction, need_grad, backend
        )[0]
        return traced
    run = select("info_nce", backend, query.device).info_nce
    with torch.no_grad(), named_range("ctt.info_nce", query.device):
        loss, grad = run(query, label, keys, count, mask, temperature, reduction, need_grad)
    return _attach(query, loss, grad)


def pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    banks: Sequence[tuple[Tensor, Tensor | None]],
    *,
    temperature: float,
    mask: Tensor | None = None,
    reduction: str = "class",
    backend: str = "auto",
) -> Tensor:
    """Low-level contrast, equation (8): pull a pixel to its peer, push from other classes' keys.

    For a pixel v of class c with v2 the feature of the same pixel in the peer network:

        lc(v) = -log( e^{cos(v,v2)/tau} / (e^{cos(v,v2)/tau} + sum over k- of e^{cos(v,k-)/tau}) )

    where k- runs over the keys of all classes but c in every bank. A pixel counts when its mask is
    true, its label is in 0..C-1 and another class holds a key in some bank.

    Args:
        query: (N, D) floating point, not normalised (done here); takes the gradient.
        positive: (N, D) floating point, not normalised; takes no gradient.
        label: (N,) int64; labels outside 0..C-1 (255) do not count.
        banks: (keys (C, V, D), count (C,) int64 or None) of each bank, with one C and D; keys
            L2-normalised as `queue_push_` stores them.
        temperature, mask, reduction, backend: as in `info_nce`.

    Returns:
        () or (N,), as `info_nce`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range.
        RuntimeError: the backend that was asked for cannot run here.
    """
    name = "pair_info_nce"
    _checks.tensor(name, "query", query, ("N", "D"), None)
    device = query.device
    _checks.tensor(name, "positive", positive, tuple(query.shape), None, device)
    if len(banks) == 0:
        raise ValueError(f"{name}: banks must hold at least one (keys, count), got none")
    classes: int | str = "C"
    for i, (keys, count) in enumerate(banks):
        _checks.tensor(name, f"banks[{i}][0]", keys, (classes, "V", query.shape[1]), None, device)
        classes = keys.shape[0]
        if count is not None:
            _checks.tensor(name, f"banks[{i}][1]", count, (classes,), torch.int64, device)
    _check_common(name, query, label, mask, temperature, reduction)
    all_keys = [keys.detach() for keys, _ in banks]
    all_counts = [
        torch.full((keys.shape[0],), keys.shape[1], device=device) if count is None else count
        for keys, count in banks
    ]
    need_grad = query.requires_grad and torch.is_grad_enabled()
    options = (temperature, reduction, need_grad)
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.ctt.pair_info_nce(
            query, positive.detach(), label, all_keys, all_counts, mask, *options, backend
        )[0]
        return traced
    run = select(name, backend, device).pair_info_nce
    with torch.no_grad(), named_range("ctt.pair_info_nce", device):
        loss, grad = run(query, positive, label, all_keys, all_counts, mask, *options)
    return _attach(query, loss, grad)


def _check_common(
    operation: str,
    query: Tensor,
    label: Tensor,
    mask: Tensor | None,
    temperature: float,
    reduction: str,
) -> None:
    _checks.tensor(operation, "label", label, (query.shape[0],), torch.int64, query.device)
    if mask is not None:
        _checks.tensor(operation, "mask", mask, (query.shape[0],), torch.bool, query.device)
    _checks.temperature(operation, temperature)
    _checks.reduction(operation, reduction)


def _attach(query: Tensor, loss: Tensor, grad: Tensor | None) -> Tensor:
    """Hang the gradient that was made with the loss onto the graph."""
    if grad is None:
        return loss
    attached: Tensor = StoredGradient.apply(query, loss, grad)
    return attached
