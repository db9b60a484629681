"""Train one small character-level GPT twice: with `nn.LayerNorm`, and with fusednorm below it.

Both runs start from the same weights and see the same batches of the manual that ships with every
CPython, so whatever differs between the two loss curves comes from the norms alone. By default the
second model is the same code while `fusednorm.enable()` holds. With --swap its norms are replaced
instead; with --fused each also does the residual addition before it. With --processes both runs
have fusednorm: the first in one process, the second shared by several.

    python examples/train_gpt.py
    python examples/train_gpt.py --dtype bf16
    python examples/train_gpt.py --fused
    python examples/train_gpt.py --fused --processes 2 --parallel tp  # or fsdp, ddp
    python examples/train_gpt.py --dtype bf16 --layers 12 --heads 12 --width 768 --lr 6e-4  # GPU
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, median
from typing import Any, NoReturn

# OpenMP reads this once, when torch is loaded. Its threads spin while they wait, which on a machine
# with other work to do makes a step of this small model ten times slower; asleep they cost nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from tqdm import tqdm  # type: ignore[import-untyped]

import fusednorm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A shorter run is a smoke test: its loss is not asked to fall.
GATED_STEPS = 50
GATED_FALL = 0.8


# The model ---------------------------------------------------------------------------------------

AddNorm = Callable[[nn.LayerNorm, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""norm, branch, stream -> stream + branch normalized, stream + branch; no stream yet starts one."""


