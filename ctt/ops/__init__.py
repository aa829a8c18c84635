"""Drop-in operations for teacher-student training with pixel contrast. Needs torch alone.

    from ctt.ops import MemoryBank, ema_update_, info_nce, pair_info_nce

Pixels are rows: features (B, D, h, w) become (N, D) by `x.permute(0, 2, 3, 1).flatten(0, 2)`, and
labels (B, h, w) become (N,) by `label.flatten()`. Every operation takes `backend="auto"`;
`available_backends()` returns what can run here, and `prefer_backend(name)` sets what "auto" tries
first. `ctt.ops.reference` holds the plain formulas.
"""

from ctt.ops._registry import available_backends, prefer_backend
from ctt.ops.bank import MemoryBank
from ctt.ops.contrast import info_nce, pair_info_nce
from ctt.ops.ema import ema_update_
from ctt.ops.push import queue_push_
from ctt.ops.topk import class_topk

__all__ = [
    "MemoryBank",
    "available_backends",
    "class_topk",
    "ema_update_",
    "info_nce",
    "pair_info_nce",
    "prefer_backend",
    "queue_push_",
]
