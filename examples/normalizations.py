"""Layer norm, RMS norm, batch norm and none, compared by what comes out: a table and a picture.

(a) accuracy by batch size, (b) padded sequences of different lengths, (c) depth, (d) inputs that
are shifted and rescaled after training, (e) features of very different scale. All data are drawn
here. Every number is a mean over seeds, ± half of the distance from the lowest to the highest.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as in train_gpt.py

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm  # type: ignore[import-untyped]
from train_gpt import OneLineParser, at_least

import fusednorm

FEATURES, CLASSES, WIDTH = 16, 8, 32
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer norm": fusednorm.LayerNorm,
    "RMS norm": fusednorm.RMSNorm,
    "batch norm": nn.BatchNorm1d,
    "none": lambda width: nn.Identity(),
}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as in training": lambda x: x,
    "all + 3": lambda x: x + 3,
    "all x 10": lambda x: 10 * x,
    "all x 0.1": lambda x: 0.1 * x,
    "first feature + 10": lambda x: torch.cat([x[:, :1] + 10, x[:, 1:]], 1),
}


class Result(NamedTuple):
    """One number: of which part, under which condition, with which norm, from which seed."""

    part: str
    condition: str
    norm: str
    seed: int
    value: float


class Task:
    """Points around four centres a class, which no plane parts."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.centres = 1.2 * torch.randn(CLASSES, 4, FEATURES, generator=self.generator)

    def draw(self, size: int, *length: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return points [size, *length, FEATURES], those of a row of one class, and the classes."""
        labels = torch.randint(CLASSES, (size,), generator=self.generator)
        centre = torch.randint(4, (size, *length), generator=self.generator)
        spread = torch.randn(size, *length, FEATURES, generator=self.generator)
        of_centre = labels.view(-1, *(1 for _ in length)).expand_as(centre)
        return self.centres[of_centre, centre] + noise * spread, labels


class Net(nn.Sequential):
    """A norm of the input if asked for, then linear, norm and ReLU in turn; no residuals."""

    def __init__(self, norm: str, depth: int = 2, of_input: bool = False) -> None:
        blocks: list[nn.Module] = [NORMS[norm](FEATURES)] if of_input else []
        for layer in range(depth):
            linear = nn.Linear(WIDTH if layer else FEATURES, WIDTH)
            blocks += [linear, NORMS[norm](WIDTH), nn.ReLU()]
        super().__init__(*blocks, nn.Linear(WIDTH, CLASSES))


def train(
    model: nn.Module, draw: Callable[[int], tuple[Tensor, Tensor]], samples: int, batch: int = 32
) -> nn.Module:
    """Train on as many samples for each batch size, with a rate that suits it; return the model."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3 * (batch / 32) ** 0.5)
    for _ in range(max(1, samples // batch)):
        x, labels = draw(batch)
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


@torch.no_grad()
def percent(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return how many of a hundred classes the model gets right."""
    return 100 * float((model(x).argmax(-1) == labels).double().mean())


def batch_sizes(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """Small batches take more and smaller steps; a quarter of the samples, for their sake."""
    for size in (1, 2, 4, 8, 32, 128):
        task, model = Task(seed), Net(norm)
        try:
            train(model, task.draw, samples // 4, size)
        except ValueError:  # batch norm: "Expected more than 1 value per channel when training"
            yield f"batch {size}", float("nan")
        else:
            yield f"batch {size}", percent(model.eval(), *task.draw(2000))


class Reader(Net):
    """Mean over the words of what a net makes of each; its norms see the padding as well."""

    def forward(self, x: Tensor) -> Tensor:
        real = (x != 0).any(-1, keepdim=True)
        words = super().forward(x.flatten(0, 1))  # type: ignore[no-untyped-call]
        words = words.unflatten(0, x.shape[:2])
        return (words * real).sum(1) / real.sum(1)  # type: ignore[no-any-return]


def lengths(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """Train on mixed lengths; then read short sequences, alone and padded to the longest."""
    task, longest = Task(seed), 32

    def padded(size: int, of_words: int = longest) -> tuple[Tensor, Tensor]:
        x, labels = task.draw(size, longest, noise=2.5)
        words = torch.randint(2, of_words + 1, (size, 1), generator=task.generator)
        return x * (torch.arange(longest) < words)[..., None], labels

    model = train(Reader(norm), padded, samples)
    x, labels = padded(2048, 4)
    for statistics in ("training", "evaluation"):
        model.train(statistics == "training")
        with torch.no_grad():
            alone, full = (torch.cat([*map(model, x[:, :n].split(32))]) for n in (4, longest))
        for how, logits in (("alone", alone), ("padded", full)):
            right = (logits.argmax(-1) == labels).double().mean().item()
            yield f"{statistics} statistics, {how}", 100 * right
        moved = (full - alone).norm() / alone.norm()
        yield f"{statistics} statistics: logits moved by padding, %", 100 * moved.item()


def depth(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """How large activations and gradients are before training, and accuracy after it."""
    for layers in (2, 4, 8, 16, 32):
        task, model = Task(seed), Net(norm, layers)
        x, labels = task.draw(512)
        hidden = nn.Sequential(*list(model)[:-1])(x)
        yield f"{layers} layers: spread of activations", hidden.std(0).mean().item()
        cross_entropy(model(x), labels).backward()
        grads = [layer.weight.grad for layer in model if isinstance(layer, nn.Linear)]
        first_over_last = grads[0].norm() / grads[-2].norm()  # type: ignore[union-attr]
        yield f"{layers} layers: gradient, first over last", first_over_last.item()
        train(model, task.draw, samples)
        yield f"{layers} layers", percent(model.eval(), *task.draw(2000))


def changed(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """A net whose first layer is the norm, on inputs that are not as they were in training."""
    task = Task(seed)
    model = train(Net(norm, of_input=True), task.draw, samples).eval()
    x, labels = task.draw(2000)
    for what, change in CHANGES.items():
        yield what, percent(model, change(x), labels)


def scales(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """A net whose first layer is the norm, on features whose scales are that far apart."""
    for spread in (1, 10, 100, 1000):
        task, factors = Task(seed), spread ** torch.linspace(-0.5, 0.5, FEATURES)

        def draw(size: int, task: Task = task, by: Tensor = factors) -> tuple[Tensor, Tensor]:
            x, labels = task.draw(size)
            return x * by, labels

        model = train(Net(norm, of_input=True), draw, samples).eval()
        yield f"scales 1 to {spread}", percent(model, *draw(2000))


PARTS = {
    "a": (batch_sizes, "by batch size"),
    "b": (lengths, "short sequences"),
    "c": (depth, "by depth"),
    "d": (changed, "inputs changed after training"),
    "e": (scales, "features of different scale"),
}


def by_condition(results: Sequence[Result]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Return the values of all seeds by part and condition, then by norm."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for part, condition, norm, _, value in results:
        found.setdefault((part, condition), {}).setdefault(norm, []).append(value)
    return found


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    return fmean(values), (max(values) - min(values)) / 2


def table(results: Sequence[Result]) -> str:
    lines = [f"| | condition | {' | '.join(NORMS)} |", "| --- " * (2 + len(NORMS)) + "|"]
    for (part, condition), row in by_condition(results).items():
        cells = ["{:.3g} ± {:.2g}".format(*mean_and_half(row[norm])) for norm in NORMS]
        lines.append(
            f"| {part} | {condition} | {' | '.join(cells)} |".replace("nan ± nan", "refuses")
        )
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    axes = (figure := Figure(figsize=(9, 11), layout="constrained")).subplots(3, 2).flatten()
    for place, (part, (_, title)) in zip(axes, PARTS.items(), strict=False):
        found = by_condition([r for r in results if r.part == part and ":" not in r.condition])
        names = [name.replace(", ", ",\n") for _, name in found]
        for norm, look in zip(NORMS, ("C0o-", "C2s-", "C1^-", "kx--"), strict=True):
            means, halves = zip(*(mean_and_half(row[norm]) for row in found.values()), strict=True)
            place.errorbar(names, means, halves, fmt=look, label=norm)
        place.tick_params("x", rotation=30, labelsize=8)
        place.set(title=f"({part}) {title}", ylim=(0, 100), ylabel="percent right")
    axes[-1].axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(path, format="png", dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description="Compare normalizations; write a table and a picture.")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the results go")
    parser.add_argument("--seeds", type=at_least(int, 1), default=3)
    parser.add_argument("--samples", type=at_least(int, 1), default=8192, help="to train on")
    args = parser.parse_args(argv)
    if not args.folder.is_dir() or not os.access(args.folder, os.W_OK):
        parser.error(f"argument --folder: cannot write into {args.folder}")
    runs = [(part, norm, seed) for part in PARTS for norm in NORMS for seed in range(args.seeds)]
    results: list[Result] = []
    for part, norm, seed in tqdm(runs, "models"):
        torch.manual_seed(seed)
        found = PARTS[part][0](norm, seed, args.samples)
        results += [Result(part, condition, norm, seed, value) for condition, value in found]
    with (args.folder / "normalizations.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Result._fields, *results])
    print(table(results))
    plot(results, args.folder / "normalizations.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
