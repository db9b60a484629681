"""What autograd saves and differentiates.

A plain eager call goes through `LayerNormFunction` straight to the launchers of a backend. Where
somebody looks at operators, and for tensor subclasses, the registered operators run, whose autograd
formulas stand below. Both save the same and share one backward, whatever the backend: a checkpoint
may recompute a forward in other surroundings. Every higher derivative comes from
`reference.layer_norm_bwd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusednorm import ops, reference
from fusednorm.backends import Launchers
from fusednorm.observers import nobody_looks, transformed
from fusednorm.spec import ByInput, Dtypes, Gradients, Mask, Operands, Saved, Spec

_NO_GRADIENT = ByInput()


def _save(
    ctx: Any, tensors: tuple[Any, ...], spec: Spec, outputs: tuple[Any, ...], needs: Any
) -> None:
    """Save what `Saved` names: h, the row statistics, the parameters, and x for dgate only."""
    x, residual, gate, *_ = tensors
    h, mean, rstd = outputs
    branch = x if gate is not None and needs[2] else None
    h = x if spec.h_dtype is None else h
    ctx.save_for_backward(branch, h, mean, rstd, *tensors[2:])
    ctx.spec, ctx.wanted = spec, needs
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dz: Tensor | None, dh: Tensor | None, launchers: Launchers | None
) -> Gradients:
    """Return the gradients of x, residual, gate, weight, bias, scale and shift."""
    saved, wanted, dtypes = Saved._make(ctx.saved_tensors), ctx.wanted, ctx.dtypes
    unscaled = saved.gate is None and saved.seed is None
    if dz is None:
        if dh is None:
            return _NO_GRADIENT
        if unscaled:
            dx, dresidual = (
                dh.to(dtype) if want else None
                for dtype, want in zip(dtypes, wanted[:2], strict=True)
            )
            return ByInput(dx, dresidual)
        wanted = (*wanted[:3], False, False, False, False)
    # Without gate and dropout dx and dresidual are one tensor.
    shared = unscaled and wanted[1] and dtypes[0] == dtypes[1]
    if shared:
        wanted = (True, False, *wanted[2:])
    grads = _gradients(dz, dh, saved, ctx.spec, dtypes, wanted, launchers)
    if shared:
        dx, _, *rest = grads
        return (dx, dx, *rest)  # autograd drops what it does not want
    return grads


def _gradients(
    dz: Tensor | None,
    dh: Tensor | None,
    saved: Saved,
    spec: Spec,
    dtypes: Dtypes,
    wanted: Mask,
    launchers: Launchers | None,
) -> Gradients:
    shape, eps, rms, dropout_p, _, _, x_hat_dtype = spec
    if launchers is not None and (launchers.differentiable or nobody_looks(dz, dh, saved.h)):
        return launchers.backward(dz, dh, *saved, shape, dropout_p, *dtypes, x_hat_dtype, wanted)
    if transformed(dz, dh):
        return reference.layer_norm_bwd(dz, dh, saved, spec, dtypes, wanted)
    numbers = (eps, rms, dropout_p)
    grads = ops.layer_norm_bwd(dz, dh, *saved, shape, *numbers, *dtypes, x_hat_dtype, wanted)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


class LayerNormFunction(torch.autograd.Function):
    """The equation on plain tensors through the launchers of a backend, with their backward."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, launchers: Launchers, *tensors: Tensor | None) -> Any:
        """Run the forward kernel; return z, and h where it is not x."""
        ctx.launchers = launchers
        z, h, mean, rstd = launchers.forward(*tensors, *spec, True, True)
        _save(ctx, tensors, spec, (h, mean, rstd), ctx.needs_input_grad[2:-1])
        return z if spec.h_dtype is None else (z, h)

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dh: Tensor | None = None) -> Any:
        """Run the backward kernels."""
        return None, None, *_backward(ctx, dz, dh, ctx.launchers), None


# That of Python spends half the time of all this on transforms, of which there are none here.
_apply: Any = super(torch.autograd.Function, LayerNormFunction).apply


