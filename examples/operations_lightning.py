"""The operations of `ctt.ops` in a LightningModule (`pip install lightning`).

    python examples/operations_lightning.py

The bank is a module of buffers, so checkpoints hold it and it moves to the device with the rest.
With several devices Lightning's strategy must not broadcast buffers: `group=None` fills the bank
alike everywhere, by the joined batch.
"""

import copy
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ctt.ops import MemoryBank, ema_update_, info_nce

CLASSES, CAPACITY, DIM = 5, 16, 32


def pixels(features: Tensor) -> Tensor:
    """(B, D, h, w) -> (B * h * w, D), without a copy."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


class Contrast(lightning.LightningModule):
    """A student that learns from pixel contrast with the keys of its averaged teacher."""

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.student = nn.Sequential(
            nn.Conv2d(3, DIM, 3, padding=1), nn.ReLU(), nn.Conv2d(DIM, DIM, 1)
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.bank = MemoryBank(CLASSES, CAPACITY, DIM)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """images (B, 3, H, W), label (B, H, W) -> ()."""
        images, label = batch
        with torch.no_grad():
            keys = pixels(self.teacher(images))
        confidence = torch.rand(len(keys), device=keys.device)
        self.bank.push(keys, label.flatten(), confidence, top_k=8, per_class=4)
        query = pixels(self.student(images))
        bank = self.bank
        loss = info_nce(query, label.flatten(), bank.keys, bank.count, temperature=0.5)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        ema_update_(self.teacher, self.student, decay=self.decay)  # after the optimiser's step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def made_up() -> DataLoader[tuple[Tensor, ...]]:
    label = torch.randint(0, CLASSES, (16, 12, 12))
    tint = torch.linspace(-1, 1, CLASSES)[label][:, None].expand(-1, 3, -1, -1)
    images = tint + 0.3 * torch.randn(16, 3, 12, 12)
    return DataLoader(TensorDataset(images, label), batch_size=2)


def main() -> None:
    strategy = "auto"
    if torch.cuda.device_count() > 1:
        strategy = DDPStrategy(broadcast_buffers=False)
    trainer = lightning.Trainer(
        max_epochs=2, strategy=strategy, logger=False, enable_checkpointing=False
    )
    module = Contrast()
    trainer.fit(module, made_up())
    loss = trainer.callback_metrics["loss"]
    print(f"loss {loss:.3f}, keys held {module.bank.count.tolist()}")


if __name__ == "__main__":
    main()
