"""First-in first-out rings of keys, one for each class."""

import torch
from torch import Tensor

from ctt.ops import _checks, _library
from ctt.ops._nvtx import named_range
from ctt.ops._registry import select_for


def queue_push_(
    keys: Tensor,
    count: Tensor,
    cursor: Tensor,
    features: Tensor,
    index: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Append chosen features, L2-normalised, to the queue of each class, in place.

    For each class c the features index[c, 0], index[c, 1], ... are written one after the other at
    cursor[c] modulo V; the oldest key leaves first. Afterwards cursor[c] is the place of the next
    write (in 0..V-1) and count[c] the number of keys held (at most V).

    Args:
        keys: (C, V, D) floating point, the rings; V and D are at least 1.
        count: (C,) int64, keys held.
        cursor: (C,) int64, next place to write.
        features: (N, D) floating point, not normalised; no gradient flows. A feature whose
            norm is 0, NaN or infinite becomes a key of zeros: no key is ever NaN. They may not
            share memory with `keys`, which is written while they are read.
        index: (C, k) int64 into features; entries outside 0..N-1 (-1) are skipped.
        backend: "auto" or a name from `ctt.ops.available_backends()`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape or device.
        RuntimeError: the backend that was asked for cannot run here.
    """
    _checks.tensor("queue_push_", "keys", keys, ("C", "V", "D"), None)
    num_classes, places, dim = keys.shape
    if places == 0 or dim == 0:
        raise ValueError(
            f"queue_push_: keys must have at least one place and one channel, got shape "
            f"{tuple(keys.shape)}"
        )
    device = keys.device
    _checks.tensor("queue_push_", "count", count, (num_classes,), torch.int64, device)
    _checks.tensor("queue_push_", "cursor", cursor, (num_classes,), torch.int64, device)
    _checks.tensor("queue_push_", "features", features, ("N", dim), None, device)
    _checks.tensor("queue_push_", "index", index, (num_classes, "k"), torch.int64, device)
    features = features.detach().resolve_neg()
    if _library.is_traced(features):
        torch.ops.ctt.queue_push_(keys, count, cursor, features, index, backend)
        return
    tensors = (keys, count, cursor, features, index)
    _checks.untransformed("queue_push_", tensors)
    run = select_for("queue_push_", backend, device, tensors).queue_push_
    with torch.no_grad(), named_range("queue_push_", payload=index.numel()):
        run(keys, count, cursor, features, index)
