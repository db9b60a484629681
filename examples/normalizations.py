"""Layer norm, RMS norm, batch norm and none, compared by what comes out: a table and a picture.

(a) accuracy by batch size, (b) padded sequences of different lengths, (c) depth, (d) inputs that
are shifted and rescaled after training, (e) features of very different scale. All data are drawn
here; every number is a mean over seeds, with the distance from the lowest to the highest.

    python examples/normalizations.py --folder .
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
BATCH_SIZES = (1, 2, 4, 8, 32, 128)
DEPTHS = (2, 4, 8, 16, 32)
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as in training": lambda x: x,
    "all + 3": lambda x: x + 3,
    "all x 10": lambda x: 10 * x,
    "all x 0.1": lambda x: 0.1 * x,
    "one feature + 10": lambda x: torch.cat([x[..., :1] + 10, x[..., 1:]], -1),
}
SPREADS = (1, 10, 100, 1000)
LENGTHS = (2, 32)  # of the shortest and the longest sequence


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

    def draw(self, size: int, length: int = 1, noise: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return points [size, length, FEATURES], all of a row of one class, and the classes."""
        labels = torch.randint(CLASSES, (size,), generator=self.generator)
        centre = torch.randint(4, (size, length), generator=self.generator)
        spread = torch.randn(size, length, FEATURES, generator=self.generator)
        return self.centres[labels[:, None], centre] + noise * spread, labels


class Net(nn.Sequential):
    """A norm of the input if asked for, then linear, norm and ReLU in turn; no residuals."""

    def __init__(self, norm: str, depth: int = 2, of_input: bool = False) -> None:
        blocks: list[nn.Module] = [NORMS[norm](FEATURES)] if of_input else []
        for layer in range(depth):
            linear = nn.Linear(WIDTH if layer else FEATURES, WIDTH)
            blocks += [linear, NORMS[norm](WIDTH), nn.ReLU()]
        super().__init__(*blocks, nn.Linear(WIDTH, CLASSES))


def train(model: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]], steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        x, labels = draw()
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        optimizer.step()


