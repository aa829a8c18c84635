"""Drop-in operations for teacher-student training with pixel contrast. Needs torch alone.

    from ctt.ops import MemoryBank, ema_update_, info_nce, pair_info_nce

Every operation takes `backend="auto"`; `available_backends()` tells what runs here
and `prefer_backend(name)` what "auto" takes first.
`ctt.ops.reference` holds the plain formulas.
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
