"""What a call computes, beside its tensors, and what its backward returns."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""z, h, mean and rstd."""

Gradients = tuple[
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]
Mask = tuple[bool, bool, bool, bool, bool, bool, bool]
"""One entry for each of x, residual, gate, weight, bias, scale and shift."""


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


def compute_dtype(*dtypes: torch.dtype | None) -> torch.dtype:
    """Return the dtype of statistics and sums: float64 where x or h is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def drop_below(p: float) -> int:
    """Return the 32-bit random word below which dropout of rate `p` drops an element."""
    return min(round(p * 2**32), 2**32 - 1)


def rows_and_columns(x: Tensor, normalized_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return M and N."""
    cols = math.prod(normalized_shape)
    if cols > 0:
        return x.numel() // cols, cols
    return math.prod(x.shape[: x.dim() - len(normalized_shape)]), cols
