"""The equation in plain torch: differentiable to any order, on every device, under every transform.

    h = residual + gate * dropout(x)    x_hat = (h - mean) * rstd    y = x_hat * weight + bias
    z = y * (1 + scale) + shift

It is the implementation behind the ``torch`` backend (around torch's own operator where that
serves), the source of all derivatives beyond the first, and the arithmetic that the kernels are
held to.

Gate, scale and shift are [1 or S, N or 1]: S samples of M / S consecutive rows each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusednorm.observers import shape_of, tracing
from fusednorm.spec import (
    ByInput,
    Dtypes,
    GatedOperands,
    GatedSaved,
    GatedSpec,
    Gradients,
    Mask,
    Operands,
    Outputs,
    Saved,
    Spec,
    compute_dtype,
    drop_below,
    rows_and_columns,
)


def _by_sample(x: Tensor, spec: Spec, *terms: Tensor | None) -> Tensor:
    """Return `x` as [S, M / S, N]."""
    samples = 1
    for term in terms:
        if term is not None and shape_of(term)[0] != 1:
            samples = shape_of(term)[0]
    rows, cols = rows_and_columns(x, spec.normalized_shape)
    # A trace then holds no number of rows.
    size = -1 if tracing() and rows * cols > 0 else rows // max(samples, 1)
    return x.reshape(samples, size, cols)


def _factor(term: Tensor, like: Tensor) -> Tensor:
    """Return a gate, scale or shift as a factor of [S, M / S, N] rows in the dtype of `like`."""
    return term.unsqueeze(1).to(like.dtype)


def _normalize(
    h: Tensor, spec: Spec | GatedSpec, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return x_hat, mean (None for RMS) and rstd of [.., N] rows, the last two as [.., 1]."""
    mean = None
    if not spec.rms:
        shift = h.mean(-1, keepdim=True)
        h = h - shift
        # What rounding left in the mean: with |mean| >> std it would otherwise offset every x_hat.
        correction = h.mean(-1, keepdim=True)
        h, mean = h - correction, shift + correction
    if rstd is None:
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
    if gate is None and keep is None:
        h = x.to(compute) if residual is None else x.to(compute) + residual.to(compute)
        return h.to(spec.h_dtype)
    h = _by_sample(x, spec, gate).to(compute)
    if keep is not None:
        h = h * keep.reshape(h.shape)
    if gate is not None:
        h = h * _factor(gate, h)
    if residual is not None:
        h = h + residual.reshape(h.shape).to(compute)
    return h.to(spec.h_dtype).reshape(x.shape)


