"""Where a checked call runs: the one function that decides.

=======================  =========================================================================
a transform is active    the equation in plain torch, which `torch.func` and forward mode know
torch, or a tracer       torch's own norm, with the other terms in plain torch around it
somebody sees operators  the registered operators, which run the launchers of the device
anything else            the launchers of the backend, under `autograd.LayerNormFunction`
=======================  =========================================================================

Where hooks see what is saved, as those of a checkpoint do, torch is a backend like the others: all
save the same under one `LayerNormFunction`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusednorm import autograd, backends, observers, ops, reference
from fusednorm.spec import Call
from fusednorm.validation import fail


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Run a call; return z and h, which is x where nothing is added to it."""
    _, operands, spec, want_h = call
    x = operands.x
    if x.is_nested:
        return _run_nested(call)
    backend = backends.select(x, plain=call.is_one_norm and _is_plain(x, spec.rms))
    if spec.dropout_p > 0.0:
        # On the device and from its generator: no synchronisation, and a graph draws anew. Every
        # backend draws the same mask from it. A kernel of its own is what that costs on a GPU:
        # the generator's offset, which needs none, is closed to Python and to the stable ABI while
        # a graph is captured, and a graph would repeat one that was read before.
        operands = operands._replace(seed=torch.randint(2**62, (1,), device=x.device))
    if observers.transforms_active():
        return reference.layer_norm(operands, spec)[:2]
    if backend == "torch" or observers.tracing():  # a trace outlives the process that has kernels
        comparable = observers.saving_watched() and not observers.tracing()
        if not comparable or not observers.all_plain(*operands):
            return reference.around_torch(operands, spec)
    elif observers.operators_watched() or not observers.all_plain(*operands):
        z, h, _, _ = ops.layer_norm_fwd(*operands, *spec)
        return z, x if spec.h_dtype is None else h
    z, stored = autograd.run(operands, spec, backends.launchers(backend), want_h=want_h)
    return z, x if stored is None else stored


def _is_plain(x: Tensor, rms: bool) -> bool:
    """Return whether a norm without other terms is one operator of torch.

    RMS norm is where our kernels are below it; a checkpoint, whose recomputation may find them
    gone, gets what they leave behind otherwise.
    """
    return not rms or (x.device.type in backends.below_torch and not observers.saving_watched())


def _run_nested(call: Call) -> tuple[Tensor, Tensor]:
    """Run a call on nested tensors by the operators that torch has for them."""
    op, operands, spec, _ = call
    backend = backends.select(operands.x)
    if backend != "torch":
        fail(op, f"a tensor of one shape for the {backend} backend", "a nested tensor")
    if spec.dropout_p > 0.0:
        fail(op, "no dropout with a nested tensor", f"dropout_p={spec.dropout_p}")
    if spec.rms and operands.x.layout is torch.strided:
        fail(op, "a nested tensor of jagged layout", "one of strided layout")
    h = operands.x if operands.residual is None else operands.residual + operands.x
    if spec.h_dtype is not None:
        h = h.to(spec.h_dtype)
    if spec.rms:
        z = F.rms_norm(h, spec.normalized_shape, operands.weight, spec.eps)
    else:
        z = F.layer_norm(h, spec.normalized_shape, operands.weight, operands.bias, spec.eps)
    return z.to(spec.out_dtype), h
