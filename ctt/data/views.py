"""Views of an image: geometry for each image in the loader, colours for a batch on the device.

Geometry belongs to the weak view and is shared by everything that looks at an image; the strong
view changes colours only, so a pixel shows the same content to every network.
"""

import math
import random
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.dataset import DatasetInfo
from ctt.data.prepare import resize_image

# luma and chroma of the NTSC standard, and back
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
FROM_YIQ = tuple(map(tuple, torch.linalg.inv(torch.tensor(YIQ, dtype=torch.float64)).tolist()))
EDGE = 0.15  # of the sides of a crop, that a pixel is kept from that the crop is placed around
REDUCED = 0.75  # resize factor; four pixels are a fair mean of what one shows down to about here

Row = tuple[float, float, float]
Affine = tuple[Row, Row]
"""Affine map of points (x, y, 1), (2, 3): its row for x and that for y."""


@cache
def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Return nested numbers as float32 on the device; they are copied once, as each copy waits."""
    return torch.tensor(values, device=device)


def to_unit(images: Tensor) -> Tensor:
    """Return images (B, C, H, W), uint8 or already in 0..1, as float32 in 0..1."""
    return images if images.is_floating_point() else images.float() / 255


def normalize(images: Tensor, info: DatasetInfo) -> Tensor:
    """Return images in 0..1 with mean 0 and deviation 1 by the dataset's statistics; without data
    they have the mean."""
    mean, std = (constant(v, images.device)[:, None, None] for v in (info.mean, info.std))
    normal = (images - mean) / std
    if info.bands:
        normal = normal.nan_to_num(0)
    return normal.contiguous(memory_format=torch.channels_last)


class GeometricView:
    """Random resize, flip, rotation, shift and crop in one resampling.

    Outside of the image, and where it has no data, the mean colour and label 255 are found. One
    resampling onto the crop is sharper than a chain of resize, rotation and crop, and costs by the
    crop, not by the image.
    Where the image is reduced to less than `REDUCED` of its size, the part that the crop shows is
    first reduced by a filter, because the resampling reads four pixels and would skip others.

    Args:
        crop: height and width of the result.
        scale: range of the resize factor.
        rotation: largest angle in degrees.
        translation: largest shift, as a share of the sides.
        mean: of the channels in 0..1.
    """

    def __init__(
        self,
        crop: tuple[int, int],
        scale: tuple[float, float],
        flip: bool,
        rotation: float,
        translation: float,
        mean: tuple[float, ...],
    ) -> None:
        self.crop, self.scale, self.flip = crop, scale, flip
        self.rotation, self.translation = rotation, translation
        self.mean = torch.tensor(mean)[:, None, None]

    def __call__(
        self, image: Tensor, label: Tensor, seed: int, point: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return an image (C, H, W) and a label (H, W) of integers at the crop's size.

        Args:
            image: uint8, or float32 in 0..1 with NaN where there is no data.
            point: row and column of a pixel that the crop is placed around, at no fixed place.
        """
        rng = random.Random(seed)
        factor = rng.uniform(*self.scale)
        matrix = self.matrix((label.shape[0], label.shape[1]), factor, rng, point)
        theta, rows, columns = window(matrix, (label.shape[0], label.shape[1]), 2 + 2 / factor)
        grid = sampling_grid(theta, self.crop)
        picture = image[:, rows, columns].contiguous()  # (C, h, w)
        classes = label[rows, columns].float().add_(1)  # 0 stands for 255
        whole = not image.is_floating_point()
        mean = 255 * self.mean if whole else self.mean
        if not whole:
            missing = picture.isnan().any(dim=0)
            picture = torch.where(missing, mean, picture)
            classes.masked_fill_(missing, 0)
        if factor < REDUCED:
            height, width = (max(1, round(side * factor)) for side in picture.shape[1:])
            picture = resize_image(picture, (height, width))
        # what lies outside is sampled as 0: shift so that 0 stands for the mean and for 255
        shifted = picture.float() - mean
        picture = F.grid_sample(shifted[None], grid, align_corners=False)[0]
        picture = picture.add_(mean)
        picture = picture.round_().clamp_(0, 255).to(torch.uint8) if whole else picture.clamp_(0, 1)
        mask = F.grid_sample(classes[None, None], grid, "nearest", align_corners=False)
        return picture, (mask[0, 0].to(torch.int32) - 1).to(label.dtype)

    def matrix(
        self,
        size: tuple[int, int],
        factor: float,
        rng: random.Random,
        point: tuple[int, int] | None = None,
    ) -> Affine:
        """Return the affine map from the crop to an image of that size, both in -1..1."""
        angle = math.radians(rng.uniform(-self.rotation, self.rotation))
        mirror = -1 if self.flip and rng.random() < 0.5 else 1
        centre, extent = [], []  # y and x, as shares of the resized image
        for axis, (side, length) in enumerate(zip(size, self.crop, strict=True)):
            resized = side * factor
            room = resized - length  # below 0 the crop is larger and the image wanders within it
            low, high = min(0.0, room), max(0.0, room)
            if point is None:
                start = rng.uniform(low, high)
                start += resized * rng.uniform(-self.translation, self.translation)
            else:  # not at the edge, where a rotation would take it out
                place = (point[axis] + 0.5) * factor - rng.uniform(EDGE, 1 - EDGE) * length
                start = min(max(place, low), high)
            centre.append((start + length / 2) / resized)
            extent.append(resized)
        (height, width), (full_height, full_width) = self.crop, extent
        cos, sin = math.cos(angle), math.sin(angle)
        x = (mirror * cos * width / full_width, -sin * height / full_width, 2 * centre[1] - 1)
        y = (mirror * sin * width / full_height, cos * height / full_height, 2 * centre[0] - 1)
        return x, y


