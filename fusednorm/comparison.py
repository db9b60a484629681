"""A norm's own forward beside a rule: the calls that are made of both, and when they agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusednorm.arithmetic import FLOAT32, HALVES, Rule


class ProbeCall(NamedTuple):
    """One call of a norm's forward, and all that it may branch on.

    Attributes:
        x: the input, with its rows along the last dimension.
        weight: the weight that the norm has in the call, or None.
        bias: the bias that it has, or None.
        eps: the epsilon that it has.
        gate: what the norm is given beside x, of its shape, or None.
        axis: the dimension that the rows of x are moved to in the call.
        training: the mode of the module.
        mode: what the call is made under; with `torch.enable_grad` gradients are compared, too.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    gate: Tensor | None = None
    axis: int = -1
    training: bool = False
    mode: Any = torch.no_grad

    @property
    def differentiated(self) -> bool:
        """Whether gradients are compared."""
        return self.mode is torch.enable_grad

    def leaves(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return x, weight, bias and gate as the leaves of a graph of their own."""
        gate = self.gate
        if gate is not None:
            gate = gate.detach().requires_grad_(self.differentiated)
        weight, bias = (
            None if t is None else nn.Parameter(t.detach(), self.differentiated)
            for t in (self.weight, self.bias)
        )
        return self.x.detach().requires_grad_(self.differentiated), weight, bias, gate


class Values(NamedTuple):
    """What norms are called with: ordinary and special rows, gates, and pairs of parameters."""

    rows: Tensor
    special: Tensor
    gates: Tensor
    parameters: Tensor
    special_parameters: Tensor


def values(size: int, eps: float) -> Values:
    """Return values for rows of a size."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=FLOAT32)

    # One row in three is so small that epsilon counts.
    scales = torch.tensor([1.0, max(eps, 1e-8) ** 0.5, 30.0], dtype=FLOAT32)
    count = 12 * -(-64 // size)
    rows = normal(count, size) * scales.repeat(count // 3)[:, None]
    parameters = torch.stack([2.5 * torch.rand(size, generator=generator) - 0.75, normal(size)])
    # Clamps and guards that a norm may have: of its input, its statistics and its result.
    special = normal(12, size)
    special[:6] *= torch.tensor([0.0, 1e-30, 1e4, 1e7, 1e15, 1e30])[:, None]
    special[6] = 1.0
    special[7] = 0.0
    special[7:, 0] = torch.tensor([30.0, 6e4, torch.inf, -torch.inf, torch.nan])
    factors = torch.tensor([0.0, 1e6, 1e-6, torch.inf, torch.nan, -1.0])
    special_parameters = parameters * factors.repeat(-(-size // 6))[:size]
    gates = 3.0 * normal(count, size)
    gates[:4, 0] = torch.tensor([0.0, 60.0, -60.0, 1e4])
    return Values(rows, special, gates, parameters, special_parameters)


def of_rank(rows: Tensor, rank: int, axis: int) -> Tensor:
    """Return rows as an input of a rank of at least 2, contiguous once they are at their axis."""
    leading = {2: (-1,), 3: (2, -1), 4: (2, -1, 2), 5: (2, -1, 1, 2)}[rank]
    return laid_out(rows.reshape(*leading, rows.shape[-1]), axis)


def laid_out(x: Tensor, axis: int) -> Tensor:
    """Return x in the layout in which it is contiguous once its rows are at their axis."""
    return x if axis == -1 else x.movedim(-1, axis).contiguous().movedim(axis, -1)


def strided(x: Tensor, axis: int) -> Tensor:
    """Return x in another layout."""
    if axis != -1:
        return x.contiguous()  # channels last
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return torch.stack([x, x], -1)[..., 0]


def agrees(rule: Rule, call: ProbeCall, y: object, gradients: list[Tensor]) -> bool:
    """Whether a rule does what a forward did, but for the order of float32 operations.

    A norm with a gate may round more often on the way, in half precision; the kernels round once.
    """
    leaves = call.leaves()
    with call.mode():
        expected = rule.plain(*leaves[:3], call.eps, leaves[3])
    if not isinstance(y, Tensor) or y.dtype != expected.dtype or y.shape != expected.shape:
        return False
    h, rstd = rule.statistics(call.x, call.eps, call.gate)
    x_hat = (h * rstd).abs()
    factor: Any = abs(rule.factor(call.weight))
    terms = torch.zeros(())
    if not rule.rms or call.bias is not None:
        # A difference is as exact as what it is taken from.
        terms = x_hat.amax(-1, keepdim=True) * factor
        terms = terms if call.bias is None else terms + call.bias.float().abs()
        if rule.gate == "before" and call.gate is not None:
            terms = terms * F.silu(call.gate.float()).abs()
    result = y
    if not rule.rms:
        # Where a variance overflows torch's own operator has nan, and other code 0.
        overflown = rstd.eq(0) & call.x.isfinite().all(-1, keepdim=True)
        result, expected = (t.masked_fill(overflown, 0.0) for t in (y, expected))
    # The roundings of a sum of N terms in another order add up like the steps of a random walk.
    order = call.x.shape[-1] ** 0.5 / 2
    if not _close(result, expected, terms, order, gated=call.gate is not None):
        return False
    if not call.differentiated:
        return True
    exactness = (8 + order) * max(torch.finfo(t.dtype).eps for t in (*call[:2], y) if t is not None)
    return all(
        ((a == b) | ((a.double() - b.double()).abs() <= exactness * terms)).all()
        for a, b, terms in zip(
            gradients,
            gradients_of(expected, leaves),
            _gradient_terms(rule, call, expected.detach(), x_hat, rstd),
            strict=True,
        )
    )


def _gradient_terms(
    rule: Rule, call: ProbeCall, y: Tensor, x_hat: Tensor, rstd: Tensor
) -> list[Tensor]:
    """Return how large the terms are that each gradient is the sum of."""
    dy, factor = y.float().abs(), torch.as_tensor(rule.factor(call.weight)).abs()
    gate = torch.ones(()) if call.gate is None else call.gate.float()
    silu = F.silu(gate).abs()
    slope = 1.1  # that of silu, at most
    weighted = dy * silu if rule.gate == "before" else dy
    dh = (weighted * factor).amax(-1, keepdim=True) * rstd
    terms = [dh * silu if rule.gate == "after" else dh]
    for parameter, summed in ((call.weight, weighted * x_hat), (call.bias, weighted)):
        if parameter is not None:
            columns = summed.reshape(-1, summed.shape[-1]).sum(0)
            terms.append(columns if parameter.numel() == len(columns) else columns.sum())
    if call.gate is not None:
        biased = x_hat * factor if call.bias is None else x_hat * factor + call.bias.float().abs()
        terms.append(slope * (dy * biased if rule.gate == "before" else dh * call.x.float().abs()))
    return terms


def _close(actual: Tensor, expected: Tensor, terms: Tensor, order: float, *, gated: bool) -> bool:
    """Whether results agree; `terms` is how large their terms are where these may cancel."""
    a, b = actual.double(), expected.double()
    different = (a != b) & ~(a.isnan() & b.isnan())
    info, is_half = torch.finfo(expected.dtype), expected.dtype in HALVES
    # A rounding more or less changes many of the results in half precision, the order few.
    few = max(1, different.numel() // (64 if terms.any() else 256))
    if is_half and not gated and different.sum() > few:
        return False
    # In half precision one rounding of x_hat and one of y may go the other way.
    tolerance = (
        2 if is_half else 16 + order
    ) * info.eps * b.abs() + info.smallest_normal * info.eps
    tolerance += (16 + order) * torch.finfo(FLOAT32).eps * terms.nan_to_num(0.0, 0.0)
    return not (different & ~(b.isfinite() & ((a - b).abs() <= tolerance))).any()


def gradients_of(y: Any, leaves: Iterable[Tensor | None]) -> list[Tensor]:
    """Return the gradients for an upstream gradient of y, with which all terms of dx are large."""
    wanted = [leaf for leaf in leaves if leaf is not None]
    return list(torch.autograd.grad(y.float().square().sum() / 2, wanted))
