"""What the norms that models bring along compute: the arithmetic that fusednorm has for them."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fusednorm import channels, functional, gated
from fusednorm.spec import GatedOperands, GatedSpec, Operands, Spec
from fusednorm.validation import check_channel_norm, check_norm

Mix: TypeAlias = tuple[torch.dtype, torch.dtype | None]
"""The dtypes of an input and of a weight; None where there is no weight."""

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
HALVES = (FLOAT16, BFLOAT16)
EPS = torch.finfo(FLOAT32).eps  # what an epsilon of None stands for


class Rule(NamedTuple):
    """The arithmetic of a mix: `(x_hat.to(rounded) * (offset + weight) + bias).to(out)`.

    Attributes:
        rms: whether the mean is taken as 0.
        offset: 1 where the weight is counted from one, as in Gemma, else 0.
        rounded: the dtype that x_hat is rounded to: the input's in Llama, float32 in OLMo 2.
        out: the dtype of the result.
        gate: "before" where the norm comes before the factor `silu(gate)`, "after" where it comes
            after it, None without a gate.
        group: the number of columns that are normalised together, or None for the whole row.
    """

    rms: bool
    offset: int
    rounded: torch.dtype
    out: torch.dtype
    gate: str | None = None
    group: int | None = None

    def plain(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Return y in plain torch, which is what a norm's own forward is compared with."""
        h, rstd = self.statistics(x, eps, gate)
        y = (h * rstd).to(self.rounded).float() * self.factor(weight)
        y = y if bias is None else y + bias.float()
        if self.gate == "before" and gate is not None:
            y = y * F.silu(gate.float())
        return y.to(self.out)

    def statistics(
        self, x: Tensor, eps: float, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what is normalised, without its mean, and rstd."""
        h = x.float()
        if self.gate == "after" and gate is not None:
            h = h * F.silu(gate.float())
        grouped = h if self.group is None else h.unflatten(-1, (-1, self.group))
        if not self.rms:
            grouped = grouped - grouped.mean(-1, keepdim=True)
        rstd = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
        if self.group is None:
            return grouped, rstd
        return grouped.flatten(-2), rstd.expand_as(grouped).flatten(-2)

    def factor(self, weight: Tensor | None) -> Tensor | float:
        """Return what x_hat is multiplied by."""
        return 1.0 if weight is None else self.offset + weight.float()

    def fused(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Return y from the kernels."""
        op = "rms_norm" if self.rms else "layer_norm"
        eps = EPS if eps is None else eps
        shape, eps = check_norm(op, x, tuple(x.shape[-1:]), weight, bias, eps)
        if gate is not None:
            return self._gated(GatedOperands(x, gate, weight, bias), shape, eps)
        scale: Tensor | None = None
        shift: Tensor | None = None
        rounded: torch.dtype | None = self.rounded
        if self.offset and weight is not None:
            scale, weight = weight[None], None
            shift, bias = None if bias is None else bias[None], None
        elif rounded == FLOAT32 and self.out == x.dtype and not (self.rms and bias is not None):
            rounded = None  # y alone is rounded: torch's own operators may serve, too
        operands = Operands(x, weight=weight, bias=bias, scale=scale, shift=shift)
        return functional.norm(op, operands, shape, eps, rounded, rms=self.rms, out_dtype=self.out)

    def fused_over_channels(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
    ) -> Tensor | None:
        """Return y of [B, C, *spatial] from the kernels that normalise dimension 1, or None.

        They have no term but weight and bias, and leave channels that are adjacent to the others.
        """
        as_stored = weight is None and self.rounded == self.out
        if x.stride(1) == 1 or (self.offset and weight is not None):
            return None
        if self.rounded != FLOAT32 and not as_stored:
            return None
        op = "rms_norm2d" if self.rms else "layer_norm2d"
        eps = check_channel_norm(op, x, weight, bias, EPS if eps is None else eps)
        spec = Spec((x.shape[1],), eps, self.rms, 0.0, self.out, None, None)
        return channels.run(op, Operands(x, weight=weight, bias=bias), spec)

    def _gated(self, operands: GatedOperands, shape: tuple[int, ...], eps: float) -> Tensor:
        rounded = None if self.rounded == FLOAT32 else self.rounded
        options = (self.group or shape[0], eps, self.rms, self.gate == "before", self.out, rounded)
        op = "gated_rms_norm" if self.rms else "gated_layer_norm"
        return gated.run(op, operands, GatedSpec(shape, *options))


class Held(NamedTuple):
    """Where a norm has what its forward reads.

    Attributes:
        weight: the name of its weight, or None.
        bias: the name of its bias, or None.
        epsilon: the name of its epsilon, or the number that the forward itself has.
    """

    weight: str | None
    bias: str | None
    epsilon: str | float


def words(mixes: list[Mix]) -> str:
    """List mixes of dtypes, those of one dtype as that dtype."""
    names = [str(x).removeprefix("torch.") for x, weight in mixes if weight in (x, None)]
    for x, weight in mixes:
        if weight not in (x, None):
            names.append("/".join(str(dtype).removeprefix("torch.") for dtype in (x, weight)))
    if len(mixes) == len(DTYPES) ** 2:
        return "any mix of float16, bfloat16 and float32"
    return ", ".join(names)