@cache
def centres(side: int) -> Tensor:
    """Return where the centres of so many pixels in a row lie in -1..1: (side,)."""
    return (2 * torch.arange(side, dtype=torch.float32, device="cpu") + 1) / side - 1


def sampling_grid(theta: Affine, size: tuple[int, int]) -> Tensor:
    """Return where `size` pixels are read by an affine map: (1, h, w, 2), x and y in -1..1.

    What F.affine_grid gives, without its product of matrices.
    """
    y, x = (centres(side) for side in size)
    # numbers of Python take a tenth of the time of tensors of six
    return torch.stack([x * a + (y * b + c)[:, None] for a, b, c in theta], dim=-1)[None]


def window(theta: Affine, size: tuple[int, int], margin: float) -> tuple[Affine, slice, slice]:
    """Return the part of an image (H, W) that an affine map reads, with a margin.

    Returns:
        the map onto that part, its rows and its columns. At least one pixel, even of a map that
        reads none.
    """

    def along(row: Row, side: int) -> tuple[Row, slice]:
        reach = abs(row[0]) + abs(row[1])
        low = (row[2] - reach + 1) / 2 * side - margin
        high = (row[2] + reach + 1) / 2 * side + margin
        start = min(max(math.floor(low), 0), side - 1)
        stop = min(max(math.ceil(high), start + 1), side)
        a, b, c = (value * (side / (stop - start)) for value in row)
        return (a, b, c + (side - 2 * start) / (stop - start) - 1), slice(start, stop)

    (x, columns), (y, rows) = along(theta[0], size[1]), along(theta[1], size[0])
    return (x, y), rows, columns