def recorded(operands: Sequence[Tensor | None]) -> bool:
    """Return whether autograd is to record a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in operands:  # any() takes three times as long
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def run(
    operands: Operands, spec: Spec, launchers: Launchers, *, want_h: bool
) -> tuple[Tensor, Tensor | None]:
    """Run a call on plain tensors by the given launchers, and record what its backward needs.

    Returns:
        z and h; h is None where it is neither wanted nor needed by a backward, or is x.
    """
    if recorded(operands):
        result = _apply(spec, launchers, *operands)
        return result if isinstance(result, tuple) else (result, None)
    return launchers.forward(*operands, *spec, False, want_h)[:2]


# The formulas of the registered operators

_OPERANDS = len(Operands._fields)
_TENSORS = 2 + len(Saved._fields)  # of a backward: dz, dh and what was saved


def _fwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, (shape, *options) = Operands(*inputs[:_OPERANDS]), inputs[_OPERANDS:]
    spec = Spec(tuple(shape), *options)
    _, h, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd, *(() if spec.h_dtype is not None else (h,)))
    outputs = (h, None if spec.rms else mean, rstd)
    ctx.arguments = len(inputs)
    _save(ctx, operands, spec, outputs, ctx.needs_input_grad[: len(ByInput._fields)])


def _fwd_backward(ctx: Any, dz: Tensor | None, dh: Tensor | None, *_: Tensor | None) -> Any:
    grads = _backward(ctx, dz, None if ctx.spec.h_dtype is None else dh, None)
    return *grads, *(None,) * (ctx.arguments - len(grads))


def _bwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = inputs[:_TENSORS], inputs[_TENSORS:]
    saved = Saved(*tensors[2:])
    # The statistics are computed again, as functions of h.
    ctx.save_for_backward(*tensors[:2], *saved._replace(mean=None, rstd=None))
    shape, eps, rms, dropout_p, *dtypes, x_hat_dtype, output_mask = options
    # out_dtype and h_dtype play no part in a backward.
    dtype = saved.h.dtype
    ctx.spec = Spec(tuple(shape), eps, rms, dropout_p, dtype, dtype, x_hat_dtype)
    ctx.dtypes, ctx.wanted = tuple(dtypes), ByInput(*output_mask)
    ctx.arguments = len(inputs)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> Any:
    def gradients(wanted: Mask, dz: Any, dh: Any, *saved: Any) -> Gradients:
        return reference.layer_norm_bwd(dz, dh, Saved(*saved), ctx.spec, ctx.dtypes, wanted)

    products = differentiated(gradients, ctx.saved_tensors, ctx.wanted, cotangents)
    return *products, *(None,) * (ctx.arguments - len(products))


def differentiated(
    gradients: Callable[..., Gradients],
    tensors: Sequence[Tensor | None],
    wanted: Mask,
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Differentiate a backward: the pullback of the formulas of the reference.

    Args:
        gradients: Takes a mask of what is wanted, and `tensors`.
        tensors: What the backward was given.
        wanted: Which gradients it returned.
        cotangents: Those of its results.

    Returns:
        The gradients of `tensors`.
    """
    received = [
        cotangent if want else None for cotangent, want in zip(cotangents, wanted, strict=True)
    ]
    results: list[Tensor | None] = [None] * len(tensors)
    given = tuple(cotangent for cotangent in received if cotangent is not None)
    if not given:
        return results
    mask = tuple(cotangent is not None for cotangent in received)
    active = [  # a seed is no number to differentiate by
        i for i, tensor in enumerate(tensors) if tensor is not None and tensor.is_floating_point()
    ]

    def function(*primals: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, primal in zip(active, primals, strict=True):
            arguments[i] = primal
        return tuple(grad for grad in gradients(mask, *arguments) if grad is not None)

    _, pullback = torch.func.vjp(  # type: ignore[misc]  # has_aux=False
        function, *(tensors[i] for i in active)
    )
    for i, product in zip(active, pullback(given), strict=True):
        results[i] = product
    return results


def register(operator: Any, formula: Any, setup_context: Any) -> None:
    """Let autograd record an operator of `ops` where that is asked for.

    As torch.library.register_autograd would, but that a graph of the compiler gets the operator
    without autograd.
    """

    def below(*inputs: Any) -> Any:
        compiles = torch._guards.CompileContext.try_get() is not None
        with torch._C._AutoDispatchBelowAutograd():
            return (ops.compiled[operator] if compiles else operator)(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = below(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(formula)}
    function: Any = type(f"Recorded_{operator._opname}", (torch.autograd.Function,), members)

    def record(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        ):
            return function.apply(*inputs)
        return below(*inputs)

    ops.register_autograd(operator, record)


register(ops.layer_norm_fwd, _fwd_backward, _fwd_setup_context)
register(ops.layer_norm_bwd, _bwd_backward, _bwd_setup_context)
