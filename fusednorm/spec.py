"""What a call is made of, what its backward reads, and what that returns."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusednorm.observers import shape_of

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""z, h, mean and rstd."""

Dtypes = tuple[torch.dtype, torch.dtype]
"""Those of the gradients of x and residual."""


class Spec(NamedTuple):
    """What a call computes beside its tensors.

    Attributes:
        normalized_shape: The trailing dimensions that form a row.
        eps: Added to the variance.
        rms: Whether the mean is taken as 0.
        dropout_p: The share of the elements of x that dropout zeroes.
        out_dtype: dtype of z.
        h_dtype: dtype that h is rounded to; None where h is x itself.
        x_hat_dtype: dtype that x_hat is rounded to before the affine part, or None.
    """

    normalized_shape: tuple[int, ...]
    eps: float
    rms: bool
    dropout_p: float
    out_dtype: torch.dtype
    h_dtype: torch.dtype | None
    x_hat_dtype: torch.dtype | None


class Operands(NamedTuple):
    """The tensors of a call; gate, scale and shift are [1 or S, N or 1]."""

    x: Tensor
    residual: Tensor | None = None
    gate: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    seed: Tensor | None = None


class Call(NamedTuple):
    """A call whose arguments have been checked.

    Attributes:
        op: The name that the user called.
        operands: Its tensors; dropout has no seed yet.
        spec: What to compute.
        want_h: Whether the caller uses h.
    """

    op: str
    operands: Operands
    spec: Spec
    want_h: bool


class Saved(NamedTuple):
    """What a backward reads: h is what was normalised, x is there for dgate only.

    Without statistics the reference computes them again, as functions of h.
    """

    x: Tensor | None
    h: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    seed: Tensor | None


class ByInput(NamedTuple):
    """One entry for each differentiable input: its gradient, or whether that is wanted."""

    x: Any = None
    residual: Any = None
    gate: Any = None
    weight: Any = None
    bias: Any = None
    scale: Any = None
    shift: Any = None


class GatedSpec(NamedTuple):
    """What a gated norm computes beside its tensors.

    Attributes:
        normalized_shape: The trailing dimensions that form a row.
        group_size: Adjacent columns that have statistics of their own; all of a row, or a divisor.
        eps: Added to the variance.
        rms: Whether the mean is taken as 0.
        norm_before_gate: Whether silu(gate_input) multiplies what has been normalised; otherwise
            it multiplies what is to be.
        out_dtype: dtype of z.
        x_hat_dtype: dtype that x_hat is rounded to before the affine part, or None.
    """

    normalized_shape: tuple[int, ...]
    group_size: int
    eps: float
    rms: bool
    norm_before_gate: bool
    out_dtype: torch.dtype
    x_hat_dtype: torch.dtype | None


class GatedOperands(NamedTuple):
    """The differentiable tensors of a gated norm."""

    x: Tensor
    gate_input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class GatedSaved(NamedTuple):
    """What the backward of a gated norm reads.

    Without statistics the reference computes them again, as functions of x and gate_input.
    """

    x: Tensor
    gate_input: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


Gradients = ByInput | tuple[Tensor | None, ...]
Mask = ByInput | tuple[bool, ...]


def compute_dtype(*dtypes: torch.dtype | None) -> torch.dtype:
    """Return the dtype of statistics and sums: float64 where x or h is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def drop_below(p: float) -> int:
    """Return the 32-bit random word below which dropout of rate `p` drops an element."""
    return min(round(p * 2**32), 2**32 - 1)


def rows_and_columns(x: Tensor, normalized_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return M and N."""
    leading = shape_of(x)[: x.dim() - len(normalized_shape)]
    return math.prod(leading), math.prod(normalized_shape)
