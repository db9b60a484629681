"""Norms over dimension 1 of [B, C, *spatial]: operators, what autograd saves, where a call runs.

A backend has launchers of its own for them, or takes the positions for rows of channels: it then
reads a permuted copy, and its result is copied back. Whatever needs more than a first derivative
sees `reference` on a moved view. `autograd` does the same for rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusednorm import backends, observers, reference, route
from fusednorm.autograd import differentiated, recorded, register
from fusednorm.backends import Launchers
from fusednorm.observers import nobody_looks, transformed
from fusednorm.ops import define, fill
from fusednorm.spec import ByInput, Call, Operands, Saved, Spec, compute_dtype

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Those of x, weight and bias."""


def moved(x: Tensor) -> Tensor:
    """Return a view of [B, C, *spatial] whose rows are the channels of a position."""
    return x.movedim(1, -1)


def moved_back(rows: Tensor) -> Tensor:
    """Return rows of channels as contiguous [B, C, *spatial]."""
    return rows.movedim(-1, 1).contiguous()


def launchers(backend: str, x: Tensor) -> Launchers:
    """Return what runs a norm of `x` by a backend."""
    own = backends.channel_launchers(backend, x.shape[1])
    return _by_rows(backends.launchers(backend)) if own is None else own


def _by_rows(rows: Launchers) -> Launchers:
    """Return launchers that take the positions for rows."""

    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        out_dtype: torch.dtype,
        save_stats: bool,
    ) -> Any:
        operands = Operands(moved(x), weight=weight, bias=bias)
        spec = Spec((x.shape[1],), eps, rms, 0.0, out_dtype, None, None)
        z, _, mean, rstd = rows.forward(*operands, *spec, save_stats, False)
        return moved_back(z), mean, rstd

    def backward(
        dz: Tensor,
        x: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        output_mask: tuple[bool, bool, bool],
    ) -> Gradients:
        saved = Saved(None, moved(x), mean, rstd, None, weight, bias, None, None, None)
        wanted = _by_input(output_mask)
        options = (x.shape[1],), 0.0, x.dtype, x.dtype, None
        grads = ByInput(*rows.backward(moved(dz), None, *saved, *options, wanted))
        dx = None if grads.x is None else moved_back(grads.x)
        return dx, grads.weight, grads.bias

    return Launchers(forward, backward)


def _by_input(wanted: tuple[bool, ...]) -> ByInput:
    x, weight, bias = wanted
    return ByInput(x, False, False, weight, bias, False, False)


def _equations_gradients(
    dz: Tensor,
    x: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    wanted: tuple[bool, ...],
) -> Gradients:
    """Return the wanted gradients as differentiable functions of the tensors."""
    saved = Saved(None, moved(x), None, rstd, None, weight, bias, None, None, None)
    spec = Spec((x.shape[1],), eps, rms, 0.0, x.dtype, None, None)
    dtypes = x.dtype, x.dtype
    grads = reference.layer_norm_bwd(moved(dz), None, saved, spec, dtypes, _by_input(wanted))
    dx, _, _, dweight, dbias, _, _ = grads
    return None if dx is None else moved_back(dx), dweight, dbias


# The operators


def _device_launchers(x: Tensor) -> Launchers:
    return launchers(backends.kernels(x.device) or "torch", x)


def _fwd(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return fill(_device_launchers(x).forward(x, *arguments, True), x)


def _fwd_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    batch, _, *spatial = x.shape
    rstd = x.new_empty(batch * math.prod(spatial), dtype=compute_dtype(x.dtype))
    z = x.new_empty(x.shape, dtype=out_dtype)
    return fill((z, None if rms else torch.empty_like(rstd), rstd), x)


def _bwd(dz: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _eps, _rms, wanted = arguments
    return fill(_device_launchers(x).backward(dz, x, *tensors, tuple(wanted)), x)


def _bwd_fake(dz: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, weight, bias, _, _, wanted = arguments
    return fill(
        (
            like.new_empty(like.shape) if want and like is not None else None
            for like, want in zip((x, weight, bias), wanted, strict=True)
        ),
        x,
    )


layer_norm2d_fwd = define(
    "layer_norm2d_fwd",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms, ScalarType out_dtype) "
    "-> (Tensor z, Tensor mean, Tensor rstd)",
    _fwd,
    _fwd_fake,
)
layer_norm2d_bwd = define(
    "layer_norm2d_bwd",
    "(Tensor dz, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? bias, float eps, "
    "bool rms, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _bwd,
    _bwd_fake,
)


# What autograd saves and differentiates


def _save(ctx: Any, operands: tuple[Any, ...], eps: float, rms: bool, statistics: Any) -> None:
    x, weight, bias = operands
    mean, rstd = statistics
    ctx.save_for_backward(x, None if rms else mean, rstd, weight, bias)
    ctx.eps, ctx.rms = eps, rms
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dz: Tensor | None, own: Launchers | None) -> Gradients:
    if dz is None:
        return None, None, None
    x, mean, rstd, weight, bias = ctx.saved_tensors
    if own is not None and nobody_looks(dz, x):
        return own.backward(dz, x, mean, rstd, weight, bias, ctx.wanted)  # type: ignore[return-value]
    if transformed(dz):
        return _equations_gradients(dz, x, rstd, weight, bias, ctx.eps, ctx.rms, ctx.wanted)
    numbers = ctx.eps, ctx.rms, ctx.wanted
    grads = layer_norm2d_bwd(dz, x, mean, rstd, weight, bias, *numbers)
    return tuple(grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True))  # type: ignore[return-value]


