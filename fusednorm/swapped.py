"""The class of a norm that is run fused where it has been compared."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fusednorm import backends, observers
from fusednorm.arithmetic import Held, Mix, Rule, words

AUTOCAST_DEVICES = ("cpu", "cuda")
ROW_RANKS, CHANNEL_RANKS = (1, 2, 3, 4), (3, 4, 5)
"""How many dimensions an input may have that is normalised over the last one, and over dimension 1.

Over dimension 1 of two is over the last one.
"""
SHORTEST = 1e-12
"""The length that `torch.nn.functional.normalize` takes a shorter row to have."""


class Swap(NamedTuple):
    """What the class of a swapped norm is made of; it can be compared, hashed and pickled.

    Attributes:
        original: the norm's own class.
        arguments: the names of the tensors that a call gives: the input, and a gate if it has one.
        held: where an instance has its weight, bias and epsilon.
        size: N, or None where any will do.
        shape: the shape of weight and bias, or None without them.
        parts: the names of what is run on the result, an activation say, in this order.
        fixed: the other attributes that the forward may read, with their values.
        axes: which dimension is normalised, by the number of dimensions of the input.
        rules: the mixes that are run fused, and how.
        autocast: the devices and mixes that are run fused under autocast, and how.
    """

    original: type[nn.Module]
    arguments: tuple[str, ...]
    held: Held
    size: int | None
    shape: tuple[int, ...] | None
    parts: tuple[str, ...]
    fixed: tuple[tuple[str, Any], ...]
    axes: tuple[tuple[int, int], ...]
    rules: tuple[tuple[Mix, Rule], ...]
    autocast: tuple[tuple[tuple[str, Mix], Rule], ...]

    @property
    def has_short_epsilon(self) -> bool:
        """Whether the epsilon is that of a shortest length, squared."""
        return not isinstance(self.held.epsilon, str) and self.held.epsilon < SHORTEST

    def describe(self) -> str:
        """Say what is run fused; all else stays with the norm's own forward."""
        mixes = [mix for mix, _ in self.rules]
        text = [words(mixes)]
        rows = tuple(rank for rank, axis in self.axes if axis == -1)
        if rows not in ((), ROW_RANKS):
            text.append(f"of rank {', '.join(map(str, rows))}")
        if channels := [str(rank) for rank, axis in self.axes if axis == 1]:
            text.append(f"over dimension 1 of rank {', '.join(channels)}")
        if self.has_short_epsilon:
            text.append("a row of a length below 1e-8 that is not 0 by another epsilon")
        for device in AUTOCAST_DEVICES:
            under = [mix for (of, mix), _ in self.autocast if of == device]
            if under != mixes:
                text.append(f"under {device} autocast {words(under) if under else 'nothing'}")
        return "; ".join(text)


