"""Swap the norms of a live model for fused ones, in place, and back.

A swap assigns the module's `__class__`. The module stays the same object with all that hangs on
it (parameters, hooks, flags, attributes, every reference to it, the optimizer's state): nothing is
copied, so nothing can be forgotten. Of torch's norms only the exact classes of `REPLACEMENTS` are
swapped so, because the assignment takes away what a subclass defines. All other norms get a
subclass of their own class, with a forward that runs fused what `recognition` has compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fusednorm import modules
from fusednorm.adaptive import Adaptive, AdaptiveNorm
from fusednorm.adaptive_probe import find_adaptive
from fusednorm.modules import LayerNorm, RMSNorm
from fusednorm.recognition import ACROSS_ROWS, Probed, computes_statistics, find_swap
from fusednorm.swapped import Swap, Swapped, swapped_class
from fusednorm.validation import fail

REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}

# Over a batch, over channels, or over groups of both: no norm of a row.
_OTHER_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)

Selection: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]
_Norms: TypeAlias = dict[nn.Module, list[str]]
_Fates: TypeAlias = dict[nn.Module, type[nn.Module] | str]

# Holds the class a swapped norm had. It is an entry of the instance's `__dict__`, so that deepcopy
# and pickle carry it and the state dict does not.
_ORIGINAL = "_fusednorm_original"
_AROUND = "a block around norms"


@dataclass(frozen=True)
class Report:
    """What became of each norm of a model; `str()` of it is for reading.

    Names are those of `model.named_modules()`: the model itself is `""`, and a module that is
    registered at two places is one module with two names, both listed.

    Attributes:
        swapped: the names of the norms whose class was changed.
        left: the name of every other norm of a row, with the reason.
        others: the name of every module that is called a norm and is none of a row itself, with
            what it is: a block around norms, or a norm over a batch, a map or running statistics.
        served: for each swapped norm that is not torch's own, the dtypes of input and weight that
            run fused. All else stays with the norm's own forward.
    """

    swapped: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    served: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    others: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        """One line with the counts, then one for each name."""
        served = dict(self.served)
        rows = [
            (name, f"swapped for {served[name]}" if name in served else "swapped")
            for name in self.swapped
        ]
        rows += [(name, f"left: {reason}") for name, reason in self.left]
        rows += [(name, f"no norm of a row: {what}") for name, what in self.others]
        width = max((len(name or "(root)") for name, _ in rows), default=0)
        lines = [f"  {name or '(root)':{width}}  {fate}" for name, fate in rows]
        others = f", {len(self.others)} no norm of a row" if self.others else ""
        return "\n".join([f"{len(self.swapped)} swapped, {len(self.left)} left{others}", *lines])


def replace_norms(
    model: nn.Module, include: Selection | None = None, exclude: Selection | None = None
) -> Report:
    """Swap the norms of `model` for fused ones, in place.

    `nn.LayerNorm` becomes `fusednorm.LayerNorm` and `nn.RMSNorm` becomes `fusednorm.RMSNorm`. Any
    other norm over the last dimension or over dimension 1 (`LlamaRMSNorm`, a subclass of
    `nn.LayerNorm`, `LayerNorm2d`) becomes a subclass of its class with a fused forward, if its
    forward takes an input, or an input and a gate, and it holds at most a weight, a bias and an
    epsilon. Its arithmetic is not guessed from its name: its forward is run on the CPU on all that
    it may branch on, and compared. For what the comparison does not cover, or covers with another
    result, its own forward stays in charge: other dtypes and ranks, an attribute that has changed
    since, an autocast that changes what it computes. An AdaLN module runs norm, scale and shift in
    one call, by its own forward.

    Only a module's class changes: it stays the same object, with its parameters, buffers, hooks
    and attributes; tied modules stay tied, and an optimizer made before keeps working. What
    `torch.compile` made from the model notices at its next call, and compiles again. Calling it
    twice is harmless.

    The report names every module whose class says that it is a norm, batch, group and instance
    norms of torch excepted; `others` are those that are none of a row. Those are left, with the
    reason, whose arithmetic fusednorm does not have, or that have parametrizations or a `forward`
    of somebody else's. A hook that keeps the forward that it stands for in an attribute, as
    accelerate's do, is no obstacle. Call it before tools that change a module's class themselves,
    like `fully_shard` or `register_parametrization`.

    Args:
        model: the model, or a norm itself.
        include: which norms to swap, by their qualified names: a glob (`*` matches dots too), an
            iterable of globs, or a callable `(name, module) -> bool`. None means all of them.
        exclude: which norms to leave, in the same forms; it wins over `include`. A norm with
            several names is selected by any of them.

    Returns:
        What was swapped, what was left, and why.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a glob matches no norm of the model, swapped before or not. Nothing is changed
            when an error is raised.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8))
        >>> print(replace_norms(model, exclude="2"))
        1 swapped, 1 left
          1  swapped
          2  left: excluded
    """
    return _replace(model, include, exclude, {})


def _replace(
    model: nn.Module, include: Selection | None, exclude: Selection | None, probed: Probed
) -> Report:
    """Do what `replace_norms` says, and remember in `probed` what was found out."""
    norms = _norms("replace_norms", model)
    included = {*norms} if include is None else _selected("include", include, norms)
    excluded = set() if exclude is None else _selected("exclude", exclude, norms)

    def fate(norm: nn.Module) -> type[nn.Module] | str:
        try:
            replacement = _replacement(norm, probed)
        except Exception as error:  # of code that is not ours
            return f"{_name(type(norm))}: {type(error).__name__} when it was looked at: {error}"
        if isinstance(replacement, str):
            return replacement
        if norm in excluded:
            return "excluded"
        return replacement if norm in included else "not included"

    fates: _Fates = {norm: fate(norm) for norm in norms}
    for norm, replacement in fates.items():
        if not isinstance(replacement, str):
            original = type(norm)
            fates[norm] = _assign(norm, replacement)
            if fates[norm] is replacement:
                norm.__dict__[_ORIGINAL] = original
    others = {norm: _other_kind(norm, fates) for norm in norms}
    for norm, kind in others.items():
        if kind is not None and kind.startswith(_AROUND) and norm in included - excluded:
            _adapt(norm, fates, probed)
    return _report(norms, fates, others)


def restore_norms(model: nn.Module) -> Report:
    """Give the norms that `replace_norms` swapped the class they had, in place.

    A module that was constructed as a norm of fusednorm is left: nothing was swapped there.

    Args:
        model: the model, or a copy or an unpickled copy of it.

    Returns:
        What was swapped back, what was left, and why.

    Raises:
        TypeError: `model` is not an `nn.Module`.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(8), LayerNorm(8))
        >>> _ = replace_norms(model)
        >>> print(restore_norms(model))
        1 swapped, 1 left
          0  swapped
          1  left: not swapped by replace_norms
        >>> type(model[0]) is nn.LayerNorm
        True
    """
    norms = _norms("restore_norms", model)
    fates = {norm: _restored(norm) for norm in norms}
    for norm, original in fates.items():
        if not isinstance(original, str):
            fates[norm] = _assign(norm, original)
            if fates[norm] is original:
                del norm.__dict__[_ORIGINAL]
    return _report(norms, fates)


def _adapt(norm: nn.Module, fates: _Fates, probed: Probed) -> None:
    """Run the scale and the shift of an AdaLN module together with its norms, if it is one."""
    try:
        found = find_adaptive(norm, probed)
        replacement = swapped_class(found, AdaptiveNorm) if isinstance(found, Adaptive) else None
    except Exception:  # of code that is not ours
        return
    if replacement is not None and _assign(norm, replacement) is replacement:
        norm.__dict__[_ORIGINAL] = replacement._fusednorm_swap.original
        fates[norm] = replacement


def _assign(norm: nn.Module, cls: type[nn.Module]) -> type[nn.Module] | str:
    """Give a norm another class; return it, or the reason why it does not take it."""
    saved = _saved_forwards(norm)
    try:
        norm.__class__ = cls
    except Exception as error:
        return f"{_name(type(norm))}: its class cannot be changed: {error}"
    for name in saved:
        norm.__dict__[name] = MethodType(cls.forward, norm)
    return cls


def _saved_forwards(norm: nn.Module) -> list[str]:
    """Return the attributes in which hooks keep the forward that they stand for.

    Whoever calls such a bound method would go on with the class that the norm had.
    """
    forward = getattr(type(norm), "forward", None)
    return [
        name
        for name, value in vars(norm).items()
        if isinstance(value, MethodType) and value.__self__ is norm and value.__func__ is forward
    ]


def _norms(operation: str, model: nn.Module) -> _Norms:
    """Every norm of the model, each once, with all its names."""
    if not isinstance(model, nn.Module):
        fail(operation, "model to be an nn.Module", f"{model!r:.200}", TypeError)
    norms: _Norms = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_norm(module):
            norms.setdefault(module, []).append(name)
    return norms


def _is_norm(module: nn.Module) -> bool:
    """Whether somebody who reads the report would look for this module in it."""
    if isinstance(module, _OTHER_NORMS):
        return False
    if type(module).__module__.startswith("torch.nn.utils.") and not is_parametrized(module):
        return False  # torch's weight and spectral norm
    # TorchScript keeps the name of the class it compiled. An attribute may be anybody's code.
    try:
        name = str(getattr(module, "original_name", type(module).__name__))
    except Exception:
        name = type(module).__name__
    return isinstance(module, tuple(REPLACEMENTS)) or "norm" in name.lower()


def _selected(argument: str, selection: Selection, norms: _Norms) -> set[nn.Module]:
    """The norms that a callable, or at least one glob, selects by at least one of their names."""
    # A class is callable, but as a selection it can only be a mistake.
    if callable(selection) and not isinstance(selection, type):
        return {norm for norm, names in norms.items() if any(selection(n, norm) for n in names)}
    selected: set[nn.Module] = set()
    for glob in _globs(argument, selection):
        matched = {norm for norm in norms if any(fnmatchcase(n, glob) for n in norms[norm])}
        if not matched:
            # Most likely misspelt, and a norm swapped that was to be kept would go unnoticed.
            known = [name for names in norms.values() for name in names]
            shown = known if len(known) <= 8 else [*known[:8], "..."]
            expected = f"{argument} pattern {glob!r} to match a norm of the model"
            fail("replace_norms", expected, f"none of {shown}")
        selected |= matched
    return selected


def _globs(argument: str, selection: Selection) -> tuple[str, ...]:
    globs = (selection,) if isinstance(selection, str) else selection
    if isinstance(globs, Iterable):
        globs = tuple(globs)
        if all(isinstance(glob, str) for glob in globs):
            return globs
    expected = f"{argument} to be None, a glob, an iterable of globs or a callable"
    fail("replace_norms", expected, f"{globs!r:.200}", TypeError)


def _replacement(norm: nn.Module, probed: Probed) -> type[nn.Module] | str:
    """Return the class that `norm` is to get, or the reason why it gets none."""
    cls = type(norm)
    if "forward" in norm.__dict__ and not _saved_forwards(norm):
        return "its forward was replaced on the instance: swap it before that"
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        return "sharded: swap it before fully_shard"
    forward: Any = getattr(cls, "forward", None)  # a scripted module has none on its class
    if getattr(forward, "__module__", None) == modules.__name__:
        fused = next(base for base in cls.__mro__ if base.__module__ == modules.__name__)
        return f"already fusednorm.{fused.__name__}"
    if isinstance(norm, Swapped):
        return "already swapped"
    if is_parametrized(norm):
        return "parametrized: swap it before register_parametrization"
    if cls not in REPLACEMENTS:
        found = find_swap(norm, probed)
        return swapped_class(found) if isinstance(found, Swap) else f"{_name(cls)}: {found}"
    if cls.forward.__module__ != cls.__module__:
        return f"nn.{cls.__name__}.forward was replaced by {cls.forward.__module__}"
    return REPLACEMENTS[cls]


def _restored(norm: nn.Module) -> type[nn.Module] | str:
    """Return the class that `norm` had, or the reason why it does not get it back."""
    original: type[nn.Module] | None = norm.__dict__.get(_ORIGINAL)
    if original is None:
        return "not swapped by replace_norms"
    cls = type(norm)
    if cls is not REPLACEMENTS.get(original) and "_fusednorm_swap" not in vars(cls):
        return f"its class was changed since, to {cls.__qualname__}"
    if "forward" in norm.__dict__ and not _saved_forwards(norm):
        return "its forward was replaced on the instance since: undo that first"
    return original


def _other_kind(norm: nn.Module, fates: _Fates) -> str | None:
    """Return what a module is that was left and is no norm of a row; None for one that is."""
    reason = fates[norm]
    if not isinstance(reason, str) or not reason.startswith(f"{_name(type(norm))}: "):
        return None  # swapped, or left for what was done to it
    if reason.endswith(ACROSS_ROWS):
        return ACROSS_ROWS
    if any(name.startswith("running_") for name, _ in norm.named_buffers(recurse=False)):
        return "it normalises by running statistics"
    if computes_statistics(norm):
        return None
    inner = [part for part in norm.modules() if part is not norm]
    parts = [fates[part] for part in inner if part in fates]
    if parts:
        swapped = sum(not isinstance(part, str) for part in parts)
        return f"{_AROUND}, of which {swapped} of {len(parts)} are swapped"
    of_torch = sorted({type(part).__name__ for part in inner if isinstance(part, _OTHER_NORMS)})
    return f"a block around {', '.join(of_torch)}" if of_torch else "it computes no statistics"


def _report(norms: _Norms, fates: _Fates, others: Mapping[nn.Module, str | None] = {}) -> Report:
    """List what became of each norm: a class that it got, or a reason."""
    named = [(name, norm, fates[norm]) for norm, names in norms.items() for name in names]
    swaps = [(name, getattr(fate, "_fusednorm_swap", None)) for name, _, fate in named]
    kinds = [(name, others.get(norm)) for name, norm, fate in named if isinstance(fate, str)]
    apart = tuple((name, kind) for name, kind in kinds if kind is not None)
    return Report(
        swapped=tuple(name for name, _, fate in named if not isinstance(fate, str)),
        left=tuple(
            (name, fate)
            for name, norm, fate in named
            if isinstance(fate, str) and others.get(norm) is None
        ),
        served=tuple((name, swap.describe()) for name, swap in swaps if swap is not None),
        others=apart,
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