class ChannelNormFunction(torch.autograd.Function):
    """A norm over dimension 1 of plain tensors through the launchers of a backend."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, own: Launchers, *operands: Tensor | None) -> Tensor:
        """Run the forward kernel; return z."""
        eps, rms = spec.eps, spec.rms
        z, *statistics = own.forward(*operands, eps, rms, spec.out_dtype, True)
        ctx.launchers, ctx.wanted = own, ctx.needs_input_grad[2:]
        _save(ctx, operands, eps, rms, statistics)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None) -> Any:
        """Run the backward kernels."""
        return None, None, *_backward(ctx, dz, ctx.launchers)


_apply: Any = super(torch.autograd.Function, ChannelNormFunction).apply  # as in `autograd`


def run(op: str, operands: Operands, spec: Spec) -> Tensor:
    """Run a checked norm over dimension 1 of x, [B, C, *spatial]; return z, contiguous.

    Torch's form of it is a norm and two copies, and nothing that a backend should leave alone.
    """
    x, *_ = tensors = operands.x, operands.weight, operands.bias
    if observers.distributed(*tensors):
        from fusednorm import distributed  # which imports much of torch.distributed

        call = Call(op, _as_rows(operands), spec, want_h=False)
        return moved_back(distributed.run(call, None, _run_part)[0])
    choice = backends.choose(x, plain=False)
    if backends.channel_launchers(choice.backend, x.shape[1]) is None:
        choice = choice._replace(reason=f"{choice.reason}; positions are rows, in a permuted copy")
    way = route.way_of(op, choice, *tensors)
    if way == "transform":
        return moved_back(reference.layer_norm(_as_rows(operands), spec)[0])
    if way == "torch":
        return moved_back(reference.around_torch(_as_rows(operands), spec)[0])
    numbers = spec.eps, spec.rms, spec.out_dtype
    if way == "operators":
        return layer_norm2d_fwd(*tensors, *numbers)[0]  # type: ignore[no-any-return]
    own = launchers(choice.backend, x)
    if recorded(operands):
        return _apply(spec, own, *tensors)  # type: ignore[no-any-return]
    return own.forward(*tensors, *numbers, False)[0]


def _as_rows(operands: Operands) -> Operands:
    return operands._replace(x=moved(operands.x))


def _run_part(call: Call) -> tuple[Tensor, Tensor]:
    """Run a norm of rows that are channels of positions; return z and x."""
    x = call.operands.x
    z = run(call.op, call.operands._replace(x=x.movedim(-1, 1)), call.spec)
    return moved(z), x


def _fwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, eps, rms, _ = inputs
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.wanted = ctx.needs_input_grad[:3]
    _save(ctx, tuple(operands), eps, rms, statistics)


def _fwd_backward(ctx: Any, dz: Tensor | None, *_: Tensor | None) -> Any:
    return *_backward(ctx, dz, None), None, None, None


def _bwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dz, x, _, _, weight, bias, ctx.eps, ctx.rms, ctx.wanted = inputs
    ctx.save_for_backward(dz, x, weight, bias)  # statistics are functions of x here
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> Any:
    def gradients(wanted: Any, dz: Any, x: Any, weight: Any, bias: Any) -> Gradients:
        return _equations_gradients(dz, x, None, weight, bias, ctx.eps, ctx.rms, wanted)

    products = differentiated(gradients, ctx.saved_tensors, ctx.wanted, cotangents)
    dz, x, weight, bias = products
    return dz, x, None, None, weight, bias, None, None, None


register(layer_norm2d_fwd, _fwd_backward, _fwd_setup_context)
register(layer_norm2d_bwd, _bwd_backward, _bwd_setup_context)
