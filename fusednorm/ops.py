"""What the dispatcher sees: the operator schemas, their fakes and their implementations.

An operator runs the kernels on every device that they serve and the reference on the others; a
request for torch never gets as far as an operator.
"""

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


def kernels_fwd(*args: Any, save_stats: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Call the launcher of the forward kernel, which imports Triton."""
    from fusednorm.triton_kernels.forward import layer_norm_fwd

    return layer_norm_fwd(*args, save_stats)  # type: ignore[no-any-return]


def kernels_bwd(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Call the launcher of the backward kernels, which imports Triton."""
    from fusednorm.triton_kernels.backward import layer_norm_bwd

    return layer_norm_bwd(*args)  # type: ignore[no-any-return]


def _layer_norm_fwd(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(normalized_shape)
    if backends.serves("triton", input.device):
        y, mean, rstd = kernels_fwd(input, shape, weight, bias, eps, out_dtype, save_stats=True)
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
    if backends.serves("triton", input.device):
        grads = kernels_bwd(dy, input, shape, mean, rstd, weight, bias, output_mask)
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
