"""A vision transformer with a light decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn

from ctt.models.base import BackboneModel, conv_bn, crop_to_stride, pad_to_multiple
from ctt.models.timm_backbone import create, not_serving

TAKEN = 4  # blocks whose output is read, as far from each other as they can be


class Vit(BackboneModel):
    """Plain vision transformer of timm; the sum of four of its blocks' outputs, up by two.

    Images of any size: they are padded to whole patches by the normalised colour 0, and position
    embeddings are interpolated. Features are at half a patch: stride 7 for patches of 14.

    Args:
        num_classes: C.
        features: D.
        backbone: name of a ViT of timm.
        drop_path: rate of stochastic depth in the last block, falling to 0 in the first.
        channels: of the images.
    """

    first_map = 1

    def __init__(
        self,
        num_classes: int,
        features: int,
        backbone: str,
        drop_path: float = 0.0,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.backbone_name, self.patches = backbone, True
        self.backbone = vit = transformer(backbone, None, drop_path, channels)
        self.multiple = vit.patch_embed.patch_size[0]
        self.stride = self.multiple // 2
        depth, dim = len(vit.blocks), vit.embed_dim
        self.stage_channels = (channels, *[dim] * TAKEN)
        self.taken = [depth * (i + 1) // TAKEN - 1 for i in range(TAKEN)]
        self.reduce = nn.ModuleList(nn.Conv2d(dim, features, 1) for _ in self.taken)
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            conv_bn(features, features),
        )
        self.classifier = nn.Conv2d(features, num_classes, 1)

    def encode(self, images: Tensor) -> list[Tensor]:
        return [images, *spread_out(self.backbone, self.adapted(images), self.taken)]

    def decode(self, stages: list[Tensor]) -> Tensor:
        images, *blocks = stages
        merged = sum(conv(x) for conv, x in zip(self.reduce, blocks, strict=True))  # D channels
        return crop_to_stride(self.decoder(merged), images, self.stride)


def transformer(
    name: str, image: tuple[int, int] | None, drop_path: float, channels: int = 3
) -> Any:
    """Return a plain vision transformer of timm that takes images of any size.

    Args:
        image: height and width for which its position embeddings are; None: as published.
        drop_path: rate of stochastic depth in the last block.
        channels: of the images.

    Raises:
        UserError: timm has no such model, or it is none.
    """
    sized = {} if image is None else {"img_size": image}
    vit: Any = create(
        name,
        drop_path,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        in_chans=channels,
        **sized,
    )
    # Swins have no such blocks, and hybrids patches of the maps of a convolutional network
    if not (hasattr(vit, "blocks") and isinstance(vit.patch_embed, PatchEmbed)):
        raise not_serving(name, "it is no plain vision transformer")
    return vit


def spread_out(vit: Any, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Return what some blocks give, after the last norm, as maps (B, dim, H / patch, W / patch);
    class tokens and registers are left out."""
    # timm's own padding rounds in a way that an exported graph cannot hold
    padded = pad_to_multiple(images, vit.patch_embed.patch_size[0])
    maps: list[Tensor] = vit.forward_intermediates(
        padded, indices=list(blocks), norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return maps
