"""Who looks at operators, and at what is saved: the one place that knows.

A short way past the dispatcher is right only where nobody looks. Most observers announce
themselves as a dispatch key that the thread includes (a tracer, a dispatch mode, fake tensors,
functionalization, a `torch.func` transform), so that a new kind is seen without being named here.
What announces itself otherwise follows below.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Tensors without rules of their own."""

# What a thread includes with nobody looking, as bits; inference mode takes one of them away. The
# check of a plain call in csrc/eager.cpp reads it.
USUAL = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).raw_repr()
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).raw_repr()
)
_UNUSUAL = ~USUAL


_included = torch._C._dispatch_tls_local_include_set
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_set_tracing_state: Any = getattr(torch._C, "_set_tracing_state")  # noqa: B009  (torch's stub lacks it)


def transforms_active() -> bool:
    """Return whether a `torch.func` transform or forward-mode AD is in progress."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transformed(*grads: Tensor | None) -> bool:
    """Return whether a backward is for plain torch: a transform, or an older vmap, has its inputs.

    The older vmap is that of `is_grads_batched`, which preceded torch.func.
    """
    return transforms_active() or any(grad is not None and _is_batched(grad) for grad in grads)


def tracing() -> bool:
    """Return whether `torch.jit.trace`, or an exporter that uses it, records the operators."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape as numbers: to a tracer, which would record them, this is no operator."""
    if not tracing():
        return tensor.shape
    state = torch._C._get_tracing_state()
    _set_tracing_state(None)
    try:
        return tensor.shape
    finally:
        _set_tracing_state(state)


def operators_watched() -> bool:
    """Return whether a compiler, a tracer or a mode of this thread is to see the operators."""
    if torch.compiler.is_compiling():
        return True
    return bool(_included().raw_repr() & _UNUSUAL)


def nobody_looks(*tensors: Tensor | None) -> bool:
    """Return whether a backward on these tensors is for the launchers.

    Nobody records it, sees its operators or batches it, and no tensor has rules of its own.
    Transforms, and the older vmap of `is_grads_batched`, are among what a thread includes.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not _included().raw_repr() & _UNUSUAL
        and forward_ad._current_level < 0
        and all_plain(*tensors)
    )


def saving_watched() -> bool:
    """Return whether hooks see what autograd saves, as those of a checkpoint do.

    A checkpoint compares what its forward saved with what its recomputation saves, and the
    recomputation has other surroundings: it must save the same whatever runs it.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def all_plain(*tensors: Tensor | None) -> bool:
    """Return whether none is a subclass with rules of its own, or outlived a transform."""
    for tensor in tensors:  # all() takes three times as long
        if tensor is not None and (type(tensor) not in PLAIN or _is_wrapped(tensor)):
            return False
    return True


def distributed(*tensors: Tensor | None) -> bool:
    """Return whether some tensor is a DTensor; what defines the class is not imported to ask."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    return any(isinstance(tensor, module.DTensor) for tensor in tensors)
