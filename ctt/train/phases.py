"""The parts of a step by name: ranges in profilers, and a clock that tells how long each takes."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from ctt.ops._nvtx import named_range

# in the order of a step; "input" is the wait for a batch
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

    On a GPU times are between events on its stream, so that nothing waits while they are taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.timing = device, False
        self._spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self.now() if self.timing else None
        with torch.profiler.record_function(name), named_range(name, "phase"):
            yield
        if start is not None:
            self._spans.append((name, start, self.now()))

    def now(self) -> Any:
        """Return a moment of the device, for `between`."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Any, end: Any) -> float:
        """Return the seconds between two moments; on a GPU both must be over."""
        seconds: float = (
            start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        )
        return seconds

    def wait(self) -> None:
        """Wait until the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call; waits for the device."""
        self.wait()
        spent: defaultdict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            spent[name] += self.between(start, end)
        self._spans = []
        return {name: spent[name] for name in (*NAMES, *spent) if name in spent}
