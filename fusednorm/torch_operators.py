"""Our kernels below torch's own operators, and out again.

While they are there, `torch.nn.functional.layer_norm` and `rms_norm`, the modules and whatever else
ends in torch's operators runs in them: autograd, tracing, transforms, exporters and DTensor are
torch's own. What the kernels do not do goes to the kernel that was there before.

Example:
    >>> import torch, fusednorm
    >>> with fusednorm.enable("cpu"):
    ...     y = torch.nn.functional.layer_norm(torch.randn(2, 8), (8,))
"""

from __future__ import annotations

import collections
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fusednorm import backends
from fusednorm.spec import compute_dtype, rows_and_columns
from fusednorm.validation import DTYPES, fail

OPERATORS = (
    "native_layer_norm",
    "native_layer_norm_backward",
    "_fused_rms_norm",
    "_fused_rms_norm_backward",
)
_VARIABLE = "FUSEDNORM_ENABLE"


class Enabled:
    """What one call of `enable` put in; leaving a ``with`` block takes it out again.

    Attributes:
        devices: The kinds of device that were not enabled before.
    """

    def __init__(self, devices: tuple[str, ...]) -> None:
        """Remember what is to be taken out."""
        self.devices = devices

    def disable(self) -> None:
        """Take out what this call put in; a second time nothing happens."""
        devices, self.devices = self.devices, ()
        disable(devices)

    def __enter__(self) -> Enabled:
        """Return the handle."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take out what this call put in."""
        self.disable()

    def __repr__(self) -> str:
        """Return what would be taken out."""
        return f"Enabled({', '.join(self.devices)})"


def enable(devices: str | torch.device | Iterable[str | torch.device] | None = None) -> Enabled:
    """Put the kernels below torch's layer norm and RMS norm, for the whole process.

    `torch.nn.functional.layer_norm` and `rms_norm`, the modules and everything that calls them then
    run in the kernels, with torch's autograd, dtypes, layouts and errors. What the kernels do not
    do goes to the kernel that was there before. What is enabled already stays as it is.

    ``FUSEDNORM_ENABLE=1`` does it when the package is imported.

    Args:
        devices: ``"cpu"``, ``"cuda"`` or several of them; None for all that have a backend.

    Returns:
        A handle, which is a context manager: leaving it, or its `disable`, takes out what this
        call put in.

    Raises:
        ValueError: There is no such kind of device, or no backend for it; nothing was enabled.

    Example:
        >>> handle = enable("cpu")
        >>> y = torch.nn.functional.rms_norm(torch.randn(2, 8), (8,))
        >>> handle.disable()
    """
    with _lock:
        new: list[str] = []
        try:
            for kind in _kinds("enable", devices):
                if kind not in _registrations:
                    _registrations[kind] = _OnCpu() if kind == "cpu" else _InPython("CUDA")
                    backends.below_torch.add(kind)
                    new.append(kind)
                    _forget_kernels()
        except BaseException:
            disable(new)
            raise
        return Enabled(tuple(new))


def disable(devices: str | torch.device | Iterable[str | torch.device] | None = None) -> None:
    """Take the kernels out; torch's own are back. What is not enabled is left alone.

    A graph that was recorded before keeps its backward.

    Args:
        devices: As for `enable`; None for all.

    Raises:
        ValueError: There is no such kind of device.

    Example:
        >>> disable()
        >>> enabled("cpu")
        False
    """
    with _lock:
        for kind in tuple(_registrations) if devices is None else _names("disable", devices):
            backends.below_torch.discard(kind)
            if (registration := _registrations.pop(kind, None)) is not None:
                registration.remove()
                _forget_kernels()


def enabled(device_type: str) -> bool:
    """Return whether torch's operators run in the kernels on a kind of device.

    Example:
        >>> with enable("cpu"):
        ...     enabled("cpu")
        True
    """
    return device_type in _registrations


def calls() -> dict[str, int]:
    """Return how many calls of each operator the kernels served so far.

    Example:
        >>> before = calls()["native_layer_norm"]
        >>> with enable("cpu"):
        ...     y = torch.nn.functional.layer_norm(torch.randn(2, 8), (8,))
        >>> calls()["native_layer_norm"] - before
        1
    """
    counted = dict(_served)
    if backends.extension_missing() is None and hasattr(_extension(), "operator_calls"):
        found = _extension().operator_calls()
        counted = {name: count + found[name] for name, count in counted.items()}
    return counted


def _extension() -> Any:
    return importlib.import_module("fusednorm._C")


def _forget_kernels() -> None:
    """Let torch's Python look the kernels of its operators up again.

    It remembers them where it compiles: on a CPU that an RMS norm is made of other operators.
    """
    for name in OPERATORS:
        getattr(torch.ops.aten, name).default._dispatch_cache.clear()


def _names(op: str, devices: str | torch.device | Iterable[str | torch.device]) -> list[str]:
    """Return the kinds of device that are named."""
    given = [devices] if isinstance(devices, (str, torch.device)) else devices
    if not isinstance(given, Iterable):
        fail(op, "devices as a name, a torch.device or several", type(given).__name__, TypeError)
    names = [name.type if isinstance(name, torch.device) else name for name in given]
    for name in names:
        if name not in ("cpu", "cuda"):
            fail(op, "devices among 'cpu' and 'cuda'", repr(name))
    return names


