"""Selection of the bank's candidates: the most confident pixels of each class."""

import torch
from torch import Tensor

from ctt.ops import _checks, _library
from ctt.ops._nvtx import named_range
from ctt.ops._registry import select_for


def class_topk(
    confidence: Tensor,
    label: Tensor,
    k: int,
    num_classes: int,
    *,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the k most confident pixels of every class.

    Args:
        confidence: (N,) floating point. A pixel whose confidence is NaN is skipped.
        label: (N,) int64. Pixels with a label outside 0..num_classes-1 (255) are skipped.
        k: how many to take per class, at least 1; more than there are is allowed.
        num_classes: C.
        valid: (N,) bool; pixels where it is false are skipped.
        backend: "auto" or a name from `ctt.ops.available_backends()`.

    Returns:
        index (C, k) int64, ordered by falling confidence, ties by the lower index, padded with -1;
        count (C,) int64, how many entries of each row are not padding.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range.
        RuntimeError: the backend that was asked for cannot run here.
    """
    _checks.tensor("class_topk", "label", label, ("N",), torch.int64)
    device = label.device
    _checks.tensor("class_topk", "confidence", confidence, tuple(label.shape), None, device)
    if valid is not None:
        _checks.tensor("class_topk", "valid", valid, tuple(label.shape), torch.bool, device)
    k = _checks.positive_int("class_topk", "k", k)
    num_classes = _checks.positive_int("class_topk", "num_classes", num_classes)
    confidence = confidence.detach().resolve_neg()
    if _library.is_traced(confidence):
        traced: tuple[Tensor, Tensor] = torch.ops.ctt.class_topk(
            confidence, label, k, num_classes, valid, backend
        )
        return traced
    _checks.untransformed("class_topk", (confidence, label))
    tensors = (confidence, label, valid)
    run = select_for("class_topk", backend, device, tensors).class_topk
    with named_range("class_topk", payload=len(label)):
        result: tuple[Tensor, Tensor] = run(confidence, label, k, num_classes, valid)
    return result
