"""A trained network with all that stands before and after it: from an image to its classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctt.models.base import SegmentationModel, upsample

if TYPE_CHECKING:
    from ctt.data.source import DatasetInfo


class Segmenter(nn.Module):
    """Normalisation, network, and its output at the resolution of the image.

    Args:
        network: any network of `ctt.models`.
        info: of the data set it was trained on.
        note: on the origin of the weights.

    Attributes:
        classes: C names.
        palette: C colours (r, g, b) in 0..255.
        mean: of the channels in 0..1, by which images are normalised.
        std: standard deviation of the channels in 0..1, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: SegmentationModel, info: DatasetInfo, note: str = "") -> None:
        super().__init__()
        self.network = network
        self.classes, self.palette, self.note = info.classes, info.palette, note
        self.white = info.white  # of images of more than 8 bits
        for name, values in (("mean", info.mean), ("std", info.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """RGB images (B, 3, H, W) in 0..1 -> class probabilities (B, C, H, W)."""
        return self.logits(self.normalize(images)).softmax(dim=1)

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in 0..1 -> mean 0 and deviation 1, as the network was trained on."""
        return (images - self.mean) / self.std

    def logits(self, normalized: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> logits (B, C, H, W)."""
        logits = self.network(normalized).logits  # (B, C, h, w)
        size = (normalized.shape[-2], normalized.shape[-1])
        return upsample(logits, size, self.network.grid)

    @torch.no_grad()
    def predict(self, image: Any) -> Tensor:
        """Return the class of every pixel of one RGB image.

        Args:
            image: an array (H, W, 3) uint8, a tensor (3, H, W) uint8, a PIL image of any mode (as
                it lies in memory), or the path of a file (turned as its EXIF says, as ctt-predict
                does).

        Returns:
            (H, W) uint8, on the CPU.

        Raises:
            ValueError: another shape or type of numbers.
            ctt.errors.UserError: a file that cannot be read.
        """
        pixels = image if isinstance(image, Tensor) else from_picture(image, self.white)
        if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
            raise ValueError(
                f"predict takes an RGB image of uint8, an array (H, W, 3) or a tensor (3, H, W); "
                f"got {tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__} "
                f"of {pixels.dtype}."
            )
        unit = pixels.to(self.mean.device)[None].float() / 255
        probability: Tensor = self(unit)  # (1, C, H, W)
        return probability[0].argmax(dim=0).to(torch.uint8).cpu()


def from_picture(image: Any, white: float | None = None) -> Tensor:
    """Return an array (H, W, 3), a PIL image or the image in a file as a tensor (3, H, W)."""
    import numpy as np
    from PIL import Image

    from ctt.data.pictures import read_image
    from ctt.data.pixels import to_rgb

    if isinstance(image, str | Path):
        return read_image(Path(image), white)
    if isinstance(image, Image.Image):
        image = to_rgb(image, white)

    pixels = torch.from_numpy(np.array(image))  # a copy: pictures share memory not to be written
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
