"""Where a checked call runs: the one function that decides.

=======================  =========================================================================
a DTensor is among them  its shards by this table: `distributed`
a transform is active    the equation in plain torch, which `torch.func` and forward mode know
torch, or a tracer       torch's own norm, with the other terms in plain torch around it
somebody sees operators  the registered operators, which run the launchers of the device
anything else            the launchers of the backend, under `autograd.LayerNormFunction`
=======================  =========================================================================

Where hooks see what is saved, as those of a checkpoint do, torch is a backend like the others: all
save the same under one `LayerNormFunction`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fusednorm import autograd, backends, observers, ops, reference
from fusednorm.backends import Choice
from fusednorm.spec import Call
from fusednorm.validation import fail

Way = Literal["transform", "torch", "operators", "launchers"]
"""Those of the table, in its order."""


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Run a call; return z and h, which is x where nothing is added to it."""
    op, operands, spec, want_h = call
    x = operands.x
    if x.is_nested:
        return _run_nested(call)
    one_norm = _is_one_norm(call)
    choice = backends.choose(x, plain=one_norm and is_one_operator(x, spec.rms))
    if observers.distributed(*operands):
        from fusednorm import distributed  # which imports much of torch.distributed

        torchs = choice if one_norm and choice.backend == "torch" else None
        return distributed.run(call, torchs, run)
    if spec.dropout_p > 0.0:
        # On the device and from its generator: no synchronisation, and a graph draws anew. Every
        # backend draws the same mask from it. A kernel of its own is what that costs on a GPU:
        # the generator's offset, which needs none, is closed to Python and to the stable ABI while
        # a graph is captured, and a graph would repeat one that was read before.
        operands = operands._replace(seed=torch.randint(2**62, (1,), device=x.device))
    way = way_of(op, choice, *operands)
    if way == "transform":
        return reference.layer_norm(operands, spec)[:2]
    if way == "torch":
        return reference.around_torch(operands, spec)
    if way == "operators":
        z, h, _, _ = ops.layer_norm_fwd(*operands, *spec)
        return z, x if spec.h_dtype is None else h
    launchers = backends.launchers(choice.backend)
    z, stored = autograd.run(operands, spec, launchers, want_h=want_h)
    return z, x if stored is None else stored


def way_of(op: str, choice: Choice, *tensors: Tensor | None) -> Way:
    """Return which way a call of the chosen backend goes, and tell `backends.explain`."""
    backend, reason = choice
    way: Way = "launchers"
    if observers.transforms_active():
        backend, way = "torch", "transform"
        reason = "a transform differentiates or batches plain torch"
    elif observers.tracing():  # a trace outlives the process that has kernels
        if backend != "torch":
            reason = "a tracer records torch's operators"
        backend, way = "torch", "torch"
    elif backend == "torch":
        if not observers.saving_watched() or not observers.all_plain(*tensors):
            way = "torch"
    elif observers.operators_watched() or not observers.all_plain(*tensors):
        device = next(tensor.device for tensor in tensors if tensor is not None)
        backend, way = backends.kernels(device) or "torch", "operators"
        reason = f"as an operator: {reason}"
    backends.note(op, backend, reason)
    return way


def _is_one_norm(call: Call) -> bool:
    """Return whether it is a norm of x with weight and bias, and nothing else of the equation.

    A function, since torch 2.10 compiles no property of a named tuple.
    """
    spec, operands = call.spec, call.operands
    return (
        spec.h_dtype is None
        and spec.x_hat_dtype is None
        and operands.scale is None
        and operands.shift is None
    )


def is_one_operator(x: Tensor, rms: bool) -> bool:
    """Return whether a norm without other terms is one operator of torch.

    RMS norm is where our kernels are below it; a checkpoint, whose recomputation may find them
    gone, gets what they leave behind otherwise.
    """
    below = backends.below_torch
    return not rms or (bool(below) and x.device.type in below and not observers.saving_watched())


def _run_nested(call: Call) -> tuple[Tensor, Tensor]:
    """Run a call on nested tensors by the operators that torch has for them."""
    op, operands, spec, _ = call
    backend, reason = backends.choose(operands.x)
    backends.note(op, backend, reason)
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
