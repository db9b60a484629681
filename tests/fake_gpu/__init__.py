"""A GPU that is not there: Triton compiles for compute capability 9.0 and its launcher starts it.

Importing this gives the process a CUDA driver that says yes (`driver.c`) and makes it Triton's.
Nothing is computed: what there is to see are the launches, and how long it took to get there.
"""

# ruff: noqa: E402  # Triton is imported once there is a driver

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

_FOLDER = tempfile.mkdtemp(prefix="fake_gpu_")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


def _build() -> ctypes.CDLL:
    """Compile the driver and load it as this process's libcuda."""
    library = f"{_FOLDER}/libcuda.so.1"
    source = Path(__file__).with_name("driver.c")
    flags = ["-O1", "-Wall", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *flags, "-o", library, source], check=True)
    Path(_FOLDER, "libcuda.so").symlink_to("libcuda.so.1")
    return ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


DRIVER = _build()
os.environ["TRITON_LIBCUDA_PATH"] = _FOLDER
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

from fusednorm.triton_kernels import launch, plans
from fusednorm.triton_kernels.config import Architecture

H100 = Architecture(
    warp_size=32,
    processors=132,
    shared_bytes=232448,
    registers=65536,
    cluster=launch.LARGEST_CLUSTER,
)
MOST_PARAMETERS, KEPT = 48, 64  # as in driver.c


class _Function(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("parameters", ctypes.c_int),
        ("sizes", ctypes.c_uint16 * MOST_PARAMETERS),
        ("shared", ctypes.c_int),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.POINTER(_Function)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("words", ctypes.c_uint64 * MOST_PARAMETERS),
    )


class Launch(NamedTuple):
    """One launch as the driver got it; arguments are their bytes as numbers."""

    handle: int | None
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int  # a number for all of them
    stream: int | None
    arguments: tuple[int, ...]


class _Driver(CudaDriver):  # type: ignore[misc]
    """Triton's driver without the torch of a CUDA build."""

    def __init__(self) -> None:
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda *_: (9, 0)
        self.set_current_device = lambda device: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _number(name: str, kind: type = ctypes.c_uint64) -> ctypes._SimpleCData[int]:
    return kind.in_dll(DRIVER, name)  # type: ignore[attr-defined, no-any-return]


def loads() -> int:
    """Return how many kernels have been loaded: one for each that was compiled."""
    return _number("fake_loads").value


def launched() -> int:
    """Return how many launches there were."""
    return _number("fake_launches").value


def launches(since: int) -> list[Launch]:
    """Return the launches since there were `since`.

    Raises:
        ValueError: There were more than the driver keeps.
    """
    if launched() - since > KEPT:
        raise ValueError(f"expected at most {KEPT} launches, got {launched() - since}")
    kept = (_Launch * KEPT).in_dll(DRIVER, "fake_kept")
    made = []
    for index in range(since, launched()):
        one = kept[index % KEPT]
        function = one.function.contents
        made.append(
            Launch(
                ctypes.addressof(function),
                function.name.decode(),
                tuple(one.grid),
                tuple(one.block),
                one.shared,
                one.attributes,
                one.stream,
                tuple(one.words[: function.parameters]),
            )
        )
    return made


@contextlib.contextmanager
def refusing(error: int) -> Iterator[None]:
    """Let the driver answer every launch with `error`."""
    refusal = _number("fake_refusal", ctypes.c_int)
    refusal.value = error
    try:
        yield
    finally:
        refusal.value = 0


@contextlib.contextmanager
def serving(repeater: str) -> Iterator[None]:
    """Let Triton's kernels take CPU tensors for an H100's, whoever is to repeat launches."""
    chosen = plans.Repeater(repeater, "asked for")

    def architecture(device: object) -> Architecture:
        return H100

    def choose(device: object) -> plans.Repeater:
        return chosen

    with (
        mock.patch.object(launch, "architecture", architecture),
        mock.patch.object(plans, "repeater", choose),
    ):
        yield


triton.runtime.driver.set_active(_Driver())
