"""Networks by name; each gives logits and features from one forward."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ctt.errors import UserError

if TYPE_CHECKING:
    from ctt.models.base import SegmentationModel

BACKBONES = {
    "deeplabv2": "resnet101",
    "deeplabv3plus": "resnet101",
    "vit": "vit_small_patch14_dinov2",
    "dpt": "vit_small_patch14_dinov2",
}
OUTPUT_STRIDES = {"deeplabv2": 8, "deeplabv3plus": 16}
SWIN_STRIDE = 32  # which cannot be dilated
SMP = "smp:"  # before the name of an architecture of segmentation_models_pytorch
SMP_BACKBONE = "resnet34"
FEATURES = 256  # D where nothing else is asked for; dpt has the published one of its backbone


def names() -> list[str]:
    """Return the architectures that `build` knows, with smp:NAME if that package is installed."""
    own = ["small", *BACKBONES]
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        return own
    from ctt.models.smp import architectures

    return [*own, *(SMP + name for name in architectures())]


def build(
    name: str,
    num_classes: int,
    features: int = 0,
    width: int = 32,
    backbone: str = "",
    output_stride: int = 0,
    grid: str = "aligned",
    drop_path: float = 0.0,
    image: Sequence[int] | None = None,
    channels: int = 3,
    normalization: str = "data",
) -> SegmentationModel:
    """Build a network with random weights from torch's global generator; nothing is downloaded.

    Args:
        num_classes: C.
        features: D; 0: the architecture's.
        width: channels of the first stage (small).
        backbone: name of a timm model; empty: the architecture's own.
        output_stride: 8 or 16, of the backbone (deeplabv2, deeplabv3plus); 0: the architecture's,
            or 32 of a Swin.
        grid: "aligned" or "legacy", see `ModelSettings.grid`.
        drop_path: rate of stochastic depth in the backbone.
        image: height and width of the images that position embeddings are for (dpt); None: as
            published.
        channels: of the images.
        normalization: "data" or "weights", see `ModelSettings.normalization`.

    Raises:
        UserError: no such architecture or backbone, or options that do not fit each other.
    """
    if output_stride and name not in OUTPUT_STRIDES:
        raise UserError(
            f"`model.output_stride` {output_stride}: the network {name} has a stride of its own. "
            f"Leave it out; it is for {' and '.join(OUTPUT_STRIDES)}."
        )
    if drop_path and (name == "small" or name.startswith(SMP)):
        raise UserError(
            f"`model.drop_path` {drop_path}: the network {name} has no stochastic depth. Leave it "
            f"out; it is for {', '.join(BACKBONES)}."
        )
    own_stride = OUTPUT_STRIDES.get(name, 0)
    if name in OUTPUT_STRIDES and backbone.startswith("swin"):
        own_stride = SWIN_STRIDE
    backbone = backbone or BACKBONES.get(name, SMP_BACKBONE if name.startswith(SMP) else "")
    options: dict[str, Any] = {
        "name": name,
        "features": features or (0 if name == "dpt" else FEATURES),
        "width": width,
        "backbone": backbone,
        "output_stride": output_stride or own_stride,
        "grid": grid,
        "drop_path": drop_path,
        "image": None if image is None or name != "dpt" else (image[0], image[1]),
        "channels": channels,
        "normalization": normalization,
    }
    network = _build(num_classes, **options)
    network.legacy_grid = grid == "legacy"
    network.options = options
    if normalization == "weights":
        add_own_input(network)
    return network


def add_own_input(network: SegmentationModel) -> None:
    """Give the backbone a normalisation of its own: the identity, until `set_own_input` sets it.

    Raises:
        UserError: it has no backbone, or images are not of three channels.
    """
    from ctt.models.base import BackboneModel

    if network.options["channels"] != 3:
        raise UserError(
            f"`model.normalization` weights: published weights are of images of 3 channels, and "
            f"these have {network.options['channels']}. Give data there."
        )
    if not isinstance(network, BackboneModel):
        raise UserError(
            f"`model.normalization` weights: the network {network.options['name']} has no backbone "
            f"with published weights. Give data there, or choose another `model.name`."
        )
    network.have_own_input()


def _build(
    num_classes: int,
    name: str,
    features: int,
    width: int,
    backbone: str,
    output_stride: int,
    drop_path: float,
    image: tuple[int, int] | None,
    channels: int,
    **unread: Any,
) -> SegmentationModel:
    if name == "small":
        if backbone:
            raise UserError(
                f"`model.backbone` {backbone}: the network small has no backbone. Leave it out, or "
                f"choose another `model.name`."
            )
        from ctt.models.small import Small

        return Small(num_classes, features, width, channels)
    if name in OUTPUT_STRIDES:
        from ctt.models import deeplab

        kind = deeplab.DeepLabV2 if name == "deeplabv2" else deeplab.DeepLabV3Plus
        return kind(num_classes, features, backbone, output_stride, drop_path, channels)
    if name == "vit":
        from ctt.models.vit import Vit

        return Vit(num_classes, features, backbone, drop_path, channels)
    if name == "dpt":
        from ctt.models.dpt import Dpt

        return Dpt(num_classes, features, backbone, image, drop_path, channels)
    if name.startswith(SMP):
        from ctt.models.smp import Smp

        return Smp(name.removeprefix(SMP), num_classes, features, backbone, channels)
    raise UserError(f"`model.name` {name}: no such architecture. Known: {', '.join(names())}.")
