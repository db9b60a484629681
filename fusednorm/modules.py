"""The `nn.Module` front ends: torch's own modules with another forward, and those around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from fusednorm.functional import (
    Options,
    add_norm,
    gated_rms_norm,
    layer_norm,
    layer_norm2d,
    modulated_layer_norm,
    modulated_rms_norm,
    rms_norm,
    rms_norm2d,
)
from fusednorm.observers import shape_of
from fusednorm.spec import Operands
from fusednorm.validation import check_group_size, fail


class LayerNorm(nn.LayerNorm):
    r"""Layer normalisation over the last dimensions of the input, fused into one kernel.

    A drop-in for `torch.nn.LayerNorm`: a subclass that overrides `forward` only, so that the
    constructor, the parameters and their initial values, `repr`, `state_dict` and every
    `isinstance(module, nn.LayerNorm)` in an optimizer's or a sharding policy's code are torch's.
    It computes, as in `Layer Normalization <https://arxiv.org/abs/1607.06450>`__
    (Ba, Kiros and Hinton, 2016),

    .. math::
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b

    where mean and biased variance are those of the last `len(normalized_shape)` dimensions, in
    training and in evaluation alike.

    Args:
        normalized_shape (int or list or torch.Size): the sizes of the dimensions to normalise
            over, the last ones of the input. An int stands for one dimension.
        eps (float): added to the variance. Zero is kept as zero.
        elementwise_affine (bool): whether there is a weight, of ones at first.
        bias (bool): whether there is a bias as well, of zeros at first.
        device: where the parameters are made.
        dtype: the dtype of the parameters.

    Shape:
        - input: `(*, *normalized_shape)`, with any number of leading dimensions, none included.
        - weight, bias: `normalized_shape`, or None.
        - output: the shape of the input.

    The input may be float16, bfloat16, float32 or float64, and the output has the dtype that
    `nn.LayerNorm` gives it, under autocast too. See `fusednorm.functional.layer_norm` for the
    whole contract.

    Example:
        >>> import torch
        >>> norm = LayerNorm(8)
        >>> norm
        LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)
        >>> norm(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
        >>> norm.load_state_dict(torch.nn.LayerNorm(8).state_dict())
        <All keys matched successfully>
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, of shape `(*, *normalized_shape)`; the result has its shape."""
        if is_scripting():  # the language of scripts has torch's functions only
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        else:  # which a script does not compile
            return _layer_norm(self, input)


def _layer_norm(norm: nn.LayerNorm, input: Tensor) -> Tensor:
    # As attributes they would be searched for everywhere else first, for a microsecond.
    parameters = norm._parameters
    try:
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:  # pruned, or computed from other parameters
        weight, bias = norm.weight, norm.bias
    return layer_norm(input, norm.normalized_shape, weight, bias, norm.eps)


class RMSNorm(nn.RMSNorm):
    r"""Division by the root mean square over the last dimensions, fused into one kernel.

    A drop-in for `torch.nn.RMSNorm`: a subclass that overrides `forward` only, so that the
    constructor, the parameters and their initial values, `repr`, `state_dict` and every
    `isinstance(module, nn.RMSNorm)` in an optimizer's or a sharding policy's code are torch's. It
    computes, as in `Root Mean Square Layer Normalization <https://arxiv.org/abs/1910.07467>`__
    (Zhang and Sennrich, 2019),

    .. math::
        y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w

    where the mean square is that of the last `len(normalized_shape)` dimensions, in training and
    in evaluation alike.

    Args:
        normalized_shape (int or list or torch.Size): the sizes of the dimensions to normalise
            over, the last ones of the input. An int stands for one dimension.
        eps (float): added to the mean square. Zero is kept as zero; None stands for the machine
            epsilon of the dtype computed in, which is float32, or float64 for float64 input.
        elementwise_affine (bool): whether there is a weight, of ones at first.
        device: where the weight is made.
        dtype: the dtype of the weight.

    Shape:
        - x: `(*, *normalized_shape)`, with any number of leading dimensions, none included.
        - weight: `normalized_shape`, or None.
        - output: the shape of the input.

    The input may be float16, bfloat16, float32 or float64, and the output has the dtype that
    `nn.RMSNorm` gives it, under autocast too. See `fusednorm.functional.rms_norm` for the whole
    contract.

    Example:
        >>> import torch
        >>> norm = RMSNorm(8)
        >>> norm
        RMSNorm((8,), eps=None, elementwise_affine=True)
        >>> norm(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
        >>> norm.load_state_dict(torch.nn.RMSNorm(8).state_dict())
        <All keys matched successfully>
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, of shape `(*, *normalized_shape)`; the result has its shape."""
        if is_scripting():
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        else:
            return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class LayerNorm2d(nn.LayerNorm):
    r"""Layer normalisation over the channels of `(B, C, *)`, fused and without a permuted copy.

    .. math::
        y_{b,c,s} = \frac{x_{b,c,s} - \mathrm{E}_c[x_{b,c,s}]}
        {\sqrt{\mathrm{Var}_c[x_{b,c,s}] + \epsilon}} \cdot w_c + b_c

    The norm of ConvNeXt (Liu et al., 2022, arXiv:2201.03545) and of many segmentation models. Like
    the classes of that name in timm and torchvision it is a `torch.nn.LayerNorm` over `(C,)` with
    another forward, and takes their state dicts.

    Args:
        num_channels (int): C, the size of dimension 1.
        eps (float): added to the variance.
        elementwise_affine (bool): whether there is a weight, of ones at first.
        bias (bool): whether there is a bias as well, of zeros at first.
        device: where the parameters are made.
        dtype: the dtype of the parameters.

    Shape:
        - input: `(B, C, *)`, with any number of further dimensions, none included.
        - weight, bias: `(C,)`, or None.
        - output: the shape of the input, and its memory format, contiguous or channels_last.

    See `fusednorm.functional.layer_norm2d` for the whole contract.

    Example:
        >>> import torch
        >>> norm = LayerNorm2d(8)
        >>> norm
        LayerNorm2d((8,), eps=1e-06, elementwise_affine=True, bias=True)
        >>> norm(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        channels = _check_int(type(self).__name__, "num_channels", num_channels)
        super().__init__(channels, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, of shape `(B, C, *)`; the result has its shape."""
        if is_scripting():
            rows = input.movedim(1, -1)
            y = F.layer_norm(rows, self.normalized_shape, self.weight, self.bias, self.eps)
            return y.movedim(-1, 1)
        else:
            return layer_norm2d(input, self.weight, self.bias, self.eps)


class RMSNorm2d(nn.RMSNorm):
    r"""Division by the root mean square over the channels of `(B, C, *)`, fused into one kernel.

    .. math::
        y_{b,c,s} = \frac{x_{b,c,s}}{\sqrt{\mathrm{E}_c[x_{b,c,s}^2] + \epsilon}} \cdot w_c

    `LayerNorm2d` with the norm of `RMSNorm`: a `torch.nn.RMSNorm` over `(C,)` with another forward.

    Args:
        num_channels (int): C, the size of dimension 1.
        eps (float): added to the mean square; None stands for the machine epsilon of the dtype
            computed in.
        elementwise_affine (bool): whether there is a weight, of ones at first.
        device: where the weight is made.
        dtype: the dtype of the weight.

    Shape:
        - x: `(B, C, *)`, with any number of further dimensions, none included.
        - weight: `(C,)`, or None.
        - output: the shape of x, and its memory format, contiguous or channels_last.

    See `fusednorm.functional.rms_norm2d` for the whole contract.

    Example:
        >>> import torch
        >>> norm = RMSNorm2d(8)
        >>> norm
        RMSNorm2d((8,), eps=None, elementwise_affine=True)
        >>> norm(torch.randn(2, 8, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        channels = _check_int(type(self).__name__, "num_channels", num_channels)
        super().__init__(channels, eps, elementwise_affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, of shape `(B, C, *)`; the result has its shape."""
        if is_scripting():
            rows = x.movedim(1, -1)
            return F.rms_norm(rows, self.normalized_shape, self.weight, self.eps).movedim(-1, 1)
        else:
            return rms_norm2d(x, self.weight, self.eps)


class _AddNorm(nn.Module):
    """What `AddLayerNorm` and `AddRMSNorm` have beside their norm."""

    normalized_shape: tuple[int, ...]
    eps: Any
    layer_scale: nn.Parameter | None

    def _set_options(
        self,
        prenorm: bool,
        dropout: float,
        layer_scale: float | None,
        residual_in_fp32: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        """Take the keyword arguments, once the constructor of the norm is through."""
        op = type(self).__name__
        self.prenorm = _check_bool(op, "prenorm", prenorm)
        self.dropout = _check_real(op, "dropout", dropout)
        if not 0 <= self.dropout < 1:
            fail(op, "dropout in [0, 1)", dropout)
        self.residual_in_fp32 = _check_bool(op, "residual_in_fp32", residual_in_fp32)
        self.layer_scale_init: float | None = None
        if layer_scale is None:
            self.register_parameter("layer_scale", None)
            return
        self.layer_scale_init = _check_real(op, "layer_scale", layer_scale, " or None")
        self.layer_scale = nn.Parameter(
            torch.empty(self.normalized_shape, device=device, dtype=dtype)
        )
        nn.init.constant_(self.layer_scale, self.layer_scale_init)

    def reset_parameters(self) -> None:
        """Give all parameters their initial values."""
        super().reset_parameters()  # type: ignore[misc]
        # The constructor of the norm calls this before there is a layer scale.
        if getattr(self, "layer_scale", None) is not None:
            nn.init.constant_(self.layer_scale, self.layer_scale_init)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Return the arguments of the norm, and those options that are on."""
        shown = {
            "prenorm": self.prenorm or None,
            "dropout": self.dropout or None,
            "layer_scale": self.layer_scale_init,
            "residual_in_fp32": self.residual_in_fp32 or None,
        }
        options = [f"{name}={value}" for name, value in shown.items() if value is not None]
        return ", ".join([super().extra_repr(), *options])

    def _add(self, op: str, given: Operands, *, rms: bool) -> tuple[Tensor, Tensor]:
        residual_dtype = torch.float32 if self.residual_in_fp32 else None
        options = Options(self.dropout, self.training, residual_dtype)
        shape, eps = self.normalized_shape, self.eps
        return add_norm(op, given, shape, eps, options, rms=rms, want_h=self.prenorm)


class AddLayerNorm(_AddNorm, LayerNorm):
    r"""Add a branch to the residual stream and normalise the sum, in one kernel.

    .. math::
        h &= \text{residual} + \text{layer\_scale} \cdot \mathrm{dropout}(x) \\
        y &= \frac{h - \mathrm{E}[h]}{\sqrt{\mathrm{Var}[h] + \epsilon}} \cdot w + b

    A post-norm block (Vaswani et al., 2017, arXiv:1706.03762) goes on with y alone, which is what
    the module returns. A pre-norm block (Xiong et al., 2020, arXiv:2002.04745) feeds y to its next
    branch and carries h on: with `prenorm=True` the module returns both.

    It is a `LayerNorm` in all else: the state dict is that of `nn.LayerNorm`, whose checkpoints
    load strictly, plus `layer_scale` where there is one.

    Args:
        normalized_shape (int or list or torch.Size): the sizes of the dimensions to normalise
            over, the last ones of the input. An int stands for one dimension.
        eps (float): added to the variance. Zero is kept as zero.
        elementwise_affine (bool): whether there is a weight, of ones at first.
        bias (bool): whether there is a bias as well, of zeros at first.
        device: where the parameters are made.
        dtype: the dtype of the parameters.
        prenorm (bool): whether h is returned as well.
        dropout (float): the probability that an element of x is dropped in training, in [0, 1).
            Evaluation drops none.
        layer_scale (float): the initial value of a learnable factor for each feature of the branch
            (LayerScale, Touvron et al., 2021, arXiv:2103.17239); None for no such factor. The
            parameter has torchvision's name, `layer_scale`; timm's is `gamma`, which the
            checkpoint loader of transformers takes for a norm's weight.
        residual_in_fp32 (bool): whether h is float32 whatever the dtype of x; otherwise it has the
            dtype of `residual + x`.

    Shape:
        - x: `(*, *normalized_shape)`, with any number of leading dimensions, none included.
        - residual: the shape of x, or None, which starts a stream.
        - weight, bias, layer_scale: `normalized_shape`, or None.
        - output: y, of the shape and dtype of x; with `prenorm` the pair (y, h), both of its shape.

    See `fusednorm.functional.add_layer_norm` for the whole contract.

    Example:
        >>> import torch
        >>> norm = AddLayerNorm(8, prenorm=True, dropout=0.1)
        >>> norm
        AddLayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True, prenorm=True, dropout=0.1)
        >>> x, residual = torch.randn(2, 2, 3, 8)
        >>> y, residual = norm(x, residual)
        >>> y.shape, residual.shape
        (torch.Size([2, 3, 8]), torch.Size([2, 3, 8]))
        >>> norm.load_state_dict(torch.nn.LayerNorm(8).state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        prenorm: bool = False,
        dropout: float = 0.0,
        layer_scale: float | None = None,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._set_options(prenorm, dropout, layer_scale, residual_in_fp32, device, dtype)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, or (y, h) with `prenorm`, of `x` and `residual`."""
        given = Operands(x, residual, self.layer_scale, self.weight, self.bias)
        y, h = self._add("add_layer_norm", given, rms=False)
        return (y, h) if self.prenorm else y


class AddRMSNorm(_AddNorm, RMSNorm):
    r"""Add a branch to the residual stream and divide by the root mean square, in one kernel.

    .. math::
        h &= \text{residual} + \text{layer\_scale} \cdot \mathrm{dropout}(x) \\
        y &= \frac{h}{\sqrt{\mathrm{E}[h^2] + \epsilon}} \cdot w

    `AddLayerNorm` with the norm of `RMSNorm`: the state dict is that of `nn.RMSNorm`, plus
    `layer_scale` where there is one.

    Args:
        normalized_shape (int or list or torch.Size): the sizes of the dimensions to normalise
            over, the last ones of the input. An int stands for one dimension.
        eps (float): added to the mean square; None stands for the machine epsilon of the dtype
            computed in.
        elementwise_affine (bool): whether there is a weight, of ones at first.
        device: where the parameters are made.
        dtype: the dtype of the parameters.
        prenorm (bool): whether h is returned as well.
        dropout (float): the probability that an element of x is dropped in training, in [0, 1).
        layer_scale (float): the initial value of a learnable factor for each feature of the branch,
            or None for no such factor.
        residual_in_fp32 (bool): whether h is float32 whatever the dtype of x.

    Shape:
        - x: `(*, *normalized_shape)`, with any number of leading dimensions, none included.
        - residual: the shape of x, or None, which starts a stream.
        - weight, layer_scale: `normalized_shape`, or None.
        - output: y, of the shape and dtype of x; with `prenorm` the pair (y, h), both of its shape.

    See `fusednorm.functional.add_rms_norm` for the whole contract.

    Example:
        >>> import torch
        >>> norm = AddRMSNorm(8, eps=1e-6, layer_scale=1e-5)
        >>> norm
        AddRMSNorm((8,), eps=1e-06, elementwise_affine=True, layer_scale=1e-05)
        >>> x, residual = torch.randn(2, 2, 3, 8)
        >>> norm(x, residual).shape
        torch.Size([2, 3, 8])
        >>> list(norm.state_dict())
        ['weight', 'layer_scale']
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        prenorm: bool = False,
        dropout: float = 0.0,
        layer_scale: float | None = None,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._set_options(prenorm, dropout, layer_scale, residual_in_fp32, device, dtype)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, or (y, h) with `prenorm`, of `x` and `residual`."""
        given = Operands(x, residual, self.layer_scale, self.weight)
        y, h = self._add("add_rms_norm", given, rms=True)
        return (y, h) if self.prenorm else y


class _AdaNorm(nn.Module):
    """What `AdaLayerNorm` and `AdaRMSNorm` have beside their norm."""

    _may_have_bias = True
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int,
        cond_features: int,
        eps: float | None,
        elementwise_affine: bool,
        bias: bool,
        gate: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        size = _check_int(op, "normalized_shape", normalized_shape)
        self.normalized_shape = (size,)
        self.cond_features = _check_int(op, "cond_features", cond_features)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.gate = _check_bool(op, "gate", gate)
        for name, wanted in (("weight", True), ("bias", bias)):
            parameter = None
            if elementwise_affine and wanted:
                parameter = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        terms = 3 if gate else 2
        self.linear = _ZeroLinear(self.cond_features, terms * size, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give weight and bias their initial values, as the linear layer does with its own."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return (z, gate), or z without `gate`, of `x` and its `condition`."""
        self._check(x, condition)
        terms = self.linear(F.silu(condition))
        terms = terms.reshape(terms.shape[0], *(1,) * (x.dim() - 2), terms.shape[1])
        # Views: copying a term would cost more than reading its strided rows.
        shift, scale, *gate = terms.chunk(3 if self.gate else 2, -1)
        z = self._modulated(x, shift, scale)
        return (z, *gate) if gate else z

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError

    def _check(self, x: Tensor, condition: Tensor) -> None:
        """Check what the function could name only by the terms made from it."""
        op = type(self).__name__
        for name, value in (("x", x), ("condition", condition)):
            if not isinstance(value, Tensor):
                fail(op, f"{name} to be a Tensor", type(value).__name__, TypeError)
        sizes = shape_of(x)
        if x.dim() < 2 or sizes[-1:] != self.normalized_shape:
            fail(op, f"x of shape (B, *, {self.normalized_shape[0]})", tuple(sizes))
        samples, features = sizes[0], self.cond_features
        if shape_of(condition) not in ((samples, features), (1, features)):
            fail(op, f"condition of shape ({samples}, {features})", tuple(condition.shape))

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        bias = f"bias={self.bias is not None}, " if self._may_have_bias else ""
        return (
            f"{self.normalized_shape[0]}, {self.cond_features}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, {bias}gate={self.gate}"
        )


class AdaLayerNorm(_AdaNorm):
    r"""Layer normalisation that a condition scales and shifts (adaLN-Zero), in one kernel.

    .. math::
        \text{shift}, \text{scale}, \text{gate} &= \mathrm{Linear}(\mathrm{SiLU}(c)) \\
        z &= \left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b\right)
        \cdot (1 + \text{scale}) + \text{shift}

    The method is that of `Scalable Diffusion Models with Transformers
    <https://arxiv.org/abs/2212.09748>`__ (Peebles and Xie, 2022). The linear layer starts as zero:
    z is the plain norm at first, and the gate, by which the caller multiplies the branch that z
    goes into, shuts the branch, so that every block starts as the identity:

    .. code-block:: python

        z, gate = norm(x, condition)
        x = x + gate * branch(z)

    The gate also is a `gate` of `fusednorm.functional.add_layer_norm`.

    Args:
        normalized_shape (int): N, the size of the last dimension, which is normalised.
        cond_features (int): C, the size of the condition.
        eps (float): added to the variance. DiT has 1e-6.
        elementwise_affine (bool): whether there is a weight, of ones at first. DiT has none.
        bias (bool): whether there then is a bias as well, of zeros at first.
        gate (bool): whether there is a gate.
        device: where the parameters are made.
        dtype: the dtype of the parameters.

    Shape:
        - x: `(B, *, N)`.
        - condition: `(B, C)`, or `(1, C)` for all samples.
        - output: z, of the shape and dtype of x, and gate, `(B, 1, .., N)`; without `gate` z alone.

    Attributes:
        linear: the `nn.Linear` from C to 3 N features, the shift first, then scale and gate as in
            DiT; to 2 N without a gate.
        weight, bias: as in `LayerNorm`; None unless `elementwise_affine`.

    Example:
        >>> import torch
        >>> norm = AdaLayerNorm(8, 4)
        >>> x, condition = torch.randn(2, 3, 8), torch.randn(2, 4)
        >>> z, gate = norm(x, condition)
        >>> torch.allclose(z, LayerNorm(8)(x), atol=1e-6), gate.shape, gate.any().item()
        (True, torch.Size([2, 1, 8]), False)
    """

    eps: float

    def __init__(
        self,
        normalized_shape: int,
        cond_features: int,
        eps: float = 1e-5,
        elementwise_affine: bool = False,
        bias: bool = True,
        gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            normalized_shape, cond_features, eps, elementwise_affine, bias, gate, device, dtype
        )

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        affine = self.weight, self.bias
        return modulated_layer_norm(x, self.normalized_shape, shift, scale, *affine, self.eps)


class AdaRMSNorm(_AdaNorm):
    r"""Division by the root mean square that a condition scales and shifts, in one kernel.

    .. math::
        \text{shift}, \text{scale}, \text{gate} &= \mathrm{Linear}(\mathrm{SiLU}(c)) \\
        z &= \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w \cdot (1 + \text{scale})
        + \text{shift}

    `AdaLayerNorm` with the norm of `RMSNorm`: see there for the gate and the linear layer.

    Args:
        normalized_shape (int): N, the size of the last dimension, which is normalised.
        cond_features (int): C, the size of the condition.
        eps (float): added to the mean square; None stands for the machine epsilon of the dtype
            computed in.
        elementwise_affine (bool): whether there is a weight, of ones at first.
        gate (bool): whether there is a gate.
        device: where the parameters are made.
        dtype: the dtype of the parameters.

    Shape:
        - x: `(B, *, N)`.
        - condition: `(B, C)`, or `(1, C)` for all samples.
        - output: z, of the shape and dtype of x, and gate, `(B, 1, .., N)`; without `gate` z alone.

    Attributes:
        linear: the `nn.Linear` from C to 3 N features, the shift first, then scale and gate; to 2 N
            without a gate.
        weight: as in `RMSNorm`; None unless `elementwise_affine`.

    Example:
        >>> import torch
        >>> norm = AdaRMSNorm(8, 4)
        >>> norm
        AdaRMSNorm(
          8, 4, eps=None, elementwise_affine=False, gate=True
          (linear): Linear(in_features=4, out_features=24, bias=True)
        )
        >>> x, condition = torch.randn(2, 3, 8), torch.randn(2, 4)
        >>> z, gate = norm(x, condition)
        >>> torch.allclose(z, RMSNorm(8)(x), atol=1e-6), gate.shape, gate.any().item()
        (True, torch.Size([2, 1, 8]), False)
    """

    _may_have_bias = False

    def __init__(
        self,
        normalized_shape: int,
        cond_features: int,
        eps: float | None = None,
        elementwise_affine: bool = False,
        gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            normalized_shape, cond_features, eps, elementwise_affine, False, gate, device, dtype
        )

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return modulated_rms_norm(x, self.normalized_shape, shift, scale, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    r"""Division by the root mean square, and the SiLU of a gate, in one kernel.

    .. math::
        z = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w \cdot \mathrm{silu}(g)
        \quad\text{or}\quad
        z = \frac{u}{\sqrt{\mathrm{E}[u^2] + \epsilon}} \cdot w
        \quad\text{with}\quad u = x \cdot \mathrm{silu}(g)

    The first is what follows the attention of GLA and DeltaNet, the second that of Mamba 2 (Dao and
    Gu, 2024, arXiv:2405.21060). It is an `RMSNorm` in all else: the state dict is that of
    `nn.RMSNorm`.

    Args:
        normalized_shape (int or list or torch.Size): the sizes of the dimensions that form a row of
            N numbers, the last ones of the input. An int stands for one dimension.
        eps (float): added to the mean square; None stands for the machine epsilon of the dtype
            computed in.
        elementwise_affine (bool): whether there is a weight, of ones at first.
        group_size (int): a divisor of N: the mean square is that of each run of so many adjacent
            numbers of a row. None for N. There is one weight for all of them.
        norm_before_gate (bool): whether the norm is that of x, as in the first formula.
        device: where the weight is made.
        dtype: the dtype of the weight.

    Shape:
        - x: `(*, *normalized_shape)`, with any number of leading dimensions, none included.
        - g: the shape of x, in any strides.
        - weight: `normalized_shape`, or None.
        - output: z, of the shape and dtype of x.

    See `fusednorm.functional.gated_rms_norm` for the whole contract.

    Example:
        >>> import torch
        >>> norm = GatedRMSNorm(8, group_size=4, norm_before_gate=False)
        >>> norm
        GatedRMSNorm((8,), eps=None, elementwise_affine=True, group_size=4, norm_before_gate=False)
        >>> x, g = torch.randn(2, 3, 16).chunk(2, -1)
        >>> norm(x, g).shape
        torch.Size([2, 3, 8])
        >>> list(norm.state_dict())
        ['weight']
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        op = type(self).__name__
        check_group_size(op, group_size, math.prod(self.normalized_shape))
        self.group_size = group_size
        self.norm_before_gate = _check_bool(op, "norm_before_gate", norm_before_gate)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise `x`, of shape `(*, *normalized_shape)`, and multiply by the SiLU of `g`."""
        return gated_rms_norm(
            x,
            g,
            self.normalized_shape,
            self.weight,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    def extra_repr(self) -> str:
        """Return the arguments of the norm, and those options that are on."""
        shown = [super().extra_repr()]
        if self.group_size is not None:
            shown.append(f"group_size={self.group_size}")
        if not self.norm_before_gate:
            shown.append("norm_before_gate=False")
        return ", ".join(shown)


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, whoever initialises it: each module resets its own."""

    def reset_parameters(self) -> None:
        """Set the weight and the bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def _get_name(self) -> str:
        return "Linear"


def _check_bool(op: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        fail(op, f"{name} to be a bool", type(value).__name__, TypeError)
    return value


def _check_int(op: str, name: str, value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        fail(op, f"{name} to be an int", repr(value), TypeError)
    return int(value)


def _check_real(op: str, name: str, value: object, alternative: str = "") -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        fail(op, f"{name} to be a float{alternative}", type(value).__name__, TypeError)
    return float(value)
