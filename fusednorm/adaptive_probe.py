"""Which modules of a model are AdaLN modules: found out by running them as a whole."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fusednorm.adaptive import Adaptive, Deferred, View, modulated
from fusednorm.arithmetic import BFLOAT16, FLOAT32
from fusednorm.modules import LayerNorm, RMSNorm
from fusednorm.recognition import Probed, undisturbed
from fusednorm.swapped import SwappedNorm, bare

# What models call the rows of another stream, and the condition that need not be given.
_ROWS = ("context", "encoder_hidden_states")
_CONDITIONS = ("emb", "temb", "condition")
_STEPS = ("timestep", "class_labels")  # which it embeds itself
_LARGEST_TWIN = 2**28


def find_adaptive(module: nn.Module, probed: Probed) -> Adaptive | str:
    """Return how a block around norms is run fused, or why it is not."""
    norms = tuple(
        name
        for name, part in module._modules.items()
        if isinstance(part, LayerNorm | RMSNorm | SwappedNorm)
    )
    code = getattr(type(module).forward, "__code__", None)
    if not norms or code is None or "super" in code.co_names:
        return "no norm of its own is modulated"
    parameters = [(name, p.shape) for name, p in module.named_parameters()]
    plain = [(k, v) for k, v in vars(module).items() if isinstance(v, int | float | str)]
    parts = [(name, type(part)) for name, part in module.named_modules()]
    key = (type(module), tuple(parameters), tuple(plain), tuple(parts))
    if key not in probed:
        with undisturbed():
            probed[key] = _judged(module, norms)
    found: Adaptive | str = probed[key]
    return found


def _judged(module: nn.Module, norms: tuple[str, ...]) -> Adaptive | str:
    """Compare a module with itself, its norms deferred, on all calls that it may take."""
    size = _size(getattr(module, norms[0]))
    if size is None or sum(p.numel() for p in module.parameters()) > _LARGEST_TWIN:
        return "it is too large to be compared"
    linear = next((part for part in module.modules() if isinstance(part, nn.Linear)), None)
    condition = size if linear is None else linear.in_features
    for call in _calls(type(module), size, condition):
        with suppress(Exception):  # it takes other things, or its code is not ours
            if _agrees(module, norms, call):
                return Adaptive(type(module), norms)
    return "no norm of its own is modulated"


def _size(norm: Any) -> int | None:
    if isinstance(norm, SwappedNorm):
        return norm._fusednorm_swap.size
    return norm.normalized_shape[0] if len(norm.normalized_shape) == 1 else None


def _calls(cls: type[nn.Module], size: int, condition: int) -> Iterator[dict[str, Tensor]]:
    """Yield keyword arguments that a forward may take: rows first, then conditions."""
    _, first, *others = inspect.signature(cls.forward).parameters.values()
    given = {first.name: _filled((2, 3, size))}
    for parameter in others:
        if parameter.name in _ROWS:
            given[parameter.name] = _filled((2, 5, size))
        elif parameter.default is parameter.empty or parameter.name in _CONDITIONS:
            given[parameter.name] = _filled((2, condition))
    yield given
    yield {k: v[:, None] if v.dim() == 2 else v for k, v in given.items()}
    steps = {p.name: torch.tensor([0, 1]) for p in others if p.name in _STEPS}
    yield {first.name: given[first.name], **steps}


def _agrees(module: nn.Module, norms: tuple[str, ...], call: dict[str, Tensor]) -> bool:
    """Whether a call has the same results and gradients, and a norm in it was modulated."""
    for dtype in (FLOAT32, BFLOAT16):
        twin, results = _twin(module, dtype).eval(), []  # its labels may be dropped in training
        made: list[Deferred] = []
        for view in (twin, View(twin, norms, made)):
            given = {k: v.detach() for k, v in call.items()}
            rows = [k for k, v in given.items() if v.is_floating_point()]
            for name in rows:
                given[name] = given[name].to(dtype).requires_grad_(dtype == FLOAT32)
            with torch.set_grad_enabled(dtype == FLOAT32):
                try:
                    result = modulated(type(module), view, (), given)  # type: ignore[arg-type]
                except RuntimeError:
                    if dtype == BFLOAT16 and view is twin:
                        return True  # it embeds in float32 unless told: judged there
                    raise
            outputs = list(result) if isinstance(result, tuple | list) else [result]
            if dtype == FLOAT32:
                total = torch.stack([y.square().sum() for y in outputs]).sum()
                outputs += torch.autograd.grad(total / 2, [given[name] for name in rows])
            results.append(outputs)
        if not any(deferred.modulations for deferred in made):
            return False
        if not all(_close(a, b, dtype) for a, b in zip(*results, strict=True)):
            return False
    return True


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether results agree but for the roundings on the way, which the kernels have not."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    count = 4 if dtype == BFLOAT16 else 64
    tolerance = count * torch.finfo(dtype).eps * a.abs().amax(-1, keepdim=True).double()
    return bool(((a.double() - b.double()).abs() <= tolerance).all())


def _twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a module like another, without its hooks, with other numbers in it."""
    twin = bare(type(module))
    twin.__dict__ = {
        name: type(value)() if "_hooks" in name and isinstance(value, dict) else copy.copy(value)
        for name, value in vars(module).items()
    }
    contents: list[dict[str, Any]] = [twin._parameters, twin._buffers]
    for held in contents:
        for name, tensor in held.items():
            if tensor is not None:
                scale = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
                value = _filled(tuple(tensor.shape), scale)
                held[name] = value.to(dtype) if tensor.is_floating_point() else value.to(tensor)
    for name, part in module._modules.items():
        twin._modules[name] = None if part is None else _twin(part, dtype)
    return twin


def _filled(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Return numbers in [-scale, scale] that differ from each other nearly everywhere."""
    some = torch.linspace(-scale, scale, 4099)[torch.arange(4099) * 1009 % 4099]
    count = torch.Size(shape).numel()
    return some.repeat(-(-count // 4099))[:count].reshape(shape)
