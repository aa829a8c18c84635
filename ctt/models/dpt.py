"""Vision transformers with the head of Ranftl et al. (DPT, ICCV 2021, arXiv 2103.13413)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ctt.models.base import BackboneModel, Grid
from ctt.models.vit import TAKEN, spread_out, transformer

CELLS = 8  # cells of the features along a patch
# widths of the head for encoders of so many channels at most: of the features, and of the four
# maps, in the program of UniMatch V2 (arXiv 2410.10777) for DINOv2 B (and half of it for S), L, g
SMALL, LARGE, GIANT = 768, 1280, 1536
OF_LARGE = (256, (256, 512, 1024, 1024))
OF_GIANT = (384, (1536, 1536, 1536, 1536))
BLOCKS_OF_24 = (4, 11, 17, 23)  # there for ViT-L; of 12 and of 40 blocks every fourth part


class Dpt(BackboneModel):
    """Plain vision transformer of timm and the head of DPT, as UniMatch V2 has it, without norms.

    Four blocks, all after the transformer's last norm and without class token and registers, become
    maps at 4, 2, 1 and 1/2 times the resolution of the patches. From the coarsest on, each is
    fused into the next finer one, and the last result is at 8 times that resolution. The features
    are what the last 1x1 convolution reads; logits go to whole patches by bilinear interpolation
    with aligned corners.

    Images of any size: they are padded to whole patches by the normalised colour 0.

    Args:
        num_classes: C.
        features: D; 0: as published for the width of the encoder.
        backbone: name of a ViT of timm.
        image: height and width of the images that the position embeddings are for; those of other
            images are interpolated; None: as published.
        drop_path: rate of stochastic depth in the last block, falling to 0 in the first.
        in_channels: of the images.
    """

    first_map = 1

    def __init__(
        self,
        num_classes: int,
        features: int,
        backbone: str,
        image: tuple[int, int] | None = None,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.backbone_name, self.patches = backbone, True
        self.backbone = vit = transformer(backbone, image, drop_path, in_channels)
        self.multiple = vit.patch_embed.patch_size[0]
        self.stride = math.ceil(self.multiple / CELLS)
        self.taken = blocks_of(len(vit.blocks))
        self.stage_channels = (in_channels, *[vit.embed_dim] * TAKEN)
        published, channels = widths(vit.embed_dim)
        width = features or published
        self.project = nn.ModuleList(nn.Conv2d(vit.embed_dim, c, 1) for c in channels)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        self.reduce = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=False) for c in channels)
        # the coarsest map, which comes first, has no other to be fused into
        self.fusion = nn.ModuleList(Fusion(width, joins=i > 0) for i in range(TAKEN))
        self.merge = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.classifier = nn.Conv2d(width, num_classes, 1)

    @property
    def grid(self) -> Grid:
        return Grid(self.multiple, cells=CELLS)

    def stage_stride(self, stage: Tensor, size: tuple[int, int]) -> int:
        return self.multiple

    def encode(self, images: Tensor) -> list[Tensor]:
        return [images, *spread_out(self.backbone, self.adapted(images), self.taken)]

    def decode(self, stages: list[Tensor]) -> Tensor:
        maps = [
            reduce(resize(project(x)))
            for x, project, resize, reduce in zip(
                stages[1:], self.project, self.resize, self.reduce, strict=True
            )
        ]
        fused: Tensor | None = None
        for i, fusion in enumerate(self.fusion):
            below = maps[TAKEN - 1 - i]
            finer = maps[TAKEN - 2 - i] if i < TAKEN - 1 else None
            height, width = (finer if finer is not None else below).shape[-2:]
            size = (height, width) if finer is not None else (2 * height, 2 * width)
            fused = fusion(below, fused, size)
        features: Tensor = self.merge(fused)
        return features


class Fusion(nn.Module):
    """Takes a map to the next finer resolution, with what the coarser ones gave added to it.

    Args:
        width: channels of all maps.
        joins: whether there is anything coarser.
    """

    def __init__(self, width: int, joins: bool) -> None:
        super().__init__()
        self.own = Residual(width) if joins else None
        self.both = Residual(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, coarser: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Return (B, width, *size) of x and what is coarser, both (B, width, h, w)."""
        if self.own is not None:
            x = coarser + self.own(x)
        x = F.interpolate(self.both(x), size=size, mode="bilinear", align_corners=True)
        fused: Tensor = self.out(x)
        return fused


class Residual(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.second(F.relu(self.first(F.relu(x))))
        return changed + x


def blocks_of(depth: int) -> tuple[int, ...]:
    """Return which four blocks of so many the head reads, counted from 0."""
    if depth == BLOCKS_OF_24[-1] + 1:
        return BLOCKS_OF_24
    return tuple(depth * (i + 1) // TAKEN - 1 for i in range(TAKEN))


def widths(dim: int) -> tuple[int, tuple[int, ...]]:
    """Return the channels of the features and of the four maps for an encoder's width."""
    if dim <= SMALL:
        return dim // 6, (dim // 8, dim // 4, dim // 2, dim)
    return OF_LARGE if dim <= LARGE else OF_GIANT
