"""Named ranges for NVIDIA's profilers, in the domain "ctt": docs/read-a-trace.md."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

try:
    import nvtx
except ImportError:  # the extra "train" brings it
    nvtx = None

_NOTHING = nullcontext()
# A colour for each operation and each phase of a step; other names are grey.
COLORS = {
    "class_topk": 0xB5A642,
    "queue_push_": 0x8C6D1F,
    "ema_update_": 0x3C7A89,
    "info_nce": 0xC0392B,
    "pair_info_nce": 0xE67E22,
    "input": 0x7F8C8D,
    "views": 0x16A085,
    "teachers": 0x2980B9,
    "students": 0x27AE60,
    "cross-entropy": 0x8E44AD,
    "contrast": 0xD35400,
    "backward": 0x2C3E50,
    "optimizer": 0xF1C40F,
    "ema": 0x5DADE2,
    "banks": 0xA04000,
}
_GREY = 0x999999


class _Range:
    def __init__(self, domain: Any, attributes: Any) -> None:
        self.domain, self.attributes = domain, attributes

    def __enter__(self) -> None:
        self.domain.push_range(self.attributes)

    def __exit__(self, *_: object) -> None:
        self.domain.pop_range()


def named_range(
    name: str, category: str = "operation", payload: int | None = None
) -> AbstractContextManager[object]:
    """Return a range for a profiler; without one, a null context (half a microsecond).

    Args:
        payload: how many pixels, tensors or other things are worked on.
    """
    domain = _listening()
    if domain is None:
        return _NOTHING
    color = COLORS.get(name, _GREY)
    attributes = domain.get_event_attributes(
        message=name, color=color, category=category, payload=payload
    )
    return _Range(domain, attributes)


@cache
def _listening() -> Any:
    """Return the domain, or None: a profiler is there before the process starts, or never."""
    domain = None if nvtx is None else nvtx.get_domain("ctt")
    if domain is None or domain.get_event_attributes(message="ctt") is None:
        return None
    return domain
