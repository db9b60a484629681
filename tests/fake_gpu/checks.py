"""Every use of every kernel, compiled for and started on the GPU that is not there.

`test_fake_gpu.py` runs this in a process of its own: Triton interprets in that of the suite.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.runtime import build

import fake_gpu
from fake_gpu.uses import (
    Call,
    Use,
    backward,
    channels_backward,
    channels_forward,
    forward,
    gated_backward,
    gated_forward,
    uses,
)
from fusednorm import backends, channels, gated, ops, torch_operators
from fusednorm.triton_kernels import plans
from fusednorm.triton_kernels.backward import layer_norm_bwd
from fusednorm.triton_kernels.channels import layer_norm2d_bwd, layer_norm2d_fwd
from fusednorm.triton_kernels.forward import layer_norm_fwd
from fusednorm.triton_kernels.gated import gated_norm_bwd, gated_norm_fwd
from fusednorm.triton_kernels.launch import LARGEST_CLUSTER

Launcher = Callable[..., Any]
RESULTS = {
    layer_norm_fwd: ("z", "h_out", "mean_out", "rstd_out"),
    layer_norm_bwd: ("dx", "dresidual", "dgate", "dweight", "dbias", "dscale", "dshift"),
    gated_norm_fwd: ("z", "mean_out", "rstd_out"),
    gated_norm_bwd: ("dx", "dgate_input", "dweight", "dbias"),
    layer_norm2d_fwd: ("z", "mean_out", "rstd_out"),
    layer_norm2d_bwd: ("dx", "dweight", "dbias"),
}
REPEATERS = ["python", "extension"] if plans._C is not None else ["python"]
CALLS = [(use, direction) for use in uses() for direction in ("forward", "backward")]
CALLS += [(Use("layer_norm"), "inference"), (Use("add_norm", residual=True), "inference")]
CALLS += [
    (use, direction)
    for use in (
        Use("channels", cols=96, rows=256),
        Use("channels_of_rms", cols=33, rows=196, dtype="float32", rms=True),
        Use("slice_of_channels", cols=96, rows=256, padding=3, trained=False),
    )
    for direction in ("channels_forward", "channels_backward")
]


def addresses(launcher: Launcher, call: Call, results: Any) -> dict[int, str]:
    """Return the names of a call's tensors by address."""
    named = call.tensors | dict(zip(RESULTS[launcher], results, strict=True))
    return {
        tensor.data_ptr(): name
        for name, tensor in named.items()
        if tensor is not None and tensor.numel() > 0
    }


def described(launches: list[fake_gpu.Launch], names: dict[int, str]) -> list[fake_gpu.Launch]:
    """Return launches with the names of tensors in place of addresses."""
    return [
        one._replace(arguments=tuple(names.get(word, word) for word in one.arguments))
        for one in launches
    ]


def by_triton(launcher: Launcher, call: Call) -> tuple[list[fake_gpu.Launch], dict[str, int]]:
    """Return the launches of Triton's own launcher, and the bytes of what was made in between."""
    since = fake_gpu.launched()
    with fake_gpu.serving("triton"), plans.recorded() as record:
        results = launcher(*call.arguments)
    scratch = {tensor.data_ptr(): f"scratch {i}" for i, tensor in enumerate(record.scratch)}
    sizes = {scratch[tensor.data_ptr()]: tensor.nbytes for tensor in record.scratch}
    names = addresses(launcher, call, results) | scratch
    return described(fake_gpu.launches(since), names), sizes


def by_repeater(
    repeater: str,
    launcher: Launcher,
    call: Call,
    expected: list[fake_gpu.Launch],
    sizes: dict[str, int],
    run: Callable[[], Any] | None = None,
) -> list[fake_gpu.Launch]:
    """Return the launches of a repeater; what is made in between is named as expected.

    Instead of the launcher, `run` may make the call.
    """
    run = functools.partial(launcher, *call.arguments) if run is None else run
    with fake_gpu.serving(repeater):
        run()  # recorded
        since = fake_gpu.launched()
        with mock.patch.object(plans, "start", None):
            results = run()
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
    for (_, end), (following, _) in itertools.pairwise(ends):
        assert end <= following
    return described(launches, names | scratch)


