"""Promise 11: what surrounds a call or its recomputation changes neither mask nor saved tensors."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, DEVICE, INTERPRETED
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusednorm
from fusednorm import backends

AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "nothing": contextlib.nullcontext,
    "flop counter": lambda: FlopCounterMode(display=False),
    **{name: lambda name=name: backends.use(name) for name in BACKENDS},
}

USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer norm": lambda x, w: fusednorm.layer_norm(x, 8, w, w),
    "RMS norm": lambda x, w: fusednorm.rms_norm(x, 8, w),
    "Add & Norm": lambda x, w: fusednorm.add_layer_norm(x, x, 8, w, w)[0],
    "Add & RMS norm": lambda x, w: fusednorm.add_rms_norm(x, x, 8, w)[0],
    "dropout": lambda x, w: fusednorm.add_layer_norm(x, None, 8, w, gate=w, dropout_p=0.5)[1],
    "modulated": lambda x, w: fusednorm.modulated_layer_norm(x, 8, w, w),
}


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", USES)
def test_a_checkpoint_recomputes_in_other_surroundings(
    use: str, dtype: torch.dtype, reentrant: bool
) -> None:
    """The gradients are those without a checkpoint, whatever is in force in either pass."""
    for forward, backward in itertools.product(AMBIENT, AMBIENT):
        interpreted = INTERPRETED and "triton" in (forward, backward)
        if interpreted and ("nothing" not in (forward, backward) or dtype == torch.bfloat16):
            continue  # the interpreter takes its time, and saves what the others save
        x, w = _leaf(3, 8, dtype=dtype), _leaf(8, dtype=dtype)
        dz = torch.randn_like(x)
        torch.manual_seed(1)
        (expected,) = torch.autograd.grad(USES[use](x, w), x, dz)
        torch.manual_seed(1)
        with AMBIENT[forward]():
            z = checkpoint(USES[use], x, w, use_reentrant=reentrant)
        with AMBIENT[backward]():
            z.backward(dz)
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(x.grad, expected, rtol=tolerance, atol=tolerance)
        if use == "dropout":
            assert torch.equal(x.grad == 0, z == 0), (forward, backward)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 7), (300, 1000)])
@pytest.mark.parametrize("p", [0.1, 0.5, 1 - 2**-40])
def test_every_backend_drops_the_same_elements(shape: tuple[int, ...], p: float) -> None:
    """One seed is one mask, under compilers, modes and transforms too."""
    x = torch.ones(shape, device=DEVICE)

    def stream(x: Tensor = x) -> Tensor:
        torch.manual_seed(7)
        return fusednorm.add_layer_norm(x, x, shape[-1], dropout_p=p)[1]

    with backends.use("torch"):
        expected = stream()
        streams = {"transformed": torch.func.jvp(stream, (x,), (x,))[0]}
    for name, ambient in AMBIENT.items():
        if name == "triton" and INTERPRETED and x.numel() > 1000:
            continue  # as above
        with ambient():
            streams[name] = stream()
    assert (expected == 1).double().mean().item() == pytest.approx(p, abs=0.35)
    for name, h in streams.items():
        assert torch.equal(h, expected), name


def test_what_is_saved_is_what_torch_saves_where_nobody_looks() -> None:
    """Without hooks a plain layer norm of CPU tensors stays torch's own node, which costs less."""
    x = torch.randn(3, 8, requires_grad=True)
    assert fusednorm.layer_norm(x, 8).grad_fn.name() == "NativeLayerNormBackward0"
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hooked = fusednorm.layer_norm(x, 8)
    assert hooked.grad_fn.name() == "LayerNormFunctionBackward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_hook_changes_no_bit_of_a_plain_layer_norm(dtype: torch.dtype) -> None:
    """Under a checkpoint it has torch's bits, forward and backward, as it has without one."""
    x, w, b = _leaf(2, 3, 8, dtype=dtype), _leaf(8, dtype=dtype), _leaf(8, dtype=dtype)
    dz = torch.randn_like(x)
    with backends.use("torch"):
        y = checkpoint(fusednorm.layer_norm, x, 8, w, b, use_reentrant=False)
        ours = (y, *torch.autograd.grad(y, (x, w, b), dz))
    expected_y = F.layer_norm(x, (8,), w, b)
    expected = (expected_y, *torch.autograd.grad(expected_y, (x, w, b), dz))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
