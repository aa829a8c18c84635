"""The losses since the last row of the log, and whether they and the weights are still finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ctt.errors import UserError
from ctt.files import atomic_write
from ctt.text import BYTES_AS_THEY_ARE
from ctt.train.resuming import resume_hint
from ctt.train.streams import Streams


class Losses:
    """Sums of the losses, kept on the device until a row or a checkpoint needs them."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.engine = streams, streams.engine
        # iteration up to which all weights are known to be finite
        self.checked_until = self.engine.iteration
        self.clear()

    def clear(self) -> None:
        """Begin a new row."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # steps in each sum; rounds differ in their terms

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the losses of a step."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def total(self) -> dict[str, float]:
        """Return the sums over the steps since the last row and over all processes.

        Call it before anything that these steps led to is saved.

        Raises:
            UserError: the loss is NaN or infinite.
        """
        if not self.sums:
            return {}
        values = self.engine.world.total(torch.stack(list(self.sums.values()))).tolist()
        sums = dict(zip(self.sums, values, strict=True))
        if not math.isfinite(sums["total"]):
            bad = ", ".join(f"{n} {value / self.counts[n]:.6g}" for n, value in sums.items())
            raise self._diverged(f"the loss is NaN or infinite ({bad})", self.counts["total"])
        return sums

    def means(self) -> dict[str, float]:
        """Return `total` as means over the steps that had each loss, and begin a new row."""
        means = {name: value / self.counts[name] for name, value in self.total().items()}
        self.clear()
        return means

    def check_weights(self) -> None:
        """Raise UserError if a weight is NaN or infinite; call it before anything is saved."""
        state = self.engine.method.state_dict()
        finite = {n: x.isfinite().all() for n, x in state.items() if x.is_floating_point()}
        if not bool(torch.stack(list(finite.values())).all()):
            lost = [name for name, good in finite.items() if not good]
            what = f"{len(lost)} of {len(finite)} tensors hold NaN or infinity, first {lost[0]}"
            raise self._diverged(what, self.engine.iteration - self.checked_until)
        self.checked_until = self.engine.iteration

    def _diverged(self, what: str, steps: int) -> UserError:
        """Return the error, having written down the images of the last `steps` steps."""
        engine, folder = self.engine, self.streams.folder
        # rounds before had other images
        steps = min(steps, engine.iteration - engine.rounds.starts[engine.method.round])
        lines, path = "".join(self.streams.drawn(steps)), folder / "diverged.txt"
        if engine.world.is_main:
            with atomic_write(path) as part:
                part.write_text(lines, "utf-8", BYTES_AS_THEY_ARE)
        return UserError(
            f"Training diverged: by iteration {engine.iteration}, {what}. Lower `optim.lr`, "
            f"set `optim.clip_norm` or leave out `train.amp` fp16; {path} names the images of the "
            f"steps in question.{resume_hint(folder)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of them."""
        return {"sums": self.total(), "summed": self.counts}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint, without the losses that new settings have switched off.

        Checkpoints of earlier versions have no sums, or one number of steps for all of them.
        """
        method, own = self.engine.method, self.engine.world.is_main
        kept = {*method.terms, *method.logged, "total"}
        sums = {name: value for name, value in saved.get("sums", {}).items() if name in kept}
        self.sums = {  # one process goes on with the sums of all
            name: torch.tensor(
                value if own else 0.0, dtype=torch.float32, device=self.engine.device
            )
            for name, value in sums.items()
        }
        summed = saved.get("summed", 0)
        counts = summed if isinstance(summed, dict) else dict.fromkeys(sums, summed)
        self.counts = {name: int(counts[name]) for name in sums}
        self.checked_until = self.engine.iteration
