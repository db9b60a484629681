"""The equation in plain torch: differentiable to any order, on every device, under every transform.

    h = residual + gate * dropout(x)    x_hat = (h - mean) * rstd    y = x_hat * weight + bias
    z = y * (1 + scale) + shift

It is the implementation behind the ``torch`` backend where torch's own operator does not serve, the
source of all derivatives beyond the first, and the arithmetic that the kernels are held to.

Gate, scale and shift are [1 or S, N or 1]: S samples of M / S consecutive rows each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusednorm.spec import Gradients, Mask, Spec, compute_dtype, drop_below, rows_and_columns


def _by_sample(x: Tensor, spec: Spec, *terms: Tensor | None) -> Tensor:
    """Return `x` as [S, M / S, N]."""
    samples = max([1, *(term.shape[0] for term in terms if term is not None)])
    rows, cols = rows_and_columns(x, spec.normalized_shape)
    return x.reshape(samples, rows // max(samples, 1), cols)


def _factor(term: Tensor, like: Tensor) -> Tensor:
    """Return a gate, scale or shift as a factor of [S, M / S, N] rows in the dtype of `like`."""
    return term.unsqueeze(1).to(like.dtype)


def _normalize(h: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return x_hat, mean (None for RMS) and rstd of [.., N] rows, the last two as [.., 1]."""
    mean = None
    if not spec.rms:
        shift = h.mean(-1, keepdim=True)
        h = h - shift
        # What rounding left in the mean: with |mean| >> std it would otherwise offset every x_hat.
        correction = h.mean(-1, keepdim=True)
        h, mean = h - correction, shift + correction
    rstd = (h.square().mean(-1, keepdim=True) + spec.eps).sqrt().reciprocal()
    return h * rstd, mean, rstd