def layer_norm(operands: Operands, spec: Spec) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return z, h, mean [M] (None for RMS) and rstd [M].

    Forward-mode derivatives nest here; those of ``torch.native_layer_norm`` do not.
    """
    x, residual, gate, weight, bias, scale, shift, seed = operands
    h = stream(x, residual, gate, _keep(seed, x, spec), spec)
    rows = h.reshape(rows_and_columns(h, spec.normalized_shape))
    x_hat, mean, rstd = _normalize(rows.to(compute_dtype(x.dtype, h.dtype)), spec)
    y = _affine(x_hat, weight, bias, spec.x_hat_dtype).reshape(x.shape)
    z = modulate(y, scale, shift, spec)
    return z, h, None if mean is None else mean.reshape(-1), rstd.reshape(-1)


def layer_norm_bwd(
    dz: Tensor | None, dh: Tensor | None, saved: Saved, spec: Spec, dtypes: Dtypes, wanted: Mask
) -> Gradients:
    """Return the wanted gradients as differentiable functions of dz, dh, x, h and the parameters.

    Where `saved` has no statistics they are computed again from h: what backward kernels read as
    constants depends on h where the next derivative is concerned.
    """
    want = ByInput(*wanted)
    x, h, _, rstd, gate, weight, bias, scale, shift, seed = saved
    terms = (gate, scale, shift)
    rows = _by_sample(h, spec, *terms).to(compute_dtype(h.dtype, dtypes[0]))
    total = torch.zeros_like(rows)
    dweight = dbias = dscale = dshift = None
    if dz is not None:
        known = None if rstd is None else rstd.reshape(*rows.shape[:-1], 1)
        x_hat, _, rstd = _normalize(rows, spec, known)
        dz = _by_sample(dz, spec, *terms).to(rows.dtype)
        dy = dz if scale is None else dz * (1 + _factor(scale, dz))
        g = dy if weight is None else dy * weight.flatten().to(dy.dtype)
        projection = x_hat * (g * x_hat).mean(-1, keepdim=True)
        if not spec.rms:
            projection = projection + g.mean(-1, keepdim=True)
        total = rstd * (g - projection)
        if want.weight and weight is not None:
            dweight = (dy * _affine(x_hat, None, None, spec.x_hat_dtype)).sum((0, 1))
            dweight = dweight.to(weight.dtype).reshape(weight.shape)
        if want.bias and bias is not None:
            dbias = dy.sum((0, 1)).to(bias.dtype).reshape(bias.shape)
        if want.scale and scale is not None:
            dscale = _sum_to(dz * _affine(x_hat, weight, bias, spec.x_hat_dtype), scale)
        if want.shift and shift is not None:
            dshift = _sum_to(dz, shift)
    if dh is not None:
        total = total + dh.reshape(rows.shape).to(rows.dtype)
    dresidual = total.to(dtypes[1]).reshape(h.shape) if want.residual else None
    if (keep := _keep(seed, h, spec)) is not None:
        total = total * keep.reshape(rows.shape)
    dgate = None
    if want.gate and gate is not None and x is not None:
        dgate = _sum_to(total * x.reshape(rows.shape).to(rows.dtype), gate)
    if gate is not None:
        total = total * _factor(gate, total)
    dx = total.to(dtypes[0]).reshape(h.shape) if want.x else None
    return ByInput(dx, dresidual, dgate, dweight, dbias, dscale, dshift)


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
    compute = compute_dtype(x.dtype, spec.h_dtype)
    quad = torch.arange(-(-cols // 4), device=x.device)[None, :]

    def kept(first: int, last: int) -> Tensor:
        row = torch.arange(first, last, device=x.device)[:, None]
        words = torch.stack(_philox(quad, row & _WORD, row >> 32, torch.zeros_like(row), seed), -1)
        words = words.reshape(words.shape[0], 4 * words.shape[1])[:, :cols]
        return (words >= drop_below(spec.dropout_p)).to(compute) / (1 - spec.dropout_p)

    if torch.compiler.is_compiling() or rows * cols <= _IN_CACHE:
        return kept(0, rows)
    # The words of a few rows at a time stay in cache through the rounds.
    step = max(1, _IN_CACHE // cols)
    return torch.cat([kept(i, min(i + step, rows)) for i in range(0, rows, step)])


_IN_CACHE = 1 << 17  # elements: their words are 256 KB at each step of the rounds


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


# The equation around torch's own operators


def around_torch(operands: Operands, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return z and h by torch's own norm, with the other terms in plain torch around it."""
    x, residual, gate, weight, bias, scale, shift, seed = operands
    if not _torch_accepts(operands, spec):
        return layer_norm(operands, spec)[:2]
    h = stream(x, residual, gate, _keep(seed, x, spec), spec)
    if spec.rms:
        y = F.rms_norm(h, spec.normalized_shape, weight, spec.eps)
    else:
        y = F.layer_norm(h, spec.normalized_shape, weight, bias, spec.eps)
    if scale is None and shift is None and y.dtype == spec.out_dtype:
        return y, h
    return modulate(y, scale, shift, spec), h


def _torch_accepts(operands: Operands, spec: Spec) -> bool:
    """Return whether torch's operator computes this, and takes the mix of dtypes."""
    x, weight, bias = operands.x, operands.weight, operands.bias
    if spec.x_hat_dtype is not None or (spec.rms and bias is not None):
        return False
    dtype = x.dtype if spec.h_dtype is None else spec.h_dtype
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return True
    if spec.out_dtype != x.dtype:  # autocast
        return True
    parameters = {parameter.dtype for parameter in (weight, bias) if parameter is not None}
    half_on_cpu = x.is_cpu and dtype in (torch.float16, torch.bfloat16)
    return not spec.rms and half_on_cpu and parameters == {torch.float32}


