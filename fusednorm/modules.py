"""The `nn.Module` front ends: torch's own modules with another forward, and nothing else."""

from torch import Tensor, nn

from fusednorm.functional import layer_norm


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
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
