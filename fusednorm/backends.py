"""Which implementation runs: the choice, what it rests on, and how to force it.

Example:
    >>> import torch, fusednorm
    >>> str(fusednorm.backends.explain(torch.empty(2, 8)))
    'torch: cpu tensors run in torch'
    >>> with fusednorm.backends.use("torch"):
    ...     y = fusednorm.layer_norm(torch.randn(2, 8), 8)
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusednorm.validation import fail

NAMES = ("triton", "torch")
_VARIABLE = "FUSEDNORM_BACKEND"
_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """The implementation for a tensor, ``triton`` or ``torch``, and why it is that one."""

    backend: str
    reason: str

    def __str__(self) -> str:
        """Return ``backend: reason``."""
        return f"{self.backend}: {self.reason}"


# The request in force: set by `use`, else by the environment, else None for the automatic choice.
_requested: str | None = None
_requested_by = ""


def _check_name(source: str, name: object) -> None:
    if name not in NAMES:
        fail(source, f"one of {', '.join(NAMES)}", repr(name))


@cache
def _triton_missing() -> str | None:
    """Return why Triton cannot be imported, or None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fusednorm[triton]')"
    try:
        import triton
    except ImportError as error:
        return f"triton does not import: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"triton {triton.__version__} is older than 3.6"
    return None


@cache
def _interpreted() -> bool:
    """Return whether Triton runs its kernels in the interpreter, on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _triton_unfit(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on `device`, or None where they can."""
    if (missing := _triton_missing()) is not None:
        return missing
    if device.type == "cuda":
        if (
            torch.version.hip is None
            and (capability := torch.cuda.get_device_capability(device)) < _MIN_CAPABILITY
        ):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        return None
    if device.type == "cpu":
        return (
            None if _interpreted() else "cpu tensors need Triton's interpreter (TRITON_INTERPRET=1)"
        )
    return f"the kernels are built for cuda devices, not {device.type}"


def _unfit(backend: str, device: torch.device) -> str | None:
    """Return why `backend` cannot run on `device`, or None where it can."""
    return None if backend == "torch" else _triton_unfit(device)


# torch.compile calls this while it traces and keeps the answer. The decorator that says so,
# torch.compiler.assume_constant_result, would import the whole compiler with this package.
_unfit._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves(backend: str, device: torch.device) -> bool:
    """Return whether `backend` can run on `device`."""
    return _unfit(backend, device) is None


def _is_wrapper(tensor: Tensor) -> bool:
    """Return whether `tensor` is a subclass around other tensors, like DTensor."""
    return type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor)


def _automatic(tensor: Tensor) -> Choice:
    device = tensor.device
    if device.type == "cpu":
        return Choice("torch", "cpu tensors run in torch")
    if (unfit := _unfit("triton", device)) is not None:
        return Choice("torch", unfit)
    if _is_wrapper(tensor):
        return Choice("torch", f"{type(tensor).__name__} has its own rules for torch's operators")
    return Choice("triton", f"{device.type} tensors run in the fused kernels")


def available() -> tuple[str, ...]:
    """Return the names of the implementations that are installed, the preferred one first."""
    return NAMES if _triton_missing() is None else ("torch",)


def explain(tensor: Tensor) -> Choice:
    """Return the implementation that would run for `tensor`, and why.

    Args:
        tensor: Any tensor; its device and its class are looked at.

    Raises:
        ValueError: A backend was requested that cannot serve the tensor.

    Example:
        >>> explain(torch.empty(2, 8)).backend
        'torch'
    """
    if not isinstance(tensor, Tensor):
        fail("explain", "a Tensor", type(tensor).__name__, TypeError)
    if _requested is None:
        return _automatic(tensor)
    unfit = _unfit(_requested, tensor.device)
    if unfit is not None:
        fail(
            _requested_by,
            f"tensors that the {_requested} backend can serve",
            f"{tensor.device}: {unfit}",
        )
    return Choice(_requested, f"requested by {_requested_by}")


def select(tensor: Tensor) -> str:
    """Return the name of the implementation for `tensor`, with `explain`'s errors."""
    if _requested is not None:
        return explain(tensor).backend
    if tensor.is_cpu or not serves("triton", tensor.device) or _is_wrapper(tensor):
        return "torch"
    return "triton"


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Force an implementation for the calls made inside the ``with`` block, in every thread.

    Backward follows the forward it belongs to, wherever it runs.

    Args:
        backend: ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: There is no such backend, or it is not installed.

    Example:
        >>> with use("torch"):
        ...     explain(torch.empty(1)).backend
        'torch'
    """
    global _requested, _requested_by
    _check_name("backends.use", backend)
    if backend == "triton" and (missing := _triton_missing()) is not None:
        fail("backends.use", "an installed backend", f"'triton': {missing}")
    previous = _requested, _requested_by
    _requested, _requested_by = backend, "backends.use"
    try:
        yield
    finally:
        _requested, _requested_by = previous


def _read_environment() -> None:
    global _requested, _requested_by
    if name := os.environ.get(_VARIABLE):
        _check_name(_VARIABLE, name)
        _requested, _requested_by = name, _VARIABLE


_read_environment()
