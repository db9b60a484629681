"""AdaLN modules of models: norm, scale and shift in one call, by the module's own forward.

Such a module computes scale and shift from a condition and returns `norm(x) * (1 + scale) + shift`,
each in its own way: diffusers alone has some fifty. Its forward is run as it is, but on a view of
the module in which a norm returns `Deferred`: that remembers a factor, and runs the norm with both
once something is added to it. Whatever else is done to it, it computes the norm first.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_map_only

from fusednorm import functional
from fusednorm.arithmetic import DTYPES, EPS
from fusednorm.modules import LayerNorm, RMSNorm
from fusednorm.spec import Operands
from fusednorm.swapped import Swapped, SwappedNorm, row
from fusednorm.validation import check_terms


class Adaptive(NamedTuple):
    """What the class of a swapped AdaLN module is made of.

    Attributes:
        original: the module's own class.
        norms: the names of the parts that are norms.
    """

    original: type[nn.Module]
    norms: tuple[str, ...]

    def describe(self) -> str:
        """Say what is run fused."""
        return f"{', '.join(self.norms)} with scale and shift in one call"


class AdaptiveNorm(Swapped):
    """What stands before an AdaLN module's own class once it is swapped."""

    _fusednorm_swap: ClassVar[Adaptive]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, with the norms deferred until they are modulated."""
        swap = self._fusednorm_swap
        return modulated(swap.original, View(self, swap.norms), args, kwargs)


def modulated(cls: type[nn.Module], view: View, args: Any, kwargs: Any) -> Any:
    """Run the forward of a class on a view of a module; return its results."""
    result = cls.forward(view, *args, **kwargs)
    if isinstance(result, tuple | list):
        return type(result)([_value(item) for item in result])
    return _value(result)


class View:
    """A module whose norms are deferred.

    Args:
        module: an AdaLN module, or its twin.
        norms: the names of its norms.
        made: gets every `Deferred` that is made, for whoever wants to know what becomes of them.
    """

    def __init__(
        self, module: nn.Module, norms: tuple[str, ...], made: list[Deferred] | None = None
    ) -> None:
        self._module, self._norms, self._made = module, norms, made

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module; of a norm, how it is called."""
        if name not in self._norms:
            return getattr(self._module, name)
        norm, made = getattr(self._module, name), self._made

        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs or _is_watched(norm):
                return norm(x, *args, **kwargs)
            arithmetic = _arithmetic(norm, x)
            if arithmetic is None:
                return norm(x)
            deferred = Deferred(norm, x, arithmetic)
            if made is not None:
                made.append(deferred)
            return deferred

        return call


def _is_watched(norm: nn.Module) -> bool:
    """Whether hooks are to see what the norm returns."""
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks)
    return any(hooks) or bool(norm._backward_pre_hooks) or _has_any_global_hook()


class _Arithmetic(NamedTuple):
    """What a norm computes of an input."""

    rms: bool
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rounded: torch.dtype | None
    out: torch.dtype


def _arithmetic(norm: nn.Module, x: Any) -> _Arithmetic | None:
    """Return what a norm computes of x, or None if that is not to be deferred."""
    if not isinstance(x, Tensor) or x.dim() < 2 or x.is_nested or "forward" in norm.__dict__:
        return None
    if isinstance(norm, LayerNorm | RMSNorm):
        rms = isinstance(norm, RMSNorm)
        if norm.normalized_shape != x.shape[-1:] or norm.eps is None:
            return None
        out = functional._output_dtype(x, rms)
        return _Arithmetic(rms, norm.weight, getattr(norm, "bias", None), norm.eps, None, out)
    if not isinstance(norm, SwappedNorm) or norm._fusednorm_swap.parts:
        return None
    weight, bias, eps = norm._fusednorm_held()
    rule = norm._fusednorm_rule(x, weight, bias, None)
    if rule is None or rule.offset or norm._fusednorm_axes[x.dim()] != -1:
        return None
    size = x.shape[-1]
    eps = EPS if eps is None else eps
    return _Arithmetic(rule.rms, row(weight, size), row(bias, size), eps, rule.rounded, rule.out)


class Deferred:
    """norm(x) or norm(x) * factor, that is not computed yet."""

    def __init__(
        self, norm: nn.Module, x: Tensor, arithmetic: _Arithmetic, factor: Tensor | None = None
    ) -> None:
        self._norm, self._x, self._arithmetic, self._factor = norm, x, arithmetic, factor
        self._computed: Tensor | None = None
        self.modulations = 0

    def value(self) -> Tensor:
        """Compute it, once."""
        if self._computed is None:
            self._computed = self._norm(self._x) if self._factor is None else self._modulated(None)
        return self._computed

    def _modulated(self, shift: Tensor | None) -> Tensor:
        """Run norm, factor and shift in one call."""
        x, factor = self._x, self._factor
        rms, weight, bias, eps, rounded, out = self._arithmetic
        # From a factor in half precision this is exact.
        scale = None if factor is None else factor.float() - 1.0
        for term in (factor, shift):
            out = out if term is None else torch.promote_types(out, term.dtype)
        op, shape = "modulated_rms_norm" if rms else "modulated_layer_norm", tuple(x.shape[-1:])
        scale, shift = check_terms(op, x, shape, scale=scale, shift=shift)
        operands = Operands(x, weight=weight, bias=bias, scale=scale, shift=shift)
        return functional.norm(op, operands, shape, eps, rounded, rms=rms, out_dtype=out)

    def __mul__(self, other: Any) -> Any:
        """Remember a factor of every sample; compute the norm for any other."""
        if self._factor is None and self._is_term(other):
            self.modulations += 1
            return Deferred(self._norm, self._x, self._arithmetic, other)
        return self.value() * other

    def __add__(self, other: Any) -> Any:
        """Run norm, factor and shift in one call, if that is a shift of every sample."""
        if self._is_term(other):
            self.modulations += 1
            return self._modulated(other)
        return self.value() + other

    __rmul__, __radd__ = __mul__, __add__

    def _is_term(self, term: Any) -> bool:
        """Whether it is one vector for all rows or for each sample."""
        x = self._x
        if not isinstance(term, Tensor) or term.dtype not in DTYPES:
            return False
        if term.device != x.device or term.shape[-1:] != x.shape[-1:]:
            return False
        if term.dim() == 1:
            return True
        between = term.shape[1:-1]
        return term.dim() == x.dim() and term.shape[0] in (1, x.shape[0]) and between.numel() == 1

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Change nothing if it has the dtype anyway."""
        given = [*args, *kwargs.values()]
        own = self._arithmetic.out if self._factor is None else None
        return self if given == [own] else self.value().to(*args, **kwargs)

    def type_as(self, other: Tensor) -> Any:
        """Change nothing if it has the dtype anyway."""
        if other.device != self._x.device:
            return self.value().type_as(other)
        return self.to(other.dtype)

    def __getattr__(self, name: str) -> Any:
        """Compute the norm first."""
        return getattr(self.value(), name)

    def __getitem__(self, index: Any) -> Any:
        """Compute the norm first."""
        return self.value()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute the norm first, for any function of torch."""
        args, kwargs = tree_map_only(cls, cls.value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _value(result: Any) -> Any:
    return result.value() if isinstance(result, Deferred) else result
