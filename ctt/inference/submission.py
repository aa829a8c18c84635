"""Predictions of a benchmark's test images, in the form that its server expects."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ctt.data.dataset import Dataset, DatasetInfo, Submission
from ctt.data.loader import read_in_order, reraise_user_errors
from ctt.errors import UserError
from ctt.inference.predict import Predict, reraise_out_of_memory, stacks
from ctt.inference.render import in_threads, palette_image, save_png
from ctt.settings import EvalSettings


def images_to_submit(dataset: Dataset) -> tuple[Submission, list[str]]:
    """Return how to write predictions of the test images, and their names.

    Raises:
        UserError: the dataset has no server, or its test images are not there.
    """
    wanted, ids = dataset.submission, dataset.test_ids()
    if wanted is None:
        raise UserError(
            f"`submission`: there is no server that evaluates {dataset.info.name}. Segment its "
            f"images with ctt-predict."
        )
    if not ids:
        raise UserError(
            f"`submission`: {dataset.info.name} has no test images here. Unpack those of the "
            f"official archive below `data_root`, so that {wanted.images} is there."
        )
    return wanted, ids


@torch.no_grad()
def write_submission(
    predict: Predict,
    dataset: Dataset,
    folder: Path,
    settings: EvalSettings,
    workers: int,
    progress: Callable[[int], object],
) -> None:
    """Write one PNG for each test image into `folder`.

    Args:
        progress: called with the number of images after each batch.

    Raises:
        UserError: see `images_to_submit`; or an image cannot be read, or memory is too little.
    """
    wanted, ids = images_to_submit(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    images = reraise_user_errors(read_in_order(partial(_read, dataset), ids, workers))
    with in_threads(workers) as call:
        for group in stacks(images, lambda pair: pair[1].shape[1:], settings.batch_pixels):
            with reraise_out_of_memory(settings):
                labels = (
                    predict(torch.stack([image for _, image in group])).max(dim=1).indices.cpu()
                )
            for (name, _), label in zip(group, labels, strict=True):
                file = folder / f"{name}{wanted.ending}"
                call(save_png, server_mask(label, wanted, dataset.info), file)
            progress(len(group))


def _read(dataset: Dataset, name: str) -> tuple[str, Tensor]:
    return name, dataset.image(name)


def server_mask(label: Tensor, wanted: Submission, info: DatasetInfo) -> Image.Image:
    """Return labels (H, W) int64 as a picture of the server's numbers."""
    values = torch.tensor(wanted.values, dtype=torch.uint8)[label]
    return palette_image(values, info) if wanted.palette else Image.fromarray(values.numpy())
