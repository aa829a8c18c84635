"""Batches for the device, and how long it has to wait for them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ctt.train.phases import Phases

Batch = tuple[Tensor, Tensor]


class DevicePrefetcher:
    """Labelled and unlabelled batches, copied to the device beside the work that it has.

    Args:
        labeled, unlabeled: batches on the CPU, in pinned memory where the device is a GPU. An
            unlabelled one may be None.
        phases: those of the step, on its device.
    """

    def __init__(
        self,
        labeled: Iterator[Batch],
        unlabeled: Iterator[Batch | None] | None,
        phases: Phases,
    ) -> None:
        self._labeled, self._unlabeled, self._phases = labeled, unlabeled, phases
        self._copies: torch.cuda.Stream | None = None
        if phases.device.type == "cuda":
            self._copies = torch.cuda.Stream(phases.device)  # type: ignore[no-untyped-call]
        self._waits: list[tuple[Any, Any]] = []

    def __call__(self) -> tuple[Batch, Batch | None]:
        """Return the batches of the next step."""
        start = self._phases.now()
        with self._phases("input"):
            labeled = self._put(next(self._labeled))
            found = None if self._unlabeled is None else next(self._unlabeled)
            unlabeled = None if found is None else self._put(found)
            if self._copies is not None:
                torch.cuda.current_stream(self._phases.device).wait_stream(self._copies)
        self._waits.append((start, self._phases.now()))
        return labeled, unlabeled

    def _put(self, batch: Batch) -> Batch:
        device = self._phases.device
        if self._copies is None:
            return batch[0].to(device), batch[1].to(device)
        with torch.cuda.stream(self._copies):
            images, label = (x.to(device, non_blocking=True) for x in batch)
        for x in (images, label):  # its memory may be used again once the step has read it
            x.record_stream(torch.cuda.current_stream(device))
        return images, label

    def waited(self) -> float:
        """Return the seconds spent waiting for a batch since the last call; waits for the device.

        On a GPU from the end of one step's work to the arrival of the next batch, on the GPU's own
        clock: a loader that is slow, but not slower than the GPU, costs nothing.
        """
        self._phases.wait()
        seconds = sum(self._phases.between(start, end) for start, end in self._waits)
        self._waits = []
        return seconds
