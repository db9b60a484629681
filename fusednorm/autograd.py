"""What autograd saves and differentiates.

A plain eager call goes through `LayerNormFunction` straight to the launchers. Traced calls and
tensor subclasses go through the registered operators, whose autograd formulas stand below. Both
share what they save and one backward; every higher derivative comes from
`reference.layer_norm_bwd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusednorm import ops, reference
from fusednorm.spec import Spec

Tensors = tuple[Tensor | None, ...]
"""x, residual, gate, weight, bias, scale and shift, which are differentiable, and the seed."""

_Parameters = tuple[Any, Any, Any, Any, Any, Any]
"""gate, weight, bias, scale, shift and seed."""

_DIFFERENTIABLE = 7

PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Tensors without rules of their own."""


def transforms_active() -> bool:
    """Return whether a `torch.func` transform or forward-mode AD is in progress."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def plain(*tensors: Tensor | None) -> bool:
    """Return whether the tensors may skip the dispatcher.

    That is without tracing, a dispatch mode, a subclass, or a tensor that outlived a transform.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    for tensor in tensors:  # all() takes three times as long
        if tensor is not None and (
            type(tensor) not in PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        ):
            return False
    return True


def _save(
    ctx: Any, tensors: tuple[Any, ...], spec: Spec, outputs: Tensors, needs: tuple[bool, ...]
) -> None:
    """Save what the backward reads: h, the row statistics, the parameters, and x for dgate only."""
    x, residual, gate, weight, bias, scale, shift, seed = tensors
    h, mean, rstd = outputs
    branch = x if gate is not None and needs[2] else None
    h = x if spec.h_dtype is None else h
    ctx.save_for_backward(branch, h, mean, rstd, gate, weight, bias, scale, shift, seed)
    ctx.spec, ctx.output_mask = spec, needs
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dz: Tensor | None, dh: Tensor | None, kernels: ops.Kernels | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, residual, gate, weight, bias, scale and shift."""
    x, h, mean, rstd, *rest = ctx.saved_tensors
    parameters: _Parameters = tuple(rest)
    gate, *_, seed = parameters
    spec, mask, dtypes = ctx.spec, ctx.output_mask, ctx.dtypes
    unscaled = gate is None and seed is None
    if dz is None:
        if dh is None:
            return (None,) * _DIFFERENTIABLE
        if unscaled:
            streams = (
                dh.to(dtype) if want else None for dtype, want in zip(dtypes, mask[:2], strict=True)
            )
            return *streams, *(None,) * 5
        mask = (*mask[:3], False, False, False, False)
    # Without gate and dropout dx and dresidual are one tensor.
    shared = unscaled and mask[1] and dtypes[0] == dtypes[1]
    if shared:
        mask = (True, False, *mask[2:])
    grads = _gradients(dz, dh, x, h, mean, rstd, parameters, spec, dtypes, mask, kernels)
    if shared:
        grads = (grads[0] if ctx.output_mask[0] else None, grads[0], *grads[2:])
    return grads


def _batched(grad: Tensor | None) -> bool:
    """Return whether `is_grads_batched` has batched it, by the vmap that preceded torch.func."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def _gradients(
    dz: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    h: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    parameters: _Parameters,
    spec: Spec,
    dtypes: tuple[torch.dtype, torch.dtype],
    mask: Any,
    kernels: ops.Kernels | None,
) -> tuple[Tensor | None, ...]:
    if transforms_active() or _batched(dz) or _batched(dh):
        return reference.layer_norm_bwd(dz, dh, x, h, *parameters, spec, *dtypes, mask)
    shape, eps, rms, dropout_p, _, _, x_hat_dtype = spec
    tensors = (dz, dh, x, h, mean, rstd, *parameters)
    if kernels is not None and not torch.is_grad_enabled() and plain(dz, dh, h):
        return kernels.backward(*tensors, shape, dropout_p, *dtypes, x_hat_dtype, mask)
    grads = ops.layer_norm_bwd(*tensors, shape, eps, rms, dropout_p, *dtypes, x_hat_dtype, mask)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))