@torch.no_grad()
def percent(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return how many of a hundred classes the model gets right."""
    return 100 * (model(x).argmax(-1) == labels).double().mean().item()


# The parts: each yields condition and value ------------------------------------------------------


def batch_sizes(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """As many samples for each batch size, so small batches take more and smaller steps."""
    for size in BATCH_SIZES:
        task, model = Task(seed), Net(norm)
        try:
            draw = lambda task=task, size=size: flat(task.draw(size))  # noqa: E731
            train(model, draw, max(1, samples // size), 1e-3 * (size / 8) ** 0.5)
        except ValueError:  # batch norm: "Expected more than 1 value per channel when training"
            yield str(size), float("nan")
            continue
        yield str(size), percent(model.eval(), *flat(task.draw(2000)))


def flat(points: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return points[0].flatten(0, 1), points[1]


class Reader(nn.Module):
    """Mean over the words of what a net makes of each; the net sees the padding, as it would."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.net = Net(norm)

    def forward(self, x: Tensor) -> Tensor:
        real = (x != 0).any(-1, keepdim=True)
        out = self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return (out * real).sum(1) / real.sum(1)  # type: ignore[no-any-return]


def padded(task: Task, size: int, longest: int, width: int) -> tuple[Tensor, Tensor]:
    """Return sequences of up to `longest` words, filled with zeros to `width`."""
    x, labels = task.draw(size, width, noise=2.5)
    lengths = torch.randint(LENGTHS[0], longest + 1, (size, 1), generator=task.generator)
    return x * (torch.arange(width) < lengths)[..., None], labels


def lengths(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """Train on mixed lengths; then short sequences, alone and padded to the longest."""
    task, model, longest = Task(seed), Reader(norm), LENGTHS[1]
    train(model, lambda: padded(task, 32, longest, longest), samples // 32, 2e-3)
    x, labels = padded(task, 2000, 4, longest)
    for statistics in ("training", "evaluation"):
        model.train(statistics == "training")
        for what, width in (("alone", 4), ("padded", longest)):
            right = fmean(percent(model, a, b) for a, b in zip(*split(x[:, :width], labels)))
            yield f"{statistics} statistics, {what}", right


def split(*tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(tensor.split(32) for tensor in tensors)


def depth(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """How large activations and gradients are before training, and accuracy after it."""
    for layers in DEPTHS:
        task, model = Task(seed), Net(norm, layers)
        x, labels = flat(task.draw(512))
        hidden = x
        for module in list(model)[:-1]:
            hidden = module(hidden)
        yield f"{layers}: activations", hidden.std().item()
        cross_entropy(model(x), labels).backward()
        first, last = model[0].weight.grad, model[-4].weight.grad
        yield f"{layers}: gradient, first over last", (first.norm() / last.norm()).item()
        train(model, lambda task=task: flat(task.draw(32)), samples // 32, 2e-3)
        yield f"{layers}: accuracy", percent(model.eval(), *flat(task.draw(2000)))


def changed(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """A net whose first layer is the norm, on inputs that are not as they were in training."""
    task, model = Task(seed), Net(norm, of_input=True)
    train(model, lambda: flat(task.draw(32)), samples // 32, 2e-3)
    x, labels = flat(task.draw(2000))
    for what, change in CHANGES.items():
        yield what, percent(model.eval(), change(x), labels)


def scales(norm: str, seed: int, samples: int) -> Iterator[tuple[str, float]]:
    """A net whose first layer is the norm, on features whose scales are that far apart."""
    for spread in SPREADS:
        task, model = Task(seed), Net(norm, of_input=True)
        factors = spread ** torch.linspace(-0.5, 0.5, FEATURES)

        def draw(size: int = 32, task: Task = task, by: Tensor = factors) -> tuple[Tensor, Tensor]:
            x, labels = flat(task.draw(size))
            return x * by, labels

        train(model, draw, samples // 32, 2e-3)
        yield str(spread), percent(model.eval(), *draw(2000))


PARTS = {"a": batch_sizes, "b": lengths, "c": depth, "d": changed, "e": scales}
TITLES = {
    "a": "(a) accuracy by batch size",
    "b": "(b) short sequences",
    "c": "(c) accuracy by depth",
    "d": "(d) inputs changed after training",
    "e": "(e) accuracy by spread of scales",
}


# The report --------------------------------------------------------------------------------------


def summary(results: Sequence[Result]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Return the values of all seeds by part and condition, then by norm."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for part, condition, norm, _, value in results:
        found.setdefault((part, condition), {}).setdefault(norm, []).append(value)
    return found


def cell(values: Sequence[float]) -> str:
    """Return mean and half of the range, to three digits."""
    if any(value != value for value in values):
        return "refuses"
    mean, half = fmean(values), (max(values) - min(values)) / 2
    return f"{mean:.1f} ± {half:.1f}" if mean >= 0.1 else f"{mean:.1e} ± {half:.0e}"


def table(results: Sequence[Result]) -> str:
    lines = [f"| part | condition | {' | '.join(NORMS)} |", "| --- " * (2 + len(NORMS)) + "|"]
    for (part, condition), row in summary(results).items():
        cells = " | ".join(cell(row[norm]) for norm in NORMS)
        lines.append(f"| {part} | {condition} | {cells} |")
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    figure = Figure(figsize=(9, 11), layout="constrained")
    axes = figure.subplots(3, 2).flatten()
    for place, part in zip(axes, PARTS, strict=False):
        rows = {key[1]: row for key, row in summary(results).items() if key[0] == part}
        if part == "c":
            rows = {k.split(":")[0]: row for k, row in rows.items() if k.endswith("accuracy")}
        labels = [label.replace(", ", ",\n").replace(" statistics", "") for label in rows]
        for norm, color, marker in zip(NORMS, ("C0", "C2", "C1", "0.4"), "os^x", strict=True):
            values = [row[norm] for row in rows.values()]
            means = [fmean(each) for each in values]
            spans = [[m - min(v) for m, v in zip(means, values)], [max(v) - m for m, v in zip(means, values)]]
            place.errorbar(range(len(rows)), means, spans, c=color, marker=marker, capsize=2, label=norm)
        place.set_xticks(range(len(rows)), labels, rotation=30 if part in "bd" else 0, fontsize=8)
        place.set(title=TITLES[part], ylim=(0, 102), ylabel="percent right")
        place.grid(alpha=0.3)
    axes[-1].axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(path, format="png", dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description="Compare normalizations; write a table and a picture.")
    add = parser.add_argument
    add("--folder", type=Path, default=Path(), help="where normalizations.csv, .md and .png go")
    add("--seeds", type=at_least(int, 1), default=3)
    add("--samples", type=at_least(int, 32), default=32768, help="that each model is trained on")
    args = parser.parse_args(argv)
    if not args.folder.is_dir() or not os.access(args.folder, os.W_OK):
        parser.error(f"argument --folder: cannot write into {args.folder}")
    runs = [(part, norm, seed) for part in PARTS for norm in NORMS for seed in range(args.seeds)]
    results: list[Result] = []
    for part, norm, seed in tqdm(runs, "models"):
        torch.manual_seed(seed)
        found = PARTS[part](norm, seed, args.samples)
        results += [Result(part, condition, norm, seed, value) for condition, value in found]
    with (args.folder / "normalizations.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Result._fields, *results])
    print(table(results))
    plot(results, args.folder / "normalizations.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
