"""What the norms that models bring along compute, found out by running them.

A norm is run on the CPU, on all that its forward may branch on, beside the rules that the kernels
have. Those dtypes and ranks of the input in which a rule agrees throughout are run fused from then
on; all else stays with the norm's own forward.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import permutations, product
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from fusednorm import functional
from fusednorm.spec import Operands
from fusednorm.validation import check_norm

Mix: TypeAlias = tuple[torch.dtype, torch.dtype | None]
"""The dtypes of an input and of a weight; None where there is no weight."""

_FLOAT16, _BFLOAT16, _FLOAT32 = torch.float16, torch.bfloat16, torch.float32
_DTYPES = (_FLOAT16, _BFLOAT16, _FLOAT32)
_HALVES = (_FLOAT16, _BFLOAT16)
_RANKS = (1, 2, 3, 4)
_AUTOCAST_DEVICES = ("cpu", "cuda")
_EPS = torch.finfo(_FLOAT32).eps  # what None stands for


class Rule(NamedTuple):
    """The arithmetic of a mix: `(x_hat.to(rounded) * (offset + weight) + bias).to(out)`.

    Attributes:
        rms: whether the mean is taken as 0.
        offset: 1 where the weight is counted from one, as in Gemma, else 0.
        rounded: the dtype that x_hat is rounded to: the input's in Llama, float32 in OLMo 2.
        out: the dtype of the result.
    """

    rms: bool
    offset: int
    rounded: torch.dtype
    out: torch.dtype

    def plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """Return y in plain torch, which is what a norm's own forward is compared with."""
        h, rstd = self.statistics(x, eps)
        y = (h * rstd).to(self.rounded).float() * self.factor(weight)
        return (y if bias is None else y + bias.float()).to(self.out)

    def statistics(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x without its mean, and rstd."""
        h = x.float()
        if not self.rms:
            h = h - h.mean(-1, keepdim=True)
        return h, torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)

    def factor(self, weight: Tensor | None) -> Tensor | float:
        """Return what x_hat is multiplied by."""
        return 1.0 if weight is None else self.offset + weight.float()

    def fused(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
    ) -> Tensor:
        """Return y from the kernels."""
        op = "rms_norm" if self.rms else "layer_norm"
        eps = _EPS if eps is None else eps
        shape, eps = check_norm(op, x, tuple(x.shape[-1:]), weight, bias, eps)
        scale: Tensor | None = None
        shift: Tensor | None = None
        rounded: torch.dtype | None = self.rounded
        if self.offset and weight is not None:
            scale, weight = weight[None], None
            shift, bias = None if bias is None else bias[None], None
        elif rounded == _FLOAT32 and self.out == x.dtype and not (self.rms and bias is not None):
            rounded = None  # y alone is rounded: torch's own operators may serve, too
        operands = Operands(x, weight=weight, bias=bias, scale=scale, shift=shift)
        return functional.norm(op, operands, shape, eps, rounded, rms=self.rms, out_dtype=self.out)


class Held(NamedTuple):
    """The names under which a norm holds what its forward reads."""

    weight: str | None
    bias: str | None
    epsilon: str


class Swap(NamedTuple):
    """What the class of a swapped norm is made of; it can be compared, hashed and pickled.

    Attributes:
        original: the norm's own class.
        held: where an instance has its weight, bias and epsilon.
        size: N, or None where any will do.
        fixed: the other attributes that the forward may read, with their values.
        ranks: the numbers of dimensions of an input that is run fused.
        rules: the mixes that are run fused, and how.
        autocast: the devices and mixes that are run fused under autocast, and how.
    """

    original: type[nn.Module]
    held: Held
    size: int | None
    fixed: tuple[tuple[str, Any], ...]
    ranks: tuple[int, ...]
    rules: tuple[tuple[Mix, Rule], ...]
    autocast: tuple[tuple[tuple[str, Mix], Rule], ...]

    def describe(self) -> str:
        """Say what is run fused; all else stays with the norm's own forward."""
        mixes = [mix for mix, _ in self.rules]
        words = [_words(mixes)]
        if self.ranks != _RANKS:
            words.append(f"of rank {', '.join(map(str, self.ranks))}")
        for device in _AUTOCAST_DEVICES:
            under = [mix for (of, mix), _ in self.autocast if of == device]
            if under != mixes:
                words.append(f"under {device} autocast {_words(under) if under else 'nothing'}")
        return "; ".join(words)


def _words(mixes: list[Mix]) -> str:
    """List mixes of dtypes, those of one dtype as that dtype."""
    names = [str(x).removeprefix("torch.") for x, weight in mixes if weight in (x, None)]
    for x, weight in mixes:
        if weight not in (x, None):
            names.append("/".join(str(dtype).removeprefix("torch.") for dtype in (x, weight)))
    if len(mixes) == len(_DTYPES) ** 2:
        return "any mix of float16, bfloat16 and float32"
    return ", ".join(names)


class SwappedNorm(nn.Module):
    """What stands before a norm's own class in the bases of its class once it is swapped."""

    _fusednorm_swap: ClassVar[Swap]
    _fusednorm_rules: ClassVar[dict[Mix, Rule]]
    _fusednorm_autocast: ClassVar[dict[tuple[str, Mix], Rule]]
    _fusednorm_argument: ClassVar[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run fused what has been compared, and the norm's own forward in all other cases."""
        x = args[0] if args else kwargs.get(self._fusednorm_argument)
        if len(args) + len(kwargs) == 1 and isinstance(x, Tensor):
            held = self._fusednorm_swap.held
            weight = None if held.weight is None else getattr(self, held.weight)
            bias = None if held.bias is None else getattr(self, held.bias)
            rule = self._fusednorm_rule(x, weight, bias)
            if rule is not None:
                return rule.fused(x, weight, bias, getattr(self, held.epsilon))
        return super().forward(*args, **kwargs)

    def _fusednorm_rule(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Rule | None:
        """Return the rule for a call, or None for one of a kind that nobody has compared."""
        swap, size = self._fusednorm_swap, x.shape[-1:]
        mix = (x.dtype, None if weight is None else weight.dtype)
        if (
            (swap.size is not None and size != (swap.size,))
            or (weight is not None and weight.shape != size)
            or (bias is not None and (bias.shape != size or bias.dtype != mix[1]))
            or x.dim() not in swap.ranks
            or x.layout is not torch.strided
            or x.is_nested
        ):
            return None
        for name, value in swap.fixed:
            if getattr(self, name, None) != value:
                return None
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return self._fusednorm_autocast.get((device, mix))
        return self._fusednorm_rules.get(mix)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Tell pickle and deepcopy how to make the class, which cannot be imported by a name."""
        state = super().__reduce_ex__(protocol)[2:]
        return (_new_swapped, tuple(self._fusednorm_swap), *state)


_SWAPPED_CLASSES: dict[Swap, type[SwappedNorm]] = {}


def swapped_class(swap: Swap) -> type[SwappedNorm]:
    """Return the class of a swapped norm: the same one for the same swap."""
    if swap not in _SWAPPED_CLASSES:
        namespace = {
            "_fusednorm_swap": swap,
            "_fusednorm_rules": dict(swap.rules),
            "_fusednorm_autocast": dict(swap.autocast),
            "_fusednorm_argument": argument(swap.original),
        }
        bases = (SwappedNorm, swap.original)
        _SWAPPED_CLASSES[swap] = type(swap.original.__name__, bases, namespace)
    return _SWAPPED_CLASSES[swap]


def _new_swapped(*swap: Any) -> nn.Module:
    """Return a swapped norm with nothing in it, for pickle to fill."""
    return _bare(swapped_class(Swap(*swap)))


def _bare(cls: type[nn.Module]) -> nn.Module:
    # The `__new__` of a class may want arguments that nobody has.
    return object.__new__(cls)


def argument(cls: type[nn.Module]) -> str | None:
    """Return the name of the one argument of a forward, or None if there are more or less."""
    forward = getattr(cls, "forward", None)
    try:
        parameters = list(inspect.signature(forward).parameters.values()) if forward else []
    except (TypeError, ValueError):  # a builtin has no signature
        return None
    if len(parameters) != 2 or parameters[1].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    return parameters[1].name


# The probe

Probed: TypeAlias = dict[tuple[Any, ...], "Swap | str"]
"""What the probe has found, for all that it may depend on."""

NOT_OURS = "its arithmetic is none that fusednorm has"

_COMMON = frozenset(vars(nn.Module()))
_WEIGHTLESS_SIZE = 96
# Square inputs of a large norm would be huge; a twin of this size stands in for it there.
_TWIN_SIZE, _LARGEST_SQUARE = 6, 16


class _LeftError(Exception):
    """The norm is left, for the reason that it says."""


class _Call(NamedTuple):
    """One call of a norm's forward, and all that it may branch on.

    Attributes:
        x: the input.
        weight: the weight that the norm holds in the call, or None.
        bias: the bias that it holds, or None.
        eps: the epsilon that it holds.
        training: the mode of the module.
        mode: what the call is made under; with `torch.enable_grad` gradients are compared, too.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    training: bool = False
    mode: Any = torch.no_grad

    @property
    def differentiated(self) -> bool:
        return self.mode is torch.enable_grad

    def leaves(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return x, weight and bias as the leaves of a graph of their own."""
        x = self.x.detach().requires_grad_(self.differentiated)
        weight, bias = (
            None if t is None else nn.Parameter(t.detach(), self.differentiated)
            for t in (self.weight, self.bias)
        )
        return x, weight, bias


def find_swap(norm: nn.Module, probed: Probed) -> Swap | str:
    """Return what is to become of a norm that is none of torch's own, or why nothing is."""
    try:
        parameters = _parameters(norm)
        key = (
            type(norm),
            *((name, p.shape, p.dtype) for name, p in parameters.items()),
            *((name, v if _is_plain(v) else id(v)) for name, v in _attributes(norm)),
        )
        if key not in probed:
            with _undisturbed():
                probed[key] = _find(norm, parameters)
    except _LeftError as left:
        return str(left)
    return probed[key]


def _parameters(norm: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a norm by name: none, a weight, or weight and bias."""
    if argument(type(norm)) is None:
        raise _LeftError("its forward has other parameters than the input")
    parameters = {name: value for name, value in norm._parameters.items() if value is not None}
    if any(is_lazy(value) for value in parameters.values()):
        raise _LeftError("its weight is not materialised yet: run the model once first")
    shapes = {tuple(value.shape) for value in parameters.values()}
    others = [*norm._buffers.values(), *norm._modules.values()]
    if (
        len(parameters) > 2
        or len(shapes) > 1
        or any(len(shape) != 1 for shape in shapes)
        or any(value is not None for value in others)
    ):
        raise _LeftError("it holds other things than a weight [N], a bias [N] and an epsilon")
    return parameters


def _attributes(norm: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what the forward of an instance may depend on, beside what every module has."""
    return ((name, value) for name, value in vars(norm).items() if name not in _COMMON)


def _is_plain(value: Any) -> bool:
    """Whether a value is equal to another wherever it behaves like it."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _find(norm: nn.Module, parameters: dict[str, nn.Parameter]) -> Swap | str:
    """Try all that may be the weight, the bias, the epsilon and the size of a norm."""
    reason = "it has no attribute that may be an epsilon"
    for held, size in product(_holdings(norm, parameters), _sizes(norm, parameters)):
        probe = _Probe(norm, held, _WEIGHTLESS_SIZE if size is None else size)
        ranks, rules = probe.findings()
        mixes = list(rules)
        if not rules:
            reason = probe.reason
        elif held.weight and parameters[held.weight].dtype not in {weight for _, weight in mixes}:
            reason = f"its arithmetic is fusednorm's for {_words(mixes)} only"
        else:
            fixed = tuple(
                (name, value)
                for name, value in _attributes(norm)
                if _is_plain(value) and name != held.epsilon
            )
            autocast = tuple(probe.under_autocast(rules, ranks[-1]).items())
            return Swap(type(norm), held, size, fixed, ranks, tuple(rules.items()), autocast)
    return reason


def _holdings(norm: nn.Module, parameters: Iterable[str]) -> Iterator[Held]:
    """Yield the names that may be those of weight, bias and epsilon."""
    for epsilon, value in _attributes(norm):
        if isinstance(value, float) or (value is None and "eps" in epsilon):
            pairs: list[Any] = list(permutations(parameters, 2))
            pairs = pairs or [(*parameters, None, None)[:2]]
            for weight, bias in pairs:
                yield Held(weight, bias, epsilon)


def _sizes(norm: nn.Module, parameters: dict[str, nn.Parameter]) -> list[int | None]:
    """Return the sizes of a row that the norm may be made for; None is any."""
    if parameters:
        return [next(iter(parameters.values())).numel()]
    # Without a weight an attribute may say it.
    values = [value for _, value in _attributes(norm)]
    values = [v[0] if isinstance(v, tuple) and len(v) == 1 else v for v in values]
    return [None, *dict.fromkeys(v for v in values if isinstance(v, int) and v > 1)]


class _Probe:
    """A norm beside the rules, once it is settled what holds its weight, bias and epsilon."""

    def __init__(self, norm: nn.Module, held: Held, size: int) -> None:
        self.norm, self.held, self.size = norm, held, size
        eps: float | None = getattr(norm, held.epsilon)
        self.eps = _EPS if eps is None else eps
        self.reason = NOT_OURS

    def findings(self) -> tuple[tuple[int, ...], dict[Mix, Rule]]:
        """Return the ranks and the rule of each mix in which the norm does what a rule does.

        What may differ by rank is tried in float32, and what may differ by dtype in one rank.
        """
        float32 = (_FLOAT32, None if self.held.weight is None else _FLOAT32)
        ranks = tuple(rank for rank in _RANKS if self._rule(float32, self._shapes(float32, rank)))
        rank = max(ranks, default=1)
        rules: dict[Mix, Rule] = {}
        if rank == 1:  # too little to tell one rule from another
            return (), rules
        # Those of one dtype come first: nothing is mixed of what does not hold by itself.
        mixes: list[Mix] = [(x, None if self.held.weight is None else x) for x in _DTYPES]
        mixes += [(x, w) for x, w in permutations(_DTYPES, 2) if self.held.weight is not None]
        for mix in mixes:
            x, weight = mix
            if weight not in (x, None) and not {(x, x), (weight, weight)} <= rules.keys():
                continue
            if rule := self._rule(mix, self._circumstances(mix, rank)):
                rules[mix] = rule
        return ranks, rules

    def _rule(self, mix: Mix, calls: Iterable[_Call]) -> Rule | None:
        """Return the first rule that agrees in all of some calls."""
        rules: list[Rule] | None = None
        for call in calls:
            try:
                y, gradients = self._own(call)
            except _LeftError:
                raise
            except Exception as error:
                self.reason = f"its forward raised {type(error).__name__} when it was probed"
                return None
            rules = _rules(mix, self.held, y) if rules is None else rules
            rules = [rule for rule in rules if _agrees(rule, call, y, gradients)]
            if not rules:
                self.reason = NOT_OURS
                return None
        return rules[0] if rules else None

    def _call(self, mix: Mix, x: Tensor, vectors: Tensor, eps: float, **around: Any) -> _Call:
        weight = bias = None
        if mix[1] is not None:
            weight = vectors[0].to(mix[1])
            bias = None if self.held.bias is None else vectors[1].to(mix[1])
        return _Call(x.to(mix[0]), weight, bias, eps, **around)

    def _circumstances(self, mix: Mix, rank: int) -> Iterator[_Call]:
        """Yield calls of one rank that differ in all else that a forward may branch on."""
        rows, special, vectors, special_vectors = _values(self.size, self.eps)
        x = _of_rank(rows, rank)
        yield self._call(mix, x, vectors, self.eps)
        yield self._call(mix, _of_rank(special, rank), vectors, self.eps)
        if mix[1] not in (mix[0], None):
            return
        # A forward that looks at its circumstances as well as at the dtype is tried in each once.
        modes = (torch.no_grad, torch.enable_grad, torch.inference_mode)
        for training, mode in product((True, False), modes):
            yield self._call(mix, x, vectors, self.eps, training=training, mode=mode)
        yield self._call(mix, x, vectors, 0.37)
        yield self._call(mix, x, special_vectors, self.eps)

    def _shapes(self, mix: Mix, rank: int) -> Iterator[_Call]:
        """Yield calls of one rank that differ in shape and layout."""
        rows, _, vectors, _ = _values(self.size, self.eps)
        if rank == 1:
            for row in rows[:12]:
                yield self._call(mix, row, vectors, self.eps)
            yield self._call(mix, _strided(rows[0]), vectors, self.eps)
            return
        x = _of_rank(rows, rank)
        yield self._call(mix, x, vectors, self.eps)
        yield self._call(mix, _strided(x), vectors, self.eps)
        for count in (0, 1):
            shape = [count, *[1] * (rank - 2), self.size]
            yield self._call(mix, rows[:count].reshape(shape), vectors, self.eps)
        # A norm of another axis shows in what is square.
        size = self.size if self.size <= _LARGEST_SQUARE else _TWIN_SIZE
        rows, _, vectors, _ = _values(size, self.eps)
        for lengths in {(size,) * (rank - 1), *set(permutations([size, *[2] * (rank - 2)]))}:
            count = math.prod(lengths)
            x = rows.repeat(-(-count // len(rows)), 1)[:count].reshape(*lengths, size)
            yield self._call(mix, x, vectors, self.eps)

    def _own(self, call: _Call) -> tuple[object, list[Tensor]]:
        """Return what the norm's own forward does in a call, and the gradients if it has any."""
        leaves = call.leaves()
        stand_in = self._stand_in(call, leaves)
        held, values = _contents(stand_in), _copies(leaves)
        with call.mode():
            y = type(self.norm).forward(stand_in, leaves[0])
        unchanged = zip(values, _copies(leaves), strict=True)
        if _contents(stand_in) != held or not all(_same(a, b) for a, b in unchanged):
            raise _LeftError("its forward changes the module or the input")
        return y, _gradients(y, leaves) if call.differentiated else []

    def _stand_in(self, call: _Call, leaves: tuple[Tensor | None, ...]) -> nn.Module:
        """Return a norm that is as the probed one, without its hooks, for one call."""
        stand_in, parameters = _bare(type(self.norm)), leaves[1:]
        state: dict[str, Any] = {
            name: copy.copy(value) if isinstance(value, dict | list | set) else value
            for name, value in vars(self.norm).items()
        }
        if call.x.shape[-1] != self.size:
            for name, value in _attributes(self.norm):
                state[name] = _resized(value, self.size, call.x.shape[-1])
        state["training"] = call.training
        if call.eps != self.eps:
            state[self.held.epsilon] = call.eps
        names = (self.held.weight, self.held.bias)
        for held, parameter in zip(names, parameters, strict=True):
            if held is not None:
                state["_parameters"][held] = parameter
        stand_in.__dict__ = state
        return stand_in

    def under_autocast(self, rules: dict[Mix, Rule], rank: int) -> dict[tuple[str, Mix], Rule]:
        """Return the rules that hold under the autocast of a device.

        On the CPU the norm is run. For CUDA the operators that it runs on fake tensors are
        compared, with their dtypes, so that no GPU need be there.
        """
        found = {("cpu", mix): rule for mix, rule in rules.items() if self._unchanged(mix, rank)}
        traces: dict[Mix, Any] = {}
        for mix, rule in rules.items():
            # Autocast tells half precisions apart by whether they are its own, and both are tried.
            x = _BFLOAT16 if mix[0] == _FLOAT16 else mix[0]
            weight = _BFLOAT16 if mix[1] == _FLOAT16 else mix[1]
            single: Mix = (_FLOAT32, None if weight is None else _FLOAT32)
            try:
                for key in ((x, weight), single):
                    if key not in traces:
                        call = next(self._circumstances(key, rank))
                        traces[key] = [self._operators("cuda", call, d) for d in (None, *_HALVES)]
            except Exception:
                continue  # nothing is known of it
            plain, *others = traces[x, weight]
            if all(other == plain for other in others):
                found["cuda", mix] = rule
            elif all(_computing(other) == _computing(traces[single][0]) for other in others):
                # All of it is run in float32, as torch's own norms are.
                found["cuda", mix] = rule._replace(rounded=_FLOAT32, out=_FLOAT32)
        return found

    def _unchanged(self, mix: Mix, rank: int) -> bool:
        """Whether a forward computes the same under the CPU's autocast."""
        call = next(self._circumstances(mix, rank))
        results: list[Any] = []
        try:
            for dtype in (None, *_HALVES):
                with torch.autocast("cpu", dtype or _BFLOAT16, enabled=dtype is not None):
                    results.append(self._own(call)[0])
        except Exception:
            return False
        plain, *others = results
        return all(y.dtype == plain.dtype and torch.equal(y, plain) for y in others)

    def _operators(self, device: str, call: _Call, autocast: torch.dtype | None) -> list[Any]:
        """Return what a forward runs on a device that need not be there."""
        from torch._subclasses import FakeTensorMode  # here, since its import takes a while

        with FakeTensorMode(), torch.no_grad():
            fakes: list[Any] = [
                None if t is None else torch.empty(t.shape, dtype=t.dtype, device=device)
                for t in call[:3]
            ]
            leaves = call._replace(x=fakes[0], weight=fakes[1], bias=fakes[2]).leaves()
            stand_in = self._stand_in(call, leaves)
            with _autocast(device, autocast), _Operators() as seen:
                type(self.norm).forward(stand_in, leaves[0])
        operators: list[Any] = seen.operators
        return operators


class _Operators(TorchDispatchMode):
    """Records the operators that run, with the dtypes and the numbers that they are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Autocast itself asks for the device, which computes nothing.
        if func.namespace != "prim":
            given = tree_map_only(Tensor, lambda t: (t.dtype, t.shape, t.device), (args, kwargs))
            self.operators.append((func, given))
        return func(*args, **kwargs)


def _computing(operators: list[Any]) -> list[Any]:
    """Return the operators without the casts to float32, which lose nothing."""
    return [(f, given) for f, given in operators if given[1].get("dtype") != _FLOAT32]


@contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Set the autocast of a device that need not be there, which `torch.autocast` refuses to."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the probe's surroundings out of it, and it out of them."""
    with (
        _disable_current_modes(),
        # A mode of its own makes every operator slower.
        torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext(),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _contents(module: nn.Module) -> list[tuple[str, int, int]]:
    """Return the identity of everything that a module holds, and how much is in it."""
    return [
        (name, id(value), len(value) if isinstance(value, dict | list | set) else 0)
        for held in (vars(module), module._parameters, module._buffers, module._modules)
        for name, value in held.items()
    ]


def _copies(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors if tensor is not None]


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _resized(value: Any, size: int, other: int) -> Any:
    """Return what an attribute of a norm of one size would be in a norm of another."""
    if type(value) in (tuple, list, torch.Size):
        return type(value)(_resized(v, size, other) for v in value)
    return other if type(value) is int and value == size else value


# What is compared


def _values(size: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ordinary and special rows, and ordinary and special pairs of a weight and a bias."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=_FLOAT32)

    # One row in three is so small that epsilon counts.
    scales = torch.tensor([1.0, max(eps, 1e-8) ** 0.5, 30.0], dtype=_FLOAT32)
    count = 12 * -(-64 // size)
    rows = normal(count, size) * scales.repeat(count // 3)[:, None]
    vectors = torch.stack([2.5 * torch.rand(size, generator=generator) - 0.75, normal(size)])
    # Clamps and guards that a norm may have: of its input, its statistics and its result.
    special = normal(12, size)
    special[:6] *= torch.tensor([0.0, 1e-30, 1e4, 1e7, 1e15, 1e30])[:, None]
    special[6] = 1.0
    special[7] = 0.0
    special[7:, 0] = torch.tensor([30.0, 6e4, torch.inf, -torch.inf, torch.nan])
    factors = torch.tensor([0.0, 1e6, 1e-6, torch.inf, torch.nan, -1.0])
    return rows, special, vectors, vectors * factors.repeat(-(-size // 6))[:size]


def _of_rank(rows: Tensor, rank: int) -> Tensor:
    """Return rows as an input of a rank of at least 2."""
    leading = {2: (-1,), 3: (2, -1), 4: (2, -1, 2)}[rank]
    return rows.reshape(*leading, rows.shape[-1])


def _strided(x: Tensor) -> Tensor:
    """Return x in another layout."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return torch.stack([x, x], -1)[..., 0]


def _rules(mix: Mix, held: Held, y: object) -> list[Rule]:
    """Return the rules for a mix whose result has the dtype of `y`."""
    x, weight = mix
    if not isinstance(y, Tensor) or y.dtype not in (x, _FLOAT32):
        return []
    roundings = dict.fromkeys((_FLOAT32, x, weight or x))
    offsets = (0,) if held.weight is None else (0, 1)
    centrings = (True, False) if held.bias is None else (False, True)
    return [
        Rule(rms, offset, rounded, y.dtype)
        for rms, offset, rounded in product(centrings, offsets, roundings)
    ]


def _agrees(rule: Rule, call: _Call, y: object, gradients: list[Tensor]) -> bool:
    """Whether a rule does what a forward did, but for the order of float32 operations."""
    leaves = call.leaves()
    with call.mode():
        expected = rule.plain(*leaves, call.eps)
    if not isinstance(y, Tensor) or y.dtype != expected.dtype or y.shape != expected.shape:
        return False
    h, rstd = rule.statistics(call.x, call.eps)
    x_hat = (h * rstd).abs()
    factor: Any = abs(rule.factor(call.weight))
    terms = torch.zeros(())
    if not rule.rms or call.bias is not None:
        # A difference is as exact as what it is taken from.
        terms = x_hat.amax(-1, keepdim=True) * factor
        terms = terms if call.bias is None else terms + call.bias.float().abs()
    result = y
    if not rule.rms:
        # Where a variance overflows torch's own operator has nan, and other code 0.
        overflown = rstd.eq(0) & call.x.isfinite().all(-1, keepdim=True)
        result, expected = (t.masked_fill(overflown, 0.0) for t in (y, expected))
    if not _close(result, expected, terms):
        return False
    if not call.differentiated:
        return True
    dy = expected.detach().float().abs()
    sums = [(dy * x_hat).reshape(-1, dy.shape[-1]).sum(0), dy.reshape(-1, dy.shape[-1]).sum(0)]
    terms_of = [(dy * factor).amax(-1, keepdim=True) * rstd, *sums][: len(gradients)]
    exactness = 8 * max(torch.finfo(t.dtype).eps for t in (*call[:2], y) if t is not None)
    return all(
        ((a == b) | ((a.double() - b.double()).abs() <= exactness * terms)).all()
        for a, b, terms in zip(gradients, _gradients(expected, leaves), terms_of, strict=True)
    )


def _close(actual: Tensor, expected: Tensor, terms: Tensor) -> bool:
    """Whether results agree; `terms` is how large their terms are where these may cancel."""
    a, b = actual.double(), expected.double()
    different = (a != b) & ~(a.isnan() & b.isnan())
    info, is_half = torch.finfo(expected.dtype), expected.dtype != _FLOAT32
    # A rounding more or less changes many of the results in half precision, the order few.
    if is_half and different.sum() > max(1, different.numel() // (64 if terms.any() else 256)):
        return False
    # In half precision one rounding of x_hat and one of y may go the other way.
    tolerance = (2 if is_half else 16) * info.eps * b.abs() + info.smallest_normal * info.eps
    tolerance += 16 * torch.finfo(_FLOAT32).eps * terms.nan_to_num(0.0, 0.0)
    return not (different & ~(b.isfinite() & ((a - b).abs() <= tolerance))).any()


def _gradients(y: Any, leaves: Iterable[Tensor | None]) -> list[Tensor]:
    """Return the gradients for an upstream gradient of y, with which all terms of dx are large."""
    wanted = [leaf for leaf in leaves if leaf is not None]
    return list(torch.autograd.grad(y.float().square().sum() / 2, wanted))
