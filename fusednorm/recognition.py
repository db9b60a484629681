"""What becomes of a norm that a model brings along, found out by running it.

A norm is run on the CPU, on all that its forward may branch on, beside the rules that the kernels
have. Those dtypes and ranks of the input in which a rule agrees throughout are run fused from then
on; all else stays with the norm's own forward.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import permutations, product
from types import CodeType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from fusednorm.arithmetic import EPS, FLOAT32, Held, words
from fusednorm.comparison import values
from fusednorm.probe import TWIN_SIZE, LeftError, Probe, attributes
from fusednorm.probe_autocast import under_autocast
from fusednorm.swapped import SHORTEST, Swap, arguments

Probed: TypeAlias = dict[tuple[Any, ...], Any]
"""What the probe has found, for all that it may depend on."""

NOT_OURS = "its arithmetic is none that fusednorm has"
ACROSS_ROWS = "it normalises across rows"

_WEIGHTLESS_SIZE = 96
_STATISTICS = re.compile("norm|rms|sqrt|mean|var|std|square|pow")
# What a forward may have as a number in it: torch's defaults, and what people write.
_CONSTANTS = (1e-5, 1e-6, 1e-8, 1e-12, EPS)


def find_swap(norm: nn.Module, probed: Probed) -> Swap | str:
    """Return what is to become of a norm that is none of torch's own, or why nothing is."""
    try:
        parameters = _parameters(norm)
        key = (
            type(norm),
            *((name, p.shape, p.dtype) for name, p in parameters.items()),
            *((name, v if _is_plain(v) else id(v)) for name, v in attributes(norm)),
            *((name, type(part), repr(part)) for name, part in norm._modules.items()),
        )
        if key not in probed:
            with undisturbed():
                probed[key] = _find(norm, parameters)
    except LeftError as left:
        return str(left)
    found: Swap | str = probed[key]
    return found


