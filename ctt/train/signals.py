"""Ctrl-C and SIGTERM: the first one asks the run to stop, a second one ends the program."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

ECHO = 2.0  # seconds in which a SIGTERM may come twice: from the scheduler, and from torchrun


@contextlib.contextmanager
def interrupt_flag() -> Iterator[list[int]]:
    """Yield a list that stops being empty on Ctrl-C or SIGTERM; a second one ends the program."""
    caught: list[int] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if caught and (number == signal.SIGINT or time.monotonic() - first > ECHO):
            raise KeyboardInterrupt
        first = first if caught else time.monotonic()
        caught.append(number)

    try:
        previous = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals reach the main thread only
        previous = {}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
