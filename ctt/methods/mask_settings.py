"""Settings of masks that another model made, `--masks.NAME`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ctt.ranges import AT_LEAST_0, SHARE


@dataclass(frozen=True)
class MaskSettings:
    folder: Path | None = None
    """Folder of masks of the unlabelled images, made by another model: one more teacher of every
    student. NAME.png, or NAME_mask.png as ctt-predict writes; a value is a class, 255 is none.
    Every unlabelled image needs one; `ctt-data check --masks DIR` looks at all."""
    confidence: Path | None = None
    """Folder of grey images, NAME.png or NAME_confidence.png as ctt-predict --confidence writes:
    how sure that model is of each pixel, 255 for 1. By default it is sure everywhere."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the cross-entropy against these masks."""
    fade: Annotated[float, SHARE] = 0.0
    """Share of the run over which that weight falls to 0, in a straight line; 0: it stays."""
    threshold: Annotated[float, SHARE] = 0.0
    """Confidence that a pixel needs to be learnt."""