def launch_fwd(*arguments: Any) -> Outputs:
    """Compute the equation with the signature of a launcher: operands, spec, and what is wanted."""
    count = len(Operands._fields)
    operands, (*options, save_stats, store_h) = Operands(*arguments[:count]), arguments[count:]
    spec = Spec(*options)
    x, _, _, weight, bias, scale, shift, _ = operands
    if not _torch_accepts(operands, spec):
        z, h, mean, rstd = layer_norm(operands, spec)
    elif (
        not spec.rms
        and spec.h_dtype is None
        and spec.out_dtype == x.dtype
        and scale is None
        and shift is None
    ):
        # As torch's own node, statistics included, for the same bits in both directions.
        z, mean, rstd = torch.native_layer_norm(x, spec.normalized_shape, weight, bias, spec.eps)
        compute = compute_dtype(x.dtype)
        return z, None, mean.reshape(-1).to(compute), rstd.reshape(-1).to(compute)
    else:
        z, h = around_torch(operands, spec)
        mean = rstd = None
        if save_stats:
            rows = h.reshape(rows_and_columns(h, spec.normalized_shape))
            _, mean, rstd = _normalize(rows.to(compute_dtype(x.dtype, h.dtype)), spec)
    stored = h.contiguous() if spec.h_dtype is not None and store_h else None
    mean, rstd = (None if one is None else one.reshape(-1) for one in (mean, rstd))
    return z.contiguous(), stored, mean, rstd


def launch_bwd(dz: Tensor | None, dh: Tensor | None, *arguments: Any) -> Gradients:
    """Differentiate it with the signature of a launcher: what was saved, and the numbers."""
    count = len(Saved._fields)
    saved, options = Saved(*arguments[:count]), arguments[count:]
    shape, dropout_p, x_dtype, residual_dtype, x_hat_dtype, wanted = options
    dtype = saved.h.dtype  # of z and h, which play no part in a backward
    spec = Spec(shape, 0.0, saved.mean is None, dropout_p, dtype, dtype, x_hat_dtype)
    if dz is not None and dh is None and _torch_differentiates(dz, saved, x_dtype, wanted):
        return _torch_bwd(dz, saved, shape, ByInput(*wanted))
    return layer_norm_bwd(dz, dh, saved, spec, (x_dtype, residual_dtype), wanted)


def _torch_differentiates(dz: Tensor, saved: Saved, x_dtype: torch.dtype, wanted: Mask) -> bool:
    """Return whether the backward of torch's own layer norm is all of this one."""
    others = (saved.gate, saved.scale, saved.shift, saved.seed)
    dtypes = {t.dtype for t in (dz, saved.h, saved.weight, saved.bias) if t is not None}
    return (
        saved.mean is not None
        and all(tensor is None for tensor in others)
        and not ByInput(*wanted).residual
        and dtypes == {x_dtype}
    )


def _torch_bwd(dz: Tensor, saved: Saved, shape: tuple[int, ...], want: ByInput) -> Gradients:
    """Run the backward of torch's own layer norm."""
    h, leading = saved.h, saved.h.dim() - len(shape)
    # Torch rounds the statistics of 16-bit rows on CPU to the dtype of the rows.
    size = (*h.shape[:leading], *(1 for _ in shape))

    def given(statistic: Any) -> Tensor:
        return statistic.reshape(size).to(h.dtype if h.is_cpu else statistic.dtype)  # type: ignore[no-any-return]

    mean, rstd = given(saved.mean), given(saved.rstd)
    mask = [want.x, want.weight and saved.weight is not None, want.bias and saved.bias is not None]
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dz, h, shape, mean, rstd, saved.weight, saved.bias, mask
    )
    return ByInput(x=dx, weight=dweight, bias=dbias)


# The gated norm


