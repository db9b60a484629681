"""What the dispatcher sees: how an operator is defined, and those of the equation.

An operator runs the kernels on every device that they serve and the reference on the others; on
the CPU the extension serves it without Python (csrc/own_operators.cpp), and hands on what it
cannot. Its arguments are those of the launchers: the tensors by `Operands`, or dz, dh and `Saved`,
then the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fusednorm import backends
from fusednorm.spec import ByInput, Operands, Saved, Spec, compute_dtype, rows_and_columns

_SPEC = "SymInt[] normalized_shape, float eps, bool rms, float dropout_p"
_library = torch.library.Library("fusednorm", "DEF")

compiled: dict[Any, Any] = {}
"""What a compiled graph has in the place of an operator: its autograd is done, and that of an
operator, which Python does, would cost each call more than a small norm."""


def define(name: str, signature: str, implementation: Any, fake: Any) -> Any:
    """Define an operator, and its twin for compiled graphs; return the operator."""
    for each in (name, f"_{name}"):
        _library.define(each + signature)
        _library.impl(each, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusednorm::{each}", fake, lib=_library)
    _library.impl(f"_{name}", torch.library.fallthrough_kernel, "Autograd")
    operator, twin = (getattr(torch.ops.fusednorm, each).default for each in (name, f"_{name}"))
    compiled[operator] = twin
    if (extension := backends.own_operators()) is not None:
        extension.register_own_operator(name, implementation)
    return operator


def register_autograd(operator: Any, formula: Callable[..., Any]) -> None:
    """Let a function run where autograd meets an operator."""
    _library.impl(operator._opname, formula, "Autograd")


def _forward_arguments(arguments: tuple[Any, ...]) -> tuple[Operands, Spec]:
    count = len(Operands._fields)
    shape, *options = arguments[count:]
    return Operands(*arguments[:count]), Spec(tuple(shape), *options)


def _layer_norm_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    operands, spec = _forward_arguments(arguments)
    launchers = backends.launchers(backends.kernels(operands.x.device) or "torch")
    return fill(launchers.forward(*operands, *spec, True, True), operands.x)


def _layer_norm_fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    (x, *_), spec = _forward_arguments(arguments)
    rows, _ = rows_and_columns(x, spec.normalized_shape)
    stats = compute_dtype(x.dtype, spec.h_dtype)
    z = x.new_empty(x.shape, dtype=spec.out_dtype)
    h = None if spec.h_dtype is None else x.new_empty(x.shape, dtype=spec.h_dtype)
    mean = None if spec.rms else x.new_empty(rows, dtype=stats)
    return fill((z, h, mean, x.new_empty(rows, dtype=stats)), x)


def _layer_norm_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    count = 2 + len(Saved._fields)
    tensors, (shape, _eps, _rms, *options, mask) = arguments[:count], arguments[count:]
    h = Saved(*tensors[2:]).h
    launchers = backends.launchers(backends.kernels(h.device) or "torch")
    return fill(launchers.backward(*tensors, tuple(shape), *options, tuple(mask)), h)


def _layer_norm_bwd_fake(_dz: Tensor | None, _dh: Tensor | None, *arguments: Any) -> Any:
    count = len(Saved._fields)
    saved, (*_, x_dtype, residual_dtype, _, output_mask) = (
        Saved(*arguments[:count]),
        arguments[count:],
    )
    h = saved.h
    likes = ByInput(h, h, saved.gate, saved.weight, saved.bias, saved.scale, saved.shift)
    dtypes = (x_dtype, residual_dtype, *(getattr(like, "dtype", None) for like in likes[2:]))
    return fill(
        tuple(
            like.new_empty(like.shape, dtype=dtype) if wanted and like is not None else None
            for like, dtype, wanted in zip(likes, dtypes, output_mask, strict=True)
        ),
        h,
    )


def fill(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Put an empty tensor in the place of each result that there is none of."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


layer_norm_fwd = define(
    "layer_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, "
    f"Tensor? shift, Tensor? seed, {_SPEC}, ScalarType out_dtype, ScalarType? h_dtype, "
    "ScalarType? x_hat_dtype) -> (Tensor z, Tensor h, Tensor mean, Tensor rstd)",
    _layer_norm_fwd,
    _layer_norm_fwd_fake,
)
layer_norm_bwd = define(
    "layer_norm_bwd",
    "(Tensor? dz, Tensor? dh, Tensor? x, Tensor h, Tensor? mean, Tensor rstd, Tensor? gate, "
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? seed, "
    f"{_SPEC}, ScalarType x_dtype, ScalarType residual_dtype, ScalarType? x_hat_dtype, "
    "bool[7] output_mask) -> (Tensor dx, Tensor dresidual, Tensor dgate, Tensor dweight, "
    "Tensor dbias, Tensor dscale, Tensor dshift)",
    _layer_norm_bwd,
    _layer_norm_bwd_fake,
)
