"""What the dispatcher sees: the operator schemas, their fakes and their implementations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusednorm import backends, reference

_library = torch.library.Library("fusednorm", "DEF")
_library.define(
    "layer_norm_fwd(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, "
    "float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "layer_norm_bwd(Tensor dy, Tensor input, SymInt[] normalized_shape, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias, float eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)

Mask = tuple[bool, bool, bool]


def run_fwd(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    save_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the forward kernel on rows of `input`; y has the shape of `input`."""
    from fusednorm.triton_kernels.forward import layer_norm_fwd

    rows = as_rows(input, normalized_shape)
    y, mean, rstd = layer_norm_fwd(rows, weight, bias, eps, out_dtype, save_stats)
    return y.view(input.shape), mean, rstd


def run_bwd(
    dy: Tensor,
    input: Tensor,
    normalized_shape: tuple[int, ...],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Mask,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward kernels; dx has the shape of `input`."""
    from fusednorm.triton_kernels.backward import layer_norm_bwd

    dx, dweight, dbias = layer_norm_bwd(
        as_rows(dy, normalized_shape),
        as_rows(input, normalized_shape),
        mean,
        rstd,
        weight,
        bias,
        output_mask,
    )
    return None if dx is None else dx.view(input.shape), dweight, dbias


def as_rows(x: Tensor, normalized_shape: tuple[int, ...]) -> Tensor:
    """Return `x` as [M, N]: a view where the rows are evenly spaced, else a copy."""
    batch = x.dim() - len(normalized_shape)
    return x.reshape(math.prod(x.shape[:batch]), math.prod(normalized_shape))


def _layer_norm_fwd(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(normalized_shape)
    if backends.select(input) == "triton":
        y, mean, rstd = run_fwd(input, shape, weight, bias, eps, out_dtype, save_stats=True)
        return y, mean, rstd  # type: ignore[return-value]  # save_stats
    return reference.layer_norm_fwd(input, shape, weight, bias, eps, out_dtype)


def _layer_norm_bwd(
    dy: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_mask: Mask,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(normalized_shape)
    if backends.select(input) == "triton":
        grads = run_bwd(dy, input, shape, mean, rstd, weight, bias, output_mask)
    else:
        grads = reference.layer_norm_bwd(dy, input, shape, weight, bias, eps, output_mask)
    return _fill(grads, input)


def _fill(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put an empty tensor in the place of each gradient that was not asked for."""
    dx, dweight, dbias = (like.new_empty(0) if grad is None else grad for grad in grads)
    return dx, dweight, dbias


def _layer_norm_fwd_fake(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = math.prod(input.shape[: input.dim() - len(normalized_shape)])
    stats = reference.compute_dtype(input.dtype)
    return (
        input.new_empty(input.shape, dtype=out_dtype),
        input.new_empty(rows, dtype=stats),
        input.new_empty(rows, dtype=stats),
    )


def _layer_norm_bwd_fake(
    dy: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_mask: Mask,
) -> tuple[Tensor, Tensor, Tensor]:
    sources = (input, weight, bias)
    return _fill(
        tuple(
            source.new_empty(source.shape) if wanted and source is not None else None
            for wanted, source in zip(output_mask, sources, strict=True)
        ),
        input,
    )


for _name, _implementation, _fake in (
    ("layer_norm_fwd", _layer_norm_fwd, _layer_norm_fwd_fake),
    ("layer_norm_bwd", _layer_norm_bwd, _layer_norm_bwd_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusednorm::{_name}", _fake, lib=_library)

layer_norm_fwd: Any = torch.ops.fusednorm.layer_norm_fwd.default
layer_norm_bwd: Any = torch.ops.fusednorm.layer_norm_bwd.default
