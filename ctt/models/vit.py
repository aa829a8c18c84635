"""A vision transformer with a light decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ctt.models.base import BackboneModel, conv_bn, crop_to_stride
from ctt.models.timm_backbone import create

TAKEN = 4  # blocks whose output is read, as far from each other as they can be


class Vit(BackboneModel):
    """Plain vision transformer of timm; the sum of four of its blocks' outputs, up by two.

    Images of any size: they are padded to whole patches by the normalised colour 0, and position
    embeddings are interpolated. Features are at half a patch: stride 7 for patches of 14.

    Args:
        num_classes: C. features: D. backbone: name of a ViT of timm.
    """

    def __init__(self, num_classes: int, features: int, backbone: str) -> None:
        super().__init__()
        self.backbone_name, self.patches = backbone, True
        transformer: Any = create(
            backbone, num_classes=0, global_pool="", dynamic_img_size=True, dynamic_img_pad=True
        )
        self.backbone = transformer
        self.stride = transformer.patch_embed.patch_size[0] // 2
        depth, dim = len(transformer.blocks), transformer.embed_dim
        self.stage_channels = (3, *[dim] * TAKEN)
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
        transformer: Any = self.backbone
        blocks: list[Tensor] = transformer.forward_intermediates(
            images, indices=self.taken, norm=True, output_fmt="NCHW", intermediates_only=True
        )  # of (B, dim, H / patch, W / patch)
        return [images, *blocks]

    def decode(self, stages: list[Tensor]) -> Tensor:
        images, *blocks = stages
        merged = sum(conv(x) for conv, x in zip(self.reduce, blocks, strict=True))  # D channels
        return crop_to_stride(self.decoder(merged), images, self.stride)
