"""Pixel contrast against per-class queues: equations (6) and (8) of the paper."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ctt.ops import _checks
from ctt.ops._library import Contrast, TransformedContrast, contrast, is_traced


def info_nce(
    query: Tensor,
    label: Tensor,
    keys: Tensor,
    count: Tensor | None = None,
    *,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    reduction: str = "class",
    backend: str = "auto",
) -> Tensor:
    """Return the loss that pulls pixels to the keys of their class and pushes them from all others.

    This is equation (6) of Xiao et al., 2022, the high-level contrast.

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
        temperature: tau > 0. It may be a tensor of one value, with a gradient if tau is learned; on
            a GPU its range is then not checked, and the `torch` backend computes the loss.
        mask: (N,) bool; pixels where it is false do not count, whatever they hold.
        reduction: "class" (mean over the pixels of a class, then over the classes present),
            "mean" (over the pixels that count) or "none" ((N,), 0 where a pixel does not count).
        backend: "auto" or a name from `ctt.ops.available_backends()`.

    Returns:
        () or (N,), in float32 (float64 for float64 queries); 0 with zero gradient if no pixel
        counts. Half-precision inputs are accumulated in float32, under autocast too. The gradient
        is computed together with the loss, so a second derivative or forward mode raises
        RuntimeError. torch.func.grad works, and vmap as a loop over its batch.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range.
        RuntimeError: the backend that was asked for cannot run here.
    """
    _checks.tensor("info_nce", "query", query, ("N", "D"), None)
    dim = query.shape[1]
    _checks.tensor("info_nce", "keys", keys, ("C", "V", dim), None, query.device)
    if count is not None:
        _checks.tensor("info_nce", "count", count, (keys.shape[0],), torch.int64, query.device)
    options = (mask, temperature, reduction, backend)
    return _contrast("info_nce", query, None, label, [keys.detach()], [count], *options)


def pair_info_nce(
    query: Tensor,
    positive: Tensor,
    label: Tensor,
    banks: Sequence[tuple[Tensor, Tensor | None]],
    *,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    reduction: str = "class",
    backend: str = "auto",
) -> Tensor:
    """Return the loss that pulls pixels to their peers and pushes them from other classes' keys.

    This is equation (8) of Xiao et al., 2022, the low-level contrast.

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
        temperature: as in `info_nce`.
        mask: as in `info_nce`.
        reduction: as in `info_nce`.
        backend: as in `info_nce`.

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
    _checks.pairs(name, "banks", "(keys, count)", banks)
    classes: int | str = "C"
    for i, (keys, count) in enumerate(banks):
        _checks.tensor(name, f"banks[{i}][0]", keys, (classes, "V", query.shape[1]), None, device)
        classes = keys.shape[0]
        if count is not None:
            _checks.tensor(name, f"banks[{i}][1]", count, (classes,), torch.int64, device)
    banks = [(keys.detach(), count) for keys, count in banks]
    all_keys, all_counts = [keys for keys, _ in banks], [count for _, count in banks]
    options = (mask, temperature, reduction, backend)
    return _contrast(name, query, positive.detach(), label, all_keys, all_counts, *options)


def _contrast(
    name: str,
    query: Tensor,
    positive: Tensor | None,
    label: Tensor,
    keys: list[Tensor],
    counts: list[Tensor | None],
    mask: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    backend: str,
) -> Tensor:
    """Check what both losses have in common, and compute one of them."""
    if query.shape[1] < 1:
        raise ValueError(f"{name}: query must have at least one feature, got {tuple(query.shape)}")
    _checks.tensor(name, "label", label, (query.shape[0],), torch.int64, query.device)
    if mask is not None:
        _checks.tensor(name, "mask", mask, (query.shape[0],), torch.bool, query.device)
    _checks.reduction(name, reduction)
    learned, tau = None, 1.0
    # a number that lies on the host is read at once
    if isinstance(temperature, Tensor) and (temperature.requires_grad or not _on_host(temperature)):
        learned = _checks.learned_temperature(name, temperature, query.device)
    else:
        tau = _checks.temperature(name, temperature)
    differentiates = torch.is_grad_enabled()
    need_grad = differentiates and query.requires_grad
    need_slope = differentiates and learned is not None and learned.requires_grad
    run: Any
    if is_traced(query):
        run = torch.ops.ctt.contrast
        counts = [_all_held(k) if n is None else n for k, n in zip(keys, counts, strict=True)]
    elif torch._C._are_functorch_transforms_active():
        # requires_grad does not tell of all levels
        run, need_grad, need_slope = TransformedContrast.apply, differentiates, learned is not None
    else:
        forward_mode = forward_ad._current_level >= 0  # which Contrast refuses, where it is used
        run = Contrast.apply if need_grad or need_slope or forward_mode else contrast
    arguments = (query, positive, label, keys, counts, mask, tau, learned, reduction)
    loss: Tensor = run(*arguments, need_grad, need_slope, backend)[0]
    return loss


def _all_held(keys: Tensor) -> Tensor:
    return torch.full((keys.shape[0],), keys.shape[1], device=keys.device)


def _on_host(x: Tensor) -> bool:
    """Whether the value can be read without waiting for a device, or breaking a graph."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return x.device.type == "cpu" and not wrapped
