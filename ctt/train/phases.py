"""The parts of a step by name: ranges in profilers, and a clock that tells how long each takes."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from ctt.ops._nvtx import named_range

# in the order of a step; "input" is the wait for the next batch
NAMES = (
    "input",
    "views",
    "teachers",
    "students",
    "cross-entropy",
    "contrast",
    "backward",
    "optimizer",
    "ema",
    "banks",
)


class Phases:
    """Names what runs inside `with phases(name)`, and times it while `timing` is set.

    On a GPU the time is between events on its stream, so that nothing waits while it is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.timing = device, False
        self._spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now() if self.timing else None
        with torch.profiler.record_function(name), named_range(name, self.device):
            yield
        if start is not None:
            self._spans.append((name, start, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self) -> dict[str, float]:
        """Of each phase, since the last call; waits for the device."""
        spent: defaultdict[str, float] = defaultdict(float)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for name, start, end in self._spans:
            if self.device.type == "cuda":
                spent[name] += start.elapsed_time(end) / 1000
            else:
                spent[name] += end - start
        self._spans = []
        return {name: spent[name] for name in (*NAMES, *spent) if name in spent}
