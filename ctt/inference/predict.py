"""Class probabilities of images under a protocol: small functions, each around a simpler one.

A `Predict` maps images (B, 3, H, W), normalised or as they are read, to class probabilities
(B, C, H, W) in float32.
Windows, flips and scales are combined as means of probabilities.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby, islice, product
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ctt.data.dataset import IGNORE, DatasetInfo
from ctt.data.prepare import resize_image, resize_label
from ctt.data.views import normalize, to_unit
from ctt.errors import UserError
from ctt.models.base import SegmentationModel, upsample
from ctt.settings import EvalSettings

TOO_LARGE = ("DefaultCPUAllocator", "Storage size calculation overflowed")  # in torch's messages
Predict = Callable[[Tensor], Tensor]
T = TypeVar("T")


def predictor(network: SegmentationModel, info: DatasetInfo, settings: EvalSettings) -> Predict:
    """Return a function of images (B, 3, H, W) uint8 to probabilities (B, C, H, W) float32.

    Args:
        info: of the dataset that the network was trained on, for the normalisation.
        settings: `center-crop` and `half` were already applied by `prepare`; here the given image
            is predicted whole.
    """
    predict: Predict = partial(whole, network, settings.amp)
    if settings.fit == "resize" and network.multiple > 1:
        predict = partial(resized, network, settings.amp)
    resampled = settings.scales != (1.0,)
    if not resampled:  # windows are normalised one by one, so that large images stay uint8
        predict = partial(normalized, predict, info)
    if settings.protocol == "sliding":
        predict = partial(sliding, predict, settings.window, settings.stride, settings.batch_pixels)
    if settings.flip:
        predict = partial(flipped, predict)
    if resampled:
        predict = partial(normalized, partial(multi_scale, predict, settings.scales), info)
    return predict


def normalized(predict: Predict, info: DatasetInfo, images: Tensor) -> Tensor:
    """Return `predict` of images (B, C, H, W), normalised by the dataset's statistics.

    Args:
        images: uint8, or in 0..1 with NaN where there is no data, which becomes the mean.
    """
    normal = normalize(to_unit(images), info)
    return predict(normal.nan_to_num(0) if images.is_floating_point() else normal)


def whole(network: SegmentationModel, amp: str, images: Tensor) -> Tensor:
    """Return the softmax of the logits, upsampled to the images' resolution first."""
    return logits_of(network, amp, images).softmax(dim=1)


def resized(network: SegmentationModel, amp: str, images: Tensor) -> Tensor:
    """Return `whole` of images resized to the nearest size that the network takes without
    padding."""
    size = (images.shape[-2], images.shape[-1])
    fitting = [max(1, math.floor(n / network.multiple + 0.5)) * network.multiple for n in size]
    images = F.interpolate(images, size=fitting, mode="bilinear", align_corners=True)
    logits = logits_of(network, amp, images)
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=True).softmax(dim=1)


def logits_of(network: SegmentationModel, amp: str, images: Tensor) -> Tensor:
    """Return the logits (B, C, H, W) of every pixel, in float32."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    with torch.autocast(images.device.type, dtype=dtype, enabled=amp != "off"):
        weights = next(network.parameters(), images)  # users may have made them float16 or float64
        logits = network(images.to(weights.dtype)).logits.float()
    size = (images.shape[-2], images.shape[-1])
    return upsample(logits, size, network.grid)


def sliding(
    predict: Predict,
    window: tuple[int, int],
    stride: float,
    batch_pixels: int,
    images: Tensor,
) -> Tensor:
    """Return the mean over the windows that cover a pixel; the last window ends at the border.

    Args:
        window: height and width, cut to the image's.
        stride, batch_pixels: see `EvalSettings`.
    """
    size = (images.shape[-2], images.shape[-1])
    height, width = (min(w, side) for w, side in zip(window, size, strict=True))
    rows, columns = starts(size[0], height, stride), starts(size[1], width, stride)
    corners = list(product(rows, columns))
    together = max(1, batch_pixels // (len(images) * height * width))
    count = torch.zeros(size, device=images.device)
    total: Tensor | None = None  # (B, C, H, W)
    for first in range(0, len(corners), together):
        part = corners[first : first + together]
        windows = torch.cat([images[..., y : y + height, x : x + width] for y, x in part])
        per_window = predict(windows).chunk(len(part))
        for (y, x), found in zip(part, per_window, strict=True):
            if total is None:
                total = found.new_zeros(*found.shape[:2], *size)
            total[..., y : y + height, x : x + width] += found
            count[y : y + height, x : x + width] += 1
    assert total is not None
    return total.div_(count)


def starts(length: int, window: int, stride: float) -> list[int]:
    """Return where windows begin along a side, so that they cover it and none leaves it."""
    step = max(1, int(stride * window if stride <= 1 else stride))
    return [*range(0, length - window, step), length - window]


def flipped(predict: Predict, images: Tensor) -> Tensor:
    """Return the mean over the images and their mirror images."""
    probability = predict(images)
    return probability.add_(predict(images.flip(-1)).flip(-1)).div_(2)


def multi_scale(predict: Predict, scales: Sequence[float], images: Tensor) -> Tensor:
    """Return the mean over the images resized by each factor, every result resized back."""
    size = (images.shape[-2], images.shape[-1])
    total: Tensor | None = None
    for scale in scales:
        resized = scaled(size, scale)
        found = resize(predict(resize(images, resized)), size)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total.div_(len(scales))


def scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return height and width times the factor, at least 1; half a pixel counts as a whole one."""
    height, width = (max(1, math.floor(factor * side + 0.5)) for side in size)
    return height, width


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (B, C, H, W) at another size; every pixel counts where it becomes smaller."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def best_class(probability: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest probability (..., H, W) and its class (..., H, W) uint8.

    Where an image has no data they are 0 and 255.

    Args:
        probability: (..., C, H, W).
        images: (..., bands, H, W) that it belongs to, as they are read: NaN where there is no data.
    """
    confidence, label = probability.max(dim=-3)
    label = label.to(torch.uint8)
    if images.is_floating_point():
        missing = images.isnan().any(dim=-3).to(label.device)
        confidence, label = confidence.masked_fill(missing, 0), label.masked_fill(missing, IGNORE)
    return confidence, label


def mean_of(predicts: Sequence[Predict]) -> Predict:
    """Return the mean of the probabilities of several networks."""
    first, *others = predicts

    def predict(images: Tensor) -> Tensor:
        total = first(images)
        for other in others:
            total.add_(other(images))
        return total.div_(len(predicts))

    return predict if others else first


def for_images(settings: EvalSettings) -> EvalSettings:
    """Return the protocol for predictions, which are of the whole image at its own size."""
    if settings.protocol == "half":
        halves = tuple(scale / 2 for scale in settings.scales)
        return replace(settings, protocol="whole", scales=halves)
    if settings.protocol == "center-crop":
        return replace(settings, protocol="whole")
    return settings


def is_out_of_memory(error: Exception) -> bool:
    """Return whether it was raised because a device, or the CPU, has too little memory."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in TOO_LARGE)


