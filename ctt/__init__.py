"""Semi-supervised semantic segmentation by cross-teacher training."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctt.models.segmenter import Segmenter

    from .train.api import train as train

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Import `ctt.ops`, or what trains, on its first use: `import ctt` alone stays quick."""
    if name not in ("ops", "train"):
        raise AttributeError(f"module 'ctt' has no attribute {name!r}")
    return importlib.import_module(f"ctt.{name}")


def load(path: str | Path, network: str = "best") -> Segmenter:
    """Return a trained network, ready for inference on the CPU, without gradients (needs the extra
    `train`).

    It is a module that maps images (B, channels, H, W) in 0..1 to class probabilities (B, C, H, W),
    with a method `predict` for arrays, pictures and files, one or many, whole or in tiles, and with
    `classes`, `palette`, `mean`, `std`.

    Args:
        path: the folder of a run, the best.safetensors of one, or `hf:owner/name`, what `ctt-export
            --push` has written to the Hugging Face hub.
        network: student_1, teacher_2 and so on, as the run's last checkpoint has them, or `best`,
            the one in its best.safetensors.

    Raises:
        ctt.errors.UserError: there is no such file or network, or it cannot be read.
    """
    from ctt.files import expanded
    from ctt.inference.load import load_trained
    from ctt.models.segmenter import Segmenter

    trained = load_trained(expanded(Path(path), "`path`"), network)
    protocol = trained.settings.eval
    segmenter = Segmenter(trained.only(), trained.info, trained.origin, protocol)
    return segmenter.requires_grad_(False)