def launcher_and_call(direction: str, use: Use) -> tuple[Launcher, Call]:
    """Return a launcher and what to call it with."""
    if use.gated:
        return {
            "forward": lambda: (gated_norm_fwd, gated_forward(use)),
            "backward": lambda: (gated_norm_bwd, gated_backward(use)),
        }[direction]()
    return {
        "forward": lambda: (layer_norm_fwd, forward(use)),
        "inference": lambda: (layer_norm_fwd, forward(use, save_stats=False)),
        "backward": lambda: (layer_norm_bwd, backward(use)),
        "channels_forward": lambda: (layer_norm2d_fwd, channels_forward(use)),
        "channels_backward": lambda: (layer_norm2d_bwd, channels_backward(use)),
    }[direction]()


@pytest.mark.parametrize(("use", "direction"), CALLS, ids=str)
def test_every_way_starts_the_same(use: Use, direction: str) -> None:
    """Kernels, grids, blocks, shared memory and every argument by value, but for addresses."""
    launcher, call = launcher_and_call(direction, use)
    expected, sizes = by_triton(launcher, call)
    assert expected
    for repeater in REPEATERS:
        assert by_repeater(repeater, launcher, call, expected, sizes) == expected


WITHOUT_CLUSTERS = pytest.mark.skipif(LARGEST_CLUSTER == 1, reason="Triton before 3.9")


@pytest.mark.parametrize("cols", [1024, pytest.param(32768, marks=WITHOUT_CLUSTERS)])
def test_attributes_of_launches(cols: int) -> None:
    """Only the finalize kernel is a dependent launch; a row of a cluster has that of its size."""
    since = fake_gpu.launched()
    with fake_gpu.serving("triton"):
        layer_norm_bwd(*backward(Use("layer_norm", cols=cols)).arguments)
    rows, finalize = fake_gpu.launches(since)
    assert finalize.attributes != 0
    assert (rows.attributes != 0) == (cols > 8192)
    assert rows.attributes != finalize.attributes


def operator_call(launcher: Launcher, call: Call) -> Callable[[], Any]:
    """Return the call of our operator that ends in a call of a launcher."""
    tensors = call.arguments[: len(call.tensors)]
    if launcher is layer_norm2d_fwd:
        return functools.partial(channels.layer_norm2d_fwd, *call.arguments[:-1])
    if launcher is layer_norm2d_bwd:
        numbers = 0.0, call.tensors["mean"] is None
        return functools.partial(channels.layer_norm2d_bwd, *tensors, *numbers, call.arguments[-1])
    shape, *options = call.arguments[len(call.tensors) :]
    if launcher is layer_norm_fwd:
        return functools.partial(ops.layer_norm_fwd, *tensors, shape, *options[:-2])
    if launcher is gated_norm_fwd:
        return functools.partial(gated.gated_norm_fwd, *tensors, shape, *options[:-1])
    if launcher is gated_norm_bwd:
        size, *others = options
        fresh = 0.0, call.tensors["mean"] is None
        return functools.partial(gated.gated_norm_bwd, *tensors, shape, size, *fresh, *others)
    rms = call.tensors["mean"] is None
    return functools.partial(ops.layer_norm_bwd, *tensors, shape, 0.0, rms, *options)


@pytest.fixture(scope="module")
def served_by_plans() -> None:
    """Let our operators take CPU tensors for those of the device that is not there."""
    if plans._C is None:
        pytest.skip("the extension repeats launches, and was not built")
    plans._C.serve_by_plans("CPU")


@pytest.fixture
def triton_alone(served_by_plans: None) -> Iterator[None]:
    """Let Triton's kernels serve our operators, and Python where nothing can be repeated."""
    fit = backends._TABLE["triton"]._replace(unfit=lambda device: None)
    with mock.patch.dict(backends._TABLE, triton=fit), backends.use("triton"):
        yield


@pytest.mark.usefixtures("triton_alone")
@pytest.mark.parametrize(
    ("use", "direction"), [call for call in CALLS if call[1] != "inference"], ids=str
)
def test_an_operator_starts_the_same(use: Use, direction: str) -> None:
    """The first call of a layout is Python's, the others the extension's where it has the norm."""
    launcher, call = launcher_and_call(direction, use)
    expected, sizes = by_triton(launcher, call)
    run = operator_call(launcher, call)
    before = plans._C.own_operator_calls()
    for repeater in REPEATERS:
        plans.forget()
        assert by_repeater(repeater, launcher, call, expected, sizes, run) == expected
    served = {name: count - before[name] for name, count in plans._C.own_operator_calls().items()}
    assert served == {name: int(name == launcher.__name__) for name in before}


