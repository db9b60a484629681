"""Swap the norms of a live model for fused ones, in place, and back.

A swap assigns the module's `__class__`. The module stays the same object with all that hangs on
it (parameters, hooks, flags, attributes, every reference to it, the optimizer's state): nothing is
copied, so nothing can be forgotten. Only the exact classes of `REPLACEMENTS` are swapped, because
the assignment takes away what a subclass defines.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fusednorm.modules import LayerNorm
from fusednorm.validation import fail

REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: LayerNorm}

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
    """Swap every `nn.LayerNorm` of `model` for `fusednorm.LayerNorm`, in place.

    Only a module's class changes: it stays the same object, with its parameters, buffers, hooks
    and attributes; tied modules stay tied, and an optimizer made before keeps working. What
    `torch.compile` made from the model notices at its next call, and compiles again. Calling it
    twice is harmless.

    These are left as they are, with the reason in the report: subclasses of `nn.LayerNorm` (let
    them inherit from `fusednorm.LayerNorm` instead), norms with parametrizations or with a
    `forward` of somebody else's, and other modules named `...LayerNorm` or `...RMSNorm`. Call it
    before tools that change a module's class themselves, like `fully_shard` or
    `register_parametrization`.

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

    def why_left(norm: nn.Module) -> str | None:
        if reason := _why_not_swappable(norm):
            return reason
        if norm in excluded:
            return "excluded"
        return None if norm in included else "not included"

    reasons = {norm: why_left(norm) for norm in norms}
    for norm, reason in reasons.items():
        if reason is None:
            norm.__dict__[_ORIGINAL] = type(norm)
            norm.__class__ = REPLACEMENTS[type(norm)]
    return _report(norms, reasons)


def restore_norms(model: nn.Module) -> Report:
    """Give the norms that `replace_norms` swapped the class they had, in place.

    A module that was constructed as `fusednorm.LayerNorm` is left: nothing was swapped there.

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
    reasons = {norm: _why_not_restorable(norm) for norm in norms}
    for norm, reason in reasons.items():
        if reason is None:
            norm.__class__ = norm.__dict__.pop(_ORIGINAL)
    return _report(norms, reasons)


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


def _why_not_swappable(norm: nn.Module) -> str | None:
    cls = type(norm)
    if "forward" in norm.__dict__:
        return "its forward was replaced on the instance"
    for fused in REPLACEMENTS.values():
        if isinstance(norm, fused) and cls.forward is fused.forward:
            return f"already fusednorm.{fused.__name__}"
    if is_parametrized(norm):
        return "parametrized: swap it before register_parametrization"
    if cls not in REPLACEMENTS:
        exact = " or ".join(f"nn.{original.__name__}" for original in REPLACEMENTS)
        return f"its class is {cls.__module__}.{cls.__qualname__}, not {exact} itself"
    if cls.forward.__module__ != cls.__module__:
        return f"nn.{cls.__name__}.forward was replaced by {cls.forward.__module__}"
    return None


def _why_not_restorable(norm: nn.Module) -> str | None:
    original = norm.__dict__.get(_ORIGINAL)
    if original is None:
        return "not swapped by replace_norms"
    if type(norm) is not REPLACEMENTS[original]:
        return f"its class was changed since, to {type(norm).__qualname__}"
    return None


def _report(norms: _Norms, reasons: dict[nn.Module, str | None]) -> Report:
    fates = [(name, reasons[norm]) for norm, names in norms.items() for name in names]
    return Report(
        swapped=tuple(name for name, reason in fates if reason is None),
        left=tuple((name, reason) for name, reason in fates if reason is not None),
    )
