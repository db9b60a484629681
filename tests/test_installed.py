"""What an installation can break, with torch and pytest alone: every function on every backend.

It needs no source tree, no NumPy, no Triton and no compiler: `make matrix` runs it where a wheel is
installed.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from fusednorm import backends

SHAPE = (37, 1000)
COLS = SHAPE[-1:]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SERVING = [name for name in backends.available() if backends.serves(name, DEVICE)]
Outputs = tuple[Tensor, ...]
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Outputs]


def plain(norm: Callable[[Tensor], Tensor]) -> Function:
    """Return what a residual stream around a norm is in torch."""

    def call(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor) -> Outputs:
        h = residual + x * 0.5
        return norm(h) * (1 + scale) + shift, h

    return call


# What a user calls, and the same in torch: x, a second tensor like it, and two vectors.
CALLS: dict[str, tuple[Function, Function]] = {
    "layer_norm": (
        lambda x, _, weight, bias: (fusednorm.layer_norm(x, COLS, weight, bias),),
        lambda x, _, weight, bias: (F.layer_norm(x, COLS, weight, bias),),
    ),
    "rms_norm": (
        lambda x, _, weight, bias: (fusednorm.rms_norm(x, COLS, weight),),
        lambda x, _, weight, bias: (F.rms_norm(x, COLS, weight),),
    ),
    "modulated_layer_norm": (
        lambda x, _, scale, shift: (fusednorm.modulated_layer_norm(x, COLS, shift, scale),),
        lambda x, _, scale, shift: (F.layer_norm(x, COLS) * (1 + scale) + shift,),
    ),
    "add_layer_norm": (
        lambda x, residual, scale, shift: fusednorm.add_layer_norm(
            x, residual, COLS, gate=torch.full_like(scale, 0.5), scale=scale, shift=shift
        ),
        plain(lambda h: F.layer_norm(h, COLS)),
    ),
    "add_rms_norm": (
        lambda x, residual, scale, shift: fusednorm.add_rms_norm(
            x, residual, COLS, gate=torch.full_like(scale, 0.5), scale=scale, shift=shift
        ),
        plain(lambda h: F.rms_norm(h, COLS)),
    ),
}


def draw() -> list[Tensor]:
    """Return x, a second tensor like it, two vectors, and the gradients of two outputs."""
    return [
        torch.randn(*size, dtype=torch.float64)
        for size in (SHAPE, SHAPE, *[COLS] * 2, *[SHAPE] * 2)
    ]


def results(call: Function, given: list[Tensor]) -> list[Tensor]:
    """Return the outputs and every gradient, in float64."""
    *leaves, dz, dh = (value.detach().requires_grad_() for value in given)
    outputs = call(*leaves)
    gradients = torch.autograd.grad(
        outputs, leaves, [dz.detach(), dh.detach()][: len(outputs)], allow_unused=True
    )
    found = [*outputs, *(grad for grad in gradients if grad is not None)]
    return [value.detach().double() for value in found]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Return the largest error of each tensor."""
    assert [result.shape for result in found] == [true.shape for true in truth]
    return [float((result - true).abs().max()) for result, true in zip(found, truth, strict=True)]


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_result_and_gradients(name: str, dtype: torch.dtype, backend: str) -> None:
    """As near to float64 as torch's of eight draws, but for one rounding of the largest value."""
    ours, theirs = CALLS[name]
    draws = [[value.to(DEVICE, dtype) for value in draw()] for _ in range(8)]
    truths = [results(theirs, [value.double() for value in given]) for given in draws]
    torchs = [
        errors(results(theirs, given), true) for given, true in zip(draws, truths, strict=True)
    ]
    with backends.use(backend):
        found = errors(results(ours, draws[0]), truths[0])
    for error, budget, true in zip(found, zip(*torchs, strict=True), truths[0], strict=True):
        rounding = torch.finfo(dtype).eps * float(true.abs().max())
        assert error <= max(budget) + rounding


@pytest.mark.parametrize("backend", SERVING)
def test_dropout_is_that_of_the_seed(backend: str) -> None:
    """Whatever draws the mask, and in a second call as well."""
    x = torch.ones(SHAPE, device=DEVICE)

    def stream(name: str) -> Tensor:
        torch.manual_seed(7)
        with backends.use(name):
            _, h = fusednorm.add_layer_norm(x, None, COLS, dropout_p=0.25)
        return h

    first = stream(backend)
    assert 0.2 < float((first == 0).double().mean()) < 0.3
    assert torch.equal(first, stream(backend))
    assert torch.equal(first, stream("torch"))


def test_export_runs_after_loading() -> None:
    """An exported program finds the operators by their names."""

    class Block(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            z, h = fusednorm.add_rms_norm(x, residual, COLS)
            return z + h

    block = Block()
    given = (torch.randn(SHAPE, device=DEVICE), torch.randn(SHAPE, device=DEVICE))
    saved = io.BytesIO()
    torch.export.save(torch.export.export(block, given), saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    torch.testing.assert_close(loaded(*given), block(*given))


def test_replaced_model_keeps_its_state() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).to(DEVICE)
    state, x = model.state_dict(), torch.randn(4, 8, device=DEVICE)
    before = model(x)
    report = fusednorm.replace_norms(model)
    assert "1 swapped" in str(report)
    assert isinstance(model[1], fusednorm.LayerNorm)
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(model(x), before)