def _affine(
    x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    y = x_hat if dtype is None else x_hat.to(dtype).to(x_hat.dtype)
    if weight is not None:
        y = y * weight.flatten().to(y.dtype)
    if bias is not None:
        y = y + bias.flatten().to(y.dtype)
    return y


def modulate(y: Tensor, scale: Tensor | None, shift: Tensor | None, spec: Spec) -> Tensor:
    """Return z = y * (1 + scale) + shift in `out_dtype`."""
    if scale is None and shift is None:
        return y.to(spec.out_dtype)
    z = _by_sample(y, spec, scale, shift).to(compute_dtype(y.dtype))
    if scale is not None:
        z = z * (1 + _factor(scale, z))
    if shift is not None:
        z = z + _factor(shift, z)
    return z.to(spec.out_dtype).reshape(y.shape)


def stream(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, keep: Tensor | None, spec: Spec
) -> Tensor:
    """Return h = residual + gate * keep * x in `h_dtype`, or `x` itself where that is None."""
    if spec.h_dtype is None:
        return x
    compute = compute_dtype(x.dtype, spec.h_dtype)
    h = _by_sample(x, spec, gate).to(compute)
    if keep is not None:
        h = h * keep.reshape(h.shape)
    if gate is not None:
        h = h * _factor(gate, h)
    if residual is not None:
        h = h + residual.reshape(h.shape).to(compute)
    return h.to(spec.h_dtype).reshape(x.shape)


def layer_norm(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return z, h, mean [M] (None for RMS) and rstd [M].

    Forward-mode derivatives nest here; those of ``torch.native_layer_norm`` do not.
    """
    h = stream(x, residual, gate, _keep(seed, x, spec), spec)
    rows = h.reshape(rows_and_columns(h, spec.normalized_shape))
    x_hat, mean, rstd = _normalize(rows.to(compute_dtype(x.dtype, h.dtype)), spec)
    y = _affine(x_hat, weight, bias, spec.x_hat_dtype).reshape(x.shape)
    z = modulate(y, scale, shift, spec)
    return z, h, None if mean is None else mean.reshape(-1), rstd.reshape(-1)


def layer_norm_bwd(
    dz: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    spec: Spec,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    output_mask: Mask,
) -> Gradients:
    """Return the wanted gradients as differentiable functions of dz, dh, x, h and the parameters.

    The statistics are computed again from h, since what backward kernels read as constants depends
    on h where the next derivative is concerned.
    """
    want_dx, want_dresidual, want_dgate, want_dweight, want_dbias, want_dscale, want_dshift = (
        output_mask
    )
    terms = (gate, scale, shift)
    rows = _by_sample(h, spec, *terms).to(compute_dtype(h.dtype, x_dtype))
    total = torch.zeros_like(rows)
    dweight = dbias = dscale = dshift = None
    if dz is not None:
        x_hat, _, rstd = _normalize(rows, spec)
        dz = _by_sample(dz, spec, *terms).to(rows.dtype)
        dy = dz if scale is None else dz * (1 + _factor(scale, dz))
        g = dy if weight is None else dy * weight.flatten().to(dy.dtype)
        projection = x_hat * (g * x_hat).mean(-1, keepdim=True)
        if not spec.rms:
            projection = projection + g.mean(-1, keepdim=True)
        total = rstd * (g - projection)
        if want_dweight and weight is not None:
            dweight = (dy * _affine(x_hat, None, None, spec.x_hat_dtype)).sum((0, 1))
            dweight = dweight.to(weight.dtype).reshape(weight.shape)
        if want_dbias and bias is not None:
            dbias = dy.sum((0, 1)).to(bias.dtype).reshape(bias.shape)
        if want_dscale and scale is not None:
            dscale = _sum_to(dz * _affine(x_hat, weight, bias, spec.x_hat_dtype), scale)
        if want_dshift and shift is not None:
            dshift = _sum_to(dz, shift)
    if dh is not None:
        total = total + dh.reshape(rows.shape).to(rows.dtype)
    dresidual = total.to(residual_dtype).reshape(h.shape) if want_dresidual else None
    if (keep := _keep(seed, h, spec)) is not None:
        total = total * keep.reshape(rows.shape)
    dgate = None
    if want_dgate and gate is not None and x is not None:
        dgate = _sum_to(total * x.reshape(rows.shape).to(rows.dtype), gate)
    if gate is not None:
        total = total * _factor(gate, total)
    dx = total.to(x_dtype).reshape(h.shape) if want_dx else None
    return dx, dresidual, dgate, dweight, dbias, dscale, dshift


def _sum_to(x: Tensor, term: Tensor) -> Tensor:
    """Add up [S, M / S, N] over the rows, and columns, that each number of a term covers."""
    total = x.sum(1)
    if term.shape[1] != total.shape[1]:
        total = total.sum(1, keepdim=True)
    if term.shape[0] != total.shape[0]:
        total = total.sum(0, keepdim=True)
    return total.to(term.dtype)


def _keep(seed: Tensor | None, x: Tensor, spec: Spec) -> Tensor | None:
    """Return what dropout multiplies x by, [M, N]: 0 or 1 / (1 - p); None without a seed.

    The mask is that of the kernels: element (row, column) is kept if word column % 4 of
    Philox 4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011) with counter
    (column / 4, row) and key `seed` is at least p * 2^32.
    """
    if seed is None:
        return None
    rows, cols = rows_and_columns(x, spec.normalized_shape)
    row = torch.arange(rows, device=x.device)[:, None]
    quad = torch.arange(-(-cols // 4), device=x.device)[None, :]
    words = torch.stack(_philox(quad, row & _WORD, row >> 32, torch.zeros_like(row), seed), -1)
    words = words.reshape(words.shape[0], 4 * words.shape[1])[:, :cols]
    kept = words >= drop_below(spec.dropout_p)
    return kept.to(compute_dtype(x.dtype, spec.h_dtype)) / (1 - spec.dropout_p)


_WORD = 0xFFFFFFFF


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> list[Tensor]:
    """Return the four words of each counter; words are int64, whose products wrap around."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (b >> 32) & _WORD ^ c1 ^ k0, (a >> 32) & _WORD ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return list(torch.broadcast_tensors(c0, c1, c2, c3))