class Swapped(nn.Module):
    """What stands before a module's own class in the bases of its class once it is swapped."""

    _fusednorm_swap: ClassVar[Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Tell pickle and deepcopy how to make the class, which cannot be imported by a name."""
        state = super().__reduce_ex__(protocol)[2:]
        base = next(cls for cls in type(self).__mro__ if Swapped in cls.__bases__)
        return (_new_swapped, (self._fusednorm_swap, base), *state)

    @classmethod
    def _fusednorm_namespace(cls, swap: Any) -> dict[str, Any]:
        """Return what the class of a swapped module has beside its swap."""
        return {}


class SwappedNorm(Swapped):
    """A norm that is run fused where it has been compared."""

    _fusednorm_swap: ClassVar[Swap]
    _fusednorm_axes: ClassVar[dict[int, int]]
    _fusednorm_short: ClassVar[bool]
    _fusednorm_rules: ClassVar[dict[Mix, Rule]]
    _fusednorm_autocast: ClassVar[dict[tuple[str, Mix], Rule]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run fused what has been compared, and the norm's own forward in all other cases."""
        swap = self._fusednorm_swap
        names = swap.arguments
        if len(args) + len(kwargs) == len(names):
            x: Any = args[0] if args else kwargs.get(names[0])
            gate: Any = None
            if len(names) == 2:
                gate = args[1] if len(args) == 2 else kwargs.get(names[1])
            weight, bias, eps = self._fusednorm_held()
            rule = self._fusednorm_rule(x, weight, bias, gate)
            if rule is not None:
                y = fused(rule, x, weight, bias, eps, gate, self._fusednorm_axes[x.dim()])
                for part in swap.parts:
                    y = getattr(self, part)(y)
                return y
        return super().forward(*args, **kwargs)

    def _fusednorm_held(self) -> tuple[Tensor | None, Tensor | None, float | None]:
        """Return weight, bias and epsilon."""
        weight, bias, epsilon = self._fusednorm_swap.held
        return (
            None if weight is None else getattr(self, weight),
            None if bias is None else getattr(self, bias),
            getattr(self, epsilon) if isinstance(epsilon, str) else epsilon,
        )

    def _fusednorm_rule(
        self, x: Any, weight: Tensor | None, bias: Tensor | None, gate: Any
    ) -> Rule | None:
        """Return the rule for a call, or None for one of a kind that nobody has compared."""
        swap = self._fusednorm_swap
        if not isinstance(x, Tensor) or (axis := self._fusednorm_axes.get(x.dim())) is None:
            return None
        mix = (x.dtype, None if weight is None else weight.dtype)
        if (
            (swap.size is not None and x.shape[axis] != swap.size)
            or (weight is not None and weight.shape != swap.shape)
            or (bias is not None and (bias.shape != swap.shape or bias.dtype != mix[1]))
            or x.layout is not torch.strided
            or x.is_nested
        ):
            return None
        if len(swap.arguments) == 2 and not (
            isinstance(gate, Tensor)
            and gate.shape == x.shape
            and gate.dtype == x.dtype
            and gate.layout is torch.strided
            and gate.device == x.device
        ):
            return None
        for name, value in swap.fixed:
            if getattr(self, name, None) != value:
                return None
        if self._fusednorm_short and not _runs_in_kernels(x):
            return None
        device = x.device.type
        if _has_autocast(device) and torch.is_autocast_enabled(device):
            return self._fusednorm_autocast.get((device, mix))
        return self._fusednorm_rules.get(mix)

    @classmethod
    def _fusednorm_namespace(cls, swap: Swap) -> dict[str, Any]:
        """Return what a call looks up, as dicts."""
        return {
            "_fusednorm_axes": dict(swap.axes),
            "_fusednorm_short": swap.has_short_epsilon,
            "_fusednorm_rules": dict(swap.rules),
            "_fusednorm_autocast": dict(swap.autocast),
        }


def _has_autocast(device: str) -> bool:
    """Return whether a kind of device has an autocast that could be on."""
    return torch.amp.is_autocast_available(device)


# A constant to torch.compile, which in torch 2.10 cannot trace the question.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _runs_in_kernels(x: Tensor) -> bool:
    """Whether no formula differentiates that has rstd cubed, infinite where epsilon is too small.

    A row of zeros has a gradient of nan there.
    """
    formula = observers.transforms_active() or observers.tracing()
    return not formula and backends.choose(x, plain=False).backend != "torch"


def fused(
    rule: Rule,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    gate: Tensor | None,
    axis: int,
) -> Tensor:
    """Run a rule on an input that lies as the module's does."""
    size = x.shape[axis]
    weight, bias = row(weight, size), row(bias, size)
    if axis == -1:
        return rule.fused(x, weight, bias, eps, gate)
    if gate is None and (y := rule.fused_over_channels(x, weight, bias, eps)) is not None:
        return y
    x, gate = x.movedim(1, -1), None if gate is None else gate.movedim(1, -1)
    return rule.fused(x, weight, bias, eps, gate).movedim(-1, 1)


def row(parameter: Tensor | None, size: int) -> Tensor | None:
    """Return a weight or bias of shape [1, N, 1], say, or of one number, as [N]."""
    if parameter is None or (parameter.dim() == 1 and parameter.shape[0] == size):
        return parameter
    return parameter.reshape(-1).expand(size)


_CLASSES: dict[Any, type[Swapped]] = {}


def swapped_class(swap: Any, base: type[Swapped] = SwappedNorm) -> type[Swapped]:
    """Return the class of a swapped module: the same one for the same swap."""
    if swap not in _CLASSES:
        namespace = {"_fusednorm_swap": swap, **base._fusednorm_namespace(swap)}
        _CLASSES[swap] = type(swap.original.__name__, (base, swap.original), namespace)
    return _CLASSES[swap]


def _new_swapped(swap: Any, base: type[Swapped]) -> nn.Module:
    """Return a swapped module with nothing in it, for pickle to fill."""
    return bare(swapped_class(swap, base))


def bare(cls: type[nn.Module]) -> nn.Module:
    """Return an instance with nothing in it: `__new__` may want arguments that nobody has."""
    return object.__new__(cls)


def arguments(cls: type[nn.Module]) -> list[tuple[str, ...]]:
    """Return the names of the tensors that a forward may be called with: one, or two.

    A second one is tried first, since who has it gives it.
    """
    forward = getattr(cls, "forward", None)
    try:
        _, *parameters = inspect.signature(forward).parameters.values() if forward else []
    except (TypeError, ValueError):  # a builtin has no signature
        return []
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in optional}
    named = [p.name for p in parameters[:2] if p.kind is plain]
    return [tuple(named[:n]) for n in range(len(named), 0, -1) if needed <= {*named[:n]}]
