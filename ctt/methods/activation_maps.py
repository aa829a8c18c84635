"""Class activation maps of the encoder's last stages, refined by attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.methods.losses import to_grid
from ctt.models.base import PooledNorm, SegmentationModel

DIMENSIONS = 128  # of queries and keys (Zou et al., PseudoSeg, 2021)


class Refiner(nn.Module):
    """Says which classes an image shows, and where, of the stages that `read` gives.

    Args:
        network: that gives the stages.
        classes: C.
        background: one of them, or -1.
    """

    def __init__(self, network: SegmentationModel, classes: int, background: int) -> None:
        super().__init__()
        channels = network.stage_channels[network.first_map :][-2:]
        objects = classes - (background >= 0)
        self.background = background
        self.classifier = nn.Linear(channels[-1], objects)
        self.query = nn.Conv2d(sum(channels), DIMENSIONS, 1, bias=False)
        self.key = nn.Conv2d(sum(channels), DIMENSIONS, 1, bias=False)
        self.logits = nn.Sequential(nn.Conv2d(classes, classes, 1, bias=False), PooledNorm(classes))

    def presence(self, stages: list[Tensor]) -> Tensor:
        """Return logits (B, C - 1) of the classes but the background, of whole images."""
        logits: Tensor = self.classifier(stages[-1].mean(dim=(2, 3)))
        return logits

    def forward(self, stages: list[Tensor], present: Tensor, valid: Tensor) -> Tensor:
        """Return logits (B, C, h, w) on the grid of the last stage.

        Args:
            present: (B, C - 1), which classes there are.
            valid: (B, h, w), where an image is.
        """
        stages = [x.detach() for x in stages]
        grid = (stages[-1].shape[-2], stages[-1].shape[-1])
        weight = self.classifier.weight.detach()[:, :, None, None]
        # the gradient of a mean over cells is the same in each, and its scale drops out
        maps = F.conv2d(stages[-1], weight).relu() * present[:, :, None, None]
        maps = maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)  # (B, C - 1, h, w)
        column = torch.cat([F.adaptive_avg_pool2d(x, grid) for x in stages], dim=1)
        query, key = self.query(column).flatten(2), self.key(column).flatten(2)  # (B, 128, n)
        score = query.transpose(1, 2) @ key / DIMENSIONS**0.5  # (B, n, n)
        score = score.masked_fill(~valid.flatten(1)[:, None], torch.finfo(score.dtype).min)
        refined = maps + (maps.flatten(2) @ score.softmax(dim=2).transpose(1, 2)).view_as(maps)
        if self.background >= 0:
            refined = torch.cat([2 - refined.amax(dim=1, keepdim=True), refined], dim=1)
        logits: Tensor = self.logits(refined)
        return logits


def read(network: SegmentationModel, stages: list[Tensor]) -> list[Tensor]:
    """Return the last two stages, none of which is the images, in full precision."""
    dtype = network.classifier.weight.dtype
    return [x.to(dtype) for x in stages[network.first_map :][-2:]]


def on_grid(outside: Tensor, stage: Tensor, network: SegmentationModel) -> Tensor:
    """Return where (B, h, w) cells of a stage are outside, as pixels (B, H, W) are; beyond the
    image they are."""
    size = (outside.shape[-2], outside.shape[-1])
    cells = to_grid(outside, network.grid_of(network.stage_stride(stage, size)))
    bottom, right = (n - m for n, m in zip(stage.shape[-2:], cells.shape[-2:], strict=True))
    return F.pad(cells, (0, right, 0, bottom), value=True)