def add_then_norm(
    norm: nn.LayerNorm, branch: Tensor, stream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Two operators: the norm reads again what the addition wrote."""
    stream = branch if stream is None else stream + branch
    return norm(stream), stream


def fused_add_norm(
    norm: nn.LayerNorm, branch: Tensor, stream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One operator, with the parameters of the norm."""
    return fusednorm.add_layer_norm(
        branch, stream, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # [batch, time, 3 * width] -> three of [batch, heads, time, width / heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        return self.out(mixed)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm Transformer block: each half reads a normalized copy of the residual stream.

    What a half returns joins the stream in front of the next norm, which may be the next block's.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, branch: Tensor, stream: Tensor | None, add_norm: AddNorm
    ) -> tuple[Tensor, Tensor]:
        x, stream = add_norm(self.attention_norm, branch, stream)
        x, stream = add_norm(self.mlp_norm, self.attention(x), stream)
        return self.mlp(x), stream


class GPT(nn.Module):
    """Characters in, logits of the next character out; the head shares the token embedding."""

    def __init__(self, vocab: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.add_norm: AddNorm = add_then_norm
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        time_steps = torch.arange(tokens.shape[1], device=tokens.device)
        branch, stream = self.tokens(tokens) + self.positions(time_steps), None
        for block in self.blocks:
            branch, stream = block(branch, stream, self.add_norm)
        x, _ = self.add_norm(self.norm, branch, stream)
        return linear(x, self.tokens.weight)


# The text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """The CPython manual as character indices, the last tenth held out."""

    vocab: str
    train: Tensor
    valid: Tensor

    @classmethod
    def load(cls) -> Corpus:
        text = "\n\n".join(topics[key] for key in sorted(topics))
        # Many sections appear under several topics. Only the first copy of a paragraph stays, so
        # that no held-out paragraph was trained on.
        text = "\n\n".join(dict.fromkeys(text.split("\n\n")))
        vocab = "".join(sorted(set(text)))
        index = {char: i for i, char in enumerate(vocab)}
        tokens = torch.tensor([index[char] for char in text])
        split = len(tokens) * 9 // 10
        return cls(vocab, tokens[:split], tokens[split:])


def random_batch(text: Tensor, rows: int, context: int, generator: torch.Generator) -> Tensor:
    """Random windows of `context + 1` characters: the inputs and, shifted by one, the targets."""
    starts = torch.randint(len(text) - context, (rows, 1), generator=generator)
    return text[starts + torch.arange(context + 1)]


# Training ----------------------------------------------------------------------------------------

Loss = Callable[[Callable[..., Tensor], Any, argparse.Namespace], Tensor]
"""forward, batch, args -> the loss that is minimized."""


@dataclass
class Run:
    """One of the two trainings: its model, and what was measured on the way."""

    name: str
    model: Any
    forward: Callable[..., Tensor]  # the model, compiled where that was asked for
    loss: Loss
    optimizer: torch.optim.Optimizer
    surroundings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    norm_seconds: float = math.nan  # forward and backward of all norms of one step
    norm_share: float = math.nan
    valid_before: float = math.nan
    valid_after: float = math.nan

    @classmethod
    def start(cls, name: str, model: nn.Module, loss: Loss, args: argparse.Namespace) -> Run:
        forward = torch.compile(model, fullgraph=True) if args.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
        return cls(name, model, forward, loss, optimizer)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bf16 is mixed precision: parameters, optimizer and residual stream stay float32."""
    return torch.autocast(args.device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32")


def mean_loss(forward: Callable[..., Tensor], batch: Tensor, args: argparse.Namespace) -> Tensor:
    with autocast(args):
        logits = forward(batch[:, :-1])
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then half a cosine down to a tenth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train_step(run: Run, batch: Any, args: argparse.Namespace) -> Tensor:
    loss = run.loss(run.forward, batch, args)
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    return loss.detach()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_step(run: Run, batch: Any, args: argparse.Namespace) -> tuple[float, float]:
    """Loss and seconds of one training step."""
    synchronize(args.device)
    begin = time.perf_counter()
    loss = train_step(run, batch, args)
    synchronize(args.device)
    seconds = time.perf_counter() - begin
    return loss.item(), seconds


def set_learning_rate(run: Run, rate: float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = rate


def train(runs: Sequence[Run], draw: Callable[[], Any], args: argparse.Namespace) -> None:
    """Train all runs in lock step, on the same batches."""
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    bar = tqdm(
        range(args.steps), desc="training", unit="step", dynamic_ncols=True, disable=not first
    )
    for step in bar:
        batch = draw()
        # Back to back and in alternating order: a machine that slows down for a while, or a batch
        # that is still in cache, then favours neither run.
        for run in runs if step % 2 == 0 else reversed(runs):
            set_learning_rate(run, learning_rate(step, args.steps, args.lr))
            with run.surroundings():
                loss, seconds = timed_step(run, batch, args)
            run.losses.append(loss)
            run.step_seconds.append(seconds)
        bar.set_postfix({run.name: f"{run.losses[-1]:.3f}" for run in runs}, refresh=False)


@torch.no_grad()
def validation_loss(model: GPT, text: Tensor, args: argparse.Namespace) -> float:
    """Mean loss over the whole held-out text, cut into windows that do not overlap."""
    windows = text.unfold(0, args.context + 1, args.context)
    total = 0.0
    # About 8192 characters at a time, whatever the batch size of the training.
    for chunk in torch.split(windows, max(1, 8192 // args.context)):
        total += mean_loss(model, chunk.to(args.device), args).item() * len(chunk)
    return total / len(windows)


@torch.no_grad()
def generate(model: GPT, vocab: str, args: argparse.Namespace) -> str:
    """Sample text, a little sharper than the model's own distribution."""
    generator = torch.Generator().manual_seed(args.seed)
    tokens = torch.tensor([[vocab.index("\n")]])
    for _ in range(args.sample_chars):
        with autocast(args):
            logits = model(tokens[:, -args.context :].to(args.device))[:, -1]
        probabilities = (logits.float().cpu() / 0.8).softmax(-1)
        tokens = torch.cat([tokens, probabilities.multinomial(1, generator=generator)], dim=1)
    return "".join(vocab[token] for token in tokens[0, 1:])


# What the norms cost -----------------------------------------------------------------------------


def norm_replay(run: Run, batch: Tensor, args: argparse.Namespace) -> Callable[[], object]:
    """A function that runs forward and backward of every norm of one training step, alone.

    With --fused the additions before the norms belong to both runs' norms.

    Hooks on modules cannot time a backward, and profiler events can only be told to belong to a
    norm by the names of its operators, which differ from implementation to implementation. What
    runs here is the norms and nothing else, so all of its time is theirs, whoever implements them.
    """
    add_norm = run.model.add_norm
    calls: list[tuple[nn.LayerNorm, Tensor, Tensor | None]] = []

    def record(norm: nn.LayerNorm, branch: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        z, total = add_norm(norm, branch, stream)
        calls.append((norm, branch, stream) if args.fused else (norm, total, None))
        return z, total

    run.model.add_norm = record
    with torch.no_grad(), autocast(args):
        run.model(batch[:, :-1])
    run.model.add_norm = add_norm

    # Tensors of their own: in the model each stream is a result of the call before.
    inputs = [[x if x is None else x.clone().requires_grad_() for x in xs] for _, *xs in calls]
    norms = [norm for norm, _, _ in calls]
    leaves = [x for xs in inputs for x in xs if x is not None]
    leaves += [parameter for norm in norms for parameter in norm.parameters()]

    def forward() -> list[Tensor]:
        results = [add_norm(norm, *xs) for norm, xs in zip(norms, inputs, strict=True)]
        zs, totals = zip(*results, strict=True)
        return [*zs, *totals[:-1]] if args.fused else [*zs]  # nothing reads the last total

    if args.compile:
        forward = torch.compile(forward)
    with autocast(args):
        dys = [torch.randn_like(y) for y in forward()]

    def replay() -> object:
        with autocast(args):
            ys = forward()
        return torch.autograd.grad(ys, leaves, dys)

    return replay


def device_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time of one call: on a CPU from start to end, on a GPU only what the GPU works on it."""
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    # A norm is often shorter than its launch, which the other kernels of a training step hide.
    # Here products of matrices keep the GPU busy until all launches are queued.
    filler = torch.ones(4096, 4096, device=device)
    for _ in range(10):
        torch.mm(filler, filler)
    begin_event = torch.cuda.Event(enable_timing=True)
    end_event = torch.cuda.Event(enable_timing=True)
    begin_event.record()
    function()
    end_event.record()
    torch.cuda.synchronize(device)
    return float(begin_event.elapsed_time(end_event)) / 1e3


def measure_norms(runs: Sequence[Run], batch: Tensor, args: argparse.Namespace) -> None:
    """Time the norms of a step and, right beside, whole steps: both see the same machine."""
    for run in runs:
        set_learning_rate(run, 0.0)  # the model stays as it was trained
        with run.surroundings():
            replay = norm_replay(run, batch, args)
            pairs = [
                (device_seconds(replay, args.device), timed_step(run, batch, args)[1])
                for _ in range(25)
            ][5:]
        run.norm_seconds = median(norms for norms, _ in pairs)
        run.norm_share = median(norms / step for norms, step in pairs)


# The report --------------------------------------------------------------------------------------


def settled(run: Run) -> float:
    """Mean loss over the last tenth of the steps."""
    return fmean(run.losses[-max(1, len(run.losses) // 10) :])


def curve_differences(baseline: Run, fused: Run) -> list[float]:
    return [abs(a - b) for a, b in zip(baseline.losses, fused.losses, strict=True)]


def largest_difference(baseline: Run, fused: Run) -> tuple[float, int]:
    """The value and the step of it; a NaN in either curve is the largest there is."""
    differences = curve_differences(baseline, fused)
    ranks = [math.inf if math.isnan(difference) else difference for difference in differences]
    step = ranks.index(max(ranks))
    return differences[step], step


def print_curves(baseline: Run, fused: Run, rows: int = 12) -> None:
    last = len(baseline.losses) - 1
    print(f"\n{'step':>6}  {baseline.name:>12}  {fused.name:>12}  {'difference':>12}")
    for step in sorted({round(row * last / (rows - 1)) for row in range(rows)}):
        a, b = baseline.losses[step], fused.losses[step]
        print(f"{step + 1:>6}  {a:>12.4f}  {b:>12.4f}  {b - a:>+12.1e}")


Rows = dict[str, Callable[[Run], str]]
"""What a row of the report is called, and the cell of a run in it."""

MEASURED: Rows = {
    "train loss, first step": lambda run: f"{run.losses[0]:.4f}",
    "train loss, last step": lambda run: f"{run.losses[-1]:.4f}",
    "train loss, mean of last 10%": lambda run: f"{settled(run):.4f}",
    "median step, ms": lambda run: f"{1e3 * median(run.step_seconds):.2f}",
}


def print_rows(runs: Sequence[Run], rows: Rows) -> None:
    header: Rows = {"": lambda run: run.name}
    print()
    for label, cell in (header | rows).items():
        print(f"{label:<30}", *(f"{cell(run):>12}" for run in runs), sep="  ")


def print_comparison(baseline: Run, fused: Run, args: argparse.Namespace) -> None:
    largest, step = largest_difference(baseline, fused)
    where = f"step {step + 1} of {args.steps}" if largest else "equal bit for bit"
    print(f"\nlargest difference of the curves: {largest:.2e} ({where})")
    # Each pair of steps ran back to back, so the pairs see through the drift of the machine.
    pairs = zip(baseline.step_seconds, fused.step_seconds, strict=True)
    print(f"speed, {fused.name} / {baseline.name}: {median(a / b for a, b in pairs):.3f}")


def print_results(baseline: Run, fused: Run, args: argparse.Namespace) -> None:
    tokens = args.batch_size * args.context
    rows: Rows = {
        "tokens per second": lambda run: f"{tokens / median(run.step_seconds):,.0f}",
        "norms in one step, ms": lambda run: f"{1e3 * run.norm_seconds:.2f}",
        "share of step time in norms": lambda run: f"{100 * run.norm_share:.1f}%",
        "validation loss, before": lambda run: f"{run.valid_before:.4f}",
        "validation loss, after": lambda run: f"{run.valid_after:.4f}",
    }
    print_rows((baseline, fused), MEASURED | rows)
    if args.fused:
        print("(Norms include the residual additions before them, in both columns.)")
    if args.compile:
        print("(Compiled code may merge a norm with its neighbours: its share is its cost alone.)")
    print_comparison(baseline, fused, args)


def losses_fell(runs: Sequence[Run], args: argparse.Namespace) -> bool:
    """Whether every loss fell, or the run was too short to ask; says which did not."""
    for run in runs:
        # Written so that a loss that became NaN fails, too.
        if args.steps >= GATED_STEPS and not settled(run) < GATED_FALL * run.losses[0]:
            print(
                f"FAILED: the loss of {run.name} went from {run.losses[0]:.4f} to "
                f"{settled(run):.4f}, not below {GATED_FALL} of where it began",
                file=sys.stderr,
            )
            return False
    return True


def running_mean(losses: Sequence[float]) -> list[float]:
    window = 1 + len(losses) // 50
    return [fmean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)]


def plot_curves(baseline: Run, fused: Run, args: argparse.Namespace) -> None:
    steps = range(1, args.steps + 1)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.5, 1))
    top.plot(steps, baseline.losses, color="#dddddd", linewidth=0.8, label="single steps")
    # The curves lie on one another: a wide pale line under a thin dashed one shows both.
    for run, color, width, style, marker in (
        (baseline, "#f4a259", 5.0, "-", "o"),
        (fused, "#1d3557", 1.5, "--", "x"),
    ):
        top.plot(steps, running_mean(run.losses), style, c=color, lw=width, label=run.name)
        ends = (0, args.steps), (run.valid_before, run.valid_after)
        label = f"{run.name}, held-out text"
        top.plot(*ends, marker, c=color, ms=4 + width, mew=1.5, zorder=3, label=label)
    top.set_ylabel("loss, nats per character")
    top.set_title(
        f"Character GPT, {args.layers} layers of width {args.width} ({args.device}, {args.dtype})"
    )
    top.legend(frameon=False)

    bottom.plot(steps, curve_differences(baseline, fused), color="#1d3557", linewidth=1.0)
    # Linear below the resolution of a float32 loss: a difference of zero stays on the axes.
    bottom.set_yscale("symlog", linthresh=1e-7)
    largest, _ = largest_difference(baseline, fused)
    bottom.set_ylim(-3e-8, max(1e-6, 2 * largest) if math.isfinite(largest) else 10.0)
    bottom.set_ylabel("|difference|" if largest else "|difference|\n(all zero)")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(args.plot, format="png", dpi=130)


# The command -------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the page of usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(
    kind: Callable[[str], float], low: float, below: float = math.inf
) -> Callable[[str], float]:
    """A type for argparse: numbers in [low, below), so neither nan nor inf."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value < below:
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"expected at least {low}{limit}, got {text}")
        return value

    return number


def usable_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"this machine (or this torch) has no GPU for {text!r}")
    return device


def base_parser(description: str | None) -> OneLineParser:
    """The options of both examples; each sets the defaults that depend on its model."""
    parser = OneLineParser(
        description=(description or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", type=usable_device, default=device, help="cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, default="fp32", help="bf16 trains under autocast")
    add("--compile", action="store_true", help="train through torch.compile")
    add("--steps", type=at_least(int, 1), help="optimizer steps of each run")
    add("--batch-size", type=at_least(int, 1), help="samples per step")
    add("--layers", type=at_least(int, 1), help="Transformer blocks")
    add("--heads", type=at_least(int, 1), default=4, help="attention heads")
    add("--width", type=at_least(int, 1), help="width of the residual stream")
    add("--lr", type=at_least(float, 0), help="peak learning rate")
    add("--seed", type=at_least(int, 0, 2**63), default=0, help="of all random numbers")
    return parser


def check_heads(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.width % args.heads:
        parser.error(f"argument --width: {args.width} is not divisible by --heads {args.heads}")


def check_writable(parser: argparse.ArgumentParser, path: Path) -> None:
    """Refuse a file that cannot be written now, not after minutes of training."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"argument --plot: cannot write a file at {path}")


def parse_args(argv: Sequence[str] | None, longest_context: int) -> argparse.Namespace:
    parser = base_parser(__doc__)
    parser.set_defaults(steps=800, batch_size=16, layers=3, width=128, lr=2e-3)
    add = parser.add_argument
    ways = parser.add_mutually_exclusive_group()
    for way, text in (
        ("--swap", "replace the norms of the second model in place of enabling the kernels"),
        ("--fused", "fuse each norm with the residual addition before it"),
    ):
        ways.add_argument(way, action="store_true", help=text)
    add("--context", type=at_least(int, 1), default=64, help="characters per sample")
    add("--plot", type=Path, default=Path("train_gpt.png"), help="where the curves go (PNG)")
    add("--sample-chars", type=at_least(int, 1), default=400, help="length of the sample")
    add("--processes", type=at_least(int, 1), default=1, help="processes that share the second run")
    add("--parallel", choices=("fsdp", "tp", "ddp"), default="fsdp", help="what they share")
    args = parser.parse_args(argv)
    check_heads(parser, args)
    check_processes(parser, args)
    if args.context > longest_context:
        parser.error(f"argument --context: expected at most {longest_context}, got {args.context}")
    check_writable(parser, args.plot)
    return args


def check_processes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    count, shared = args.processes, ("heads" if args.parallel == "tp" else "batch_size")
    if getattr(args, shared) % count:
        option = "--" + shared.replace("_", "-")
        parser.error(f"argument {option}: {getattr(args, shared)} is not divisible by {count}")
    if count > 1 and args.device.type != "cpu":
        parser.error(f"argument --processes: several run on the cpu, not on {args.device}")


def start_fused(model: GPT, args: argparse.Namespace) -> tuple[Run, str]:
    """Return the run with our norms, and what makes them ours."""
    if args.fused:
        model.add_norm = fused_add_norm
        change = f"fused the {2 * args.layers} residual additions into the norms after them"
        return Run.start("fused blocks", model, mean_loss, args), change
    if not args.swap:
        try:
            fusednorm.enable(args.device).disable()
        except ValueError as error:
            print(f"swapped, since nothing can be enabled here: {error}")
        else:
            run = Run.start("enabled", model, mean_loss, args)
            run.surroundings = functools.partial(fusednorm.enable, args.device)
            return run, "fusednorm.enable(): torch's norms run in our kernels in every second step"
    report = str(fusednorm.replace_norms(model))
    return Run.start("fusednorm", model, mean_loss, args), report


def main_parallel(argv: Sequence[str], corpus: Corpus, args: argparse.Namespace) -> int:
    """Train once in one process and once in several, on the same batches."""
    import parallel_gpt  # much of torch.distributed, for those who ask for it

    if "RANK" not in os.environ:
        return parallel_gpt.launch(__file__, argv, args.processes)
    work = functools.partial(train_in_processes, corpus, args)
    parallel_gpt.work_joined(args.processes, work)


def train_in_processes(corpus: Corpus, args: argparse.Namespace, mesh: Any) -> int:
    """Train a GPT alone and one that the processes of a mesh share; return the exit code."""
    import parallel_gpt

    torch.manual_seed(args.seed)
    model = GPT(len(corpus.vocab), args.context, args.layers, args.heads, args.width)
    alone, change = start_fused(copy.deepcopy(model), args)
    shared, _ = start_fused(model, args)
    loss = parallel_gpt.own_part(mean_loss, args.parallel)
    model = parallel_gpt.parallelize(model, args.parallel, mesh)
    surroundings = shared.surroundings
    shared = Run.start(f"{args.processes} x {args.parallel}", model, loss, args)
    shared.surroundings = surroundings
    alone.name = "one process"
    runs = (alone, shared)
    print(change, flush=True)
    train(runs, batches(corpus, args), args)
    shared.losses = parallel_gpt.averaged(shared.losses)
    print_curves(*runs)
    largest, step = largest_difference(*runs)
    print(f"\nlargest difference of the curves: {largest:.2e} (step {step + 1})")
    return 0 if losses_fell(runs, args) else 1


def batches(corpus: Corpus, args: argparse.Namespace) -> Callable[[], Tensor]:
    """Return what draws the next batch."""
    generator = torch.Generator().manual_seed(args.seed)

    def draw() -> Tensor:
        batch = random_batch(corpus.train, args.batch_size, args.context, generator)
        return batch.to(args.device)

    return draw


def main(argv: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    corpus = Corpus.load()
    args = parse_args(argv, longest_context=len(corpus.valid) - 1)
    if args.processes > 1:
        return main_parallel(sys.argv[1:] if argv is None else argv, corpus, args)

    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)  # events are recorded on the current device
    torch.manual_seed(args.seed)
    model = GPT(len(corpus.vocab), args.context, args.layers, args.heads, args.width)
    model.to(args.device)
    baseline = Run.start("nn.LayerNorm", model, mean_loss, args)
    fused, change = start_fused(copy.deepcopy(model), args)
    runs = (baseline, fused)
    draw = batches(corpus, args)

    print(
        f"text: {len(corpus.train):,} characters to train on, {len(corpus.valid):,} held out, "
        f"{len(corpus.vocab)} different; the manual of Python {platform.python_version()}"
    )
    print(
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{args.device}, {args.dtype}, torch {torch.__version__}"
    )
    print(change)
    example = torch.zeros(args.batch_size, args.context, args.width, device=args.device)
    with fused.surroundings(), fusednorm.backends.explain() as ran:
        fusednorm.layer_norm(example, args.width)
    print(ran[0], flush=True)

    for run in runs:
        with run.surroundings():
            run.valid_before = validation_loss(run.model, corpus.valid, args)
    train(runs, draw, args)
    for run in runs:
        with run.surroundings():
            run.valid_after = validation_loss(run.model, corpus.valid, args)
    measure_norms(runs, draw(), args)

    print_curves(baseline, fused)
    print_results(baseline, fused, args)
    plot_curves(baseline, fused, args)
    print(f"curves: {args.plot}")
    print(f"\nsample of the model with {fused.name}:")
    print("\n".join("  | " + row for row in generate(fused.model, corpus.vocab, args).split("\n")))
    print(f"\ntotal: {time.perf_counter() - began:.0f} s")
    return 0 if losses_fell(runs, args) else 1


if __name__ == "__main__":
    sys.exit(main())
