"""The operations of `ctt.ops` in a plain loop of DistributedDataParallel, with two kinds of bank.

    torchrun --nproc-per-node 2 examples/operations_ddp.py

A bank that all processes share (`group=None`) holds the keys of the joined batch on every one of
them, so every process pushes at every step. A bank of one's own (`group="local"`) waits for nobody:
here rank 0 alone fills one with the keys that it has seen, to look at or to save.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctt.ops import MemoryBank, ema_update_, info_nce

CLASSES, CAPACITY, DIM, SIDE = 5, 16, 32, 12


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, H, W) of this process and their labels (B, H, W), made up."""
    g = torch.Generator().manual_seed(1000 * step + rank)
    label = torch.randint(0, CLASSES, (2, SIDE, SIDE), generator=g)
    tint = torch.linspace(-1, 1, CLASSES)[label][:, None].expand(-1, 3, -1, -1)
    return tint + 0.3 * torch.randn(2, 3, SIDE, SIDE, generator=g), label


def pixels(features: Tensor) -> Tensor:
    """(B, D, h, w) -> (B * h * w, D), without a copy."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def train(steps: int = 10) -> tuple[MemoryBank, MemoryBank | None, float]:
    """Return the shared bank, rank 0's own one (None elsewhere) and the last loss."""
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same weights everywhere
    network = nn.Sequential(nn.Conv2d(3, DIM, 3, padding=1), nn.ReLU(), nn.Conv2d(DIM, DIM, 1))
    teacher = copy.deepcopy(network).requires_grad_(False)
    student = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    # banks stay outside the wrapped module, which would overwrite their buffers with rank 0's
    shared = MemoryBank(CLASSES, CAPACITY, DIM)
    seen = MemoryBank(CLASSES, 4 * CAPACITY, DIM, group="local") if rank == 0 else None
    loss = torch.zeros(())
    for step in range(steps):
        images, label = batch(step, rank)
        with torch.no_grad():
            keys = pixels(teacher(images))
        confidence = torch.rand(len(keys))
        for bank in (shared, seen):  # the shared one on every process, or all wait
            if bank is not None:
                bank.push(keys, label.flatten(), confidence, top_k=8, per_class=4)
        query = pixels(student(images))
        loss = info_nce(query, label.flatten(), shared.keys, shared.count, temperature=0.5)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema_update_(teacher, network, decay=0.9)
    return shared, seen, loss.item()


def main() -> None:
    dist.init_process_group("gloo")  # nccl, and .to(device), on GPUs
    try:
        shared, seen, loss = train()
        if seen is not None:
            held = f"{shared.count.tolist()} keys shared, {seen.count.tolist()} of rank 0's own"
            print(f"loss {loss:.3f}, {held}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
