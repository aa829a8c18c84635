"""Ctrl-C, SIGTERM and a closed terminal ask the run to stop; a second one ends the program."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from ctt.text import drop_closed_streams

ECHO = 2.0  # seconds in which a SIGTERM may come twice: from the scheduler, and from torchrun
HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal is closed; Windows has none
ASKING = [n for n in (signal.SIGINT, signal.SIGTERM, HANG_UP) if n is not None]


@contextlib.contextmanager
def interrupt_flag() -> Iterator[list[int]]:
    """Yield a list that stops being empty on the first of the signals `ASKING`.

    A second one ends the program, unless it is SIGHUP, which a shell and the system may both send.
    Under `nohup`, SIGHUP stays ignored.
    """
    caught: list[int] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if number == HANG_UP:
            drop_closed_streams()  # otherwise the next line to be printed ends the program
        elif caught and (number == signal.SIGINT or time.monotonic() - first > ECHO):
            raise KeyboardInterrupt
        first = first if caught else time.monotonic()
        caught.append(number)

    try:
        asking = [n for n in ASKING if n != HANG_UP or signal.getsignal(n) != signal.SIG_IGN]
        previous = {n: signal.signal(n, note) for n in asking}
    except ValueError:  # signals reach the main thread only
        previous = {}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
