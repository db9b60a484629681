"""Repeats what a launcher did for one layout of its arguments: the same kernels, other pointers.

A launcher computes grids, strides and constants, and Triton binds them to find what it compiled.
All of that depends on how the tensors lie, not on where: the first call of a layout is recorded,
and its `Plan` is repeated from then on, by the compiled extension or, without it, by Python.
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
from torch import Tensor
from triton import knobs
from triton.runtime import driver

try:
    from fusednorm import _C  # type: ignore[attr-defined]
except ImportError:
    _C = None

KNOWN_TRITON = ("3.6", "3.8", "3.9")
"""Versions for which tests/test_fake_gpu.py has compared every repeated launch with Triton's."""

MOST_PLANS = 4096
"""As many as a process of variable batches may need at a time."""


class Repeater(NamedTuple):
    """Who repeats launches, extension, python or, if nobody does, triton; and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        """Return ``name: reason``."""
        return f"{self.name}: {self.reason}"


@cache
def repeater(device: torch.device) -> Repeater:
    """Return who repeats the launches on `device`."""
    if device.type != "cuda":
        return Repeater("triton", f"nothing is launched on {device.type} devices")
    version = triton.__version__
    if not version.startswith(tuple(f"{known}." for known in KNOWN_TRITON)):
        return Repeater("triton", f"triton {version} is none of {', '.join(KNOWN_TRITON)}")
    if torch.version.hip is not None:
        return Repeater("python", "the extension starts no kernels on AMD GPUs")
    if _C is None:
        return Repeater("python", "the compiled extension does not load")
    return Repeater("extension", f"it starts kernels as triton {version} does")


class Record:
    """What a launcher did: the kernels that it started, and what it allocated in between.

    Attributes:
        starts: What Triton compiled, the grid, and what came before the constants.
        scratch: Tensors that one kernel writes and another one reads.
    """

    def __init__(self) -> None:
        self.starts: list[tuple[Any, tuple[int, int, int], tuple[Any, ...]]] = []
        self.scratch: list[Tensor] = []


class _Thread(threading.local):
    """Where this thread's launchers write what they do, if anybody wants to know."""

    record: Record | None = None


_thread = _Thread()


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """Note what the launchers of this thread do."""
    _thread.record = record = Record()
    try:
        yield record
    finally:
        _thread.record = None


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start ``kernel[grid](*arguments, **constants)``.

    Raises:
        RuntimeError: The driver refuses the launch.
    """
    x, y, z = (*grid, 1, 1)[:3]
    try:
        compiled = kernel[x, y, z](*arguments, **constants)
    except RuntimeError as error:
        raise _refused(kernel.fn.__name__, (x, y, z), error) from error
    if _thread.record is not None and compiled is not None:
        _thread.record.starts.append((compiled, (x, y, z), arguments))


def scratch(like: Tensor, *size: int) -> Tensor:
    """Allocate what one kernel of a launcher writes and another one reads."""
    tensor = like.new_empty(size)
    if _thread.record is not None:
        _thread.record.scratch.append(tensor)
    return tensor


def _refused(name: str, grid: tuple[int, ...], error: RuntimeError) -> RuntimeError:
    """Return what to raise in the place of an error: one with kernel and grid if it is Triton's."""
    if not str(error).startswith("Triton Error"):
        return error
    word = str(error).partition(": ")[2]
    expected = f"expected the driver to launch a grid of {grid}"
    return RuntimeError(f"fusednorm: {name}: {expected}, got {word}")


class Argument(NamedTuple):
    """An argument of a kernel: numbers, or the address of a tensor and an offset.

    Attributes:
        place: Of the tensor: of those that a launcher takes, those that it returns, and its
            scratch; -1 for numbers.
        value: The number or the tuple of them, the offset in bytes, or None for a constant.
    """

    place: int
    value: Any


