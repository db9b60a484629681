"""What every launcher needs: of its tensors, of the device, and to start its kernels.

`start` starts a kernel as Triton does, but binds arguments of one layout once only. Where the
compiled extension is, it goes further: a `native` launcher has it repeat what the Python of the
launcher did for the same layout, with no Python on the way.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import struct
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from .config import Architecture, vector_elements

try:
    from fusednorm import _C  # type: ignore[attr-defined]
except ImportError:
    _C = None

KNOWN_TRITON = ("3.6", "3.9")
"""Versions for which tests have compared the extension's launches with Triton's own."""

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    None: None,
}

# Stands in for the device when the kernels run in Triton's interpreter: few processors, so that
# small tests still give every program several rows.
_INTERPRETER = Architecture(warp_size=32, processors=4, shared_bytes=232448, registers=0)


@cache
def architecture(device: torch.device) -> Architecture:
    """Return the launch policy's view of a device."""
    if device.type == "cpu":
        return _INTERPRETER
    target = triton.runtime.driver.active.get_current_target()
    properties = torch.cuda.get_device_properties(device)
    nvidia = target.backend == "cuda"
    return Architecture(
        warp_size=target.warp_size,
        processors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin
        if nvidia
        else properties.shared_memory_per_block,
        registers=properties.regs_per_multiprocessor if nvidia else 0,
    )


def options(num_warps: int, arch: Architecture, programs: int = 1) -> dict[str, object]:
    """Return Triton's launch options for a program of `num_warps`, `programs` to a processor."""
    # Fusing multiply and add saves a rounding; newer Triton would stop doing it by default.
    chosen: dict[str, object] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if (limit := arch.max_registers(num_warps, programs)) is not None:
        chosen["maxnreg"] = limit
    return chosen


