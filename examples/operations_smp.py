"""The operations of `ctt.ops` around a network of segmentation_models_pytorch.

    pip install segmentation-models-pytorch
    python examples/operations_smp.py

A network of that package is an encoder, a decoder and a head. Contrast compares the features that
the decoder gives to the head. The supervised loss is one of that package.
"""

import copy
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor

from ctt.ops import MemoryBank, ema_update_, info_nce

CLASSES, CAPACITY, SIDE, STRIDE = 4, 32, 64, 4


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return made-up images (B, 3, H, W) of boxes and their labels (B, H, W)."""
    g = torch.Generator().manual_seed(step)
    cells = torch.randint(0, CLASSES, (2, SIDE // 16, SIDE // 16), generator=g)
    label = cells.repeat_interleave(16, 1).repeat_interleave(16, 2)
    tint = torch.linspace(-1, 1, CLASSES)[label][:, None].expand(-1, 3, -1, -1)
    return tint + 0.3 * torch.randn(2, 3, SIDE, SIDE, generator=g), label


def decode(network: Any, images: Tensor) -> Tensor:
    """Return the features (B, D, h, w) that the network's head reads."""
    features: Tensor = network.decoder(network.encoder(images))
    return features


def pixels(maps: Tensor) -> Tensor:
    """Return every STRIDE-th pixel of (B, D, h, w) in both directions as rows (N, D)."""
    return maps[:, :, ::STRIDE, ::STRIDE].permute(0, 2, 3, 1).flatten(0, 2)


def train(steps: int = 20) -> tuple[MemoryBank, list[float]]:
    """Return the bank and the dice loss of every step."""
    torch.manual_seed(0)
    network = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)
    teacher = copy.deepcopy(network).requires_grad_(False).eval()
    dice = smp.losses.DiceLoss("multiclass")
    bank = MemoryBank(CLASSES, CAPACITY, dim=16)  # a U-Net's decoder gives 16 channels
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    seen = []
    for step in range(steps):
        images, label = batch(step)
        features = decode(network, images)
        logits = network.segmentation_head(features)  # (B, C, H, W)
        supervised = dice(logits, label)
        coarse = label[:, ::STRIDE, ::STRIDE].flatten()  # (N,)
        contrast = info_nce(pixels(features), coarse, bank.keys, bank.count, temperature=0.5)
        optimizer.zero_grad()
        (supervised + 0.1 * contrast).backward()
        optimizer.step()
        ema_update_(teacher, network, decay=0.9)
        with torch.no_grad():
            known = decode(teacher, images)
            confidence = pixels(teacher.segmentation_head(known).softmax(1)).amax(1)
        bank.push(pixels(known), coarse, confidence, top_k=16, per_class=4)
        seen.append(supervised.item())
    return bank, seen


def main() -> None:
    bank, seen = train()
    print(f"dice loss {seen[0]:.2f} -> {seen[-1]:.2f}, keys held {bank.count.tolist()}")


if __name__ == "__main__":
    main()
