"""Dropout: which elements fall, who decides, and that backward agrees without having stored it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import keep_mask, plain_spec
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusednorm import add_layer_norm, reference
from fusednorm.spec import Operands

# One N for each tile: several rows, a partial quad of columns, chunks, long rows; see `FORMS` of
# test_determinism.py.
FORMS = [
    (1, torch.float32),
    (2, torch.float64),
    (7, torch.float32),
    (64, torch.bfloat16),
    (1025, torch.float16),
    (5000, torch.float32),
    (9000, torch.bfloat16),
    (34000, torch.float32),
]


def dropped(x: Tensor, p: float, residual: Tensor | None = None) -> Tensor:
    """Return the stream after dropout of rate `p`."""
    return add_layer_norm(x, residual, x.shape[-1], dropout_p=p)[1]


def key_of(seed: int, device: torch.device) -> int:
    """Return the key that the library draws first after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return int(torch.randint(2**62, (1,), device=device))


@pytest.mark.parametrize(("cols", "dtype"), FORMS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_is_the_published_one(
    kernels: torch.device, cols: int, dtype: torch.dtype, p: float
) -> None:
    """Forward, both ways of backward and the reference drop the elements that the seed says."""
    x = torch.ones(3, cols, dtype=dtype, device=kernels, requires_grad=True)
    key = key_of(5, kernels)
    keep = torch.from_numpy(keep_mask(key, 3, cols, p))
    torch.manual_seed(5)
    z, h = add_layer_norm(x, None, cols, dropout_p=p)
    assert torch.equal(h.cpu(), keep.to(dtype))
    ones = torch.ones_like(x)
    (alone,) = torch.autograd.grad(h, x, ones, retain_graph=True)
    assert torch.equal(alone.cpu(), keep.to(dtype))
    both = torch.autograd.grad([z, h], x, [torch.zeros_like(x), ones])[0]
    assert torch.equal(both.cpu(), keep.to(dtype))

    spec = plain_spec((cols,), 1e-5, dtype)._replace(h_dtype=dtype, dropout_p=p)
    seed = torch.tensor([key], device=kernels)
    stream = reference.layer_norm(Operands(x, seed=seed), spec)[1]
    assert torch.equal(stream, h)


def test_rate_and_independence(kernels: torch.device) -> None:
    """The share that falls is p, in every column of a quad, and neighbours do not know of it."""
    rows, cols, p = 64, 512, 0.3
    x = torch.ones(rows, cols, device=kernels)
    torch.manual_seed(0)
    first, second = ((dropped(x, p) == 0).double().cpu().numpy() for _ in range(2))
    samples = first.size

    def share(mask: np.ndarray) -> float:
        return (mask.mean() - p) / math.sqrt(p * (1 - p) / mask.size)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return ((a - p) * (b - p)).mean() / (p * (1 - p)) * math.sqrt(a.size)

    # Standard normal under the hypothesis; 4.5 is passed by one in 150,000.
    deviations = [share(first), share(second)]
    deviations += [share(first[:, word::4]) for word in range(4)]
    deviations += [correlation(first[:, lag:], first[:, :-lag]) for lag in (1, 2, 3, 4, 8, 64)]
    deviations += [correlation(first[lag:], first[:-lag]) for lag in (1, 2, 4)]
    deviations += [correlation(first, second)]
    assert samples == rows * cols
    assert max(map(abs, deviations)) < 4.5, deviations


def test_follows_manual_seed(kernels: torch.device) -> None:
    """One seed gives one mask, the next call another, and another seed another."""
    x = torch.ones(8, 64, device=kernels)

    def masks(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [dropped(x, 0.5), dropped(x, 0.5)]

    first, again, other = masks(1), masks(1), masks(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("backend", ["kernels", "torch"])
def test_off_when_not_training(
    request: pytest.FixtureRequest, device: torch.device, backend: str
) -> None:
    """Without training, or at rate 0, nothing falls and no random number is drawn."""
    if backend == "kernels":
        request.getfixturevalue("kernels")
    x, residual = torch.randn(2, 5, 6, device=device)
    state = torch.get_rng_state()
    for options in ({"dropout_p": 0.5, "training": False}, {"dropout_p": 0.0}):
        assert torch.equal(add_layer_norm(x, residual, 6, **options)[1], residual + x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_replays_the_mask(kernels: torch.device, reentrant: bool) -> None:
    """What is computed again in backward drops the same elements."""
    x, residual = torch.randn(2, 5, 64, device=kernels)

    def block(x: Tensor) -> Tensor:
        z, h = add_layer_norm(x, residual, 64, dropout_p=0.4)
        return z + h

    def gradient(run: Callable[[Tensor], Tensor], seed: int) -> Tensor:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(seed)
        y = run(leaf)
        torch.manual_seed(99)  # what follows the forward may draw numbers too
        return torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    plain = gradient(block, 1)
    if not reentrant:
        replayed = gradient(lambda x: checkpoint(block, x, use_reentrant=False), 1)
        assert torch.equal(replayed, plain)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    checkpoint(block, leaf, use_reentrant=reentrant).sum().backward()
    assert torch.equal(leaf.grad, plain)
    assert not torch.equal(gradient(block, 2), plain)


def test_compiled_drops_what_eager_drops(kernels: torch.device) -> None:
    """The seed is drawn in the graph, so that each call of a compiled function draws anew."""
    torch._dynamo.reset()
    x = torch.randn(5, 64, device=kernels, requires_grad=True)
    residual = torch.randn(5, 64, device=kernels)

    def block(x: Tensor) -> Tensor:
        z, h = add_layer_norm(x, residual, 64, dropout_p=0.4)
        return z + h

    def both(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        ys = [run(x), run(x)]
        return [*ys, *torch.autograd.grad(ys[1].sum(), x)]

    compiled = both(torch.compile(block, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, both(block), strict=True):
        assert torch.equal(got, expected)
    assert not torch.equal(compiled[0], compiled[1])


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_vmap(kernels: torch.device, randomness: str) -> None:
    """Under vmap dropout asks for a kind of randomness, as torch's does."""
    x = torch.ones(3, 5, 64, device=kernels)
    mapped = torch.func.vmap(lambda x: dropped(x, 0.5), randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="randomness"):
            mapped(x)
        return
    masks = mapped(x)
    assert torch.equal(masks[0], masks[1]) == (randomness == "same")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_cuda_graph_draws_a_new_mask_at_each_replay(kernels: torch.device) -> None:
    """And none of it waits for the device."""
    x = torch.ones(64, 512, device=kernels)
    dropped(x, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = dropped(x, 0.5)
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(h.clone())
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dropped(x, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
