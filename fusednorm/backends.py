"""Which implementation runs: the choice, what it rests on, and how to force it.

Example:
    >>> import torch, fusednorm
    >>> with fusednorm.backends.use("torch"), fusednorm.backends.explain() as ran:
    ...     y = fusednorm.layer_norm(torch.randn(2, 8), 8)
    >>> print(ran[0])
    layer_norm: torch, requested by backends.use
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusednorm import reference
from fusednorm._version import __version__
from fusednorm.observers import distributed
from fusednorm.spec import Gradients, Outputs
from fusednorm.validation import fail

_VARIABLE = "FUSEDNORM_BACKEND"
_MIN_CAPABILITY = (8, 0)


class Choice(NamedTuple):
    """The implementation for a tensor, one of `NAMES`, and why it is that one."""

    backend: str
    reason: str

    def __str__(self) -> str:
        """Return ``backend: reason``."""
        return f"{self.backend}: {self.reason}"


below_torch: set[str] = set()
"""The kinds of device whose norms of torch run in our kernels; `torch_operators` keeps it."""

# The request in force: set by `use`, else by the environment, else None for the automatic choice.
_requested: str | None = None
_requested_by = ""


class Launchers(NamedTuple):
    """What runs one backend.

    The signatures are those of Triton's forward and backward; for norms over dimension 1 those of
    `triton_kernels.channels`. A backward that is differentiable is the source of all higher
    derivatives, too.
    """

    forward: Callable[..., Outputs]
    backward: Callable[..., Gradients]
    differentiable: bool = False


class GatedLaunchers(NamedTuple):
    """What runs the gated norm; the signatures are those of Triton's gated_norm_fwd and _bwd."""

    forward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    backward: Callable[..., tuple[Tensor | None, ...]]


class Backend(NamedTuple):
    """One implementation of the equation.

    Attributes:
        missing: Returns why it is not installed, or None where it is.
        unfit: Returns why it cannot run on a device, or None where it can.
        launchers: Returns its launchers, once it is installed.
        gated_launchers: Returns those of the gated norm.
        channels: Returns those of norms over dimension 1 of so many channels, or None where it has
            none and takes the channels for rows.
    """

    missing: Callable[[], str | None]
    unfit: Callable[[torch.device], str | None]
    launchers: Callable[[], Launchers]
    gated_launchers: Callable[[], GatedLaunchers]
    channels: Callable[[int], Launchers | None] = lambda channels: None


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
def extension_missing() -> str | None:
    """Return why there is no compiled extension, or None once it is loaded.

    Raises:
        ImportError: There is one that does not load: it was built for another platform or torch.
    """
    name = "fusednorm._C"
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # something else stands in its place
        found = None
    if found is None or found.origin is None:
        return "the compiled extension was not built (FUSEDNORM_BUILD=cpu)"
    try:
        importlib.import_module(name)
    except ImportError as error:
        said = re.search(rb"built with (torch [^,\0]+), compiler", Path(found.origin).read_bytes())
        built = said[1].decode() if said else "nobody knows what"
        here = f"torch {torch.__version__} for {sysconfig.get_platform()}"
        raise ImportError(
            f"fusednorm {__version__}: the compiled extension does not load: {error}; it was built "
            f"with {built}, and this is {here}"
        ) from error
    return None


@cache
def cuda_missing() -> str | None:
    """Return why the CUDA kernels of the extension cannot be loaded, or None once they are."""
    if (missing := extension_missing()) is not None:
        return missing
    if hasattr(importlib.import_module("fusednorm._C"), "cuda_forward"):
        return None
    return "the compiled extension has no CUDA kernels (FUSEDNORM_BUILD=cuda)"


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
        if not torch.cuda.is_available():
            return None  # a fake tensor, for a device that is somewhere else
        too_old = None if torch.version.hip is not None else _too_old(device)
        return too_old or _driver_missing()
    if device.type == "cpu":
        return (
            None if _interpreted() else "cpu tensors need Triton's interpreter (TRITON_INTERPRET=1)"
        )
    return f"the kernels are built for cuda devices, not {device.type}"


def _driver_missing() -> str | None:
    """Return why Triton cannot start kernels, or None where it can: it compiles what starts them.

    CUDA's images for running programs have no C compiler.
    """
    from triton.runtime import driver

    try:
        _ = driver.active
    except Exception as error:  # of a compiler, of a linker, of an operating system
        return f"triton cannot build its launcher: {error}"
    return None


