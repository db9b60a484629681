"""The gated norm: its operators, what autograd saves and differentiates, and where a call runs.

    z = norm(x) * silu(gate_input)    or, with the gate first,    norm(x * silu(gate_input))

It has two operators of its own beside those of the equation: it shares none of its other terms,
and its statistics are those of groups of columns. What runs where goes by the same rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusednorm import backends, observers, reference, route
from fusednorm.autograd import differentiated, recorded, register
from fusednorm.backends import GatedLaunchers
from fusednorm.ops import define, fill
from fusednorm.spec import GatedOperands, GatedSaved, GatedSpec, compute_dtype, rows_and_columns

_OPERANDS = len(GatedOperands._fields)
_SAVED = len(GatedSaved._fields)
Gradients = tuple[Tensor | None, ...]

# What the dispatcher sees; arguments are those of the launchers and, of a backward, `eps` and `rms`
# as well, by which the next derivative computes the statistics again.


def _launchers(x: Tensor) -> GatedLaunchers:
    return backends.gated_launchers(backends.kernels(x.device) or "torch")


def _fwd(*arguments: Any) -> tuple[Tensor, ...]:
    operands, spec = _forward_arguments(arguments)
    return fill(_launchers(operands.x).forward(*operands, *spec, True), operands.x)


def _forward_arguments(arguments: tuple[Any, ...]) -> tuple[GatedOperands, GatedSpec]:
    shape, *options = arguments[_OPERANDS:]
    return GatedOperands(*arguments[:_OPERANDS]), GatedSpec(tuple(shape), *options)


def _fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    (x, gate_input, *_), spec = _forward_arguments(arguments)
    rows, cols = rows_and_columns(x, spec.normalized_shape)
    groups = cols // spec.group_size if cols > 0 else 0
    dtype = compute_dtype(x.dtype, gate_input.dtype)
    mean = None if spec.rms else x.new_empty(rows * groups, dtype=dtype)
    z = x.new_empty(x.shape, dtype=spec.out_dtype)
    return fill((z, mean, x.new_empty(rows * groups, dtype=dtype)), x)


def _bwd(dz: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    saved = GatedSaved(*arguments[:_SAVED])
    shape, group_size, _eps, _rms, *options, mask = arguments[_SAVED:]
    numbers = tuple(shape), group_size, *options, tuple(mask)
    results = _launchers(saved.x).backward(dz, *saved, *numbers)
    return fill(results, dz)


def _bwd_fake(dz: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    saved, mask = GatedSaved(*arguments[:_SAVED]), arguments[-1]
    likes = (saved.x, saved.gate_input, saved.weight, saved.bias)
    made = [
        like.new_empty(like.shape) if wanted and like is not None else None
        for like, wanted in zip(likes, mask, strict=True)
    ]
    return fill(tuple(made), dz)


gated_norm_fwd = define(
    "gated_norm_fwd",
    "(Tensor x, Tensor gate_input, Tensor? weight, Tensor? bias, SymInt[] normalized_shape, "
    "SymInt group_size, float eps, bool rms, bool norm_before_gate, ScalarType out_dtype, "
    "ScalarType? x_hat_dtype) -> (Tensor z, Tensor mean, Tensor rstd)",
    _fwd,
    _fwd_fake,
)
gated_norm_bwd = define(
    "gated_norm_bwd",
    "(Tensor dz, Tensor x, Tensor gate_input, Tensor? mean, Tensor? rstd, Tensor? weight, "
    "Tensor? bias, SymInt[] normalized_shape, SymInt group_size, float eps, bool rms, "
    "bool norm_before_gate, ScalarType? x_hat_dtype, bool[4] output_mask) "
    "-> (Tensor dx, Tensor dgate_input, Tensor dweight, Tensor dbias)",
    _bwd,
    _bwd_fake,
)


# What autograd saves and differentiates


def _save(ctx: Any, operands: GatedOperands, spec: GatedSpec, mean: Any, rstd: Any) -> None:
    x, gate_input, *parameters = operands
    ctx.save_for_backward(x, gate_input, mean, rstd, *parameters)
    ctx.spec = spec
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dz: Tensor | None, wanted: tuple[bool, ...], launchers: GatedLaunchers | None
) -> Gradients:
    """Return the gradients of x, gate_input, weight and bias."""
    if dz is None:
        return (None,) * _OPERANDS
    saved, spec = GatedSaved._make(ctx.saved_tensors), ctx.spec
    shape, group_size, eps, rms, norm_before_gate, _, x_hat_dtype = spec
    options = (norm_before_gate, x_hat_dtype, wanted)
    if launchers is not None and observers.nobody_looks(dz, saved.x):
        return launchers.backward(dz, *saved, shape, group_size, *options)
    if observers.transformed(dz):
        return reference.gated_norm_bwd(dz, saved, spec, wanted)
    grads = gated_norm_bwd(dz, *saved, shape, group_size, eps, rms, *options)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


class GatedNormFunction(torch.autograd.Function):
    """A gated norm of plain tensors through the launchers of a backend, with their backward."""

    @staticmethod
    def forward(ctx: Any, spec: GatedSpec, launchers: GatedLaunchers, *tensors: Any) -> Tensor:
        """Run the forward kernel."""
        operands = GatedOperands(*tensors)
        z, mean, rstd = launchers.forward(*operands, *spec, True)
        _save(ctx, operands, spec, mean, rstd)
        ctx.launchers = launchers
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None) -> Any:
        """Run the backward kernels."""
        return None, None, *_gradients(ctx, dz, ctx.needs_input_grad[2:], ctx.launchers)


def _fwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, spec = _forward_arguments(inputs)
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.arguments = len(inputs)
    _save(ctx, operands, spec, None if spec.rms else mean, rstd)


def _fwd_backward(ctx: Any, dz: Tensor | None, *_: Tensor | None) -> Any:
    grads = _gradients(ctx, dz, ctx.needs_input_grad[:_OPERANDS], None)
    return *grads, *(None,) * (ctx.arguments - _OPERANDS)


def _bwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dz, *saved = inputs[: 1 + _SAVED]
    # The statistics are computed again, as functions of x and gate_input.
    ctx.save_for_backward(dz, *GatedSaved(*saved)._replace(mean=None, rstd=None))
    shape, group_size, eps, rms, norm_before_gate, x_hat_dtype, mask = inputs[1 + _SAVED :]
    dtype = dz.dtype  # that of z plays no part in a backward
    ctx.spec = GatedSpec(tuple(shape), group_size, eps, rms, norm_before_gate, dtype, x_hat_dtype)
    ctx.wanted, ctx.arguments = tuple(mask), len(inputs)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> Any:
    def gradients(wanted: tuple[bool, ...], dz: Any, *saved: Any) -> Gradients:
        return reference.gated_norm_bwd(dz, GatedSaved(*saved), ctx.spec, wanted)

    products = differentiated(gradients, ctx.saved_tensors, ctx.wanted, cotangents)
    return *products, *(None,) * (ctx.arguments - len(products))


register(gated_norm_fwd, _fwd_backward, _fwd_setup_context)
register(gated_norm_bwd, _bwd_backward, _bwd_setup_context)

# As in fusednorm/autograd.py: past the way that Python has for transforms.
_apply: Any = super(torch.autograd.Function, GatedNormFunction).apply


def run(op: str, operands: GatedOperands, spec: GatedSpec) -> Tensor:
    """Run a gated norm whose arguments have been checked; return z."""
    if observers.distributed(*operands):
        from fusednorm import distributed  # which imports much of torch.distributed

        return distributed.run_gated(op, operands, spec, run)
    choice = backends.choose(operands.x, plain=False)
    way = route.way_of(op, choice, *operands)
    if way in ("transform", "torch"):
        return reference.gated_norm(operands, spec)[0]
    if way == "operators":
        z: Tensor = gated_norm_fwd(*operands, *spec)[0]
        return z
    launchers = backends.gated_launchers(choice.backend)
    if recorded(operands):
        z = _apply(spec, launchers, *operands)
        return z
    return launchers.forward(*operands, *spec, False)[0]
