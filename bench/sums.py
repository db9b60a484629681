"""What fusing the sums of a model with the norms behind them would bring, the rest left as it is.

    python -m bench.sums MODEL.. > bench/results/cpu_sums.txt

A stack of blocks of transformers' Llama or timm's ViT is run by a loop of ours, in which each
branch is added to the stream and the sum normalised: with torch's norms, with those of this
package, and with one call for both. No embedding, head or optimizer, which would only make the
share of the norms smaller. Medians of interleaved rounds of one thread, of the processor's time.
Whole stacks vary by some percent, so that what is saved is taken from the same loop without its
branches, whose tensors lie closer to the processor than those of a model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fusednorm

SECONDS = 1.0
"""About the time that one way is given; three rounds at the least."""
DTYPES = (torch.float32, torch.bfloat16)

# The norm, the output of a branch, its LayerScale, the stream so far -> what goes on, the stream.
AddNorm = Callable[[Any, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]

# A norm, the LayerScale of the branch behind it, that branch.
Part = tuple[nn.Module, Tensor | None, Callable[[Any], Any]]


class Stack(NamedTuple):
    """Two parts for each block; then the last norm."""

    parts: list[Part]
    last: nn.Module

    def without_branches(self) -> Stack:
        """Return the norms and sums alone."""
        return self._replace(parts=[(norm, gate, lambda z: z) for norm, gate, _ in self.parts])


def two_calls(
    norm: Any, branch: Tensor, gate: Tensor | None, stream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add and normalise, as the models do."""
    branch = branch if gate is None else branch * gate
    stream = branch if stream is None else stream + branch
    return norm(stream), stream


def one_call(
    norm: Any, branch: Tensor, gate: Tensor | None, stream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do the same in one kernel."""
    weight, shape = norm.weight, norm.weight.shape
    if isinstance(norm, nn.LayerNorm):
        return fusednorm.add_layer_norm(
            branch, stream, shape, weight, norm.bias, norm.eps, gate=gate
        )
    return fusednorm.add_rms_norm(branch, stream, shape, weight, norm.variance_epsilon, gate=gate)


def run(stack: Stack, add_norm: AddNorm, x: Tensor) -> Tensor:
    """Run the blocks."""
    branch, gate, stream = x, None, None
    for norm, gate_after, layer in stack.parts:
        z, stream = add_norm(norm, branch, gate, stream)
        branch, gate = layer(z), gate_after
    return add_norm(stack.last, branch, gate, stream)[0]


def llama(model: Any, rows: int) -> Stack:
    """Return the blocks of transformers' Llama, for one sequence."""
    rotary = model.rotary_emb(torch.empty(1, dtype=model.dtype), torch.arange(rows)[None])
    parts: list[Part] = []
    for block in model.layers:

        def attention(z: Tensor, block: Any = block) -> Any:
            return block.self_attn(z, position_embeddings=rotary, attention_mask=None)[0]

        parts += [(block.input_layernorm, None, attention)]
        parts += [(block.post_attention_layernorm, None, block.mlp)]
    return Stack(parts, model.norm)


def vit(model: Any, _: int) -> Stack:
    """Return the blocks of timm's ViT."""
    parts: list[Part] = []
    for block in model.blocks:
        parts += [(block.norm1, getattr(block.ls1, "gamma", None), block.attn)]
        parts += [(block.norm2, getattr(block.ls2, "gamma", None), block.mlp)]
    return Stack(parts, model.norm)


def make_llama(width: int, layers: int = 2) -> Any:
    """Return a Llama of few layers and words, with the proportions of its family."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=width // 64,
        num_hidden_layers=layers,
        vocab_size=32,
    )
    return transformers.LlamaModel(config)


def make_vit(name: str) -> Any:
    """Return one of timm's with two blocks."""
    return importlib.import_module("timm").create_model(name, depth=2)


# What makes the model, its stack, and the shape of what goes in.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Stack], tuple[int, ...]]] = {
    "Llama, 2048 wide": (lambda: make_llama(2048, 1), llama, (1, 128, 2048)),
    "Llama, 1024 wide": (lambda: make_llama(1024), llama, (1, 256, 1024)),
    "Llama, 1024 wide, 1024 tokens": (lambda: make_llama(1024, 1), llama, (1, 1024, 1024)),
    "Llama, 256 wide": (lambda: make_llama(256), llama, (1, 256, 256)),
    "Llama, 1024 wide, one token": (lambda: make_llama(1024), llama, (1, 1, 1024)),
    "ViT-B": (lambda: make_vit("vit_base_patch16_224"), vit, (2, 197, 768)),
    "ViT-B, LayerScale": (lambda: make_vit("deit3_base_patch16_224"), vit, (2, 197, 768)),
    "ViT-Ti": (lambda: make_vit("vit_tiny_patch16_224"), vit, (2, 197, 192)),
}


