"""Settings that say which images a dataset is made of. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ctt.ranges import AT_LEAST_1, Range


@dataclass(frozen=True)
class DatasetOptions:
    """What `ctt.data.open_dataset` needs beside the name and the folder of a dataset."""

    voc_set: Literal["aug", "classic"] = "aug"
    """voc: which images may be labelled. `aug`: the 10,582 with masks in SegmentationClassAug.
    `classic`: the 1,464 of train.txt; the other 9,118 are unlabelled images."""
    holdout: Annotated[float, Range(0, 1, above=True, below=True)] = 0.1
    """Share of the training images that is held out for evaluation, the same ones for every seed:
    of a `folder` without val/, and of data in files with --data.eval-split tune."""
    labeled_pool: Annotated[int, Range(2)] = 1000
    """digits: images made for training, labelled and unlabelled together."""
    eval_images: Annotated[int, AT_LEAST_1] = 300
    """digits: images made for evaluation."""
    eval_split: Literal["val", "tune"] = "val"
    """Which images to evaluate on. `tune` holds a part of the training images out, so that
    settings can be chosen without looking at the validation images; earth has tiles for it that
    nothing is trained with."""