def _too_old(device: torch.device) -> str | None:
    """Return why the kernels do not run on an NVIDIA GPU, or None where they do."""
    if not torch.cuda.is_available():
        return None  # as in _triton_unfit
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def _cuda_unfit(device: torch.device) -> str | None:
    """Return why the compiled CUDA kernels cannot run on `device`, or None where they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are built for NVIDIA GPUs, not {device.type}"
    return cuda_missing() or _too_old(device)


def _cpu_unfit(device: torch.device) -> str | None:
    """Return why the compiled kernels cannot run on `device`, or None where they can."""
    if device.type != "cpu":
        return f"the kernels are built for cpu tensors, not {device.type}"
    return extension_missing()


@cache
def _triton_launchers() -> Launchers:
    from fusednorm.triton_kernels import backward, forward

    return Launchers(forward.layer_norm_fwd, backward.layer_norm_bwd)


@cache
def _cuda_launchers() -> Launchers:
    from fusednorm import cuda

    return Launchers(cuda.layer_norm_fwd, cuda.layer_norm_bwd)


@cache
def _cpu_launchers() -> Launchers:
    from fusednorm import _C  # type: ignore[attr-defined]

    return Launchers(_C.forward, _C.backward)


@cache
def _triton_gated() -> GatedLaunchers:
    from fusednorm.triton_kernels import gated

    return GatedLaunchers(gated.gated_norm_fwd, gated.gated_norm_bwd)


def _cuda_gated() -> GatedLaunchers:
    fail("cuda backend", "no gate_input, which the triton backend has", "one")


@cache
def _cpu_gated() -> GatedLaunchers:
    from fusednorm import _C  # type: ignore[attr-defined]

    return GatedLaunchers(_C.gated_forward, _C.gated_backward)


def _triton_channels(channels: int) -> Launchers | None:
    from fusednorm.triton_kernels import channels as kernels
    from fusednorm.triton_kernels.config import MOST_CHANNELS

    if channels > MOST_CHANNELS:
        return None
    return Launchers(kernels.layer_norm2d_fwd, kernels.layer_norm2d_bwd)


def _cpu_channels(channels: int) -> Launchers | None:
    from fusednorm import _C  # type: ignore[attr-defined]

    return Launchers(_C.channels_forward, _C.channels_backward)


_TORCH_LAUNCHERS = Launchers(reference.launch_fwd, reference.launch_bwd)
_TORCH_GATED = GatedLaunchers(reference.launch_gated_fwd, reference.launch_gated_bwd)

_TABLE = {
    "triton": Backend(
        *(_triton_missing, _triton_unfit, _triton_launchers, _triton_gated, _triton_channels)
    ),
    "cuda": Backend(cuda_missing, _cuda_unfit, _cuda_launchers, _cuda_gated),
    "cpu": Backend(extension_missing, _cpu_unfit, _cpu_launchers, _cpu_gated, _cpu_channels),
    "torch": Backend(
        lambda: None, lambda device: None, lambda: _TORCH_LAUNCHERS, lambda: _TORCH_GATED
    ),
}
"""Every backend by name, the preferred one first; nothing else knows what there is."""

NAMES = tuple(_TABLE)


def launchers(backend: str) -> Launchers:
    """Return the launchers of an installed backend."""
    return _TABLE[backend].launchers()


def gated_launchers(backend: str) -> GatedLaunchers:
    """Return the launchers of the gated norm.

    Raises:
        ValueError: The backend has none.
    """
    return _TABLE[backend].gated_launchers()


def channel_launchers(backend: str, channels: int) -> Launchers | None:
    """Return what an installed backend has for norms over dimension 1; None if it takes rows."""
    return _TABLE[backend].channels(channels)


def _unfit(backend: str, device: torch.device) -> str | None:
    """Return why `backend` cannot run on `device`, or None where it can."""
    return _TABLE[backend].unfit(device)


# torch.compile calls this while it traces and keeps the answer. The decorator that says so,
# torch.compiler.assume_constant_result, would import the whole compiler with this package.
_unfit._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves(backend: str, device: torch.device) -> bool:
    """Return whether `backend` can run on `device`."""
    return _unfit(backend, device) is None


def of_valid_call(tensor: Tensor, plain: bool) -> str | None:
    """Return what `choose` takes for a call that `is_plain` accepts; None for torch's operator."""
    if _requested is None and tensor.is_cpu:
        return None if plain else "cpu"
    backend, _ = choose(tensor, plain=plain)
    return None if backend == "torch" else backend


@cache
def is_plain() -> Callable[..., bool] | None:
    """Return the extension's check of a call, which `observers` and `validation` define."""
    try:
        from fusednorm import _C  # type: ignore[attr-defined]
    except ImportError:
        return None  # where it is needed, `extension_missing` says why
    return _C.is_plain  # type: ignore[no-any-return]


def kernels(device: torch.device) -> str | None:
    """Return the kernels behind our operators on `device`: those requested, if they serve it."""
    if _requested in ("triton", "cuda") and serves(_requested, device):
        return _requested
    if device.type == "cpu" and serves("cpu", device):
        return "cpu"
    return "triton" if serves("triton", device) else None


def _is_wrapper(tensor: Tensor) -> bool:
    """Return whether `tensor` is a subclass around other tensors, and no DTensor.

    The parts of a DTensor are what runs: `distributed`.
    """
    return (
        type(tensor) is not Tensor
        and is_traceable_wrapper_subclass(tensor)
        and not distributed(tensor)
    )