@contextmanager
def out_of_memory_as(text: str) -> Iterator[None]:
    """Turn a lack of memory into a UserError of this text."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(text) from None


@contextmanager
def reraise_out_of_memory(settings: EvalSettings) -> Iterator[None]:
    """Turn a lack of memory into a UserError that says what needs less of it."""
    mend = (
        "a smaller `eval.window`"
        if settings.protocol == "sliding"
        else "`eval.protocol` sliding `eval.window` 513 513"
    )
    with out_of_memory_as(
        f"There is not enough memory for images of this size. Try {mend}, or a smaller "
        f"`eval.batch_pixels`."
    ):
        yield


def prepare(image: Tensor, label: Tensor, settings: EvalSettings) -> tuple[Tensor, Tensor]:
    """Return the part or size of image (3, H, W) uint8 and label (H, W) uint8 that is scored."""
    height, width = label.shape
    if settings.protocol == "center-crop":
        h, w = min(settings.window[0], height), min(settings.window[1], width)
        y, x = (height - h) // 2, (width - w) // 2
        return image[:, y : y + h, x : x + w], label[y : y + h, x : x + w]
    if settings.protocol == "half":
        size = scaled((height, width), 1 / 2)
        return resize_image(image, size), resize_label(label, size)
    return image, label


def stacks(
    items: Iterable[T], size: Callable[[T], tuple[int, ...]], batch_pixels: int
) -> Iterator[list[T]]:
    """Yield neighbours of one size, as many together as have at most `batch_pixels`."""
    for (height, width), group in groupby(items, key=size):
        limit = max(1, batch_pixels // (height * width))
        while together := list(islice(group, limit)):
            yield together


def protocol_dict(settings: EvalSettings) -> dict[str, Any]:
    """Return everything that a score depends on, to be written beside it."""
    protocol: dict[str, Any] = {"name": settings.protocol}
    if settings.protocol in ("sliding", "center-crop"):
        protocol["window"] = list(settings.window)
    if settings.protocol == "sliding":
        protocol["stride"] = settings.stride
    scales = list(settings.scales)
    more = {"fit": settings.fit, "flip": settings.flip, "amp": settings.amp}
    return {**protocol, "scales": scales, **more}


def protocol_text(settings: EvalSettings) -> str:
    """Return one phrase, such as "sliding, window 801x801, stride 0.67 of it, scales 0.75 1,
    flip"."""
    parts: list[str] = [settings.protocol]
    if settings.protocol in ("sliding", "center-crop"):
        parts.append("window {}x{}".format(*settings.window))
    if settings.protocol == "sliding":
        share = settings.stride <= 1
        parts.append(f"stride {settings.stride:.3g} {'of it' if share else 'pixels'}")
    if settings.scales != (1.0,):
        parts.append("scales " + " ".join(f"{scale:g}" for scale in settings.scales))
    if settings.fit != "pad":
        parts.append("resized to whole patches")
    if settings.flip:
        parts.append("flip")
    if settings.amp != "off":
        parts.append(settings.amp)
    return ", ".join(parts)
