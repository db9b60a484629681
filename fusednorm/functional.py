"""The functions that users call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusednorm import autograd, backends, reference
from fusednorm.validation import check_layer_norm, fail

# Devices on which autocast runs layer norm in float32; elsewhere it leaves the dtype alone.
AUTOCAST_FLOAT32 = frozenset({"cuda", "xpu", "mps", "maia", "mtia"})


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise over the last dimensions, as :func:`torch.nn.functional.layer_norm` does.

    .. math::
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot \gamma + \beta

    Mean and (biased) variance are taken over `normalized_shape`, in float32, in float64 for
    float64 input. The method is that of Ba, Kiros and Hinton, *Layer Normalization*, 2016
    (arXiv:1607.06450).

    Args:
        input: [\*, \*normalized_shape]; float16, bfloat16, float32 or float64, any strides.
        normalized_shape: Trailing dimensions that are normalised together.
        weight: :math:`\gamma`, of shape `normalized_shape` and any of these dtypes, or None for 1.
        bias: :math:`\beta`, of shape `normalized_shape` and any of these dtypes, or None for 0.
        eps: Added to the variance; in the square of the unit of `input`.

    Returns:
        A contiguous tensor of `input`'s shape and dtype; float32 under an autocast that runs
        layer norm in float32, as CUDA's does.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape or the device of an argument does not fit, or a backend was requested
            that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> fusednorm.layer_norm(x, 4)
        tensor([[-1.3416, -0.4472,  0.4472,  1.3416]])
    """
    shape, eps = check_layer_norm(input, normalized_shape, weight, bias, eps)
    backend = backends.select(input)
    if autograd.transforms_active() or (
        backend == "torch" and not _torch_accepts(input, weight, bias)
    ):
        return reference.layer_norm(input, shape, weight, bias, eps, _output_dtype(input))
    if backend == "torch":
        return F.layer_norm(input, shape, weight, bias, eps)
    if input.is_nested:
        fail("layer_norm", "a tensor of one shape for the triton backend", "a nested tensor")
    return autograd.layer_norm(input, shape, weight, bias, eps, _output_dtype(input))


def _output_dtype(input: Tensor) -> torch.dtype:
    if (
        input.device.type in AUTOCAST_FLOAT32
        and torch.is_autocast_enabled(input.device.type)
        and input.dtype != torch.float64
    ):
        return torch.float32
    return input.dtype


def _torch_accepts(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Return whether torch's operator takes this mix of dtypes."""
    dtype = input.dtype
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return True
    parameters = {parameter.dtype for parameter in (weight, bias) if parameter is not None}
    half_on_cpu = input.is_cpu and dtype in (torch.float16, torch.bfloat16)
    return _output_dtype(input) != dtype or (half_on_cpu and parameters == {torch.float32})
