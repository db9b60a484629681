"""Train one small diffusion Transformer twice: with AdaLN-Zero in plain torch, and fused.

The model is the DiT of Peebles and Xie, *Scalable Diffusion Models with Transformers*, 2022
(arXiv:2212.09748). It learns to tell the noise in a noisy image from the image, which shows one of
five figures, drawn anew for every step. Both runs start from the same weights and see the same
images, so whatever differs between the two loss curves comes from the norms alone.

    python examples/adaln.py
    python examples/adaln.py --dtype bf16 --compile --layers 12 --heads 12 --width 768  # GPU
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as in train_gpt.py

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mse_loss, pixel_shuffle, pixel_unshuffle
from train_gpt import (
    MEASURED,
    Attention,
    Run,
    autocast,
    base_parser,
    check_heads,
    losses_fell,
    print_comparison,
    print_curves,
    print_rows,
    train,
)

import fusednorm

SIZE = 16  # of an image, in pixels
PATCH = 2
EPS = 1e-6


# The model ---------------------------------------------------------------------------------------

AddNorm = Callable[[Tensor, Tensor | None, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]
"""branch, stream, gate, shift, scale -> the modulated norm of stream + gate * branch, and that sum.

Without a stream yet the branch starts one.
"""


def plain_add_norm(
    branch: Tensor, stream: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Operators of torch: each reads what the one before it wrote."""
    # A stream comes with the gate of its branch.
    stream = branch if stream is None else stream + gate * branch  # type: ignore[operator]
    y = layer_norm(stream, stream.shape[-1:], eps=EPS)
    return y * (1 + scale) + shift, stream


