"""The equation in plain torch: differentiable to any order, on every device, under every transform.

It is the implementation behind the ``torch`` backend where torch's own operator does not serve, the
source of all derivatives beyond the first, and the arithmetic that the kernels are held to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_dims(x: Tensor, normalized_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the trailing dimensions of `x` that form a row."""
    return tuple(range(x.dim() - len(normalized_shape), x.dim()))


def _normalize(
    x: Tensor, normalized_shape: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_hat, mean and rstd in the compute dtype, the last two with their row dims kept."""
    dims = row_dims(x, normalized_shape)
    x = x.to(compute_dtype(x.dtype))
    shift = x.mean(dims, keepdim=True)
    centred = x - shift
    # What rounding left in the mean: with |mean| >> std it would otherwise offset every x_hat.
    correction = centred.mean(dims, keepdim=True)
    centred = centred - correction
    rstd = (centred.square().mean(dims, keepdim=True) + eps).sqrt().reciprocal()
    return centred * rstd, shift + correction, rstd


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x_hat
    if weight is not None:
        y = y * weight.to(x_hat.dtype)
    if bias is not None:
        y = y + bias.to(x_hat.dtype)
    return y


def layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return y = (x - mean) / sqrt(var + eps) * weight + bias in `out_dtype`.

    Forward-mode derivatives nest here; those of ``torch.native_layer_norm`` do not.
    """
    x_hat, _, _ = _normalize(x, normalized_shape, eps)
    return _affine(x_hat, weight, bias).to(out_dtype)


def layer_norm_fwd(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean [M] and rstd [M], as the forward kernel does."""
    x_hat, mean, rstd = _normalize(x, normalized_shape, eps)
    y = _affine(x_hat, weight, bias).to(out_dtype).contiguous()
    return y, mean.reshape(-1), rstd.reshape(-1)


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dweight and dbias as differentiable functions of dy, x and weight.

    The statistics are computed again from x, since what backward kernels read as constants depends
    on x where the next derivative is concerned.
    """
    dims = row_dims(x, normalized_shape)
    batch = tuple(range(x.dim() - len(normalized_shape)))
    x_hat, _, rstd = _normalize(x, normalized_shape, eps)
    g_out = dy.to(x_hat.dtype)
    dx = dweight = dbias = None
    if output_mask[0]:
        g = g_out if weight is None else g_out * weight.to(x_hat.dtype)
        c1 = (g * x_hat).mean(dims, keepdim=True)
        c2 = g.mean(dims, keepdim=True)
        dx = (rstd * (g - (x_hat * c1 + c2))).to(x.dtype)
    if output_mask[1] and weight is not None:
        dweight = _sum(g_out * x_hat, batch).to(weight.dtype)
    if output_mask[2] and bias is not None:
        dbias = _sum(g_out, batch).to(bias.dtype)
    return dx, dweight, dbias


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Add up `dims`; without any, copy, where torch would add up every dimension."""
    return x.sum(dims) if dims else x.clone()
