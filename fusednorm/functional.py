"""The functions that users call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusednorm import autograd, backends, channels, gated, observers, route
from fusednorm.observers import PLAIN
from fusednorm.spec import Call, GatedOperands, GatedSpec, Operands, Spec, compute_dtype
from fusednorm.validation import (
    DTYPES,
    check_channel_norm,
    check_dropout,
    check_gate_input,
    check_group_size,
    check_norm,
    check_residual,
    check_residual_dtype,
    check_terms,
    is_shape,
)

# Devices on which autocast runs layer norm in float32; elsewhere it leaves the dtype alone.
AUTOCAST_FLOAT32 = frozenset({"cuda", "xpu", "mps", "maia", "mtia"})
# Since torch 2.12 it does the same to RMS norm.
_AUTOCAST_RMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)

_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


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
    shape: Any = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
    given = (input, weight, bias)
    if has_torch_function_variadic(*given):
        return handle_torch_function(layer_norm, given, input, shape, weight, bias, eps)
    if (y := _by_torch(input, shape, weight, bias, eps)) is not None:
        return y
    operands = Operands(input, None, None, weight, bias)
    if done := _unchecked(operands, shape, eps, rms=False):
        return done[0]
    shape, eps = check_norm("layer_norm", input, normalized_shape, weight, bias, eps)
    return norm("layer_norm", operands, shape, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    r"""Divide by the root mean square, as :func:`torch.nn.functional.rms_norm` does.

    .. math::
        y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot \gamma

    The mean square is taken over `normalized_shape`, in float32, in float64 for float64 input. The
    method is that of Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019
    (arXiv:1910.07467).

    Args:
        input: [\*, \*normalized_shape]; float16, bfloat16, float32 or float64, any strides.
        normalized_shape: Trailing dimensions that are normalised together.
        weight: :math:`\gamma`, of shape `normalized_shape` and any of these dtypes, or None for 1.
        eps: Added to the mean square; None for the machine epsilon of the dtype computed in,
            1.2e-7, or 2.2e-16 for float64 input.

    Returns:
        A contiguous tensor of `input`'s shape and dtype; float32 under an autocast that runs RMS
        norm in float32, as CUDA's does since torch 2.12.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape or the device of an argument does not fit, or a backend was requested
            that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> fusednorm.rms_norm(torch.tensor([[1.0, 2.0, 2.0, 4.0]]), 4)
        tensor([[0.4000, 0.8000, 0.8000, 1.6000]])
    """
    shape: Any = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(rms_norm, (input, weight), input, shape, weight, eps)
    eps = _default_eps(input) if eps is None else eps
    below = "cpu" in backends.below_torch
    if below and (y := _by_torch(input, shape, weight, None, eps, rms=True)) is not None:
        return y
    operands = Operands(input, None, None, weight)
    if done := _unchecked(operands, shape, eps, rms=True):
        return done[0]
    shape, eps = check_norm("rms_norm", input, normalized_shape, weight, None, eps)
    return norm("rms_norm", operands, shape, eps, rms=True)


def layer_norm2d(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    r"""Normalise over dimension 1, the channels, of each position, without a permuted copy.

    .. math::
        y_{b,c,s} = \frac{x_{b,c,s} - \mathrm{E}_c[x_{b,c,s}]}
        {\sqrt{\mathrm{Var}_c[x_{b,c,s}] + \epsilon}} \cdot \gamma_c + \beta_c

    `layer_norm` of the channels of each position, as in ConvNeXt (Liu et al., 2022,
    arXiv:2201.03545): what ``F.layer_norm(input.movedim(1, -1), (C,), ..).movedim(-1, 1)``
    computes, with the precision and the dtypes of `layer_norm`.

    Args:
        input: [B, C, \*spatial] with any number of spatial dimensions, none included; float16,
            bfloat16, float32 or float64, any strides.
        weight: :math:`\gamma`, [C] and of any of these dtypes, or None for 1.
        bias: :math:`\beta`, [C] and of any of these dtypes, or None for 0.
        eps: Added to the variance; in the square of the unit of `input`.

    Returns:
        A tensor of `input`'s shape and dtype, in channels_last memory format if the channels of
        `input` are adjacent, else contiguous; float32 under an autocast that runs layer norm in
        float32, as CUDA's does.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape or the device of an argument does not fit, or a backend was requested
            that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> x = torch.tensor([[[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [4.0, 9.0]]])  # [1, 4, 2]
        >>> fusednorm.layer_norm2d(x)
        tensor([[[-1.3416, -0.5774],
                 [-0.4472, -0.5774],
                 [ 0.4472, -0.5774],
                 [ 1.3416,  1.7321]]])
    """
    given = (input, weight, bias)
    if has_torch_function_variadic(*given):
        return handle_torch_function(layer_norm2d, given, *given, eps)
    operands = Operands(input, None, None, weight, bias)
    return _channel_norm("layer_norm2d", operands, eps)


def rms_norm2d(input: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    r"""Divide by the root mean square over dimension 1, the channels, without a permuted copy.

    .. math::
        y_{b,c,s} = \frac{x_{b,c,s}}{\sqrt{\mathrm{E}_c[x_{b,c,s}^2] + \epsilon}} \cdot \gamma_c

    `rms_norm` of the channels of each position: what ``F.rms_norm(input.movedim(1, -1), (C,),
    ..).movedim(-1, 1)`` computes, with the precision and the dtypes of `rms_norm`.

    Args:
        input: [B, C, \*spatial] with any number of spatial dimensions, none included; float16,
            bfloat16, float32 or float64, any strides.
        weight: :math:`\gamma`, [C] and of any of these dtypes, or None for 1.
        eps: Added to the mean square; None for the machine epsilon of the dtype computed in.

    Returns:
        A tensor of `input`'s shape and dtype, in channels_last memory format if the channels of
        `input` are adjacent, else contiguous; float32 under an autocast that runs RMS norm in
        float32, as CUDA's does since torch 2.12.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape or the device of an argument does not fit, or a backend was requested
            that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> fusednorm.rms_norm2d(torch.tensor([[[1.0], [2.0], [2.0], [4.0]]])).flatten()
        tensor([0.4000, 0.8000, 0.8000, 1.6000])
    """
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(rms_norm2d, (input, weight), input, weight, eps)
    eps = _default_eps(input) if eps is None else eps
    return _channel_norm("rms_norm2d", Operands(input, None, None, weight), eps, rms=True)


def _channel_norm(op: str, operands: Operands, eps: float, *, rms: bool = False) -> Tensor:
    """Check the arguments of a norm over dimension 1 and run it."""
    x = operands.x
    eps = check_channel_norm(op, x, operands.weight, operands.bias, eps)
    shape = (x.shape[1],)
    if x.dim() == 2 or x.stride(1) == 1:  # the channels are rows as they lie
        rows = operands._replace(x=x.movedim(1, -1))
        return norm(op, rows, shape, eps, rms=rms).movedim(-1, 1)
    spec = Spec(shape, eps, rms, 0.0, _output_dtype(x, rms), None, None)
    return channels.run(op, operands, spec)


def add_layer_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add a branch to the residual stream and normalise the sum, in one kernel.

    .. math::
        h &= \text{residual} + \text{gate} \cdot \mathrm{dropout}(x) \\
        z &= \left(\frac{h - \mathrm{E}[h]}{\sqrt{\mathrm{Var}[h] + \epsilon}} \cdot \gamma
        + \beta\right) \cdot (1 + \text{scale}) + \text{shift}

    h is rounded to its dtype before it is normalised, so that z belongs to the h that is returned.
    Post-norm blocks (Vaswani et al., 2017, arXiv:1706.03762) use z alone, pre-norm blocks (Xiong et
    al., 2020, arXiv:2002.04745) carry h on. `gate` makes it LayerScale (arXiv:2103.17239) or
    stochastic depth (arXiv:1603.09382), `scale` and `shift` make it adaptive (arXiv:2212.09748).

    Args:
        input: x, the output of the branch, [\*, \*normalized_shape]; float16, bfloat16, float32 or
            float64, any strides.
        residual: The stream so far, of `input`'s shape and any of these dtypes; None starts one.
        normalized_shape: Trailing dimensions that are normalised together.
        weight: :math:`\gamma`, of shape `normalized_shape`, or None for 1.
        bias: :math:`\beta`, of shape `normalized_shape`, or None for 0.
        eps: Added to the variance; in the square of the unit of `input`.
        gate: One vector for all rows, of shape `normalized_shape`; one for each sample,
            [B, 1, .., \*normalized_shape] with `input` [B, .., \*normalized_shape]; or one number
            for each sample, [B, 1, .., 1]. None for 1.
        scale: As `gate`; None for 0.
        shift: As `gate`; None for 0.
        dropout_p: Probability that an element of `input` is dropped, in [0, 1); the others are
            divided by 1 - `dropout_p`. The mask follows `torch.manual_seed` and is not stored.
        training: Whether dropout is on.
        residual_dtype: dtype of h; None for the one that torch's `residual + input` has.

    Returns:
        z, of `input`'s shape and dtype (float32 under an autocast that runs layer norm in float32),
        and h, of `input`'s shape. Without residual, gate, dropout and another `residual_dtype` h is
        `input` itself, not a copy.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape, the device or the value of an argument does not fit, or a backend was
            requested that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> x, residual = torch.ones(2, 4), torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(2, 4)
        >>> z, h = fusednorm.add_layer_norm(x, residual, 4)
        >>> h[0]
        tensor([1., 2., 3., 4.])
        >>> z[0]
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """
    given = Operands(input, residual, gate, weight, bias, scale, shift)
    options = Options(dropout_p, training, residual_dtype)
    return add_norm("add_layer_norm", given, normalized_shape, eps, options)


def add_rms_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add a branch to the residual stream and divide by the root mean square, in one kernel.

    .. math::
        h &= \text{residual} + \text{gate} \cdot \mathrm{dropout}(x) \\
        z &= \frac{h}{\sqrt{\mathrm{E}[h^2] + \epsilon}} \cdot \gamma \cdot (1 + \text{scale})
        + \text{shift}

    `add_layer_norm` with the norm of `rms_norm`; a `scale` of shape `normalized_shape` makes the
    weight zero-centred. See there for the arguments, the shapes and the errors.

    Args:
        input: x, [\*, \*normalized_shape].
        residual: The stream so far, or None.
        normalized_shape: Trailing dimensions that are normalised together.
        weight: :math:`\gamma`, of shape `normalized_shape`, or None for 1.
        eps: Added to the mean square; None for the machine epsilon of the dtype computed in.
        gate: One vector for all rows or for each sample, or one number for each sample.
        scale: As `gate`.
        shift: As `gate`.
        dropout_p: Probability that an element of `input` is dropped, in [0, 1).
        training: Whether dropout is on.
        residual_dtype: dtype of h; None for the one that torch's `residual + input` has.

    Returns:
        z and h.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape, the device or the value of an argument does not fit, or a backend was
            requested that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> x, residual = torch.ones(2, 4), torch.tensor([0.0, 1.0, 1.0, 3.0]).expand(2, 4)
        >>> z, h = fusednorm.add_rms_norm(x, residual, 4)
        >>> z[0]
        tensor([0.4000, 0.8000, 0.8000, 1.6000])
    """
    given = Operands(input, residual, gate, weight, None, scale, shift)
    options = Options(dropout_p, training, residual_dtype)
    return add_norm("add_rms_norm", given, normalized_shape, eps, options, rms=True)


def modulated_layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise, then scale and shift as a condition says (AdaLN), in one kernel.

    .. math::
        z = \left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot \gamma
        + \beta\right) \cdot (1 + \text{scale}) + \text{shift}

    The method is that of Peebles and Xie, *Scalable Diffusion Models with Transformers*, 2022
    (arXiv:2212.09748).

    Args:
        input: [\*, \*normalized_shape]; float16, bfloat16, float32 or float64, any strides.
        normalized_shape: Trailing dimensions that are normalised together.
        shift: One vector for all rows, of shape `normalized_shape`; one for each sample,
            [B, 1, .., \*normalized_shape] with `input` [B, .., \*normalized_shape]; or one number
            for each sample, [B, 1, .., 1]. None for 0.
        scale: As `shift`.
        weight: :math:`\gamma`, of shape `normalized_shape`, or None for 1.
        bias: :math:`\beta`, of shape `normalized_shape`, or None for 0.
        eps: Added to the variance; in the square of the unit of `input`.

    Returns:
        A contiguous tensor of `input`'s shape and dtype; float32 under an autocast that runs
        layer norm in float32.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape or the device of an argument does not fit, or a backend was requested
            that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]]])
        >>> shift, scale = torch.zeros(2, 1, 1), torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
        >>> fusednorm.modulated_layer_norm(x, 4, shift, scale)
        tensor([[[-1.3416, -0.4472,  0.4472,  1.3416]],
        <BLANKLINE>
                [[-2.6833, -0.8944,  0.8944,  2.6833]]])
    """
    op = "modulated_layer_norm"
    given = Operands(input, None, None, weight, bias, scale, shift)
    if has_torch_function_variadic(*given):
        return handle_torch_function(
            modulated_layer_norm,
            given,
            *(input, normalized_shape, shift, scale, weight, bias, eps),
        )
    shape, eps = check_norm(op, input, normalized_shape, weight, bias, eps)
    scale, shift = check_terms(op, input, shape, scale=scale, shift=shift)
    return norm(op, given._replace(scale=scale, shift=shift), shape, eps)


def modulated_rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    r"""Divide by the root mean square, then scale and shift as a condition says, in one kernel.

    .. math::
        z = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot \gamma \cdot (1 + \text{scale})
        + \text{shift}

    `modulated_layer_norm` with the norm of `rms_norm`; see there for the shapes.

    Args:
        input: [\*, \*normalized_shape]; float16, bfloat16, float32 or float64, any strides.
        normalized_shape: Trailing dimensions that are normalised together.
        shift: One vector for all rows or for each sample, or one number for each sample; None
            for 0.
        scale: As `shift`.
        weight: :math:`\gamma`, of shape `normalized_shape`, or None for 1.
        eps: Added to the mean square; None for the machine epsilon of the dtype computed in.

    Returns:
        A contiguous tensor of `input`'s shape and dtype; float32 under an autocast that runs RMS
        norm in float32.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape or the device of an argument does not fit, or a backend was requested
            that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> x = torch.tensor([[[1.0, 2.0, 2.0, 4.0]], [[1.0, 2.0, 2.0, 4.0]]])
        >>> shift, scale = torch.zeros(2, 1, 1), torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
        >>> fusednorm.modulated_rms_norm(x, 4, shift, scale)
        tensor([[[0.4000, 0.8000, 0.8000, 1.6000]],
        <BLANKLINE>
                [[0.8000, 1.6000, 1.6000, 3.2000]]])
    """
    op = "modulated_rms_norm"
    given = Operands(input, None, None, weight, None, scale, shift)
    if has_torch_function_variadic(*given):
        return handle_torch_function(
            modulated_rms_norm, given, *(input, normalized_shape, shift, scale, weight, eps)
        )
    eps = _default_eps(input) if eps is None else eps
    shape, eps = check_norm(op, input, normalized_shape, weight, None, eps)
    scale, shift = check_terms(op, input, shape, scale=scale, shift=shift)
    return norm(op, given._replace(scale=scale, shift=shift), shape, eps, rms=True)


def gated_layer_norm(
    input: Tensor,
    gate_input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    r"""Normalise and multiply by the SiLU of a gate, in one kernel.

    .. math::
        \mathrm{norm}(x) &= \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot \gamma
        + \beta \\
        z &= \mathrm{norm}(x) \cdot \mathrm{silu}(g) \quad\text{or}\quad
        z = \mathrm{norm}(x \cdot \mathrm{silu}(g))

    The backward is one pass as well: it computes the norm and
    :math:`\mathrm{silu}(g) = g / (1 + e^{-g})` again from x and g.

    Args:
        input: x, [\*, \*normalized_shape]; float16, bfloat16, float32 or float64, any strides.
        gate_input: g, of `input`'s shape and any of these dtypes and strides: a slice of a wider
            projection is read where it lies.
        normalized_shape: Trailing dimensions that form a row of N numbers.
        weight: :math:`\gamma`, of shape `normalized_shape`, or None for 1.
        bias: :math:`\beta`, of shape `normalized_shape`, or None for 0.
        eps: Added to the variance; in the square of the unit of what is normalised.
        group_size: A divisor of N: mean and variance are those of each run of so many adjacent
            numbers of a row. None for N.
        norm_before_gate: True for :math:`\mathrm{norm}(x) \cdot \mathrm{silu}(g)`, False for
            :math:`\mathrm{norm}(x \cdot \mathrm{silu}(g))`, whose product is not rounded.

    Returns:
        A contiguous tensor of `input`'s shape and dtype; float32 under an autocast that runs layer
        norm in float32.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape, the device or the value of an argument does not fit, or a backend was
            requested that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> fusednorm.gated_layer_norm(x, torch.ones(1, 4), 4)
        tensor([[-0.9808, -0.3269,  0.3269,  0.9808]])
        >>> fusednorm.gated_layer_norm(x, torch.ones(1, 4), 4, group_size=2)
        tensor([[-0.7310,  0.7310, -0.7310,  0.7310]])
    """
    given = GatedOperands(input, gate_input, weight, bias)
    if has_torch_function_variadic(*given):
        return handle_torch_function(
            gated_layer_norm,
            given,
            *(input, gate_input, normalized_shape, weight, bias, eps),
            group_size=group_size,
            norm_before_gate=norm_before_gate,
        )
    return gated_norm(
        "gated_layer_norm",
        given,
        normalized_shape,
        eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
    )


def gated_rms_norm(
    input: Tensor,
    gate_input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    r"""Divide by the root mean square and multiply by the SiLU of a gate, in one kernel.

    .. math::
        \mathrm{norm}(x) &= \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot \gamma + \beta \\
        z &= \mathrm{norm}(x) \cdot \mathrm{silu}(g) \quad\text{or}\quad
        z = \mathrm{norm}(x \cdot \mathrm{silu}(g))

    `gated_layer_norm` with the norm of `rms_norm`; see there for the shapes and the errors. The
    first is the gated norm of GLA and DeltaNet, the second that of Mamba 2 (Dao and Gu, 2024,
    arXiv:2405.21060), where `group_size` lets every device of a tensor parallel model have whole
    groups.

    Args:
        input: x, [\*, \*normalized_shape].
        gate_input: g, of `input`'s shape.
        normalized_shape: Trailing dimensions that form a row of N numbers.
        weight: :math:`\gamma`, of shape `normalized_shape`, or None for 1.
        bias: :math:`\beta`, of shape `normalized_shape`, or None for 0.
        eps: Added to the mean square; None for the machine epsilon of the dtype computed in.
        group_size: A divisor of N: the mean square is that of each run of so many adjacent numbers
            of a row. None for N.
        norm_before_gate: True for :math:`\mathrm{norm}(x) \cdot \mathrm{silu}(g)`, False for
            :math:`\mathrm{norm}(x \cdot \mathrm{silu}(g))`.

    Returns:
        A contiguous tensor of `input`'s shape and dtype; float32 under an autocast that runs RMS
        norm in float32.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: The shape, the device or the value of an argument does not fit, or a backend was
            requested that cannot serve it.

    Example:
        >>> import torch, fusednorm
        >>> x, g = torch.tensor([[1.0, 2.0, 2.0, 4.0]]), torch.tensor([[0.0, 1.0, 2.0, 9.0]])
        >>> fusednorm.gated_rms_norm(x, g, 4)
        tensor([[ 0.0000,  0.5848,  1.4093, 14.3982]])
        >>> fusednorm.gated_rms_norm(x, g, 4, norm_before_gate=False)
        tensor([[0.0000, 0.0808, 0.1947, 1.9889]])
    """
    given = GatedOperands(input, gate_input, weight, bias)
    if has_torch_function_variadic(*given):
        return handle_torch_function(
            gated_rms_norm,
            given,
            *(input, gate_input, normalized_shape, weight, bias, eps),
            group_size=group_size,
            norm_before_gate=norm_before_gate,
        )
    eps = _default_eps(input, gate_input) if eps is None else eps
    return gated_norm(
        "gated_rms_norm",
        given,
        normalized_shape,
        eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        rms=True,
    )


class Options(NamedTuple):
    """What an Add & Norm takes beside its tensors and its norm."""

    dropout_p: float = 0.0
    training: bool = True
    residual_dtype: torch.dtype | None = None

    def are_default(self) -> bool:
        """Return whether there is nothing to check or to do."""
        return self.residual_dtype is None and (
            not self.training or (type(self.dropout_p) is float and self.dropout_p == 0.0)
        )


def norm(
    op: str,
    operands: Operands,
    shape: tuple[int, ...],
    eps: float,
    x_hat_dtype: torch.dtype | None = None,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run a norm of x itself, whose arguments have been checked; return z."""
    out_dtype = _output_dtype(operands.x, rms) if out_dtype is None else out_dtype
    spec = Spec(shape, eps, rms, 0.0, out_dtype, None, x_hat_dtype)
    return route.run(Call(op, operands, spec, want_h=False))[0]


def gated_norm(
    op: str,
    given: GatedOperands,
    normalized_shape: int | Sequence[int],
    eps: float,
    *,
    group_size: int | None,
    norm_before_gate: bool,
    rms: bool = False,
    x_hat_dtype: torch.dtype | None = None,
) -> Tensor:
    """Check the arguments of a gated norm and run it."""
    x, gate_input, weight, bias = given
    shape, eps = check_norm(op, x, normalized_shape, weight, bias, eps)
    check_gate_input(op, gate_input, x)
    size = check_group_size(op, group_size, math.prod(shape))
    out_dtype, before = _output_dtype(x, rms), bool(norm_before_gate)
    return gated.run(op, given, GatedSpec(shape, size, eps, rms, before, out_dtype, x_hat_dtype))


def add_norm(
    op: str,
    given: Operands,
    normalized_shape: int | Sequence[int],
    eps: float | None,
    options: Options,
    *,
    rms: bool = False,
    want_h: bool = True,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of an Add & Norm and run it; h is arbitrary where it is not wanted."""
    if has_torch_function_variadic(*given):
        return _overridden(given, normalized_shape, eps, options, rms)
    x, residual, gate, weight, bias, scale, shift, _ = given
    eps = _default_eps(x, residual) if eps is None else eps
    if gate is None and scale is None and shift is None and options.are_default():
        sizes = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
        if done := _unchecked(given, sizes, eps, rms=rms, want_h=want_h):
            return done
    shape, eps = check_norm(op, x, normalized_shape, weight, bias, eps)
    check_residual(op, residual, x)
    check_residual_dtype(op, options.residual_dtype)
    dropout_p = check_dropout(op, options.dropout_p) if options.training else 0.0
    gate, scale, shift = check_terms(op, x, shape, gate=gate, scale=scale, shift=shift)
    h_dtype = options.residual_dtype
    if h_dtype is None:
        h_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if residual is None and gate is None and dropout_p == 0.0 and h_dtype == x.dtype:
        h_dtype = None
    spec = Spec(shape, eps, rms, dropout_p, _output_dtype(x, rms), h_dtype, None)
    operands = given._replace(gate=gate, scale=scale, shift=shift)
    return route.run(Call(op, operands, spec, want_h))


def _overridden(
    given: Operands,
    normalized_shape: int | Sequence[int],
    eps: float | None,
    options: Options,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """Let a mode or a class of tensors have the call, by its public name."""
    x, residual, gate, weight, bias, scale, shift, _ = given
    function: Any = add_rms_norm if rms else add_layer_norm
    positional = (x, residual, normalized_shape, weight, *(() if rms else (bias,)), eps)
    terms = {"gate": gate, "scale": scale, "shift": shift}
    done: tuple[Tensor, Tensor] = handle_torch_function(
        function, given, *positional, **terms, **options._asdict()
    )
    return done


def _by_torch(
    input: Tensor,
    shape: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Any,
    *,
    rms: bool = False,
) -> Tensor | None:
    """Run a plain norm of CPU tensors by torch's operator; return None for any other.

    What a small tensor costs on a CPU is the Python before torch's operator. These are the rules
    that torch has not or learns of too late; by the others it refuses before it allocates.
    """
    if (
        type(input) is Tensor
        and input.is_cpu
        and (dtype := input.dtype) in DTYPES
        and (choice := backends.choose(input)).backend == "torch"
        and input.layout is torch.strided
        and (weight is None or (type(weight) in PLAIN and weight.dtype is dtype and weight.is_cpu))
        and (bias is None or (type(bias) in PLAIN and bias.dtype is dtype and bias.is_cpu))
        and type(eps) is float
        and is_shape(shape)
        and not observers.transforms_active()
        and not observers.saving_watched()
    ):
        if backends.listener is not None:
            backends.note("rms_norm" if rms else "layer_norm", *choice)
        try:
            if rms:
                return torch.rms_norm(input, shape, weight, eps)
            return torch.layer_norm(input, shape, weight, bias, eps)
        except (RuntimeError, TypeError):
            pass  # the checks that follow say why
    return None


def _unchecked(
    operands: Operands, shape: Any, eps: Any, *, rms: bool, want_h: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Run a norm of x, or of residual + x, that needs no further check in the kernels.

    Return None for any other, and without the extension: on a small tensor the checks in Python
    would take longer than all else.
    """
    x, residual, _, weight, bias, _, _, _ = operands
    if (
        type(eps) is not float
        or torch.compiler.is_compiling()
        or (is_plain := backends.is_plain()) is None
        or not is_plain(shape, x, residual, weight, bias)
    ):
        return None
    plain = residual is None and route.is_one_operator(x, rms)
    if (backend := backends.of_valid_call(x, plain)) is None:
        return None
    if backends.listener is not None:
        name = "rms_norm" if rms else "layer_norm"
        backends.note(
            f"{'' if residual is None else 'add_'}{name}", *backends.choose(x, plain=plain)
        )
    out_dtype = _output_dtype(x, rms)
    h_dtype = None if residual is None else x.dtype
    spec = Spec(shape, eps, rms, 0.0, out_dtype, h_dtype, None)
    z, h = autograd.run(operands, spec, backends.launchers(backend), want_h=want_h)
    return z, x if h is None else h


def _default_eps(x: Tensor, other: Tensor | None = None) -> float:
    return _EPS[compute_dtype(getattr(x, "dtype", None), getattr(other, "dtype", None))]


def _output_dtype(input: Tensor, rms: bool) -> torch.dtype:
    if input.is_cpu and "cpu" not in AUTOCAST_FLOAT32:
        return input.dtype  # a device's name takes six times as long
    if (
        input.device.type in AUTOCAST_FLOAT32
        and torch.is_autocast_enabled(input.device.type)
        and input.dtype != torch.float64
        and (_AUTOCAST_RMS or not rms)
    ):
        return torch.float32
    return input.dtype