class LayerNormFunction(torch.autograd.Function):
    """Layer norm of plain tensors through the kernels, with their fused backward."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, kernels: ops.Kernels, *tensors: Tensor | None) -> Any:
        """Run the forward kernel; return z, and h where it is not x."""
        ctx.kernels = kernels
        z, h, mean, rstd = kernels.forward(*tensors, *spec, True, True)
        _save(ctx, tensors, spec, (h, mean, rstd), ctx.needs_input_grad[2 : 2 + _DIFFERENTIABLE])
        return z if spec.h_dtype is None else (z, h)

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dh: Tensor | None = None) -> Any:
        """Run the backward kernels."""
        return None, None, *_backward(ctx, dz, dh, ctx.kernels), None


# That of Python spends half the time of all this on transforms, of which there are none here.
_apply: Any = super(torch.autograd.Function, LayerNormFunction).apply


def _fwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (normalized_shape, *options) = inputs[:8], inputs[8:]
    spec = Spec(tuple(normalized_shape), *options)
    _, h, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd, *(() if spec.h_dtype is not None else (h,)))
    outputs = (h, None if spec.rms else mean, rstd)
    _save(ctx, tensors, spec, outputs, ctx.needs_input_grad[:_DIFFERENTIABLE])


def _fwd_backward(ctx: Any, dz: Tensor | None, dh: Tensor | None, *_: Tensor | None) -> Any:
    dh = None if ctx.spec.h_dtype is None else dh
    return *_backward(ctx, dz, dh, None), *(None,) * 8


_ACTIVE = (0, 1, 2, 3, 6, 7, 8, 9)
"""Inputs of the backward that its results are differentiable functions of: dz to scale."""


def _bwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = inputs[:12]
    ctx.save_for_backward(*(None if i in (4, 5) else tensor for i, tensor in enumerate(tensors)))
    shape, eps, rms, dropout_p, *dtypes, x_hat_dtype, output_mask = inputs[12:]
    # out_dtype and h_dtype play no part in a backward.
    h = inputs[3]
    ctx.spec = Spec(tuple(shape), eps, rms, dropout_p, h.dtype, h.dtype, x_hat_dtype)
    ctx.dtypes, ctx.output_mask = tuple(dtypes), tuple(output_mask)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> Any:
    """Differentiate the backward: the pullback of the reference formulas."""
    saved: list[Any] = list(ctx.saved_tensors)
    received = [
        cotangent if wanted else None
        for cotangent, wanted in zip(cotangents, ctx.output_mask, strict=True)
    ]
    mask: Any = tuple(cotangent is not None for cotangent in received)
    none: list[Tensor | None] = [None] * 20
    if not any(mask):
        return tuple(none)
    active = [index for index in _ACTIVE if saved[index] is not None]

    def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
        arguments = dict(enumerate(saved)) | dict(zip(active, primals, strict=True))
        dz, dh, x, h, _, _, *rest = arguments.values()
        parameters: _Parameters = tuple(rest)
        dtypes: tuple[torch.dtype, torch.dtype] = ctx.dtypes
        grads = reference.layer_norm_bwd(dz, dh, x, h, *parameters, ctx.spec, *dtypes, mask)
        return tuple(grad for grad in grads if grad is not None)

    _, pullback = torch.func.vjp(  # type: ignore[misc]  # has_aux=False
        gradients, *(saved[index] for index in active)
    )
    results = pullback(tuple(cotangent for cotangent in received if cotangent is not None))
    for index, result in zip(active, results, strict=True):
        none[index] = result
    return tuple(none)


torch.library.register_autograd(
    "fusednorm::layer_norm_fwd", _fwd_backward, setup_context=_fwd_setup_context
)
torch.library.register_autograd(
    "fusednorm::layer_norm_bwd", _bwd_backward, setup_context=_bwd_setup_context
)


def layer_norm(*tensors: Tensor | None, spec: Spec, want_h: bool) -> tuple[Tensor, Tensor | None]:
    """Run the kernels and record what their backward needs.

    Args:
        tensors: x, residual, gate, weight, bias, scale, shift and seed.
        spec: What to compute.
        want_h: Whether the caller uses h.

    Returns:
        z and h; h is None where it is neither wanted nor needed by a backward, or is x.
    """
    x = tensors[0]
    kernels = None if x is None or not plain(*tensors) else ops.kernels(x.device)
    if kernels is None:
        z, h, _, _ = ops.layer_norm_fwd(*tensors, *spec)
        return z, None if spec.h_dtype is None else h
    return run_eagerly(kernels, *tensors, spec=spec, want_h=want_h)


def run_eagerly(
    kernels: ops.Kernels, *tensors: Tensor | None, spec: Spec, want_h: bool
) -> tuple[Tensor, Tensor | None]:
    """Do what `layer_norm` does with plain tensors by the given kernels."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                result = _apply(spec, kernels, *tensors)
                return result if isinstance(result, tuple) else (result, None)
    return kernels.forward(*tensors, *spec, False, want_h)[:2]