_PLAIN_ON_CPU = Choice("torch", "a plain layer norm of cpu tensors is one operator of torch")
_COMPILED_ON_CPU = Choice("torch", "the compiler fuses torch's operators")
_BELOW_TORCH = Choice("torch", "torch's operator runs in our kernels: fusednorm.enable")
_NESTED = Choice("torch", "nested tensors have torch's operators only")
_FUSED_ON_CPU = Choice("cpu", "this would be several operators of torch")


def _automatic(tensor: Tensor, plain: bool) -> Choice:
    """Choose by the device and the class of the tensor, never by its number of rows.

    A row has the same bits in every batch. On the CPU it goes by bench/results/cpu_uses.txt: one
    operator of torch is the least that a call can cost. In a compiled graph our kernels take half
    of the time of inductor's code for norms beyond the cache, and no whole training step is faster
    for it (bench/results/compiled_cpu.txt): inductor fuses its own with what is around.
    """
    on_cpu = tensor.is_cpu
    if plain and below_torch and tensor.device.type in below_torch:
        return _BELOW_TORCH
    if on_cpu and plain:
        return _PLAIN_ON_CPU
    if on_cpu and torch.compiler.is_compiling():
        return _COMPILED_ON_CPU
    device = tensor.device
    if (unfit := _unfit("cpu" if on_cpu else "triton", device)) is not None:
        return Choice("torch", unfit)
    if _is_wrapper(tensor):
        return Choice("torch", f"{type(tensor).__name__} has its own rules for torch's operators")
    if tensor.is_nested:
        return _NESTED
    if on_cpu:
        return _FUSED_ON_CPU
    return Choice("triton", f"{device.type} tensors run in the fused kernels")


def available() -> tuple[str, ...]:
    """Return the names of the implementations that are installed, the preferred one first."""
    return tuple(name for name in NAMES if _TABLE[name].missing() is None)


class Ran(NamedTuple):
    """A call, the implementation that ran it, one of `NAMES`, and why it is that one."""

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        """Return ``op: backend, reason``."""
        return f"{self.op}: {self.backend}, {self.reason}"


# What `explain` listens with; None while nobody asks, which is all that a call looks at.
listener: list[Ran] | None = None


@contextlib.contextmanager
def explain() -> Iterator[list[Ran]]:
    """Note what runs each call inside the ``with`` block, and why, in every thread.

    Yields:
        The calls so far, the latest one last. What a compiled graph runs was decided when it was
        traced, and is noted then.

    Example:
        >>> import torch, fusednorm
        >>> with explain() as ran:
        ...     y = fusednorm.rms_norm(torch.empty(2, 8, device="meta"), 8)
        >>> print(*ran)
        rms_norm: torch, the kernels are built for cuda devices, not meta
    """
    global listener
    previous, listener = listener, []
    try:
        yield listener
    finally:
        listener = previous


def note(op: str, backend: str, reason: str) -> None:
    """Tell `explain` what runs a call."""
    if listener is not None:
        listener.append(Ran(op, backend, reason))


def choose(tensor: Tensor, *, plain: bool = True) -> Choice:
    """Return the implementation for a call on `tensor`, and why.

    Args:
        tensor: Its device and its class are looked at.
        plain: Whether torch has the call as one operator.

    Raises:
        ValueError: A backend was requested that cannot serve the tensor.
    """
    return _automatic(tensor, plain) if _requested is None else _request(_requested, tensor)


def _request(requested: str, tensor: Tensor) -> Choice:
    """Return the requested backend, which has to serve the tensor."""
    if (unfit := _unfit(requested, tensor.device)) is not None:
        expected = f"tensors that the {requested} backend can serve"
        fail(_requested_by, expected, f"{tensor.device}: {unfit}")
    return Choice(requested, f"requested by {_requested_by}")


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Force an implementation for the calls made inside the ``with`` block, in every thread.

    Backward follows the forward it belongs to, wherever it runs.

    Args:
        backend: ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"torch"``.

    Raises:
        ValueError: There is no such backend, or it is not installed.

    Example:
        >>> import torch, fusednorm
        >>> with use("torch"):
        ...     y = fusednorm.layer_norm(torch.ones(2, 4), 4)
    """
    _check_name("backends.use", backend)
    if (missing := _TABLE[backend].missing()) is not None:
        fail("backends.use", "an installed backend", f"{backend!r}: {missing}")
    previous = _requested, _requested_by
    _ask(backend, "backends.use")
    try:
        yield
    finally:
        _ask(*previous)


def _ask(backend: str | None, source: str) -> None:
    global _requested, _requested_by
    _requested, _requested_by = backend, source
    if (extension := own_operators()) is not None:
        extension.ask(backend)


def own_operators() -> Any:
    """Return the extension if it has our operators for CPU tensors, else None."""
    if extension_missing() is not None:
        return None
    extension = importlib.import_module("fusednorm._C")
    return extension if hasattr(extension, "register_own_operator") else None


def _read_environment() -> None:
    if name := os.environ.get(_VARIABLE):
        _check_name(_VARIABLE, name)
        _ask(name, _VARIABLE)


_read_environment()