def _kinds(op: str, devices: str | torch.device | Iterable[str | torch.device] | None) -> list[str]:
    """Return the kinds of device to enable, each of which has a backend."""
    if devices is None:
        missing = {name: _missing(name) for name in ("cpu", "cuda")}
        kinds = [name for name, reason in missing.items() if reason is None]
        if not kinds:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            fail(op, "a device with a backend", reasons)
        return kinds
    names = _names(op, devices)
    for name in names:
        if (reason := _missing(name)) is not None:
            fail(op, "devices that have a backend", f"{name}: {reason}")
    return names


def _missing(kind: str) -> str | None:
    """Return why a kind of device has no backend, or None where it has one."""
    if kind == "cpu":
        if (missing := backends.extension_missing()) is not None:
            return missing
        if hasattr(_extension(), "register_operators"):
            return None
        return "the compiled extension is of another version (FUSEDNORM_BUILD=cpu builds it again)"
    if not torch.cuda.is_available():
        return "no cuda device is available to torch"
    device = torch.device("cuda", torch.cuda.current_device())
    if backends.kernels(device) is not None:
        return None
    return backends.choose(torch.empty(0, device=device)).reason


Kernel = Callable[..., Any]


def _previous(operator: str, key: str) -> Kernel:
    """Return the kernel that an operator has for a dispatch key now."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])
    kernel = torch.library.get_kernel(f"aten::{operator}", key)
    return lambda *arguments: kernel.call_boxed(keys, *arguments)


def _rms_norm_bwd(
    dz: Tensor,
    x: Tensor,
    normalized_shape: list[int],
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Differentiate any RMS norm: torch has no kernel for it on the CPU."""
    inner = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    compute = compute_dtype(x.dtype)
    g, x_hat = dz.to(compute), x.to(compute) * rstd
    dweight = (g * x_hat).sum(tuple(range(inner[0]))) if inner[0] else g * x_hat
    if weight is not None:
        g = g * weight.to(compute)
    dx = (g - x_hat * (g * x_hat).mean(inner, keepdim=True)) * rstd
    return (
        dx.to(x.dtype) if output_mask[0] else None,
        dweight.to(weight.dtype) if output_mask[1] and weight is not None else None,
    )


class _OnCpu:
    """The kernels of the extension, registered by it: no Python runs on the way to them."""

    def __init__(self) -> None:
        _spend_the_warning()
        others = [_previous(name, "CPU") for name in OPERATORS[:-1]]
        _extension().register_operators(*others, _rms_norm_bwd)
        # A thread that has begun a call reads what was registered until it has returned.
        _in_use.append([torch.library.get_kernel(f"aten::{name}", "CPU") for name in OPERATORS])

    def remove(self) -> None:
        """Put torch's kernels back."""
        _extension().unregister_operators()