class PhotometricView:
    """Colour jitter and blur of a batch, drawn for each image.

    Channels that are no colours have neither saturation nor hue, and one has not the scale of
    another: each keeps its own mean when the contrast changes, and a wave over the channels, of a
    random phase and height, makes some brighter and others darker.

    Args:
        strength: brightness, contrast and saturation change by a factor in 1 - s .. 1 + s; the
            wave is at most s high.
        hue: largest change of the hue, as a share of the colour circle; None: s / 4.
        jitter_probability, blur_probability, grey_probability: share of the images that each is
            applied to.
        blur_sigma: range of the blur, in pixels.
        colours: the channels are red, green and blue; else none of the images becomes grey.
    """

    DRAWS = 8  # random numbers that an image takes; 7 suffice without grey images

    def __init__(
        self,
        strength: float,
        jitter_probability: float,
        blur_probability: float,
        blur_sigma: tuple[float, float],
        grey_probability: float = 0.0,
        hue: float | None = None,
        colours: bool = True,
    ) -> None:
        self.grey_probability, self.colours = grey_probability if colours else 0.0, colours
        self.hue = strength / 4 if hue is None else hue
        self.strength, self.jitter_probability = strength, jitter_probability
        self.blur_probability, self.blur_sigma = blur_probability, blur_sigma

    def __call__(self, images: Tensor, draw: Tensor) -> Tensor:
        """Return images (B, C, H, W) in 0..1 as uniform random numbers (DRAWS, B) change them."""
        if (self.strength or self.hue) and self.jitter_probability:
            images = self._jitter(images, draw[:5, :, None, None, None])
        if self.grey_probability:
            chosen = (draw[7] < self.grey_probability)[:, None, None, None]
            images = torch.where(chosen, grey(images), images)
        if self.blur_probability:
            images = self._blur(images, draw[5:7])
        return images

    def _jitter(self, images: Tensor, draw: Tensor) -> Tensor:
        chosen = draw[4] < self.jitter_probability
        change = torch.where(chosen, 2 * draw[:4] - 1, 0)  # (4, B, 1, 1, 1) in -1..1
        brightness, contrast, saturation = 1 + self.strength * change[:3]
        images = (images * brightness).clamp(0, 1)
        if not self.colours:
            images = blend(images, images.mean(dim=(2, 3), keepdim=True), contrast)
            return (images * (1 + self.strength * wave(change[2:], images.shape[1]))).clamp(0, 1)
        images = blend(images, grey(images).mean(dim=(2, 3), keepdim=True), contrast)
        images = blend(images, grey(images), saturation)
        return rotate_hue(images, change[3] * self.hue * 2 * math.pi)

    def _blur(self, images: Tensor, draw: Tensor) -> Tensor:
        low, high = self.blur_sigma
        sigma = low + (high - low) * draw[0]
        radius = max(1, math.ceil(3 * high))
        blurred = gaussian_blur(images, sigma, radius)
        chosen = (draw[1] < self.blur_probability)[:, None, None, None]
        return torch.where(chosen, blurred, images)


def wave(draw: Tensor, channels: int) -> Tensor:
    """Return a wave over the channels, at most 1 high, with the mean 0: (B, C, 1, 1).

    Args:
        draw: (2, B, 1, 1, 1) in -1..1, its cosine and sine parts. Of one channel it is 0.
    """
    place = 2 * math.pi * torch.arange(channels, device=draw.device) / channels
    cosine, sine = place.cos()[:, None, None], place.sin()[:, None, None]
    height: Tensor = (draw[0] * cosine + draw[1] * sine) / math.sqrt(2)
    return height if channels > 1 else torch.zeros_like(height)


def grey(images: Tensor) -> Tensor:
    """Return luma (B, 1, H, W) of images (B, 3, H, W), with the weights of ITU-R BT.601."""
    weight = constant(YIQ[0], images.device)[:, None, None]
    return (images * weight).sum(dim=1, keepdim=True)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return `factor` parts of the images and 1 - factor of the other, kept in 0..1."""
    return (other + factor * (images - other)).clamp(0, 1)


def rotate_hue(images: Tensor, angle: Tensor) -> Tensor:
    """Turn the chroma plane of YIQ by `angle` (B, 1, 1, 1) radians; the luma stays."""
    y, i, q = torch.einsum("ij,bjhw->ibhw", constant(YIQ, images.device), images)
    cos, sin = angle[:, 0].cos(), angle[:, 0].sin()
    turned = torch.stack([y, cos * i - sin * q, sin * i + cos * q])  # (3, B, H, W)
    return torch.einsum("ij,jbhw->bihw", constant(FROM_YIQ, images.device), turned).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image (C, H, W) of a batch with its own sigma (B,), in pixels."""
    batch, channels, height, width = images.shape
    radius = min(radius, height - 1, width - 1)  # reflection needs that much image
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]).square())  # (B, 2r + 1)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = images.reshape(1, batch * channels, height, width)
    flat = F.pad(flat, (radius, radius, radius, radius), mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * channels)
    return flat.reshape(images.shape)
