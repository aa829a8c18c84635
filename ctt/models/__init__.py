"""Networks by name; each gives logits and features from one forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctt.errors import UserError

if TYPE_CHECKING:
    from ctt.models.base import SegmentationModel

BACKBONES = {"deeplabv2": "resnet101", "deeplabv3plus": "resnet101"}
OUTPUT_STRIDES = {"deeplabv2": 8, "deeplabv3plus": 16}


def names() -> list[str]:
    """The architectures that `build` knows."""
    return ["small", *BACKBONES]


def build(
    name: str,
    num_classes: int,
    features: int = 256,
    width: int = 32,
    backbone: str = "",
    output_stride: int = 0,
) -> SegmentationModel:
    """A network with fresh random weights from torch's global generator; nothing is downloaded.

    Args:
        num_classes: C. features: D.
        width: channels of the first stage (small).
        backbone: name of a timm model; empty: the architecture's own.
        output_stride: 8 or 16, of the backbone (deeplabv2, deeplabv3plus); 0: the architecture's.

    Raises:
        UserError: no such architecture or backbone, or one that does not fit the other.
    """
    if name not in names():
        raise UserError(f"--model.name {name}: no such architecture. Known: {', '.join(names())}.")
    backbone = backbone or BACKBONES.get(name, "")
    output_stride = output_stride or OUTPUT_STRIDES.get(name, 0)
    network = _build(name, num_classes, features, width, backbone, output_stride)
    network.options = {
        "name": name,
        "features": features,
        "width": width,
        "backbone": backbone,
        "output_stride": output_stride,
    }
    return network


def _build(
    name: str, num_classes: int, features: int, width: int, backbone: str, output_stride: int
) -> SegmentationModel:
    if name == "small":
        if backbone:
            raise UserError(
                f"--model.backbone {backbone}: the network small has no backbone. Leave it out, or "
                f"choose another --model.name."
            )
        from ctt.models.small import Small

        return Small(num_classes, features, width)
    from ctt.models import deeplab

    if name == "deeplabv2":
        return deeplab.DeepLabV2(num_classes, features, backbone, output_stride)
    return deeplab.DeepLabV3Plus(num_classes, features, backbone, output_stride)
