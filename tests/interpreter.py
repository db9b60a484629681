"""Makes Triton's interpreter fast enough for a whole suite, and round as a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class _Nothing:
    def restore(self) -> None:
        """Restore nothing: the launch around this call restores what it patched."""


def patch_language_once_per_launch() -> None:
    """Skip work that the interpreter repeats.

    It replaces the members of triton.language anew whenever one device function calls another,
    which takes milliseconds and changes nothing after the first call from a module.
    """
    patched: set[int] = set()
    launch = interpreter.GridExecutor.__call__
    patch_language = interpreter._patch_lang

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return _Nothing()
        patched.add(module)
        return patch_language(function)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter._patch_lang = patch_once


def fuse_multiply_add() -> None:
    """Round a float32 `fma` once, as a GPU does and the interpreter from Triton 3.9 on.

    The product is exact in float64, and the sum is rounded there first, to 29 more bits.
    """
    if hasattr(interpreter._interpreter, "fma_fp64"):
        return
    fma = interpreter.InterpreterBuilder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return fma(self, x, y, z)
        wide = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(wide.astype(np.float32), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def round_to_nearest_bfloat16() -> None:
    """Convert float32 to bfloat16 to nearest even, as a GPU does; the interpreter truncates.

    Where a kernel rounds in the middle of its work, a truncation is no rounding of the result.
    """
    convert = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            # Adding to a NaN could make an infinity of it.
            rounded = np.where(np.isnan(source.data), bits >> 16 | 0x40, rounded)
            return interpreter.TensorHandle(rounded.astype(np.uint16), target.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            bits = source.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), target.scalar)
        return convert(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast
