"""What the dispatcher sees: the operator schemas, their fakes and their implementations.

An operator runs the kernels on every device that they serve and the reference on the others; a
request for torch never gets as far as an operator. `kernels` is the one place that knows which
kernels those are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusednorm import backends, reference
from fusednorm.spec import Gradients, Mask, Outputs, Spec, compute_dtype, rows_and_columns

_SPEC = "SymInt[] normalized_shape, float eps, bool rms, float dropout_p"
_library = torch.library.Library("fusednorm", "DEF")
_library.define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, "
    f"Tensor? scale, Tensor? shift, Tensor? seed, {_SPEC}, ScalarType out_dtype, "
    "ScalarType? h_dtype, ScalarType? x_hat_dtype) "
    "-> (Tensor z, Tensor h, Tensor mean, Tensor rstd)"
)
_library.define(
    "layer_norm_bwd(Tensor? dz, Tensor? dh, Tensor? x, Tensor h, Tensor? mean, Tensor rstd, "
    "Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? seed, "
    f"{_SPEC}, ScalarType x_dtype, ScalarType residual_dtype, ScalarType? x_hat_dtype, "
    "bool[7] output_mask) -> (Tensor dx, Tensor dresidual, Tensor dgate, Tensor dweight, "
    "Tensor dbias, Tensor dscale, Tensor dshift)"
)


class Kernels(NamedTuple):
    """The launchers of one implementation; those of Triton's forward and backward define them."""

    forward: Callable[..., Outputs]
    backward: Callable[..., Gradients]


def _triton_fwd(*args: Any) -> Outputs:
    from fusednorm.triton_kernels.forward import layer_norm_fwd

    return layer_norm_fwd(*args)  # type: ignore[no-any-return]


def _triton_bwd(*args: Any) -> Gradients:
    from fusednorm.triton_kernels.backward import layer_norm_bwd

    return layer_norm_bwd(*args)  # type: ignore[no-any-return]


_TRITON_KERNELS = Kernels(_triton_fwd, _triton_bwd)


@cache
def _cpu_kernels() -> Kernels:
    from fusednorm import _C  # type: ignore[attr-defined]

    return Kernels(_C.forward, _C.backward)


@cache
def _is_plain() -> Callable[..., bool]:
    from fusednorm import _C  # type: ignore[attr-defined]

    return _C.is_plain  # type: ignore[no-any-return]


@cache
def _cuda_kernels() -> Kernels:
    from fusednorm import cuda

    return Kernels(cuda.layer_norm_fwd, cuda.layer_norm_bwd)


def kernels(device: torch.device) -> Kernels | None:
    """Return the kernels that run on `device`, or None where the reference has to."""
    backend = backends.kernels(device)
    if backend == "cuda":
        return _cuda_kernels()
    if backend == "cpu":
        return _cpu_kernels()
    return None if backend is None else _TRITON_KERNELS


def eager_kernels(
    shape: object,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    plain: bool,
) -> Kernels | None:
    """Return the kernels that may run on the arguments with no further check, if there are any.

    That is where they are valid, plain tensors on the CPU and nothing looks at the operators.
    """
    if torch.compiler.is_compiling() or not backends.compiled_on_cpu(plain):
        return None
    if not _is_plain()(shape, input, residual, weight, bias):
        return None
    return _cpu_kernels()


def _layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    normalized_shape: list[int],
    eps: float,
    rms: bool,
    dropout_p: float,
    out_dtype: torch.dtype,
    h_dtype: torch.dtype | None,
    x_hat_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    tensors = (x, residual, gate, weight, bias, scale, shift, seed)
    spec = Spec(tuple(normalized_shape), eps, rms, dropout_p, out_dtype, h_dtype, x_hat_dtype)
    if (found := kernels(x.device)) is not None:
        return _fill(found.forward(*tensors, *spec, True, True), x)
    z, h, mean, rstd = reference.layer_norm(*tensors, spec)
    stored = None if h_dtype is None else h.contiguous()
    return _fill((z.contiguous(), stored, mean, rstd), x)


def _layer_norm_bwd(
    dz: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    h: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    normalized_shape: list[int],
    eps: float,
    rms: bool,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    x_hat_dtype: torch.dtype | None,
    output_mask: Mask,
) -> tuple[Tensor, ...]:
    shape = tuple(normalized_shape)
    parameters = (gate, weight, bias, scale, shift, seed)
    dtypes = (x_dtype, residual_dtype)
    if (found := kernels(h.device)) is not None:
        tensors = (dz, dh, x, h, mean, rstd, *parameters)
        return _fill(
            found.backward(*tensors, shape, dropout_p, *dtypes, x_hat_dtype, output_mask), h
        )
    spec = Spec(shape, eps, rms, dropout_p, x_dtype, h.dtype, x_hat_dtype)
    return _fill(reference.layer_norm_bwd(dz, dh, x, h, *parameters, spec, *dtypes, output_mask), h)


def _fill(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Put an empty tensor in the place of each result that there is none of."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _layer_norm_fwd_fake(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    normalized_shape: list[int],
    eps: float,
    rms: bool,
    dropout_p: float,
    out_dtype: torch.dtype,
    h_dtype: torch.dtype | None,
    x_hat_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    spec = Spec(tuple(normalized_shape), eps, rms, dropout_p, out_dtype, h_dtype, x_hat_dtype)
    rows, _ = rows_and_columns(x, spec.normalized_shape)
    stats = compute_dtype(x.dtype, h_dtype)
    z = x.new_empty(x.shape, dtype=out_dtype)
    h = None if h_dtype is None else x.new_empty(x.shape, dtype=h_dtype)
    mean = None if rms else x.new_empty(rows, dtype=stats)
    return _fill((z, h, mean, x.new_empty(rows, dtype=stats)), x)


def _layer_norm_bwd_fake(
    dz: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    h: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    normalized_shape: list[int],
    eps: float,
    rms: bool,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    x_hat_dtype: torch.dtype | None,
    output_mask: Mask,
) -> tuple[Tensor, ...]:
    streams = (h.new_empty(h.shape, dtype=dtype) for dtype in (x_dtype, residual_dtype))
    parameters = (
        None if parameter is None else parameter.new_empty(parameter.shape)
        for parameter in (gate, weight, bias, scale, shift)
    )
    return _fill(
        tuple(
            gradient if wanted else None
            for gradient, wanted in zip((*streams, *parameters), output_mask, strict=True)
        ),
        h,
    )


for _name, _implementation, _fake in (
    ("layer_norm_fwd", _layer_norm_fwd, _layer_norm_fwd_fake),
    ("layer_norm_bwd", _layer_norm_bwd, _layer_norm_bwd_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusednorm::{_name}", _fake, lib=_library)

layer_norm_fwd: Any = torch.ops.fusednorm.layer_norm_fwd.default
layer_norm_bwd: Any = torch.ops.fusednorm.layer_norm_bwd.default
