"""The launchers of the compiled CUDA kernels: check, choose device and stream, launch.

They have LayerNorm, RMSNorm, residual and dropout for rows of one dtype; Triton's kernels have the
rest of the equation. Those of Triton say what the arguments and the results are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusednorm import _C  # type: ignore[attr-defined]
from fusednorm.spec import Gradients, Outputs
from fusednorm.validation import fail

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def layer_norm_fwd(*arguments: Any) -> Outputs:
    """Run the forward kernel.

    Raises:
        ValueError: The kernels do not have what is asked for.
    """
    x, residual, gate, weight, bias, scale, shift, _, shape, *_ = arguments
    out_dtype, h_dtype, x_hat_dtype = arguments[12:15]
    with _current(x.device):
        terms = gate, scale, shift
        _check(x, (residual,), (out_dtype, h_dtype), terms, x_hat_dtype, math.prod(shape))
        _check_parameters(x, weight, bias)
        return _C.cuda_forward(*arguments, _stream(x.device))  # type: ignore[no-any-return]


def layer_norm_bwd(*arguments: Any) -> Gradients:
    """Run the backward kernels.

    Raises:
        ValueError: The kernels do not have what is asked for.
    """
    dz, dh, _, h, _, _, gate, weight, bias, scale, shift, _, shape, *_ = arguments
    *dtypes, x_hat_dtype, _ = arguments[14:]
    with _current(h.device):
        terms = gate, scale, shift
        _check(h, (dz, dh), dtypes, terms, x_hat_dtype, math.prod(shape))
        _check_parameters(h, weight, bias)
        return _C.cuda_backward(*arguments, _stream(h.device))  # type: ignore[no-any-return]


def _check(
    rows: Tensor,
    other_rows: tuple[Tensor | None, ...],
    other_dtypes: Sequence[torch.dtype | None],
    terms: tuple[Tensor | None, ...],
    x_hat_dtype: torch.dtype | None,
    cols: int,
) -> None:
    """Refuse what the kernels do not have, before anything is allocated."""
    for name, term in zip(("gate", "scale", "shift"), terms, strict=True):
        if term is not None:
            fail("cuda backend", f"no {name}, which the triton backend has", "one")
    if x_hat_dtype is not None:
        fail("cuda backend", "no dtype that x_hat is rounded to", x_hat_dtype)
    if rows.dtype not in _DTYPES:
        fail("cuda backend", "rows of float16, bfloat16 or float32", rows.dtype)
    others = [None if tensor is None else tensor.dtype for tensor in other_rows]
    for dtype in (*others, *other_dtypes):
        if dtype is not None and dtype != rows.dtype:
            fail("cuda backend", f"rows of one dtype, {rows.dtype}", dtype)
    widest = _C.cuda_widest_rows()
    if cols > widest:
        fail("cuda backend", f"at most {widest} columns on this device", cols)


def _check_parameters(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    dtypes = {parameter.dtype for parameter in (weight, bias) if parameter is not None}
    if len(dtypes) > 1 or not dtypes <= {rows.dtype, torch.float32}:
        expected = f"weight and bias of one dtype, {rows.dtype} or float32"
        fail("cuda backend", expected, " and ".join(sorted(map(str, dtypes))))


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the one in use, which the extension launches on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    """Return the address of the stream that torch launches on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