def as_rows(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return `x` as [M, N] with adjacent columns: a view if its strides allow one, else a copy."""
    x = x.reshape(rows, cols)
    return x if x.stride(1) == 1 or cols == 1 else x.contiguous()


def itemsize(compute: torch.dtype, *written: torch.Tensor | None) -> int:
    """Return the element size that the launch policy goes by: the widest that rows are written in.

    Triton lets a thread write 16 bytes at once: a wider element in a tile made for a narrower one
    would be exchanged between threads, two barriers a chunk. Reading has no such limit.
    """
    if compute == torch.float64:
        return 8
    return max(tensor.element_size() for tensor in written if tensor is not None)


def row_stride(x: torch.Tensor) -> int:
    """Return the distance of two rows; a lone row gets the one it would have in a batch."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def vector(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Return a weight or bias whose elements are adjacent, as the kernels index it."""
    return None if parameter is None else parameter.contiguous()


def drop_below(p: float) -> int:
    """Return the 32-bit random word below which dropout of rate `p` drops an element."""
    return min(round(p * 2**32), 2**32 - 1)


class Terms(NamedTuple):
    """The gate, scale and shift of a launch, [1 or S, N or 1] each, as the kernels index them.

    Attributes:
        tensors: Gate, scale and shift, or None; the elements of a row are adjacent.
        strides: Elements from one sample to the next; 0 where there is one row for all.
        rows_per_sample: Rows of x that one sample covers.
        samples: S; 1 where no term differs between samples.
        constants: What is compiled in.
    """

    tensors: tuple[torch.Tensor | None, ...]
    strides: tuple[int, ...]
    rows_per_sample: int
    samples: int
    constants: dict[str, object]


def terms(rows: int, cols: int, *tensors: torch.Tensor | None) -> Terms:
    """Prepare the gate, scale and shift of M = `rows` and N = `cols`."""
    scalars = [tensor is not None and tensor.shape[1] < cols for tensor in tensors]
    vector = vector_elements(cols, 1)
    prepared, strides, samples = [], [], 1
    for tensor, scalar in zip(tensors, scalars, strict=True):
        if tensor is not None:
            adjacent = scalar or cols == 1 or tensor.stride(1) == 1
            # Rows of a chunk of a wider tensor stay where they are if their vectors are aligned.
            if not adjacent or tensor.stride(0) % vector:
                tensor = tensor.contiguous()
            samples = max(samples, tensor.shape[0])
        prepared.append(tensor)
        strides.append(0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0))
    constants = dict(zip(("GATE_SCALAR", "SCALE_SCALAR", "SHIFT_SCALAR"), scalars, strict=True))
    constants |= {"SAMPLED": samples > 1, "TERM_VECTOR": vector}
    return Terms(tuple(prepared), tuple(strides), rows // samples, samples, constants)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current device, whatever the tensors are on."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@cache
def not_native(device: torch.device) -> str | None:
    """Return why Triton's own launcher starts the kernels on `device`, or None if C++ does."""
    if device.type != "cuda":
        return f"the extension starts no kernels on {device.type} devices"
    if torch.version.hip is not None:
        return "the extension starts no kernels on AMD devices"
    return untested_triton() or (None if _C else "the compiled extension does not load")


def untested_triton() -> str | None:
    """Return why the extension leaves this Triton alone, or None where it knows how it launches."""
    if triton.__version__.startswith(tuple(f"{version}." for version in KNOWN_TRITON)):
        return None
    return f"triton {triton.__version__} is none of {', '.join(KNOWN_TRITON)}"


class Start(NamedTuple):
    """One start of a kernel, as the extension repeats it.

    Attributes:
        compiled: What Triton compiled.
        grid: Programs along each of three axes.
        arguments: What the kernel was given before its constants.
    """

    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class _Started(threading.local):
    """What this thread has started since somebody began to listen, if anybody does."""

    starts: list[Start] | None = None


_started = _Started()
_compiled: dict[tuple[object, ...], Any] = {}


def _hooked() -> bool:
    """Return whether somebody has asked Triton to tell him of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start ``kernel[grid](*arguments, **constants)``.

    Triton takes half of a launch to find what it compiled. Of an argument that is no tensor it goes
    by nothing, since our kernels specialize no number, and of a tensor by dtype and alignment.

    Raises:
        RuntimeError: The driver refuses the launch.
    """
    grid = (*grid, 1, 1)[:3]
    try:
        if _hooked() or not isinstance(kernel, triton.JITFunction):
            kernel[grid](*arguments, **constants)
            return
        active = driver.active
        device = active.get_current_device()
        layout = [
            (argument.dtype, argument.data_ptr() % 16 == 0)
            if isinstance(argument, torch.Tensor)
            else argument is None
            for argument in arguments
        ]
        key = (kernel, device, *layout, *constants.values())
        compiled = _compiled.get(key)
        if compiled is None:
            compiled = kernel[grid](*arguments, **constants)
            if compiled is None:  # interpreted, or compiled and not started
                return
            _compiled[key] = compiled
        else:
            # The constants' places are skipped.
            blanks = len(kernel.arg_names) - len(arguments)
            compiled.run(
                *grid,
                active.get_current_stream(device),
                compiled.function,
                compiled.packed_metadata,
                *(None, None, None),  # nobody to tell
                *arguments,
                *(None,) * blanks,
            )
    except RuntimeError as error:
        if not str(error).startswith("Triton Error"):
            raise
        name, word = kernel.fn.__name__, str(error).partition(": ")[2]
        message = f"{name}: expected the driver to launch a grid of {grid}, got {word}"
        raise RuntimeError(message) from error
    if _started.starts is not None:
        _started.starts.append(Start(compiled, grid, arguments))


def native(name: str, tensors: int, device_of: int, results: tuple[str, ...]) -> Any:
    """Return a decorator by which the extension repeats what a launcher does.

    Args:
        name: The extension's function.
        tensors: How many tensors the launcher's arguments begin with.
        device_of: Which of them is on the device.
        results: Names of the tensors that the launcher returns.
    """

    def decorator(launcher: Callable[..., Any]) -> Callable[..., Any]:
        names = (*list(inspect.signature(launcher).parameters)[:tensors], *results)
        repeat = getattr(_C, name, None)

        @functools.wraps(launcher)
        def launch(*arguments: Any) -> Any:
            device = arguments[device_of].device
            if not_native(device) is not None or _hooked():
                return launcher(*arguments)
            active = driver.active
            index = active.get_current_device()
            if device.index not in (index, None):
                with torch.cuda.device(device):
                    return launch(*arguments)
            done = repeat(index, active.get_current_stream(index), *arguments)  # type: ignore[misc]
            if type(done) is not bytes:
                return done
            _started.starts = starts = []
            try:
                outputs = launcher(*arguments)
            finally:
                _started.starts = None
            _hand_over(done, starts, dict(zip(names, (*arguments[:tensors], *outputs), strict=True)))
            return outputs

        return launch

    return decorator


class _Repeatable(NamedTuple):
    """A start as the extension reads it; an argument is an index into the tensors and a word."""

    function: int
    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: list[tuple[int, int]]


class _NotRepeatable(Exception):  # noqa: N818  # nobody sees it
    """Something was started with what the extension does not have."""


class _Scratch:
    """Where the tensors that a launcher makes for itself lie in one allocation."""

    def __init__(self) -> None:
        self.itemsize = 4
        self.bytes = 0
        self._places: dict[int, int] = {}

    def place(self, tensor: torch.Tensor) -> int:
        """Return the offset of a tensor, which keeps the alignment of allocations."""
        if tensor.data_ptr() not in self._places:
            self.itemsize = tensor.element_size()
            self._places[tensor.data_ptr()] = self.bytes
            self.bytes += -(-tensor.nbytes // 256) * 256
        return self._places[tensor.data_ptr()]


def _hand_over(key: bytes, starts: list[Start], tensors: dict[str, torch.Tensor | None]) -> None:
    """Let the extension repeat `starts` wherever a layout has this key."""
    scratch = _Scratch()
    try:
        repeatable = [_repeatable(start, tensors, scratch) for start in starts]
    except _NotRepeatable:
        return
    kernels = [start.compiled for start in starts]
    _C.triton_keep(key, repeatable, scratch.bytes // scratch.itemsize, kernels)


_FORMATS = {"i32": "<i", "i64": "<q", "fp64": "<d"}


def _repeatable(
    start: Start, tensors: dict[str, torch.Tensor | None], scratch: _Scratch
) -> _Repeatable:
    """Describe a start to the extension.

    Raises:
        _NotRepeatable: It takes more than a function, a grid and arguments, or reads a copy.
    """
    metadata = start.compiled.metadata
    plain = metadata.num_ctas == 1 and not metadata.launch_cooperative_grid
    if not plain or metadata.launch_pdl:
        raise _NotRepeatable
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise _NotRepeatable
    names = list(tensors)
    arguments: list[tuple[int, int]] = []
    signature = start.compiled.src.signature.items()
    for (name, kind), argument in zip(signature, start.arguments, strict=False):
        if kind == "constexpr":
            continue
        if not kind.startswith("*"):
            word = struct.pack(_FORMATS[kind], argument).ljust(8, b"\0")
            arguments.append((-1, int.from_bytes(word, "little")))
            continue
        name = name.removesuffix("_ptr")
        if name not in tensors:
            arguments.append((len(names), scratch.place(argument)))
            continue
        given = tensors[name]
        if given is None or given.data_ptr() != argument.data_ptr():
            raise _NotRepeatable
        arguments.append((names.index(name), 0))
    arguments += [(-1, 0)] * 2  # Triton's scratch, global and of its profiler
    return _Repeatable(
        start.compiled.function,
        start.compiled.name,
        start.grid,
        metadata.num_warps * metadata.warp_size,
        metadata.shared,
        arguments,
    )