def _parameters(norm: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a norm by name: none, a weight, or weight and bias."""
    if not arguments(type(norm)):
        raise LeftError("its forward has other parameters than an input and a gate")
    parameters = {name: value for name, value in norm._parameters.items() if value is not None}
    if any(is_lazy(value) for value in parameters.values()):
        raise LeftError("its weight is not materialised yet: run the model once first")
    shapes = {tuple(value.shape) for value in parameters.values()}
    parts = [tensor for part in norm._modules.values() if part for tensor in _tensors(part)]
    others = [*norm._buffers.values(), *parts]
    if (
        len(parameters) > 2
        or len(shapes) > 1
        or any(sum(length != 1 for length in shape) > 1 for shape in shapes)
        or any(value is not None for value in others)
    ):
        raise LeftError("it holds other things than a weight [N], a bias [N] and an epsilon")
    return parameters


def _tensors(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]


def _is_plain(value: Any) -> bool:
    """Whether a value is equal to another wherever it behaves like it."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _find(norm: nn.Module, parameters: dict[str, nn.Parameter]) -> Swap | str:
    """Try all that may be the call, the size, the weight, the bias and the epsilon of a norm."""
    raised, reason = None, None
    sizes = _sizes(norm, parameters)
    calls = arguments(type(norm))
    for names, size in product(calls, sizes):
        for held in _holdings(norm, parameters, size or _WEIGHTLESS_SIZE):
            probe = Probe(norm, names, held, size or _WEIGHTLESS_SIZE)
            axes, rules = probe.findings()
            if rules and not probe.ends_with_parts(axes):
                rules = {}
            if not rules:
                raised = raised or probe.raised
                reason = NOT_OURS if probe.compared else reason
            elif names != calls[0] and probe.changed_by(calls[0]):
                return "its arithmetic with a second argument is none that fusednorm has"
            elif held.weight and parameters[held.weight].dtype not in {w for _, w in rules}:
                reason = f"its arithmetic is fusednorm's for {words([*rules])} only"
            else:
                fixed = tuple(
                    (name, value)
                    for name, value in attributes(norm)
                    if _is_plain(value) and name != held.epsilon
                )
                return Swap(
                    type(norm),
                    names,
                    held,
                    size,
                    probe.shape,
                    probe.parts,
                    fixed,
                    tuple(axes.items()),
                    tuple(rules.items()),
                    tuple(under_autocast(probe, rules, Probe.told_by(axes)).items()),
                )
    if any(_is_across_rows(norm, parameters, rank) for rank in (3, 4, 5)):
        return ACROSS_ROWS
    return reason or f"its forward raised {raised} when it was probed"


def _holdings(norm: nn.Module, parameters: Iterable[str], size: int) -> Iterator[Held]:
    """Yield what may be weight, bias and epsilon."""
    epsilons: list[str | float] = [
        name
        for name, value in attributes(norm)
        if isinstance(value, float) or (value is None and "eps" in name)
    ]
    # A row of length l divided by max(l, SHORTEST) is one divided by its root mean square.
    epsilons += [SHORTEST**2 / size, *_CONSTANTS]
    pairs: list[Any] = list(permutations(parameters, 2))
    pairs = pairs or [(*parameters, None, None)[:2]]
    for epsilon, (weight, bias) in product(epsilons, pairs):
        yield Held(weight, bias, epsilon)


def _sizes(norm: nn.Module, parameters: dict[str, nn.Parameter]) -> list[int | None]:
    """Return the sizes of a row that the norm may be made for; None is any."""
    if parameters and (size := next(iter(parameters.values())).numel()) > 1:
        return [size]
    # Without a weight an attribute may say it, or its root.
    found: list[Any] = [value for _, value in attributes(norm)]
    found = [v[0] if isinstance(v, tuple) and len(v) == 1 else v for v in found]
    found += [round(v * v) for v in found if type(v) is float and math.isclose(v * v, round(v * v))]
    sizes: list[int | None] = [None, *dict.fromkeys(v for v in found if type(v) is int and v > 1)]
    return [*sizes, 1] if parameters else sizes


def _is_across_rows(norm: nn.Module, parameters: dict[str, nn.Parameter], rank: int) -> bool:
    """Whether a result depends on more than its row, be that along the last dimension or the first.

    Such norms, over a map of an image or over groups of channels, are no norms of a row.
    """
    names = (*parameters, None, None)[:2]
    size = next((p.numel() for p in parameters.values()), TWIN_SIZE)
    probe = Probe(norm, ("x",), Held(names[0], names[1], 0.0), size)
    small = TWIN_SIZE if size > TWIN_SIZE else size
    parameter = values(small, 1e-6).parameters
    x = torch.linspace(-1, 1, 2 * small ** (rank - 1)).sin().reshape(2, *[small] * (rank - 1))

    def result(x: Tensor) -> Any:
        call = probe.call((FLOAT32, FLOAT32 if parameters else None), x, parameter, x, -1, eps=0.0)
        return probe.own(call)[0]

    try:
        y = result(x)
        if y.shape != x.shape:
            return False
        places: list[Any] = [(0,) * (rank - 1), (0, slice(None), *(0,) * (rank - 2))]
        for place in places:
            changed = x.clone()
            changed[place] += 1.0
            difference = (result(changed) - y).abs() > 1e-6
            difference[place] = False
            if not difference.any():
                return False
    except Exception:  # of code that is not ours
        return False
    return True


def computes_statistics(module: nn.Module) -> bool:
    """Whether the code of a module's own methods names an operator that a norm is made of.

    What it calls its parts and attributes does not count.
    """
    classes = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module)]
    forward = getattr(type(module), "forward", nn.Module.forward)
    if forward is nn.Module.forward or not hasattr(forward, "__code__"):
        return True  # for all that is known
    if nn.LayerNorm in classes or nn.RMSNorm in classes:
        return True
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    used: set[str] = set()
    hidden = {"__init__", "reset_parameters", "extra_repr"}
    for cls in classes[: classes.index(nn.Module)]:
        for name, method in vars(cls).items():
            code = getattr(getattr(method, "__func__", method), "__code__", None)
            if name not in hidden and isinstance(code, CodeType):
                names = _names(code)
                used |= names
                if "super" not in names:
                    hidden.add(name)
    return any(map(_STATISTICS.search, used - own - {*dir(type(module))}))


def _names(code: CodeType) -> set[str]:
    """Return the names of all globals and attributes that code uses."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return {*code.co_names}.union(*inner)


@contextmanager
def undisturbed() -> Iterator[None]:
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
