"""What autograd saves and differentiates.

A plain eager call goes through `LayerNormFunction` straight to the launchers. Traced calls and
tensor subclasses go through the registered operators, whose autograd formulas stand below. Both
share one backward; every higher derivative comes from `reference.layer_norm_bwd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusednorm import ops, reference


def transforms_active() -> bool:
    """Return whether a `torch.func` transform or forward-mode AD is in progress."""
    return torch._C._are_functorch_transforms_active() or forward_ad_active()


def forward_ad_active() -> bool:
    """Return whether forward-mode AD is in progress."""
    return torch.autograd.forward_ad._current_level >= 0


def plain(*tensors: Tensor | None) -> bool:
    """Return whether the tensors may skip the dispatcher: no subclass, tracing or dispatch mode."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(
        tensor is None or type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
        for tensor in tensors
    )


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight, dbias for the first three differentiable inputs of `ctx`."""
    input, weight, bias, mean, rstd = ctx.saved_tensors
    shape, eps, mask = ctx.normalized_shape, ctx.eps, ctx.output_mask
    # is_grads_batched=True still batches dy through the vmap that preceded torch.func.
    if transforms_active() or torch._C._functorch.is_legacy_batchedtensor(dy):
        return reference.layer_norm_bwd(dy, input, shape, weight, bias, eps, mask)
    if not torch.is_grad_enabled() and plain(dy, input):
        return ops.kernels_bwd(dy, input, shape, mean, rstd, weight, bias, mask)
    grads = ops.layer_norm_bwd(dy, input, shape, mean, rstd, weight, bias, eps, mask)
    dx, dweight, dbias = (
        grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)
    )
    return dx, dweight, dbias


class LayerNormFunction(torch.autograd.Function):
    """Layer norm of plain tensors through the kernels, with their fused backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_shape: tuple[int, ...],
        eps: float,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Run the forward kernel; save the inputs and the row statistics."""
        y, mean, rstd = ops.kernels_fwd(
            input, normalized_shape, weight, bias, eps, out_dtype, save_stats=True
        )
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.normalized_shape, ctx.eps = normalized_shape, eps
        ctx.output_mask = ctx.needs_input_grad[:3]
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """Run the backward kernels."""
        if dy is None:
            return None, None, None, None, None, None
        return *_backward(ctx, dy), None, None, None


def _fwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, normalized_shape, weight, bias, eps, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(input, weight, bias, mean, rstd)
    ctx.normalized_shape, ctx.eps = tuple(normalized_shape), eps
    needs = ctx.needs_input_grad
    ctx.output_mask = (needs[0], needs[2], needs[3])
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> Any:
    if dy is None:
        return None, None, None, None, None, None
    dx, dweight, dbias = _backward(ctx, dy)
    return dx, None, dweight, dbias, None, None


def _bwd_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, input, normalized_shape, _, _, weight, bias, eps, output_mask = inputs
    ctx.save_for_backward(dy, input, weight, bias)
    ctx.normalized_shape, ctx.eps = tuple(normalized_shape), eps
    ctx.output_mask = tuple(output_mask)
    ctx.set_materialize_grads(False)


def _bwd_backward(ctx: Any, *cotangents: Tensor | None) -> Any:
    """Differentiate the backward: the pullback of the reference formulas at dy, x and weight."""
    dy, input, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = (
        cotangent if wanted else None
        for cotangent, wanted in zip(cotangents, ctx.output_mask, strict=True)
    )
    mask = (dx is not None, dweight is not None, dbias is not None)
    if not any(mask):
        return (None,) * 9

    def gradients(dy: Tensor, input: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
        grads = reference.layer_norm_bwd(
            dy, input, ctx.normalized_shape, weight, bias, ctx.eps, mask
        )
        return tuple(grad for grad in grads if grad is not None)

    primals = (dy, input) if weight is None else (dy, input, weight)
    _, pullback = torch.func.vjp(gradients, *primals)  # type: ignore[misc]  # has_aux=False
    ddy, ddx, *ddweight = pullback(
        tuple(cotangent for cotangent in (dx, dweight, dbias) if cotangent is not None)
    )
    return ddy, ddx, None, None, None, ddweight[0] if ddweight else None, None, None, None


torch.library.register_autograd(
    "fusednorm::layer_norm_fwd", _fwd_backward, setup_context=_fwd_setup_context
)
torch.library.register_autograd(
    "fusednorm::layer_norm_bwd", _bwd_backward, setup_context=_bwd_setup_context
)


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Run the kernels on [*, *normalized_shape] and record what their backward needs."""
    if not plain(input, weight, bias):
        y: Tensor = ops.layer_norm_fwd(input, normalized_shape, weight, bias, eps, out_dtype)[0]
        return y
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return LayerNormFunction.apply(  # type: ignore[no-any-return,no-untyped-call]
            input, weight, bias, normalized_shape, eps, out_dtype
        )
    return ops.kernels_fwd(input, normalized_shape, weight, bias, eps, out_dtype, save_stats=False)[
        0
    ]
