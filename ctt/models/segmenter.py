"""A trained network with all that stands before and after it: from an image to its classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctt.files import expanded
from ctt.models.base import SegmentationModel, upsample
from ctt.settings import EvalSettings

if TYPE_CHECKING:
    from ctt.data.dataset import DatasetInfo

BATCH_PIXELS = 2**18  # of images of one size that go through the network together
OVERLAP = 2 / 3  # step from tile to tile, as a share of a tile


class Segmenter(nn.Module):
    """Normalisation, network, and its output at the resolution of the image.

    Args:
        network: any network of `ctt.models`.
        info: of the dataset it was trained on.
        note: on the origin of the weights.
        protocol: how `predict` shows images to it; by default whole and at their own size.

    Attributes:
        classes: C names.
        palette: C colours (r, g, b) in 0..255.
        mean: of the channels in 0..1, by which images are normalised.
        std: standard deviation of the channels in 0..1, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: SegmentationModel,
        info: DatasetInfo,
        note: str = "",
        protocol: EvalSettings | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes, self.palette, self.note = info.classes, info.palette, note
        self.info, self.protocol = info, protocol or EvalSettings()
        for name, values in (("mean", info.mean), ("std", info.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return class probabilities (B, C, H, W) of images (B, channels, H, W) in 0..1."""
        return self.logits(self.normalize(images)).softmax(dim=1)

    def normalize(self, images: Tensor) -> Tensor:
        """Return images (B, channels, H, W) in 0..1 with mean 0 and deviation 1, as in training:
        where bands have no data (NaN), they have the mean."""
        normal = (images - self.mean) / self.std
        return normal.nan_to_num(0) if self.info.bands else normal

    def logits(self, normalized: Tensor) -> Tensor:
        """Return logits (B, C, H, W) of normalised images (B, channels, H, W)."""
        logits = self.network(normalized).logits  # (B, C, h, w)
        size = (normalized.shape[-2], normalized.shape[-1])
        return upsample(logits, size, self.network.grid)

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        *,
        tile: int | tuple[int, int] | None = None,
        probabilities: bool = False,
        batch_pixels: int = BATCH_PIXELS,
    ) -> Any:
        """Return the class of every pixel of an image, or of each of several images.

        Images are shown to the network as in the evaluations of its run (at half their size, in
        windows, mirrored and so on), as ctt-predict does; `protocol` says how.

        An image is an array (H, W, C) or grey (H, W), a tensor (C, H, W), a PIL image of any mode
        (as it lies in memory), or the path of a file (turned as its EXIF says, as ctt-predict
        does). Several are an array or tensor with one axis more in front, or a list or other
        iterable of images of any sizes, of which those of one size that follow each other go
        through the network together.

        Where the network was trained on RGB images, arrays and tensors are uint8; where it was
        trained on bands, they hold the C bands in the numbers of the files.

        Args:
            tile: side, or height and width, of overlapping windows in which the network sees large
                images, as ctt-predict --eval.protocol sliding does; None: as in its run.
            probabilities: return those of the classes, and not the most probable class.
            batch_pixels: how many pixels go through the network together at most.

        Returns:
            (H, W) uint8 on the CPU, 255 where an image of bands has no data, or probabilities
            (C, H, W) float32; of several images a list of those.

        Raises:
            ValueError: another shape or type of numbers, or no such tile.
            ctt.errors.UserError: a file that cannot be read.
        """
        from ctt.inference.predict import best_class, for_images, predictor, stacks

        several = getattr(images, "ndim", 0) == 4 or (
            isinstance(images, Iterable) and not hasattr(images, "ndim") and not _is_one(images)
        )
        protocol = replace(self.protocol, batch_pixels=batch_pixels)
        if tile is not None:
            window = _window_of(tile)
            protocol = replace(protocol, protocol="sliding", window=window, stride=OVERLAP)
        predict = predictor(self.network, self.info, for_images(protocol))
        pixels = (self.pixels_of(image) for image in (images if several else [images]))
        found = list[Tensor]()
        for group in stacks(pixels, lambda image: image.shape[1:], batch_pixels):
            batch = torch.stack(group).to(self.mean.device)
            result = predict(batch)
            if not probabilities:
                result = best_class(result, batch)[1]
            found += result.cpu()
        return found if several else found[0]

    def pixels_of(self, image: Any) -> Tensor:
        """Return an image, see `predict`, as the dataset has its images.

        Returns:
            (3, H, W) uint8, or of bands (C, H, W) float32 in 0..1, NaN where there is no data.
        """
        from ctt.data.rasters import read_as

        if isinstance(image, str | Path):
            return read_as(expanded(Path(image), "the image"), self.info)
        return _bands_of(image, self.info) if self.info.bands else _rgb_of(image, self.info)


def _window_of(tile: Any) -> tuple[int, int]:
    sides = [tile, tile] if isinstance(tile, Integral) else tile
    fits = isinstance(sides, list | tuple) and len(sides) == 2
    if not fits or not all(isinstance(side, Integral) and int(side) > 0 for side in sides):
        raise ValueError(
            f"`tile` must be a whole number of pixels above 0, or a height and a width, got "
            f"{tile!r}."
        )
    return int(sides[0]), int(sides[1])


def _is_one(images: Any) -> bool:
    from PIL import Image

    return isinstance(images, str | bytes | Path | Image.Image)


def _rgb_of(image: Any, info: DatasetInfo) -> Tensor:
    import numpy as np
    from PIL import Image

    from ctt.data.pixels import to_rgb

    given = type(image).__name__
    if isinstance(image, Tensor):
        pixels = image
    else:
        if not isinstance(image, Image.Image):
            image = np.asarray(image)
            if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] in ((1,), (4,))):
                image = Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)
        array = to_rgb(image, info.white) if isinstance(image, Image.Image) else image
        if array.dtype.kind not in "uifb":
            raise ValueError(f"predict takes images or paths of their files; got {given}.")
        # a copy: pictures share memory not to be written
        pixels = torch.from_numpy(np.array(array))
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
    if (
        pixels.ndim != 3
        or pixels.shape[0] != 3
        or pixels.dtype != torch.uint8
        or not pixels.numel()
    ):
        raise ValueError(
            f"predict takes RGB images of uint8, an array (H, W, 3) or a tensor (3, H, W); "
            f"got {tuple(pixels.shape)} of {pixels.dtype}."
        )
    return pixels


def _bands_of(image: Any, info: DatasetInfo) -> Tensor:
    import numpy as np

    from ctt.data.rasters import scaled

    values = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and not isinstance(image, Tensor):
        values = np.moveaxis(values, 2, 0)
    fits = values.ndim == 3 and len(values) == info.channels and values.size > 0
    if not fits or values.dtype.kind not in "uif":
        raise ValueError(
            f"predict takes images of {info.channels} bands, an array (H, W, {info.channels}) or a "
            f"tensor ({info.channels}, H, W); got {np.shape(image)} of {values.dtype}."
        )
    missing = ~np.isfinite(values).all(axis=0)
    return scaled(values, missing, info, "the image")
