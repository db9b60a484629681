"""A norm that a model brings along, run on the CPU beside the rules that the kernels have."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from itertools import chain, permutations, product
from typing import Any

import torch
from torch import Tensor, nn

from fusednorm.arithmetic import DTYPES, EPS, FLOAT32, Held, Mix, Rule
from fusednorm.comparison import (
    ProbeCall,
    agrees,
    gradients_of,
    laid_out,
    of_rank,
    strided,
    values,
)
from fusednorm.swapped import CHANNEL_RANKS, ROW_RANKS, bare

_COMMON = frozenset(vars(nn.Module()))
# Square inputs of a large norm would be huge; a twin of this size stands in for it there.
TWIN_SIZE, _LARGEST_SQUARE, _LARGEST_INPUT = 6, 16, 2**20


class LeftError(Exception):
    """The norm is left, for the reason that it says."""


def attributes(norm: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what the forward of an instance may depend on, beside what every module has."""
    return ((name, value) for name, value in vars(norm).items() if name not in _COMMON)


class Probe:
    """A norm beside the rules, once it is settled how it is called and what it holds."""

    def __init__(self, norm: nn.Module, names: tuple[str, ...], held: Held, size: int) -> None:
        self.norm, self.held, self.size = norm, held, size
        self.names, self.gated = names, len(names) == 2
        eps: Any = getattr(norm, held.epsilon) if isinstance(held.epsilon, str) else held.epsilon
        self.eps = EPS if eps is None else eps
        parameter = None if held.weight is None else norm._parameters[held.weight]
        self.shape = None if parameter is None else tuple(parameter.shape)
        self.is_scalar = parameter is not None and parameter.numel() == 1
        self.parts = tuple(name for name, part in norm._modules.items() if part is not None)
        self.groups: list[int | None] = [None]
        if self.gated:
            divisors = [v for _, v in attributes(norm) if type(v) is int and 1 < v < size]
            groups = [v for n in divisors if size % n == 0 for v in (n, size // n)]
            self.groups += dict.fromkeys(groups)
        self.compared = False
        self.raised: str | None = None

    def findings(self) -> tuple[dict[int, int], dict[Mix, Rule]]:
        """Return the axis by rank, and the rule of each mix, in which it does what a rule does.

        What may differ by rank is tried in float32, and what may differ by dtype in one rank.
        """
        float32 = (FLOAT32, None if self.held.weight is None else FLOAT32)
        axes: dict[int, int] = {}
        for axis, ranks in ((-1, ROW_RANKS), (1, CHANNEL_RANKS)):
            for rank in ranks:
                if rank not in axes and self._rule(float32, self._shapes(float32, rank, axis)):
                    axes[rank] = axis
        rules: dict[Mix, Rule] = {}
        if max(axes, default=1) == 1:  # too little to tell one rule from another
            return {}, rules
        # Those of one dtype come first: nothing is mixed of what does not hold by itself.
        mixes: list[Mix] = [(x, None if self.held.weight is None else x) for x in DTYPES]
        mixes += [(x, w) for x, w in permutations(DTYPES, 2) if self.held.weight is not None]
        for mix in mixes:
            x, weight = mix
            if weight not in (x, None) and not {(x, x), (weight, weight)} <= rules.keys():
                continue
            calls = chain.from_iterable(
                self.circumstances(mix, rank, axis) for rank, axis in self.told_by(axes)
            )
            if rule := self._rule(mix, calls):
                rules[mix] = rule
        return axes, rules

    @staticmethod
    def told_by(axes: dict[int, int]) -> list[tuple[int, int]]:
        """Return the largest rank for each axis."""
        return [*{axis: (rank, axis) for rank, axis in sorted(axes.items())}.values()]

    def _rule(self, mix: Mix, calls: Iterable[ProbeCall]) -> Rule | None:
        """Return the first rule that agrees in all of some calls."""
        rules: list[Rule] | None = None
        for call in calls:
            try:
                y, gradients = self.own(call)
            except LeftError:
                raise
            except Exception as error:
                self.raised = type(error).__name__
                return None
            self.compared = True
            rules = self._rules(mix, y) if rules is None else rules
            rules = [rule for rule in rules if agrees(rule, call, y, gradients)]
            if not rules:
                return None
        return rules[0] if rules else None

    def _rules(self, mix: Mix, y: object) -> list[Rule]:
        """Return the rules for a mix whose result has the dtype of `y`."""
        x, weight = mix
        if not isinstance(y, Tensor) or y.dtype not in (x, FLOAT32):
            return []
        roundings = dict.fromkeys((FLOAT32, x, weight or x))
        offsets = (0,) if self.held.weight is None or self.gated else (0, 1)
        centrings = (True, False) if self.held.bias is None else (False, True)
        gates = ("before", "after") if self.gated else (None,)
        return [
            Rule(rms, offset, rounded, y.dtype, gate, group)
            for rms, offset, rounded, gate, group in product(
                centrings, offsets, roundings, gates, self.groups
            )
        ]

    def call(
        self, mix: Mix, x: Tensor, parameters: Tensor, gates: Tensor, axis: int, **around: Any
    ) -> ProbeCall:
        """Return a call with tensors of a mix."""
        weight = bias = None
        if mix[1] is not None:
            weight = (parameters[0, :1] if self.is_scalar else parameters[0]).to(mix[1])
            if self.held.bias is not None:
                bias = (parameters[1, :1] if self.is_scalar else parameters[1]).to(mix[1])
        gate = None
        if self.gated:
            count = x.numel() // x.shape[-1]
            rows = gates.repeat(-(-count // len(gates)), 1)[:count].to(mix[0])
            gate = laid_out(rows.reshape(x.shape), axis)
        eps = around.pop("eps", self.eps)
        return ProbeCall(x.to(mix[0]), weight, bias, eps, gate, axis, **around)

    def circumstances(self, mix: Mix, rank: int, axis: int) -> Iterator[ProbeCall]:
        """Yield calls of one rank that differ in all else that a forward may branch on."""
        given = values(self.size, self.eps)
        x = of_rank(given.rows, rank, axis)
        vectors, gates = given.parameters, given.gates
        yield self.call(mix, x, vectors, gates, axis)
        yield self.call(mix, of_rank(given.special, rank, axis), vectors, gates, axis)
        if mix[1] not in (mix[0], None):
            return
        # A forward that looks at its circumstances as well as at the dtype is tried in each once.
        modes = (torch.no_grad, torch.enable_grad, torch.inference_mode)
        for training, mode in product((True, False), modes):
            yield self.call(mix, x, vectors, gates, axis, training=training, mode=mode)
        if isinstance(self.held.epsilon, str):
            yield self.call(mix, x, vectors, gates, axis, eps=0.37)
        yield self.call(mix, x, given.special_parameters, gates, axis)

    def _shapes(self, mix: Mix, rank: int, axis: int) -> Iterator[ProbeCall]:
        """Yield calls of one rank that differ in shape and layout."""
        given = values(self.size, self.eps)
        rows, vectors, gates = given.rows, given.parameters, given.gates
        if rank == 1:
            for row in rows[:12]:
                yield self.call(mix, row, vectors, gates, axis)
            yield self.call(mix, strided(rows[0], axis), vectors, gates, axis)
            return
        x = of_rank(rows, rank, axis)
        yield self.call(mix, x, vectors, gates, axis)
        yield self.call(mix, strided(x, axis), vectors, gates, axis)
        for count in (0, 1):
            shape = [count, *[1] * (rank - 2), self.size]
            yield self.call(mix, rows[:count].reshape(shape), vectors, gates, axis)
        # A norm of another axis shows in what is square.
        size = self.size if self.size <= _LARGEST_SQUARE or self.gated else TWIN_SIZE
        given = values(size, self.eps)
        rows, vectors, gates = given.rows, given.parameters, given.gates
        for lengths in {(size,) * (rank - 1), *set(permutations([size, *[2] * (rank - 2)]))}:
            count = math.prod(lengths)
            if count * size <= _LARGEST_INPUT:
                x = rows.repeat(-(-count // len(rows)), 1)[:count].reshape(*lengths, size)
                yield self.call(mix, laid_out(x, axis), vectors, gates, axis)

    def own(self, call: ProbeCall) -> tuple[object, list[Tensor]]:
        """Return what the norm's own forward does in a call, and the gradients if it has any."""
        leaves = call.leaves()
        stand_in = self.stand_in(call, leaves)
        held, copies = _contents(stand_in), _copies(leaves)
        with call.mode():
            y = self.run(stand_in, call, leaves)
        unchanged = zip(copies, _copies(leaves), strict=True)
        if _contents(stand_in) != held or not all(same(a, b) for a, b in unchanged):
            raise LeftError("its forward changes the module or the input")
        return y, gradients_of(y, leaves) if call.differentiated else []

    def run(self, stand_in: nn.Module, call: ProbeCall, leaves: tuple[Any, ...]) -> Any:
        """Call the own forward with the rows at their axis; return the result, rows last."""
        given = [leaf for leaf in (leaves[0], leaves[3]) if leaf is not None]
        if call.axis == -1:
            return type(self.norm).forward(stand_in, *given)
        y: Any = type(self.norm).forward(stand_in, *[t.movedim(-1, call.axis) for t in given])
        return y.movedim(call.axis, -1) if isinstance(y, Tensor) and y.dim() > 1 else y

    def stand_in(self, call: ProbeCall, leaves: tuple[Tensor | None, ...]) -> nn.Module:
        """Return a norm that is as the probed one, without its hooks, for one call."""
        stand_in, size = bare(type(self.norm)), call.x.shape[-1]
        state: dict[str, Any] = {
            name: copy.copy(value) if isinstance(value, dict | list | set) else value
            for name, value in vars(self.norm).items()
        }
        if size != self.size:
            for name, value in attributes(self.norm):
                state[name] = _resized(value, self.size, size)
        state["training"] = call.training
        state["_modules"] = {name: nn.Identity() for name in self.parts}
        if call.eps != self.eps:
            state[str(self.held.epsilon)] = call.eps
        for held, parameter in zip(self.held[:2], leaves[1:3], strict=True):
            if held is not None and parameter is not None:
                shape = _resized(self.shape, self.size, size)
                parameter = parameter if parameter.shape == shape else parameter.reshape(shape)
                state["_parameters"][held] = parameter
        stand_in.__dict__ = state
        return stand_in

    def ends_with_parts(self, axes: dict[int, int]) -> bool:
        """Whether the parts, an activation say, are run on the norm's result in their order."""
        if not self.parts:
            return True
        float32 = (FLOAT32, None if self.held.weight is None else FLOAT32)
        parts = {
            name: copy.deepcopy(part).eval() for name, part in self.norm._modules.items() if part
        }
        for rank, axis in axes.items():
            call = next(self._shapes(float32, rank, axis))
            leaves = call.leaves()
            whole, norm = self.stand_in(call, leaves), self.stand_in(call, leaves)
            whole.__dict__["_modules"] = parts
            with torch.no_grad():
                y, expected = self.run(norm, call, leaves), self.run(whole, call, leaves)
                y = y if axis == -1 else y.movedim(-1, axis)
                for part in parts.values():
                    y = part(y)
                y = y if axis == -1 else y.movedim(axis, -1)
            if y.shape != expected.shape or y.dtype != expected.dtype or not same(y, expected):
                return False
        return True

    def changed_by(self, names: tuple[str, ...]) -> bool:
        """Whether a second argument, where one is taken, makes another result."""
        float32 = (FLOAT32, None if self.held.weight is None else FLOAT32)
        call = next(self.circumstances(float32, 2, -1))
        other = Probe(self.norm, names, self.held, self.size)
        try:
            gated = other.own(next(other.circumstances(float32, 2, -1)))[0]
        except LeftError:
            raise
        except Exception:  # it takes something else
            return False
        plain = self.own(call)[0]
        if not isinstance(gated, Tensor) or not isinstance(plain, Tensor):
            return True
        return gated.shape != plain.shape or not same(gated, plain)


def _contents(module: nn.Module) -> list[tuple[str, int, int]]:
    """Return the identity of everything that a module holds, and how much is in it."""
    return [
        (name, id(value), len(value) if isinstance(value, dict | list | set) else 0)
        for held in (vars(module), module._parameters, module._buffers, module._modules)
        for name, value in held.items()
    ]


def _copies(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors if tensor is not None]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same numbers."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _resized(value: Any, size: int, other: int) -> Any:
    """Return what an attribute of a norm of one size would be in a norm of another."""
    if type(value) in (tuple, list, torch.Size):
        return type(value)(_resized(v, size, other) for v in value)
    if type(value) is float:
        for power in (0.5, -0.5):
            if math.isclose(value, size**power):
                return other**power
    return other if type(value) is int and value == size else value