@pytest.mark.usefixtures("triton_alone")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rms", [False, True])
def test_torchs_operators_start_the_same_without_python(
    monkeypatch: pytest.MonkeyPatch, rms: bool, affine: bool
) -> None:
    """While enabled, below torch's own autograd, on the second call of a layout."""
    leaves = [torch.ones(2, 3, 1024, dtype=torch.bfloat16, requires_grad=True)]
    if affine:
        leaves += [torch.ones(1024, dtype=torch.bfloat16, requires_grad=True)] * (1 if rms else 2)
    dz = torch.ones_like(leaves[0])

    def both() -> list[fake_gpu.Launch]:
        since = fake_gpu.launched()
        x, *parameters = leaves
        norm = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
        y = norm(x, (1024,), *parameters, eps=1e-5)
        wanted = list(dict.fromkeys(leaves))
        results = (y, *torch.autograd.grad(y, wanted, dz))
        assert [tensor.shape for tensor in results[1:]] == [tensor.shape for tensor in wanted]
        return [one._replace(arguments=()) for one in fake_gpu.launches(since)]

    registration = torch_operators._InPython("CPU")
    try:
        with fake_gpu.serving("extension"):
            plans.forget()
            first = both()
            monkeypatch.setattr(torch_operators, "_launchers", None)
            before = sum(torch_operators.calls().values())
            assert both() == first
            assert sum(torch_operators.calls().values()) == before + 2
    finally:
        registration.remove()
    assert len(first) == (3 if affine else 2)


@pytest.mark.usefixtures("triton_alone")
def test_python_serves_an_operator_while_somebody_listens() -> None:
    """As the launcher does: Triton's profilers hear of every launch."""
    run = operator_call(layer_norm_fwd, forward(Use("layer_norm", rows=29)))
    heard: list[str] = []

    def listener(metadata: Any) -> None:
        heard.append(metadata.get()["name"])

    with fake_gpu.serving("extension"):
        run()
        triton.knobs.runtime.launch_enter_hook.add(listener)
        try:
            run()
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(listener)
        run()
    assert heard == ["layer_norm_fwd_kernel"]


@pytest.mark.usefixtures("triton_alone")
def test_a_refused_launch_of_an_operator_is_named() -> None:
    """In the words of the launcher."""
    run = operator_call(layer_norm_fwd, forward(Use("layer_norm", rows=4096)))
    with fake_gpu.serving("extension"):
        run()
        with fake_gpu.refusing(1), pytest.raises(RuntimeError, match=r"a grid of \(1024, 1, 1\)"):
            run()


def test_no_number_of_rows_compiles_anything() -> None:
    """One compilation for each class of shapes: no way loads a kernel for another M."""
    for repeater in ("triton", *REPEATERS):
        loads = set()
        for rows in (*range(2, 51), 100_000):
            use = Use("layer_norm", rows=rows, cols=256)
            with fake_gpu.serving(repeater):
                layer_norm_fwd(*forward(use).arguments)
                layer_norm_bwd(*backward(use).arguments)
            loads.add(fake_gpu.loads())
        assert len(loads) == 1


def test_no_place_of_a_jump_compiles_anything() -> None:
    """How many jumps there are is compiled in, not where, nor how far they go."""
    x, *rest = forward(Use("layer_norm", cols=64, rows=1)).arguments
    for repeater in ("triton", *REPEATERS):
        loads = set()
        for length, heads in ((3, 4), (16, 16), (2, 15), (1000, 2), (2, 40_000)):
            packed = x.new_empty(2, length, 3, heads, 64)[:, :, 0]
            with fake_gpu.serving(repeater):
                layer_norm_fwd(packed, *rest)
                layer_norm_fwd(packed.transpose(1, 2), *rest)
            loads.add(fake_gpu.loads())
        assert len(loads) == 1


@pytest.mark.parametrize("repeater", ["triton", *REPEATERS])
def test_a_refused_launch_names_kernel_grid_and_reason(repeater: str) -> None:
    """One error, whoever started it."""
    call = forward(Use("layer_norm", rows=4096))
    expected = re.escape(
        "fusednorm: layer_norm_fwd_kernel: expected the driver to launch a grid of "
        "(1024, 1, 1), got invalid argument"
    )
    with fake_gpu.serving(repeater):
        layer_norm_fwd(*call.arguments)
        with fake_gpu.refusing(1), pytest.raises(RuntimeError, match=expected):
            layer_norm_fwd(*call.arguments)
        layer_norm_fwd(*call.arguments)


@pytest.mark.parametrize("repeater", REPEATERS)
def test_whoever_listens_to_launches_hears_of_them(repeater: str) -> None:
    """Triton's profilers hook into its own launcher: no other starts a kernel then."""
    call = forward(Use("layer_norm"))
    heard: list[str] = []

    def listener(metadata: Any) -> None:
        heard.append(metadata.get()["name"])

    with fake_gpu.serving(repeater):
        for _ in range(2):
            layer_norm_fwd(*call.arguments)
        triton.knobs.runtime.launch_enter_hook.add(listener)
        try:
            layer_norm_fwd(*call.arguments)
        finally:
            triton.knobs.runtime.launch_enter_hook.remove(listener)
        layer_norm_fwd(*call.arguments)
    assert heard == ["layer_norm_fwd_kernel"]


@pytest.mark.parametrize("repeater", REPEATERS)
def test_one_tensor_in_two_places_is_two_tensors_the_next_time(repeater: str) -> None:
    """What was recorded with x as its own residual serves other residuals."""
    call = forward(Use("add_norm", residual=True, rows=33))
    x, _, *rest = call.arguments
    residual = x.clone()
    with fake_gpu.serving(repeater):
        layer_norm_fwd(x, x, *rest)
        since = fake_gpu.launched()
        with mock.patch.object(plans, "start", None):
            layer_norm_fwd(x, residual, *rest)
    (launch,) = fake_gpu.launches(since)
    assert launch.arguments[:2] == (x.data_ptr(), residual.data_ptr())


@pytest.mark.parametrize("repeater", REPEATERS)
def test_a_copy_is_made_each_time(repeater: str) -> None:
    """Columns that are not adjacent are copied, and a copy's address is no plan's."""
    call = forward(Use("layer_norm", rows=32))
    x, *rest = call.arguments
    spread = x.new_ones(1024, 32).t()
    with fake_gpu.serving(repeater):
        for _ in range(3):
            since = fake_gpu.launched()
            kept = spread.contiguous()  # takes the place of an earlier copy
            layer_norm_fwd(spread, *rest)
            (launch,) = fake_gpu.launches(since)
            assert launch.arguments[0] not in (spread.data_ptr(), kept.data_ptr())


@pytest.mark.parametrize("repeater", REPEATERS)
def test_what_is_misaligned_is_another_layout(repeater: str) -> None:
    """A kernel compiled for 16-byte accesses never gets an address that has none."""
    call = forward(Use("layer_norm", rows=31))
    x, *rest = call.arguments
    shifted = x.new_ones(31 * 1024 + 1)[1:].view(31, 1024)
    kernels = []
    with fake_gpu.serving(repeater):
        for rows in (x, shifted, x, shifted):
            since = fake_gpu.launched()
            layer_norm_fwd(rows, *rest)
            kernels += [launch.handle for launch in fake_gpu.launches(since)]
    assert kernels[0] == kernels[2] != kernels[1] == kernels[3]


@pytest.mark.parametrize("repeater", REPEATERS)
def test_another_thread_launches_as_well(repeater: str) -> None:
    """A backward runs on a thread of autograd's, which CUDA has not seen before."""
    call = backward(Use("layer_norm", rows=30))
    with fake_gpu.serving(repeater), ThreadPoolExecutor(1) as thread:
        layer_norm_bwd(*call.arguments)
        since = fake_gpu.launched()
        for _ in range(2):
            thread.submit(layer_norm_bwd, *call.arguments).result()
    first, second = fake_gpu.launches(since)[:2], fake_gpu.launches(since)[2:]
    assert [one.kernel for one in first] == [one.kernel for one in second]
    assert len(first) == 2


def test_an_unknown_triton_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever relies on how a version launches has compared it with that version."""
    device = torch.device("cuda", 0)
    for version, name in ((triton.__version__, None), ("3.60.0", "triton"), ("4.0.0", "triton")):
        monkeypatch.setattr(triton, "__version__", version)
        found = plans.repeater.__wrapped__(device)
        assert found.name == (name or REPEATERS[-1]), found


def test_without_a_c_compiler_torch_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton compiles what starts its kernels; whoever runs it in a bare image is told."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends._triton_unfit.__wrapped__(device) is None
    if hasattr(build, "_find_compiler"):  # remembers what it found
        monkeypatch.setattr(build, "_find_compiler", build._find_compiler.__wrapped__)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "_create_driver", fake_gpu._Driver)
    for kept in ("_active", "_default"):
        monkeypatch.setattr(triton.runtime.driver, kept, None)
    reason = backends._triton_unfit.__wrapped__(device)
    assert reason is not None
    assert "Failed to find C compiler" in reason