def _in_groups(tensor: Tensor, spec: GatedSpec, dtype: torch.dtype) -> Tensor:
    """Return rows as [M, groups, group_size] of `dtype`."""
    rows, cols = rows_and_columns(tensor, spec.normalized_shape)
    size = -1 if tracing() and rows * cols > 0 else rows  # a trace then holds no number of rows
    return tensor.reshape(size, cols // max(spec.group_size, 1), spec.group_size).to(dtype)


def gated_norm(operands: GatedOperands, spec: GatedSpec) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return z, and mean (None for RMS) and rstd of every group of every row, [M * groups].

    z = norm(x) * silu(gate_input), or norm(x * silu(gate_input)).
    """
    x, gate_input, weight, bias = operands
    dtype = compute_dtype(x.dtype, gate_input.dtype)
    silu = F.silu(_in_groups(gate_input, spec, dtype))
    h = _in_groups(x, spec, dtype)
    x_hat, mean, rstd = _normalize(h if spec.norm_before_gate else h * silu, spec)
    z = _affine(x_hat.flatten(1), weight, bias, spec.x_hat_dtype)
    if spec.norm_before_gate:
        z = z * silu.flatten(1)
    mean = None if mean is None else mean.reshape(-1)
    return z.to(spec.out_dtype).reshape(x.shape), mean, rstd.reshape(-1)


def gated_norm_bwd(
    dz: Tensor, saved: GatedSaved, spec: GatedSpec, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the wanted gradients of x, gate_input, weight and bias, as `layer_norm_bwd` does."""
    x, gate_input, _, rstd, weight, bias = saved
    dtype = compute_dtype(x.dtype, gate_input.dtype)
    h, dy, gate = (_in_groups(tensor, spec, dtype) for tensor in (x, dz, gate_input))
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    dsilu = sigmoid + silu * (1 - sigmoid)
    known = None if rstd is None else rstd.reshape(*h.shape[:-1], 1)
    x_hat, _, rstd = _normalize(h if spec.norm_before_gate else h * silu, spec, known)
    dgate = dy
    if spec.norm_before_gate:
        y = _affine(x_hat.flatten(1), weight, bias, spec.x_hat_dtype)
        dgate, dy = dy * y.reshape(h.shape), dy * silu
    g = dy if weight is None else dy * weight.reshape(h.shape[1:]).to(dtype)
    projection = x_hat * (g * x_hat).mean(-1, keepdim=True)
    if not spec.rms:
        projection = projection + g.mean(-1, keepdim=True)
    dx = rstd * (g - projection)
    if not spec.norm_before_gate:
        dgate, dx = dx * h, dx * silu
    dweight = dbias = None
    if wanted[2] and weight is not None:
        dweight = (dy * _affine(x_hat, None, None, spec.x_hat_dtype)).sum(0)
        dweight = dweight.to(weight.dtype).reshape(weight.shape)
    if wanted[3] and bias is not None:
        dbias = dy.sum(0).to(bias.dtype).reshape(bias.shape)
    return (
        dx.to(x.dtype).reshape(x.shape) if wanted[0] else None,
        (dgate * dsilu).to(gate_input.dtype).reshape(x.shape) if wanted[1] else None,
        dweight,
        dbias,
    )


def launch_gated_fwd(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the gated norm with the signature of a launcher."""
    count = len(GatedOperands._fields)
    *options, _save_stats = arguments[count:]
    z, mean, rstd = gated_norm(GatedOperands(*arguments[:count]), GatedSpec(*options))
    return z.contiguous(), mean, rstd


def launch_gated_bwd(dz: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Differentiate it with the signature of a launcher."""
    count = len(GatedSaved._fields)
    saved, options = GatedSaved(*arguments[:count]), arguments[count:]
    shape, group_size, norm_before_gate, x_hat_dtype, wanted = options
    dtype = dz.dtype  # that of z plays no part in a backward
    spec = GatedSpec(
        shape, group_size, 0.0, saved.mean is None, norm_before_gate, dtype, x_hat_dtype
    )
    return gated_norm_bwd(dz, saved, spec, wanted)
