"""The functions that users call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fusednorm import autograd, backends, ops, reference
from fusednorm.spec import Spec, compute_dtype
from fusednorm.validation import (
    DTYPES,
    check_dropout,
    check_norm,
    check_residual,
    check_residual_dtype,
    check_terms,
    fail,
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
    # What a small tensor costs on a CPU is the Python before torch's operator. These are the rules
    # that torch has not or learns of too late; by the others it refuses before it allocates.
    if (
        type(input) is Tensor
        and input.is_cpu
        and backends.select(input) == "torch"
        and (dtype := input.dtype) in DTYPES
        and input.layout is torch.strided
        and (
            weight is None
            or (type(weight) in autograd.PLAIN and weight.dtype is dtype and weight.is_cpu)
        )
        and (bias is None or (type(bias) in autograd.PLAIN and bias.dtype is dtype and bias.is_cpu))
        and type(eps) is float
        and is_shape(normalized_shape)
        and not has_torch_function_variadic(input, weight, bias)
        and not autograd.transforms_active()
    ):
        try:
            return torch.layer_norm(input, normalized_shape, weight, bias, eps)
        except RuntimeError:
            pass  # the checks below say why
    if done := _eagerly(input, None, normalized_shape, weight, bias, eps, False, rms=False):
        return done[0]
    shape, eps = check_norm("layer_norm", input, normalized_shape, weight, bias, eps)
    return _norm("layer_norm", input, weight, bias, shape, eps, rms=False)


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
    eps = _default_eps(input) if eps is None else eps
    if done := _eagerly(input, None, normalized_shape, weight, None, eps, False, rms=True):
        return done[0]
    shape, eps = check_norm("rms_norm", input, normalized_shape, weight, None, eps)
    return _norm("rms_norm", input, weight, None, shape, eps, rms=True)


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
    options = (gate, scale, shift, dropout_p, training, residual_dtype)
    return _add_norm(
        "add_layer_norm", input, residual, normalized_shape, weight, bias, eps, *options, rms=False
    )


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
    eps = _default_eps(input, residual) if eps is None else eps
    options = (gate, scale, shift, dropout_p, training, residual_dtype)
    return _add_norm(
        "add_rms_norm", input, residual, normalized_shape, weight, None, eps, *options, rms=True
    )


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
    shape, eps = check_norm(op, input, normalized_shape, weight, bias, eps)
    scale, shift = check_terms(op, input, shape, scale=scale, shift=shift)
    return _norm(op, input, weight, bias, shape, eps, scale, shift, rms=False)


def _norm(
    op: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    x_hat_dtype: torch.dtype | None = None,
    *,
    rms: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Run a norm of `input` itself, whose arguments have been checked."""
    out_dtype = _output_dtype(input, rms) if out_dtype is None else out_dtype
    spec = Spec(shape, eps, rms, 0.0, out_dtype, None, x_hat_dtype)
    return _run(op, input, None, None, weight, bias, scale, shift, spec, want_h=False)[0]


def _add_norm(
    op: str,
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dropout_p: float,
    training: bool,
    residual_dtype: torch.dtype | None,
    *,
    rms: bool,
    want_h: bool = True,
) -> tuple[Tensor, Tensor]:
    """Check the arguments of an Add & Norm and run it; h is arbitrary where it is not wanted."""
    if (
        gate is None
        and scale is None
        and shift is None
        and residual_dtype is None
        and (not training or (type(dropout_p) is float and dropout_p == 0.0))
    ):
        arguments = (input, residual, normalized_shape, weight, bias, eps, want_h)
        if done := _eagerly(*arguments, rms=rms):
            return done
    shape, eps = check_norm(op, input, normalized_shape, weight, bias, eps)
    check_residual(op, residual, input)
    check_residual_dtype(op, residual_dtype)
    dropout_p = check_dropout(op, dropout_p) if training else 0.0
    gate, scale, shift = check_terms(op, input, shape, gate=gate, scale=scale, shift=shift)
    h_dtype = residual_dtype
    if h_dtype is None:
        h_dtype = (
            input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
        )
    if residual is None and gate is None and dropout_p == 0.0 and h_dtype == input.dtype:
        h_dtype = None
    spec = Spec(shape, eps, rms, dropout_p, _output_dtype(input, rms), h_dtype, None)
    return _run(op, input, residual, gate, weight, bias, scale, shift, spec, want_h)


