"""How often labelled images show each class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ctt.data.check import histogram
from ctt.data.dataset import Dataset
from ctt.data.loader import read_in_order, reraise_user_errors


def class_pixels(dataset: Dataset, names: Sequence[str], workers: int) -> Tensor:
    """Return the pixels (N, C) int64 of each class in each of these labelled images.

    Args:
        workers: processes that read masks; 0: this one.

    Raises:
        UserError: a mask is missing or broken.
    """
    classes = len(dataset.info.classes)
    read = partial(_histogram_of, dataset)
    found = [
        pixels[:classes] for pixels in reraise_user_errors(read_in_order(read, names, workers))
    ]
    return torch.stack(found) if found else torch.zeros(0, classes, dtype=torch.int64)


def _histogram_of(dataset: Dataset, name: str) -> Tensor:
    return histogram(dataset.label(name), len(dataset.info.classes))
