"""Predictions as pictures: colours, palette PNGs, overlays."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ctt.data.dataset import DatasetInfo
from ctt.files import as_write_error, part_of

OVERLAY = 0.55  # opacity of the mask's colours over the image
# pixels that are blended at once: in float32 they take twenty times the memory of the picture
STRIP = 1 << 20


def colorize(label: Tensor, info: DatasetInfo) -> Tensor:
    """Return labels (..., H, W) as colours (..., H, W, 3) uint8; 255 is white."""
    table = torch.full((256, 3), 255, dtype=torch.uint8)
    table[: len(info.palette)] = torch.tensor(info.palette, dtype=torch.uint8)
    return table[label.long().cpu()]


def palette_image(label: Tensor, info: DatasetInfo) -> Image.Image:
    """Return labels (H, W) as a picture whose values are the classes, in the palette's colours."""
    mask = Image.fromarray(label.to(torch.uint8).cpu().numpy(), mode="P")
    colours = [channel for colour in info.palette for channel in colour]
    # of a palette that is shorter, Pillow writes as few bits as it needs, and cuts 255 to them
    mask.putpalette([*colours, *[0] * (3 * 256 - len(colours))])
    return mask


def save_png(picture: Image.Image, path: Path) -> None:
    """Save a PNG as a whole or not at all.

    Raises:
        UnwritableError: there is no room for it, or the folder cannot be written.
    """
    part = part_of(path)
    try:
        with as_write_error(path):
            picture.save(part, format="PNG")
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def in_threads(threads: int) -> Iterator[Callable[..., None]]:
    """Yield a function that runs another one in a thread, to write files while networks run.

    It blocks while more than four calls a thread are pending, and leaving the context waits for all
    of them. The error of a call is raised where it is waited for: by a later call, or on leaving.
    """
    pending: deque[Future[object]] = deque()

    def call(function: Callable[..., object], *arguments: object) -> None:
        pending.append(pool.submit(function, *arguments))
        if len(pending) > 4 * threads:
            pending.popleft().result()

    with ThreadPoolExecutor(max(1, threads)) as pool:
        yield call
        for future in pending:
            future.result()


def visible(image: Tensor, info: DatasetInfo) -> Tensor:
    """Return an image (C, H, W) of the dataset as (3, H, W) uint8; where it has no data, black."""
    image = image.cpu()
    if not info.bands:
        return image
    return (255 * image[list(info.shown)].nan_to_num(0)).round().to(torch.uint8)


def overlay(
    image: Tensor, label: Tensor, info: DatasetInfo, opacity: float = OVERLAY
) -> Image.Image:
    """Return the image (C, H, W) under the colours of its labels (H, W)."""
    height, width = label.shape
    picture = torch.empty(height, width, 3, dtype=torch.uint8)
    rows = max(1, STRIP // max(1, width))
    strips = zip(
        torch.split(picture, rows),
        torch.split(image, rows, 1),
        torch.split(label, rows),
        strict=True,
    )
    for into, seen, classes in strips:
        into.copy_(_overlaid(seen, classes.cpu(), info, opacity))
    return Image.fromarray(picture.numpy())


def _overlaid(image: Tensor, label: Tensor, info: DatasetInfo, opacity: float) -> Tensor:
    picture = visible(image, info).permute(1, 2, 0).float()  # (h, W, 3)
    coloured = torch.lerp(picture, colorize(label, info).float(), opacity)
    # class 0 is the background of every dataset with one: it stays as it is
    plain = (label == 0)[:, :, None] & (info.classes[0] == "background")
    return torch.where(plain, picture, coloured).round()


def confidence_image(confidence: Tensor) -> Image.Image:
    """Return probabilities (H, W) as a grey image, white for 1."""
    return Image.fromarray((255 * confidence.cpu()).round().to(torch.uint8).numpy(), mode="L")