class _InPython:
    """The launchers of `backends.kernels` as torch's operators, for one dispatch key.

    The extension, where there is one, repeats a launch that it has a plan for. Any other call
    passes through Python, as the launchers do.
    """

    def __init__(self, key: str) -> None:
        _spend_the_warning()
        self._before = {
            name: torch.library.get_kernel(f"aten::{name}", key)
            for name in OPERATORS
            if torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"aten::{name}", key)
        }
        implementations = (self._norm, self._norm_bwd, self._rms_norm, self._rms_norm_bwd)
        self._library = None
        if backends.own_operators() is not None:
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])
            functions = [functools.partial(function, keys) for function in implementations]
            _extension().register_by_plans(key, *functions)
            return
        self._library = torch.library.Library("aten", "IMPL")
        try:
            for name, function in zip(OPERATORS, implementations, strict=True):
                self._library.impl(name, function, key, with_keyset=True, allow_override=True)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put back what was there before."""
        if self._library is None:
            _extension().unregister_by_plans()
        else:
            self._library._destroy()

    def _hand_on(self, name: str, keys: Any, *arguments: Any) -> Any:
        if name not in self._before:
            return _rms_norm_bwd(*arguments)
        return self._before[name].call_boxed(keys, *arguments)

    def _norm(
        self,
        keys: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Any:
        if not _is_served(x, shape, weight, bias):
            return self._hand_on(OPERATORS[0], keys, x, shape, weight, bias, eps)
        return _forward(x, shape, weight, bias, eps, rms=False)

    def _rms_norm(
        self, keys: Any, x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None
    ) -> Any:
        if not _is_served(x, shape, weight) or not _is_laid_out_as_usual(x):
            return self._hand_on(OPERATORS[2], keys, x, shape, weight, eps)
        if eps is None:
            eps = torch.finfo(compute_dtype(x.dtype)).eps
        return _forward(x, shape, weight, None, eps, rms=True)

    def _norm_bwd(
        self,
        keys: Any,
        dz: Tensor,
        x: Tensor,
        shape: list[int],
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: list[bool],
    ) -> Any:
        if not _is_served(x, shape, weight, bias) or not _fits(dz, x, (mean, rstd)):
            arguments = (dz, x, shape, mean, rstd, weight, bias, mask)
            return self._hand_on(OPERATORS[1], keys, *arguments)
        return _backward(dz, x, shape, tuple(mask), mean=mean, rstd=rstd, weight=weight, bias=bias)

    def _rms_norm_bwd(
        self,
        keys: Any,
        dz: Tensor,
        x: Tensor,
        shape: list[int],
        rstd: Tensor,
        weight: Tensor | None,
        mask: list[bool],
    ) -> Any:
        if not _is_served(x, shape, weight) or not _fits(dz, x, (rstd,)):
            return self._hand_on(OPERATORS[3], keys, dz, x, shape, rstd, weight, mask)
        return _backward(dz, x, shape, (*mask, False), rstd=rstd, weight=weight)[:2]


def _is_served(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None = None
) -> bool:
    """Return whether the kernels serve a norm of x; all others are errors, or empty, or rare."""
    if x.dtype not in DTYPES or not shape or list(x.shape[-len(shape) :]) != list(shape):
        return False
    if x.numel() == 0 or backends.kernels(x.device) is None:
        return False
    half = x.dtype in (torch.float16, torch.bfloat16)
    dtypes = {parameter.dtype for parameter in (weight, bias) if parameter is not None}
    return (dtypes <= {x.dtype} or (half and dtypes == {torch.float32})) and all(
        parameter is None or (list(parameter.shape) == list(shape) and parameter.device == x.device)
        for parameter in (weight, bias)
    )


def _fits(dz: Tensor | None, x: Tensor, statistics: tuple[Tensor | None, ...]) -> bool:
    """Return whether a gradient and the statistics are such as the kernels take."""
    compute = compute_dtype(x.dtype)
    return (
        dz is not None
        and (dz.dtype, dz.shape, dz.device) == (x.dtype, x.shape, x.device)
        and all(value is not None and value.dtype == compute for value in statistics)
    )


def _is_laid_out_as_usual(x: Tensor) -> bool:
    """Return whether torch's RMS norm of x is contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() not in formats or not x.is_contiguous(memory_format=formats[x.dim()])


_served = dict.fromkeys(OPERATORS, 0)


def _launchers(x: Tensor) -> backends.Launchers:
    return backends.launchers(backends.kernels(x.device) or "torch")


def _forward(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    rms: bool,
) -> tuple[Tensor, ...]:
    """Return z, mean (not for RMS) and rstd, the last two of x's shape with 1 for each column."""
    kernels = _launchers(x)
    tensors = (x, None, None, weight, bias, None, None, None)
    options = (tuple(shape), eps, rms, 0.0, x.dtype, None, None, True, False)
    z, _, mean, rstd = kernels.forward(*tensors, *options)
    _served[OPERATORS[2 if rms else 0]] += 1
    leading = (*x.shape[: -len(shape)], *(1 for _ in shape))
    return tuple(
        value if value is z else value.view(leading)
        for value in (z, mean, rstd)
        if value is not None
    )


def _backward(
    dz: Tensor,
    x: Tensor,
    shape: list[int],
    mask: tuple[bool, ...],
    *,
    rstd: Tensor,
    weight: Tensor | None,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias; those of an RMS norm without a mean."""
    kernels = _launchers(x)
    rows, _ = rows_and_columns(x, tuple(shape))
    statistics = (None if mean is None else mean.reshape(rows), rstd.reshape(rows))
    tensors = (dz, None, None, x, *statistics, None, weight, bias, None, None, None)
    wanted = (mask[0], False, False, mask[1], mask[2], False, False)
    options = (tuple(shape), 0.0, x.dtype, x.dtype, None, wanted)
    dx, _, _, dweight, dbias, *_ = kernels.backward(*tensors, *options)
    _served[OPERATORS[3 if mean is None else 1]] += 1
    return dx, dweight, dbias


_warned = False


def _spend_the_warning() -> None:
    """Let torch give the one warning that it has for kernels that are overridden, unheard."""
    global _warned
    if _warned:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = torch.library.Library("fusednorm", "FRAGMENT")
        library.define("_overridden() -> ()")
        for _ in range(2):
            library.impl("_overridden", lambda: None, "CPU", allow_override=True)
        library._destroy()
    _warned = True


_lock = threading.RLock()
_registrations: dict[str, _OnCpu | _InPython] = {}
_in_use: collections.deque[list[Any]] = collections.deque(maxlen=256)


def _new_lock() -> None:
    """In a forked child: whoever held the lock is not there."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)


def read_environment() -> None:
    """Do what ``FUSEDNORM_ENABLE`` says.

    Raises:
        ValueError: It says neither 0 nor 1, or no device has a backend.
    """
    value = os.environ.get(_VARIABLE, "")
    if value not in ("", "0", "1"):
        fail(_VARIABLE, "0 or 1", repr(value))
    if value == "1":
        enable()
