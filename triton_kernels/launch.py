"""What every launcher needs of its tensors and of the device."""

from __future__ import annotations

import contextlib
import math
from functools import cache

import torch
import triton
import triton.language as tl

from .config import Architecture

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

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


def options(num_warps: int, arch: Architecture) -> dict[str, object]:
    """Return Triton's launch options for a program of `num_warps`."""
    # Fusing multiply and add saves a rounding; newer Triton would stop doing it by default.
    chosen: dict[str, object] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if (limit := arch.max_registers(num_warps)) is not None:
        chosen["maxnreg"] = limit
    return chosen


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and accumulators: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_and_columns(x: torch.Tensor, normalized_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return M and N."""
    return math.prod(x.shape[: x.dim() - len(normalized_shape)]), math.prod(normalized_shape)


def as_rows(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return `x` as [M, N] with adjacent columns: a view if its strides allow one, else a copy."""
    x = x.reshape(rows, cols)
    return x if x.stride(1) == 1 or cols == 1 else x.contiguous()


def row_stride(x: torch.Tensor) -> int:
    """Return the distance of two rows; a lone row gets the one it would have in a batch."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def vector(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Return a weight or bias whose elements are adjacent, as the kernels index it."""
    return None if parameter is None else parameter.contiguous()


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current device, whatever the tensors are on."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
