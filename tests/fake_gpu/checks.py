"""Every use of every kernel, compiled for and started on the GPU that is not there.

`test_fake_gpu.py` runs this in a process of its own: Triton interprets in that of the suite.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import fake_gpu
import pytest
import triton
from fake_gpu.uses import Call, Use, backward, forward, uses

from fusednorm.triton_kernels import launch
from fusednorm.triton_kernels.backward import layer_norm_bwd
from fusednorm.triton_kernels.forward import layer_norm_fwd

Launcher = Callable[..., Any]
RESULTS = {
    layer_norm_fwd: ("z", "h_out", "mean_out", "rstd_out"),
    layer_norm_bwd: ("dx", "dresidual", "dgate", "dweight", "dbias", "dscale", "dshift"),
}
needs_extension = pytest.mark.skipif(launch._C is None, reason="there is no compiled extension")
needs_known_triton = pytest.mark.skipif(
    launch.untested_triton() is not None, reason="this Triton is left alone"
)


def addresses(launcher: Launcher, call: Call, results: Any) -> dict[int, str]:
    """Return the names of a call's tensors by address."""
    named = call.tensors | dict(zip(RESULTS[launcher], results, strict=True))
    return {tensor.data_ptr(): name for name, tensor in named.items() if tensor is not None}


def described(launches: list[fake_gpu.Launch], names: dict[int, str]) -> list[fake_gpu.Launch]:
    """Return launches with the names of tensors in place of addresses."""
    return [
        one._replace(arguments=tuple(names.get(word, word) for word in one.arguments))
        for one in launches
    ]


def by_python(launcher: Launcher, call: Call) -> tuple[list[fake_gpu.Launch], dict[str, int]]:
    """Return the launches of Triton's own launcher, and the bytes of what was made in between."""
    since = fake_gpu.launched()
    with fake_gpu.serving(native=False), launch.recorded() as record:
        results = launcher(*call.arguments)
    scratch = {tensor.data_ptr(): f"scratch {i}" for i, tensor in enumerate(record.scratch)}
    sizes = {scratch[tensor.data_ptr()]: tensor.nbytes for tensor in record.scratch}
    names = addresses(launcher, call, results) | scratch
    return described(fake_gpu.launches(since), names), sizes


def by_extension(
    launcher: Launcher, call: Call, expected: list[fake_gpu.Launch], sizes: dict[str, int]
) -> list[fake_gpu.Launch]:
    """Return the launches of the extension; what is made in between is named as expected."""
    with fake_gpu.serving(native=True):
        launcher(*call.arguments)  # handed over
        since = fake_gpu.launched()
        with mock.patch.object(launch, "start", None):
            results = launcher(*call.arguments)
    launches = fake_gpu.launches(since)
    names = addresses(launcher, call, results)
    scratch: dict[int, str] = {}
    for theirs, ours in zip(expected, launches, strict=True):
        for name, word in zip(theirs.arguments, ours.arguments, strict=True):
            if name in sizes:
                assert isinstance(word, int)
                assert scratch.setdefault(word, str(name)) == name
                assert word not in names
                assert word % 16 == 0
    assert len(scratch) == len(sizes)
    ends = [(at, at + sizes[name]) for at, name in sorted(scratch.items())]
    for (_, end), (following, _) in zip(ends, ends[1:], strict=False):
        assert end <= following
    return described(launches, names | scratch)


def launcher_and_call(direction: str, use: Use) -> tuple[Launcher, Call]:
    """Return a launcher and what to call it with."""
    return {
        "forward": lambda: (layer_norm_fwd, forward(use)),
        "inference": lambda: (layer_norm_fwd, forward(use, save_stats=False)),
        "backward": lambda: (layer_norm_bwd, backward(use)),
    }[direction]()


@needs_extension
@needs_known_triton
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("use", uses(), ids=str)
def test_both_ways_start_the_same(use: Use, direction: str) -> None:
    """Kernels, grids, blocks, shared memory and every argument by value, but for addresses."""
    launcher, call = launcher_and_call(direction, use)
    expected, sizes = by_python(launcher, call)
    assert expected
    assert by_extension(launcher, call, expected, sizes) == expected


def test_no_number_of_rows_compiles_anything() -> None:
    """One compilation for each class of shapes: neither way loads a kernel for another M."""
    for native in (False, launch._C is not None):
        loads = set()
        for rows in (*range(2, 51), 100_000):
            use = Use("layer_norm", rows=rows, cols=256)
            with fake_gpu.serving(native=native):
                layer_norm_fwd(*forward(use).arguments)
                layer_norm_bwd(*backward(use).arguments)
            loads.add(fake_gpu.loads())
        assert len(loads) == 1


@pytest.mark.parametrize("native", [False, True])
def test_a_refused_launch_names_kernel_grid_and_reason(native: bool) -> None:
    """One error, whichever way it was started."""
    call = forward(Use("layer_norm", rows=4096))
    expected = re.escape(
        "layer_norm_fwd_kernel: expected the driver to launch a grid of (1024, 1, 1), got "
        "invalid argument"
    )
    with fake_gpu.serving(native=native and launch._C is not None):
        layer_norm_fwd(*call.arguments)
        with fake_gpu.refusing(1), pytest.raises(RuntimeError, match=expected):
            layer_norm_fwd(*call.arguments)
        layer_norm_fwd(*call.arguments)


def test_whoever_listens_to_launches_hears_of_them() -> None:
    """Triton's profilers hook into its own launcher: no other starts a kernel then."""
    call = forward(Use("layer_norm"))
    heard: list[str] = []

    def listener(metadata: Any) -> None:
        heard.append(metadata.get()["name"])

    with fake_gpu.serving(native=launch._C is not None):
        for _ in range(2):
            layer_norm_fwd(*call.arguments)
        triton.knobs.runtime.launch_enter_hook.add(listener)
        try:
            layer_norm_fwd(*call.arguments)
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(listener)
        layer_norm_fwd(*call.arguments)
    assert heard == ["layer_norm_fwd_kernel"]