class Start(NamedTuple):
    """What starts one kernel: what Triton compiled, the grid, and every argument."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Argument]


class Plan(NamedTuple):
    """What a launcher does for one layout of its arguments.

    Attributes:
        starts: The kernels in order.
        results: Size and dtype of what it returns.
        scratch: How many elements it needs in between, and of which dtype.
    """

    starts: list[Start]
    results: list[tuple[torch.Size, torch.dtype] | None]
    scratch: tuple[int, torch.dtype] | None

    def repeat(self, pointers: list[int], device: torch.device, stream: int) -> Any:
        """Do it again with what lies at `pointers`, and return new results."""
        results = tuple(
            None if made is None else torch.empty(made[0], dtype=made[1], device=device)
            for made in self.results
        )
        pointers += [0 if result is None else result.data_ptr() for result in results]
        if self.scratch is not None:
            block = torch.empty(self.scratch[0], dtype=self.scratch[1], device=device)
            pointers.append(block.data_ptr())
        for compiled, grid, arguments in self.starts:
            words = [value if place < 0 else pointers[place] + value for place, value in arguments]
            nobody = None, None, None  # to tell of the launch
            try:
                compiled.run(
                    *grid, stream, compiled.function, compiled.packed_metadata, *nobody, *words
                )
            except RuntimeError as error:
                raise _refused(compiled.name, grid, error) from error
        return results


def plan_of(
    record: Record, inputs: dict[str, Tensor | None], results: tuple[Tensor | None, ...]
) -> Plan | None:
    """Return how to repeat what was recorded; None where a kernel read a copy of an input.

    Inputs go by the names that the kernels have for them, since one tensor may be two of them.
    """
    places: dict[int, Argument] = {}
    for place, result in enumerate(results, len(inputs)):
        if result is not None:
            places[result.data_ptr()] = Argument(place, 0)
    elements = 0
    for tensor in record.scratch:
        offset = elements * tensor.element_size()
        places[tensor.data_ptr()] = Argument(len(inputs) + len(results), offset)
        elements += -(-tensor.numel() // 64) * 64  # aligned as an allocation
    names = list(inputs)
    starts = []
    for compiled, grid, given in record.starts:
        arguments = []
        for index, (name, kind) in enumerate(compiled.src.signature.items()):
            input = name.removesuffix("_ptr")
            if kind == "constexpr":
                arguments.append(Argument(-1, None))
            elif type(kind) is tuple or not kind.startswith("*"):
                arguments.append(Argument(-1, given[index]))
            elif (address := given[index].data_ptr()) in places:
                arguments.append(places[address])
            elif (own := inputs.get(input)) is not None and own.data_ptr() == address:
                arguments.append(Argument(names.index(input), 0))
            else:
                return None
        starts.append(Start(compiled, grid, arguments))
    made = [None if result is None else (result.shape, result.dtype) for result in results]
    return Plan(starts, made, (elements, record.scratch[0].dtype) if elements else None)


_MOST_SHARED = 228 * 1024
"""Bytes of shared memory beyond which Triton gives a launch an attribute."""

_DEPENDENT, _CLUSTER, _CLUSTER_POLICY, _SPREAD = 6, 4, 5, 1
"""What CUDA calls the attributes of a dependent launch and of one of clusters, and the policy that
Triton asks for."""

_FORMATS = {"i32": "<i4x", "i64": "<q", "fp64": "<d"}


def _hand_over(key: bytes, plan: Plan) -> None:
    """Let the extension repeat a plan that takes nothing it does not know of."""
    starts = []
    for compiled, grid, planned in plan.starts:
        metadata = compiled.metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            return
        if metadata.launch_cooperative_grid or metadata.shared > _MOST_SHARED:
            return
        arguments = []
        for kind, (place, value) in zip(compiled.src.signature.values(), planned, strict=True):
            if kind == "constexpr":
                continue
            numbers = zip(kind, value, strict=True) if type(kind) is tuple else ((kind, value),)
            for each, number in numbers:
                word = struct.pack("<q" if place >= 0 else _FORMATS[each], number)
                arguments.append((place, int.from_bytes(word, "little")))
        arguments += [(-1, 0)] * 2  # Triton's own scratch, global and of its profiler
        threads = metadata.num_warps * metadata.warp_size
        attributes: list[tuple[int, tuple[int, ...]]] = []
        if metadata.launch_pdl:
            attributes.append((_DEPENDENT, (1,)))
        if (cluster := metadata.num_ctas) > 1:
            grid = grid[0] * cluster, *grid[1:]
            attributes += [(_CLUSTER, (cluster, 1, 1)), (_CLUSTER_POLICY, (_SPREAD,))]
        start = compiled.function, compiled.name, grid, threads, metadata.shared, arguments
        starts.append((*start, attributes))
    scratch = 0 if plan.scratch is None else plan.scratch[0]
    _C.triton_keep(key, starts, scratch, [start.compiled for start in plan.starts])


_plans: dict[tuple[object, ...], Plan] = {}


def forget() -> None:
    """Forget all plans: what launchers decide by has changed."""
    _plans.clear()
    if _C is not None:
        _C.triton_forget()


def _keep(key: Any, plan: Plan | None) -> None:
    if plan is None or not plan.starts:
        return
    if type(key) is bytes:
        _hand_over(key, plan)
        return
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = plan


def _layout(tensors: tuple[Tensor | None, ...]) -> tuple[list[object], list[int]]:
    """Return what a launcher decides by of its tensors, and their addresses."""
    layout: list[object] = []
    pointers = []
    for tensor in tensors:
        if tensor is None:
            layout.append(None)
            pointers.append(0)
        else:
            pointer = tensor.data_ptr()
            layout += (tensor.dtype, tensor.shape, tensor.stride(), pointer % 16 == 0)
            pointers.append(pointer)
    return layout, pointers


def _hooked() -> bool:
    """Return whether somebody has asked Triton to tell him of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def repeated(name: str, *, tensors: int, device_of: int) -> Callable[..., Any]:
    """Return a decorator of a launcher that repeats what it has done for the same layout.

    Args:
        name: The extension's function for it.
        tensors: How many tensors its arguments begin with.
        device_of: Which of them is always there.
    """

    def decorator(launcher: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(launcher).parameters)[:tensors]
        repeat = getattr(_C, name, None)

        @functools.wraps(launcher)
        def launch(*arguments: Any) -> Any:
            device = arguments[device_of].device
            who = repeater(device).name
            if who == "triton" or _hooked():
                return launcher(*arguments)
            active = driver.active
            index = active.get_current_device()
            if device.index not in (index, None):
                with torch.cuda.device(device):
                    return launch(*arguments)
            stream = active.get_current_stream(index)
            key: Any
            if who == "extension" and repeat is not None:
                key = repeat(index, stream, *arguments)
                if type(key) is not bytes:
                    return key
            else:
                layout, pointers = _layout(arguments[:tensors])
                key = (name, index, *layout, *arguments[tensors:])
                if (plan := _plans.get(key)) is not None:
                    return plan.repeat(pointers, device, stream)
            with recorded() as record:
                results = launcher(*arguments)
            inputs = dict(zip(names, arguments, strict=False))
            _keep(key, plan_of(record, inputs, results))
            return results

        return launch

    return decorator
