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
from collections.abc import Callable, Iterator
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


class Record:
    """What a launcher did: the kernels that it started, and what it allocated in between."""

    def __init__(self) -> None:
        self.starts: list[Start] = []
        self.scratch: list[torch.Tensor] = []


class _Thread(threading.local):
    """Where this thread's launchers write what they do, if anybody wants to know."""

    record: Record | None = None


_thread = _Thread()
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
    if _thread.record is not None:
        _thread.record.starts.append(Start(compiled, grid, arguments))


def scratch(like: torch.Tensor, *size: int) -> torch.Tensor:
    """Allocate what one kernel of a launcher writes and another one reads."""
    tensor = like.new_empty(size)
    if _thread.record is not None:
        _thread.record.scratch.append(tensor)
    return tensor


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """Note what the launchers of this thread do."""
    _thread.record = record = Record()
    try:
        yield record
    finally:
        _thread.record = None


def native(name: str, tensors: int, device_of: int) -> Any:
    """Return a decorator by which the extension repeats what a launcher does.

    Args:
        name: The extension's function.
        tensors: How many tensors the launcher's arguments begin with.
        device_of: Which of them is always there.
    """

    def decorator(launcher: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(launcher).parameters)[:tensors]
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
            with recorded() as record:
                results = launcher(*arguments)
            _hand_over(done, record, dict(zip(names, arguments, strict=False)), results)
            return results

        return launch

    return decorator


class _Repeatable(NamedTuple):
    """A start as the extension reads it.

    Attributes:
        function: The driver's handle.
        name: The kernel's.
        grid: Programs along each of three axes.
        threads: Of a program.
        shared: Bytes that a program shares.
        arguments: For each an index into the tensors, or -1, and a word to add to the address.
    """

    function: int
    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: list[tuple[int, int]]


class _NotRepeatable(Exception):  # noqa: N818  # caught at once
    """A launcher started something with what the extension does not have."""


_Places = dict[int, tuple[int, int]]
"""By address of a tensor: which of the extension's it is, and how far into it."""


def _hand_over(
    key: bytes,
    record: Record,
    inputs: dict[str, torch.Tensor | None],
    results: tuple[torch.Tensor | None, ...],
) -> None:
    """Let the extension repeat what was recorded wherever a layout has this key."""
    places: _Places = {}
    for index, result in enumerate(results, len(inputs)):
        if result is not None:
            places[result.data_ptr()] = index, 0
    elements = 0
    for tensor in record.scratch:
        places[tensor.data_ptr()] = len(inputs) + len(results), elements * tensor.element_size()
        elements += -(-tensor.numel() // 64) * 64  # aligned as an allocation
    try:
        starts = [_repeatable(start, inputs, places) for start in record.starts]
    except _NotRepeatable:
        return
    _C.triton_keep(key, starts, elements, [start.compiled for start in record.starts])


_MOST_SHARED = 228 * 1024
"""Bytes of shared memory beyond which Triton gives a launch an attribute."""

_FORMATS = {"i32": "<i4x", "i64": "<q", "fp64": "<d"}


def _repeatable(
    start: Start, inputs: dict[str, torch.Tensor | None], places: _Places
) -> _Repeatable:
    """Describe a start to the extension.

    Inputs go by the names that the kernels have for them, since one tensor may be two of them.

    Raises:
        _NotRepeatable: It takes more than a function, a grid and arguments, or reads a copy.
    """
    metadata = start.compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise _NotRepeatable
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl:
        raise _NotRepeatable
    if metadata.shared > _MOST_SHARED:
        raise _NotRepeatable
    names = list(inputs)
    arguments: list[tuple[int, int]] = []
    signature = start.compiled.src.signature.items()
    for (name, kind), argument in zip(signature, start.arguments, strict=False):
        tensor = name.removesuffix("_ptr")
        if kind == "constexpr":
            continue
        if not kind.startswith("*"):
            arguments.append((-1, int.from_bytes(struct.pack(_FORMATS[kind], argument), "little")))
        elif (address := argument.data_ptr()) in places:
            arguments.append(places[address])
        elif (given := inputs.get(tensor)) is not None and given.data_ptr() == address:
            arguments.append((names.index(tensor), 0))
        else:
            raise _NotRepeatable
    arguments += [(-1, 0)] * 2  # Triton's own scratch, global and of its profiler
    return _Repeatable(
        start.compiled.function,
        start.compiled.name,
        start.grid,
        metadata.num_warps * metadata.warp_size,
        metadata.shared,
        arguments,
    )
