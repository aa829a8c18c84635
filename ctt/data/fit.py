"""A crop for the images of a dataset, where none was asked for."""

from __future__ import annotations

import statistics

from ctt.data.check import handful
from ctt.data.dataset import Dataset

# what two cores take in a second or less
LARGEST = 96
STEP = 8  # the largest stride of the small network's stages
FITTING = (0, 0)  # a crop that is to be found by the images


def fitting_crop(
    dataset: Dataset, names: list[str], resize: tuple[int, int] | None
) -> tuple[int, int]:
    """Return height and width of a crop: the median of the images' sides, up to `LARGEST`.

    Args:
        names: of images, of which a handful is looked at. resize: to which they are brought first.
    """
    sizes = [resize] if resize else [dataset.image(name).shape[1:] for name in handful(names)]
    sides = (int(statistics.median(size[axis] for size in sizes)) for axis in (0, 1))
    height, width = (max(STEP, min(side, LARGEST) // STEP * STEP) for side in sides)
    return height, width
