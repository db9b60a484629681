"""Fuse the norms of a model that accelerate prepares: one line before `prepare`.

What accelerate wraps and shards is then the fused model, and the mixed precision of the
Accelerator is served as any other. The optimizer may be made before or after: the parameters are
the same objects. Run as a script it trains a random encoder.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusednorm


class Largest(nn.Module):
    """An encoder that learns to name the largest of its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 32), nn.Linear(32, 1)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.encoder(self.embed(x[..., None])))
        return logits[..., 0]


def main() -> None:
    model = Largest()
    print(fusednorm.replace_norms(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = DataLoader(TensorDataset(torch.randn(512, 8)), batch_size=32)
    accelerator = Accelerator(cpu=True)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for _ in range(3):
        for (x,) in data:
            loss = nn.functional.cross_entropy(model(x), x.argmax(-1))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    fusednorm.restore_norms(accelerator.unwrap_model(model))
    print(f"loss {losses[0]:.2f} before, {losses[-1]:.2f} after")


if __name__ == "__main__":
    main()