def _eagerly(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    want_h: bool,
    *,
    rms: bool,
) -> tuple[Tensor, Tensor] | None:
    """Run a norm that needs no further check in the compiled kernels; return None for any other.

    On a small tensor the checks in Python would take longer than all else.
    """
    if type(eps) is not float:
        return None
    shape: Any = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
    plain = not rms and residual is None
    kernels = ops.eager_kernels(shape, input, residual, weight, bias, plain=plain)
    if kernels is None:
        return None
    dtype = input.dtype
    spec = Spec(shape, eps, rms, 0.0, dtype, None if residual is None else dtype, None)
    tensors = (input, residual, None, weight, bias, None, None, None)
    z, h = autograd.run_eagerly(kernels, *tensors, spec=spec, want_h=want_h)
    return z, input if h is None else h


def _run(
    op: str,
    input: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    spec: Spec,
    want_h: bool,
) -> tuple[Tensor, Tensor]:
    """Run checked arguments where they are to run; return z and h."""
    plain = not spec.rms and spec.h_dtype is None and scale is None and shift is None
    backend = backends.select(input, plain=plain)
    parameters = (weight, bias, scale, shift)
    if backend == "torch" or autograd.transforms_active():
        # The masks of the kernels would take plain torch dozens of operators.
        x = F.dropout(input, spec.dropout_p) if spec.dropout_p > 0.0 else input
        if backend == "torch" and not autograd.transforms_active():
            return _torch_norm(x, residual, gate, *parameters, spec)
        return reference.layer_norm(x, residual, gate, *parameters, None, spec)[:2]
    if input.is_nested:
        fail(op, f"a tensor of one shape for the {backend} backend", "a nested tensor")
    seed = None
    if spec.dropout_p > 0.0:
        # On the device and from its generator: no synchronisation, and a graph draws anew.
        seed = torch.randint(2**62, (1,), device=input.device)
    z, h = autograd.layer_norm(input, residual, gate, *parameters, seed, spec=spec, want_h=want_h)
    return z, input if h is None else h


def _torch_norm(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """Run torch's own norm, and the terms around it in plain torch."""
    if spec.x_hat_dtype is not None or not _torch_accepts(x, weight, bias, spec):
        return reference.layer_norm(x, residual, gate, weight, bias, scale, shift, None, spec)[:2]
    h = reference.stream(x, residual, gate, None, spec)
    if spec.rms:
        y = F.rms_norm(h, spec.normalized_shape, weight, spec.eps)
    else:
        y = F.layer_norm(h, spec.normalized_shape, weight, bias, spec.eps)
    if scale is None and shift is None and y.dtype == spec.out_dtype:
        return y, h
    return reference.modulate(y, scale, shift, spec), h


def _default_eps(*tensors: Tensor | None) -> float:
    return _EPS[compute_dtype(*[getattr(tensor, "dtype", None) for tensor in tensors])]


def _output_dtype(input: Tensor, rms: bool) -> torch.dtype:
    if (
        input.device.type in AUTOCAST_FLOAT32
        and torch.is_autocast_enabled(input.device.type)
        and input.dtype != torch.float64
        and (_AUTOCAST_RMS or not rms)
    ):
        return torch.float32
    return input.dtype


def _torch_accepts(x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec) -> bool:
    """Return whether torch's operator takes this mix of dtypes without complaint."""
    dtype = x.dtype if spec.h_dtype is None else spec.h_dtype
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return True
    if spec.out_dtype != x.dtype:  # autocast
        return True
    parameters = {parameter.dtype for parameter in (weight, bias) if parameter is not None}
    half_on_cpu = x.is_cpu and dtype in (torch.float16, torch.bfloat16)
    return not spec.rms and half_on_cpu and parameters == {torch.float32}