def fused_add_norm(
    branch: Tensor, stream: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One operator."""
    width = branch.shape[-1]
    if stream is None:
        return fusednorm.modulated_layer_norm(branch, width, shift, scale, eps=EPS), branch
    return fusednorm.add_layer_norm(
        branch, stream, width, eps=EPS, gate=gate, shift=shift, scale=scale
    )


class Block(nn.Module):
    """AdaLN-Zero block: the condition shifts and scales what each half reads, and gates its result.

    What a half returns joins the stream, through its gate, in front of the next norm.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.attention = Attention(width, heads, causal=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )

    def forward(
        self,
        condition: Tensor,
        branch: Tensor,
        stream: Tensor | None,
        gate: Tensor | None,
        add_norm: AddNorm,
    ) -> tuple[Tensor, Tensor, Tensor]:
        terms = self.modulation(condition).chunk(6, dim=-1)
        attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = terms
        x, stream = add_norm(branch, stream, gate, attention_shift, attention_scale)
        x, stream = add_norm(self.attention(x), stream, attention_gate, mlp_shift, mlp_scale)
        return self.mlp(x), stream, mlp_gate


class DiT(nn.Module):
    """Noisy images, their times in [0, 1] and classes in, the noise in them out."""

    def __init__(self, classes: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.add_norm: AddNorm = plain_add_norm
        self.patches = nn.Linear(PATCH**2, width)
        self.positions = nn.Embedding((SIZE // PATCH) ** 2, width)
        self.times = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.noise = nn.Linear(width, PATCH**2)
        # The paper's choice, and positions of about 1. From a much smaller stream a norm magnifies
        # every step, and two runs that differ by one rounding soon differ visibly.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The Zero of AdaLN-Zero: every gate starts closed, so that every block is the identity.
        modulations = [module.modulation[1] for module in (*self.blocks, self)]
        for linear in (*modulations, self.noise):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        # [batch, 1, SIZE, SIZE] -> [batch, patches, PATCH**2]
        pixels = pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)
        branch, stream, gate = self.patches(pixels) + self.positions.weight, None, None
        condition = self.times(waves(times, branch.shape[-1])) + self.labels(labels)
        condition = condition.unsqueeze(1)  # one for all patches of an image
        for block in self.blocks:
            branch, stream, gate = block(condition, branch, stream, gate, self.add_norm)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        x, _ = self.add_norm(branch, stream, gate, shift, scale)
        noise = self.noise(x).transpose(1, 2)
        return pixel_shuffle(noise.unflatten(2, (SIZE // PATCH, SIZE // PATCH)), PATCH)


def waves(times: Tensor, width: int) -> Tensor:
    """Cosines and sines of the times, of wavelengths from 0.006 to 60."""
    half = width // 2
    frequencies = 1e3 * 1e4 ** (-torch.arange(half, device=times.device) / half)
    angles = times[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# The images --------------------------------------------------------------------------------------

# The distance of (x, y) to the edge of a figure of radius 1, negative inside.
FIGURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: torch.hypot(x, y) - 1,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.8).abs() - 0.2,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.9,
    "diamond": lambda x, y: (x.abs() + y.abs() - 1.1) * 0.7,
    "cross": lambda x, y: torch.maximum(
        torch.minimum(x.abs(), y.abs()) - 0.25, torch.maximum(x.abs(), y.abs()) - 1
    ),
}


def draw_figures(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Images [batch, 1, SIZE, SIZE] of figures with random centres and radii, about -1 to 1."""
    x0, y0, radius = torch.rand(3, len(labels), 1, 1, generator=generator)
    radius = 3 + 3 * radius
    grid = torch.arange(SIZE) + 0.5
    x = (grid[None, None, :] - radius - (SIZE - 2 * radius) * x0) / radius
    y = (grid[None, :, None] - radius - (SIZE - 2 * radius) * y0) / radius
    distances = torch.stack([figure(x, y) for figure in FIGURES.values()])
    distance = distances[labels, torch.arange(len(labels))] * radius
    return torch.tanh(-2 * distance).unsqueeze(1)


class Batch(NamedTuple):
    """Images, which are all figure at time 0 and all noise at time 1, and the noise in them."""

    images: Tensor
    times: Tensor
    labels: Tensor
    noise: Tensor

    @classmethod
    def draw(cls, size: int, device: torch.device, generator: torch.Generator) -> Batch:
        labels = torch.randint(len(FIGURES), (size,), generator=generator)
        images = draw_figures(labels, generator)
        times = torch.rand(size, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        angle = times.view(-1, 1, 1, 1) * (math.pi / 2)
        noisy = angle.cos() * images + angle.sin() * noise
        return cls(*(tensor.to(device) for tensor in (noisy, times, labels, noise)))


# Training ----------------------------------------------------------------------------------------


def noise_loss(forward: Callable[..., Tensor], batch: Batch, args: argparse.Namespace) -> Tensor:
    """Mean squared error of the predicted noise; 1 for a model that predicts none."""
    with autocast(args):
        noise = forward(batch.images, batch.times, batch.labels)
    return mse_loss(noise.float(), batch.noise)


# The command -------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser(__doc__)
    parser.set_defaults(steps=400, batch_size=16, layers=3, width=96, lr=2e-3)
    args = parser.parse_args(argv)
    check_heads(parser, args)
    if args.width % 2:
        parser.error(f"argument --width: expected an even number, got {args.width}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    model = DiT(len(FIGURES), args.layers, args.heads, args.width).to(args.device)
    fused_model = copy.deepcopy(model)
    fused_model.add_norm = fused_add_norm
    baseline = Run.start("plain torch", model, noise_loss, args)
    fused = Run.start("fusednorm", fused_model, noise_loss, args)
    runs = (baseline, fused)

    print(
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{args.device}, {args.dtype}, torch {torch.__version__}"
    )
    patches = (SIZE // PATCH) ** 2
    example = torch.zeros(args.batch_size, patches, args.width, device=args.device)
    with fusednorm.backends.explain() as ran:
        fusednorm.layer_norm(example, args.width)
    print(ran[0], flush=True)

    generator = torch.Generator().manual_seed(args.seed)
    train(runs, lambda: Batch.draw(args.batch_size, args.device, generator), args)

    print_curves(baseline, fused)
    print_rows(runs, MEASURED)
    print("(No image is seen twice, so these are losses on new images; predicting no noise: 1.0.)")
    print_comparison(baseline, fused, args)
    print(f"\ntotal: {time.perf_counter() - began:.0f} s")
    return 0 if losses_fell(runs, args) else 1


if __name__ == "__main__":
    sys.exit(main())
