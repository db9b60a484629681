"""What every launcher needs of its tensors and of the device."""

from __future__ import annotations

import contextlib
import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .config import JUMP_ORIGIN, Architecture, vector_elements

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    None: None,
}

LARGEST_CLUSTER = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 1
"""Programs of a cluster that every device with clusters starts; 3.6 compiles no sum over one."""

MOST_ROWS = 2**31
"""Rows with jumps that `tile.row_offsets` can number."""

# Stands in for the device when the kernels run in Triton's interpreter: few processors, so that
# small tests still give every program several rows.
_INTERPRETER = Architecture(warp_size=32, processors=4, shared_bytes=232448, registers=0)


@cache
def architecture(device: torch.device) -> Architecture:
    """Return the launch policy's view of a device."""
    if device.type == "cpu":
        return _INTERPRETER
    target = triton.runtime.driver.active.get_current_target()
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks some
    nvidia = target.backend == "cuda"
    clusters = nvidia and 90 <= target.arch < 120
    return Architecture(
        warp_size=target.warp_size,
        processors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin
        if nvidia
        else properties.shared_memory_per_block,
        registers=properties.regs_per_multiprocessor if nvidia else 0,
        cluster=LARGEST_CLUSTER if clusters else 1,
    )


def options(
    num_warps: int, arch: Architecture, programs: int = 1, cluster: int = 1
) -> dict[str, object]:
    """Return Triton's launch options for a program of `num_warps`, `programs` to a processor."""
    # Fusing multiply and add saves a rounding; newer Triton would stop doing it by default.
    chosen: dict[str, object] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if cluster > 1:
        chosen["num_ctas"] = cluster
    if (limit := arch.max_registers(num_warps, programs)) is not None:
        chosen["maxnreg"] = limit
    return chosen


def jump_arguments(jumps: list[int]) -> tuple[int, ...] | None:
    """Return jumps as a kernel takes them: every so many rows, by so many elements, and so on.

    A kernel divides by `every`: it gets m with row // every == row * m // 2**63 for all rows.
    Triton compiles by the width of a number in a tuple and by whether it is 1 or a multiple of 16;
    `do_not_specialize` does not reach there. All of these are wide and odd.
    """
    every, by = jumps[::2], jumps[1::2]
    numbers = (
        (-(-(2**63) // e) | 1, JUMP_ORIGIN + 2 * b + 1) for e, b in zip(every, by, strict=True)
    )
    return tuple(number for pair in numbers for number in pair) or None


class Rows(NamedTuple):
    """A tensor as the kernels index it.

    Attributes:
        tensor: Of M x N elements, the columns of a row adjacent, or None.
        stride: Elements from one row to the next; a lone row has the stride that it would have in
            a batch.
        jumps: `jump_arguments`; None where there are none, which costs a kernel nothing.
        vector: Elements that may be loaded at once.
    """

    tensor: torch.Tensor | None
    stride: int
    jumps: tuple[int, ...] | None
    vector: int


MOST_JUMPS = 2
"""What the extension has room for: a packed projection has one, its heads transposed have two."""


def as_rows(x: torch.Tensor | None, normalized_shape: tuple[int, ...]) -> Rows:
    """Return a tensor as it lies; copied where columns are not adjacent or jumps are too many.

    Rows with jumps are copied, too, where there are more than `MOST_ROWS`.
    """
    if x is None:
        return Rows(None, 0, None, 1)
    leading = x.dim() - len(normalized_shape)
    dims = list(zip(x.shape, x.stride(), strict=True))
    expected = 1  # the stride with which a dimension goes on as those inside of it
    for size, stride in reversed(dims[leading:]):
        if size != 1 and stride != expected:
            return as_rows(x.contiguous(), normalized_shape)
        expected *= size
    apart, inside = expected, 1
    jumps: list[int] = []
    for size, stride in reversed(dims[:leading]):
        if size == 1:
            continue
        if inside == 1:
            apart = stride
        elif stride != expected:
            jumps += (inside, stride - expected)
        inside *= size
        expected = stride * size
    if len(jumps) > 2 * MOST_JUMPS or (jumps and inside > MOST_ROWS):
        return as_rows(x.contiguous(), normalized_shape)
    vector = vector_elements(math.gcd(apart, *jumps[1::2]), x.element_size())
    return Rows(x, apart, jump_arguments(jumps), vector)


def even_rows(x: torch.Tensor, normalized_shape: tuple[int, ...]) -> Rows:
    """Return a tensor as rows without jumps: as it lies if it can be, else copied."""
    found = as_rows(x, normalized_shape)
    return found if found.jumps is None else as_rows(x.contiguous(), normalized_shape)


def itemsize(compute: torch.dtype, *written: torch.Tensor | None) -> int:
    """Return the element size that the launch policy goes by: the widest that rows are written in.

    Triton lets a thread write 16 bytes at once: a wider element in a tile made for a narrower one
    would be exchanged between threads, two barriers a chunk. Reading has no such limit.
    """
    if compute == torch.float64:
        return 8
    return max(tensor.element_size() for tensor in written if tensor is not None)


def vector(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Return a weight or bias whose elements are adjacent, as the kernels index it."""
    return None if parameter is None else parameter.contiguous()


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

    def of_rows(self, rows: int, cols: int) -> bool:
        """Return whether every term that is there has a vector for each of several rows."""
        there = [tensor for tensor in self.tensors if tensor is not None]
        return 1 < rows == self.samples and all(tensor.shape == (rows, cols) for tensor in there)

    def chosen(self, *names: str) -> dict[str, object]:
        """Return the constants that a kernel takes."""
        return {name: self.constants[name] for name in names}


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
    names = ("GATE_SCALAR", "SCALE_SCALAR", "SHIFT_SCALAR")
    constants: dict[str, object] = dict(zip(names, scalars, strict=True))
    constants |= {"SAMPLED": samples > 1, "TERM_VECTOR": vector}
    return Terms(tuple(prepared), tuple(strides), rows // samples, samples, constants)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current device, whatever the tensors are on."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
