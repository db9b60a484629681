"""Swap the norms of a live model for fused ones, in place, and back.

A swap assigns the module's `__class__`. The module stays the same object with all that hangs on
it (parameters, hooks, flags, attributes, every reference to it, the optimizer's state): nothing is
copied, so nothing can be forgotten. Of torch's norms only the exact classes of `REPLACEMENTS` are
swapped, because the assignment takes away what a subclass defines. The RMS norms that models bring
along get a subclass of their own class, with the forward of one of `ARITHMETICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fusednorm import modules
from fusednorm.arithmetic import Probed, Swap, SwappedNorm, find_swap, swapped_class
from fusednorm.modules import LayerNorm, RMSNorm
from fusednorm.validation import fail

REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}

Selection: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]
_Norms: TypeAlias = dict[nn.Module, list[str]]

# Holds the class a swapped norm had. It is an entry of the instance's `__dict__`, so that deepcopy
# and pickle carry it and the state dict does not.
_ORIGINAL = "_fusednorm_original"


@dataclass(frozen=True)
class Report:
    """What became of each norm of a model; `str()` of it is for reading.

    Names are those of `model.named_modules()`: the model itself is `""`, and a module that is
    registered at two places is one module with two names, both listed.

    Attributes:
        swapped: the names of the norms whose class was changed.
        left: the name of every other norm, with the reason.
    """

    swapped: tuple[str, ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """One line with the counts, then one for each name."""
        rows = [(name or "(root)", "swapped") for name in self.swapped]
        rows += [(name or "(root)", f"left: {reason}") for name, reason in self.left]
        width = max((len(name) for name, _ in rows), default=0)
        counts = f"{len(self.swapped)} swapped, {len(self.left)} left"
        return "\n".join([counts, *(f"  {name:{width}}  {fate}" for name, fate in rows)])


def replace_norms(
    model: nn.Module, include: Selection | None = None, exclude: Selection | None = None
) -> Report:
    """Swap the norms of `model` for fused ones, in place.

    `nn.LayerNorm` becomes `fusednorm.LayerNorm` and `nn.RMSNorm` becomes `fusednorm.RMSNorm`. An
    RMS norm of the model's own (`LlamaRMSNorm`, `GemmaRMSNorm`, `T5LayerNorm`: any class named
    `...RMSNorm` or `...LayerNorm` that holds a weight of one dimension, `variance_epsilon` or `eps`
    and nothing else) becomes a subclass of its class with a fused forward. What it computes is
    not guessed from its name: its forward is run on a few rows on the CPU, and compared. For
    inputs that the comparison does not cover its own forward stays in charge: dtypes other than
    float16, bfloat16 and float32; an input of another dtype than the weight if x_hat is cast before
    it is multiplied by the weight, as Llama does; half precision under autocast.

    Only a module's class changes: it stays the same object, with its parameters, buffers, hooks
    and attributes; tied modules stay tied, and an optimizer made before keeps working. What
    `torch.compile` made from the model notices at its next call, and compiles again. Calling it
    twice is harmless.

    These are left as they are, with the reason in the report: subclasses of `nn.LayerNorm` and
    `nn.RMSNorm` (let them inherit from fusednorm's instead), norms with parametrizations or with a
    `forward` of somebody else's, and other modules named `...LayerNorm` or `...RMSNorm` whose
    arithmetic fusednorm does not have. Call it before tools that change a module's class
    themselves, like `fully_shard` or `register_parametrization`.

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
    norms = _norms("replace_norms", model)
    included = norms.keys() if include is None else _selected("include", include, norms)
    excluded = set() if exclude is None else _selected("exclude", exclude, norms)

    probed: Probed = {}

    def fate(norm: nn.Module) -> type[nn.Module] | str:
        replacement = _replacement(norm, probed)
        if isinstance(replacement, str):
            return replacement
        if norm in excluded:
            return "excluded"
        return replacement if norm in included else "not included"

    fates = {norm: fate(norm) for norm in norms}
    for norm, replacement in fates.items():
        if not isinstance(replacement, str):
            norm.__dict__[_ORIGINAL] = type(norm)
            norm.__class__ = replacement
    return _report(norms, fates)


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
            norm.__class__ = original
            del norm.__dict__[_ORIGINAL]
    return _report(norms, fates)


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
    # TorchScript keeps the name of the class it compiled.
    name = str(getattr(module, "original_name", type(module).__name__))
    return isinstance(module, tuple(REPLACEMENTS)) or name.endswith(("LayerNorm", "RMSNorm"))


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
    if "forward" in norm.__dict__:
        return "its forward was replaced on the instance"
    forward: Any = getattr(cls, "forward", None)  # a scripted module has none on its class
    if forward and forward.__module__ == modules.__name__:
        return f"already fusednorm.{forward.__qualname__.partition('.')[0]}"
    if isinstance(norm, SwappedNorm):
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
    return original


def _report(norms: _Norms, fates: dict[nn.Module, type[nn.Module] | str]) -> Report:
    """List what became of each norm: a class that it got, or a reason."""
    named = [(name, fates[norm]) for norm, names in norms.items() for name in names]
    return Report(
        swapped=tuple(name for name, fate in named if not isinstance(fate, str)),
        left=tuple((name, fate) for name, fate in named if isinstance(fate, str)),
    )


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
