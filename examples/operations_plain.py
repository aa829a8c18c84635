"""The operations of `ctt.ops` in a plain training loop, with nothing else than PyTorch.

    python examples/operations_plain.py

A student learns made-up masks by cross-entropy, and by contrast with a bank of its teacher's
features.
Replace `batch` by your loader and `network` by your own.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctt.ops import MemoryBank, ema_update_, info_nce

CLASSES, CAPACITY, DIM, SIDE = 5, 32, 32, 16


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return made-up images (B, 3, H, W) and labels (B, H, W), 255 for ignored pixels."""
    g = torch.Generator().manual_seed(step)
    label = torch.randint(0, CLASSES, (4, SIDE, SIDE), generator=g)
    tint = torch.linspace(-1, 1, CLASSES)[label][:, None].expand(-1, 3, -1, -1)
    images = tint + 0.3 * torch.randn(4, 3, SIDE, SIDE, generator=g)
    label[:, 0] = 255
    return images, label


def pixels(features: Tensor) -> Tensor:
    """Return (B, D, h, w) as rows (B * h * w, D), without a copy."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def train(steps: int = 60) -> tuple[MemoryBank, list[float]]:
    """Return the bank and the cross-entropy of every step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, DIM, 3, padding=1), nn.ReLU(), nn.Conv2d(DIM, DIM, 1))
    classifier = nn.Conv2d(DIM, CLASSES, 1)
    teacher = copy.deepcopy(network).requires_grad_(False)
    bank = MemoryBank(CLASSES, CAPACITY, DIM)
    optimizer = torch.optim.SGD([*network.parameters(), *classifier.parameters()], lr=0.1)
    seen = []
    for step in range(steps):
        images, label = batch(step)
        features = network(images)  # (B, D, h, w)
        logits = classifier(features)
        supervised = F.cross_entropy(logits, label, ignore_index=255)
        confidence = logits.detach().softmax(1).amax(1).flatten()  # (N,)
        contrast = info_nce(
            pixels(features), label.flatten(), bank.keys, bank.count, temperature=0.5
        )
        loss = supervised + 0.1 * contrast  # 0 until the bank holds keys of two classes
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema_update_(teacher, network, decay=0.9)
        with torch.no_grad():
            keys = pixels(teacher(images))
        bank.push(keys, label.flatten(), confidence, top_k=16, per_class=4)
        seen.append(supervised.item())
    return bank, seen


def main() -> None:
    bank, seen = train()
    print(f"cross-entropy {seen[0]:.2f} -> {seen[-1]:.2f}, keys held {bank.count.tolist()}")


if __name__ == "__main__":
    main()