def ways(
    name: str, dtype: torch.dtype, *, training: bool
) -> tuple[dict[str, Callable[[], Any]], ...]:
    """Return each way to run a stack by its name; the same without the branches."""
    make, stack_of, shape = MODELS[name]
    torch.manual_seed(0)
    own = make().to(dtype)
    swapped = copy.deepcopy(own)
    fusednorm.replace_norms(swapped)
    x = torch.randn(shape, dtype=dtype, requires_grad=training)
    whole: dict[str, Callable[[], Any]] = {}
    alone: dict[str, Callable[[], Any]] = {}
    for way, model, add_norm in (
        ("torch", own, two_calls),
        ("norms", swapped, two_calls),
        ("sums", swapped, one_call),
    ):
        stack = stack_of(model.requires_grad_(training), shape[1])
        for calls, loop in ((whole, stack), (alone, stack.without_branches())):

            def forward(x: Tensor, stack: Stack = loop, add_norm: AddNorm = add_norm) -> Tensor:
                return run(stack, add_norm, x)

            leaves = [x, *model.parameters()] if training else []
            calls[way] = call_of(forward, x, leaves)
    return whole, alone


def call_of(
    function: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor]
) -> Callable[[], Any]:
    """Return a forward, and a backward if there are leaves."""

    def call() -> Any:
        with torch.set_grad_enabled(bool(leaves)):
            y = function(x)
        if not leaves:
            return [y]
        found = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        return [y, *(gradient for gradient in found if gradient is not None)]

    return call


def kernels(way: str) -> contextlib.AbstractContextManager[object]:
    """Run the norms in the CPU kernels, but those of torch's way in torch's."""
    return contextlib.nullcontext() if way == "torch" else fusednorm.enable("cpu")


def interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median seconds of each way."""

    def seconds(way: str, times: int = 1) -> float:
        with kernels(way):
            calls[way]()  # the first after a change of sides is no measure
            start = time.thread_time()
            for _ in range(times):
                calls[way]()
            return (time.thread_time() - start) / times

    once = seconds("torch")
    rounds = min(15, max(3, int(SECONDS / once)))
    times = max(1, int(SECONDS / 15 / once))
    found: dict[str, list[float]] = {way: [] for way in calls}
    for turn in range(rounds):
        for way in list(calls)[:: 1 if turn % 2 else -1]:
            found[way].append(seconds(way, times))
    return {way: statistics.median(values) for way, values in found.items()}


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference of results, beside the largest number of each."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def line(name: str, dtype: torch.dtype, *, training: bool) -> str:
    """Return the times of a model."""
    whole, alone = ways(name, dtype, training=training)
    found = {}
    for way in ("norms", "sums"):
        with kernels(way):
            found[way] = whole[way]()
    differs = difference(found["sums"], found["norms"])
    cells, seconds = [], []
    for calls in (whole, alone):
        seconds.append(interleaved(calls))
        cells += [f"{value * 1e3:10.3f}" for value in seconds[-1].values()]
    step, bare = seconds
    for before, after in (("torch", "norms"), ("norms", "sums")):
        cells.append(f"{(bare[before] - bare[after]) / step[before] * 100:8.2f} %")
    mode = "training" if training else "inference"
    label = f"{name}, {str(dtype).removeprefix('torch.')}, {mode}"
    return f"{label:52}{''.join(cells)}{differs:9.0e}"


def main() -> None:
    """Print a table of the models that are asked for."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(MODELS)
    print(f"{'':52}{'whole, ms':^30}{'norms and sums alone, ms':^30}{'saves of whole':^20}")
    print(
        f"{'':52}{2 * ''.join(f'{way:>10}' for way in ('torch', 'norms', 'sums'))}"
        f"{'norms':>10}{'sums':>10}{'differs':>9}"
    )
    for name in wanted:
        rows = MODELS[name][2][1]
        for dtype in DTYPES:
            for training in (False,) if rows == 1 else (False, True):
                print(line(name, dtype, training=training), flush=True)


if __name__ == "__main__":
    main()
