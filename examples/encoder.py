"""Train a Transformer encoder to sort digits, twice: from readable parts, and from torch's.

The parts have the names of `nn.TransformerEncoderLayer`, so that one state dict fits both; their
norms are `fusednorm.AddLayerNorm`: add, then norm. Post-norm is that of *Attention Is All You Need*
(arXiv:1706.03762), --pre-norm that of most later models (arXiv:2002.04745).
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as in train_gpt.py

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, relu, scaled_dot_product_attention
from tqdm import tqdm  # type: ignore[import-untyped]
from train_gpt import OneLineParser, at_least, check_writable

import fusednorm

DIGITS, LENGTH, WIDTH, HEADS = 10, 8, 32, 4
# In float32 rounding, magnified by each step, parts the curves by up to a few thousandths.
DTYPE = torch.float64


class Attention(nn.Module):
    """Every position asks all positions, and gets a mixture of what they hold."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        # [batch, length, 3 * width] -> three of [batch, heads, length, width / HEADS]
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention, then a small network for each position, each with an Add & Norm."""

    def __init__(self, width: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = Attention(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1 = (fusednorm.LayerNorm if pre_norm else fusednorm.AddLayerNorm)(width)
        self.norm2 = fusednorm.AddLayerNorm(width, prenorm=pre_norm)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:  # branches read a norm of the stream and add to the stream itself
            y, x = self.norm2(self.self_attn(self.norm1(x)), x)
            return x + self.feed_forward(y)
        x = self.norm1(self.self_attn(x), x)  # norm(x + attention(x))
        return self.norm2(self.feed_forward(x), x)  # type: ignore[no-any-return]

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(relu(self.linear1(x)))  # type: ignore[no-any-return]


class Sorter(nn.Module):
    """Digits in, logits of the digit at each place of the sorted sequence out."""

    def __init__(self, layers: Sequence[nn.Module], pre_norm: bool) -> None:
        super().__init__()
        self.digits = nn.Embedding(DIGITS, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH) if pre_norm else nn.Identity()
        self.head = nn.Linear(WIDTH, DIGITS)

    def forward(self, digits: Tensor) -> Tensor:
        x = self.digits(digits) + waves()
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def waves() -> Tensor:
    """Sines and cosines of the position, [LENGTH, WIDTH]: the paper's positional encoding."""
    angles = torch.arange(LENGTH)[:, None] / 1e4 ** (torch.arange(0, WIDTH, 2) / WIDTH)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Tensor) -> float:
    """Return the share of sequences that come out sorted from end to end."""
    right = model(digits).argmax(-1) == digits.sort().values
    return float(right.all(-1).double().mean())


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description="Sort digits with a Transformer encoder, twice.")
    add = parser.add_argument
    add("--pre-norm", action="store_true", help="normalise what goes into a branch, not the sum")
    add("--layers", type=at_least(int, 1), default=2)
    add("--steps", type=at_least(int, 1), default=800)
    add("--seed", type=at_least(int, 0, 2**63), default=0)
    add("--plot", type=Path, default=Path("encoder.png"), help="where the curves go (PNG)")
    args = parser.parse_args(argv)
    check_writable(parser, args.plot)
    torch.manual_seed(args.seed)
    pre = args.pre_norm
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=pre
    )
    theirs = Sorter([copy.deepcopy(layer) for _ in range(args.layers)], pre).to(DTYPE)
    ours = Sorter([Layer(WIDTH, pre) for _ in range(args.layers)], pre).to(DTYPE)
    ours.load_state_dict(theirs.state_dict())
    models = {"torch's parts": theirs, "readable parts": ours}
    optimizers = [torch.optim.Adam(model.parameters()) for model in models.values()]
    curves: dict[str, list[float]] = {name: [] for name in models}
    for step in tqdm(range(args.steps), "training", mininterval=0.5, disable=None):
        digits = torch.randint(DIGITS, (64, LENGTH))
        rate = 3e-3 * min(1.0, (step + 1) / 50) * (1 - step / args.steps)
        for (name, model), optimizer in zip(models.items(), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            loss = cross_entropy(model(digits).flatten(0, 1), digits.sort().values.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[name].append(loss.item())
    fresh = torch.randint(DIGITS, (1000, LENGTH))
    solved = {name: accuracy(model, fresh) for name, model in models.items()}
    axes = (figure := Figure(figsize=(8, 4), layout="constrained")).subplots()
    # The curves lie on one another: a wide pale line under a thin dashed one shows both.
    looks = (("#f4a259", 4.0, "-"), ("#1d3557", 1.2, "--"))
    for (name, losses), (color, thickness, style) in zip(curves.items(), looks, strict=True):
        print(f"{name:15} loss {losses[0]:.4f} -> {losses[-1]:.4f}, {solved[name]:.1%} sorted")
        axes.semilogy(losses, style, c=color, lw=thickness, label=name)
    gap = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    print(f"largest difference of the curves: {gap:.1e}")
    axes.set(title=f"{'pre' if pre else 'post'}-norm", xlabel="step", ylabel="nats per digit")
    axes.legend(frameon=False)
    figure.savefig(args.plot, format="png", dpi=110)
    return 0 if min(solved.values()) > 0.95 or args.steps < 800 else 1


if __name__ == "__main__":
    sys.exit(main())
