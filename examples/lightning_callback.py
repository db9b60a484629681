"""Fuse the norms of whatever a Trainer of lightning trains: one callback.

    trainer = lightning.Trainer(callbacks=[FusedNorms()])

It swaps them in `setup`, before the strategy wraps the model and the optimizers are made, and gives
the model back its own classes at the end. Run as a script it trains a random encoder.
"""

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fusednorm


class FusedNorms(lightning.Callback):
    """Swap the norms of the model when it is set up, and back when the Trainer is done."""

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        self.report = fusednorm.replace_norms(pl_module)

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        fusednorm.restore_norms(pl_module)


class Largest(lightning.LightningModule):
    """An encoder that learns to name the largest of its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 32), nn.Linear(32, 1)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        logits = self.head(self.encoder(self.embed(batch[0][..., None])))[..., 0]
        loss = nn.functional.cross_entropy(logits, batch[0].argmax(-1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fused, model = FusedNorms(), Largest()
    data = DataLoader(TensorDataset(torch.randn(512, 8)), batch_size=32)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=3, callbacks=[fused], **quiet)
    trainer.fit(model, data)
    print(fused.report)
    print(f"loss {model.losses[0]:.2f} before, {model.losses[-1]:.2f} after")


if __name__ == "__main__":
    main()
