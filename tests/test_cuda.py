"""The compiled CUDA kernels: on a GPU natively, elsewhere on the host that stands in for one.

The suites of the Triton kernels run here with this module's `kernels`, as far as the CUDA kernels
have the terms and dtypes; what they do not have is refused.
"""

# ruff: noqa: F401  (imported tests run here, with this module's `kernels`)

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Case, assert_accurate, make_case, run
from simt_library import load_host_kernels
from test_accuracy import (
    test_error_is_at_most_that_of_torch,
    test_error_without_weight_or_bias,
    test_large_mean_costs_no_digits,
    test_many_rows,
    test_variance_of_the_hardest_rows,
)
from test_autograd import (
    test_dy_is_not_modified,
    test_inputs_are_not_modified,
)
from test_determinism import (
    test_row_alone_equals_row_among_thousands,
    test_row_alone_equals_row_in_batch,
    test_two_runs_are_equal,
)
from test_dropout import (
    test_checkpoint_replays_the_mask,
    test_mask_is_the_published_one,
)
from test_jumps import test_right_and_as_copied
from test_layouts import (
    test_constant_rows,
    test_dy_expanded_from_one_number,
    test_dy_that_a_residual_branch_shares,
    test_empty_inputs,
    test_eps,
    test_float16_up_to_its_range,
    test_gamma_zero_tiny_negative,
    test_large_mean_and_small_variance,
    test_layouts_in_half_precision,
    test_layouts_of_weight_and_bias,
    test_layouts_of_x_and_dy,
    test_non_finite_weight_bias_or_dy,
    test_non_finite_x,
    test_one_column,
    test_ranks,
    test_rows_beyond_int32,
    test_strided_normalised_dimensions,
)
from test_terms import P, make

import fusednorm
from fusednorm import backends

if "cpu" not in backends.available():
    pytest.skip("the compiled extension is not installed", allow_module_level=True)

from fusednorm import cuda

# Shared memory of a processor in KB, and whether there are clusters.
DEVICES = {"8.0": (164, False), "8.6": (100, False), "9.0": (228, True), "12.0": (100, True)}
ON_GPU = torch.cuda.is_available() and "cuda" in backends.available()


def leaves_out(item: pytest.Item) -> bool:
    """Return whether a test is about a dtype that the kernels do not have; see conftest.py."""
    assert isinstance(item, pytest.Function)
    return hasattr(item, "callspec") and torch.float64 in item.callspec.params.values()


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The functions of csrc/cuda_ops.cpp with a host in place of the GPU."""
    return load_host_kernels()


@pytest.fixture
def use_host(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[..., None]:
    """Put the host in the place of the GPU: so many processors of a compute capability."""

    def use(processors: int = 3, capability: str = "9.0") -> None:
        module = request.getfixturevalue("module")
        ctypes.CDLL(module.__file__).simt_device(processors, *DEVICES[capability])
        monkeypatch.setattr(cuda, "_C", module)
        launchers = backends.Launchers(cuda.layer_norm_fwd, cuda.layer_norm_bwd)
        host = backends._TABLE["cuda"]._replace(
            missing=lambda: None, unfit=lambda device: None, launchers=lambda: launchers
        )
        monkeypatch.setitem(backends._TABLE, "cuda", host)

    return use


@pytest.fixture
def kernels(use_host: Callable[..., None], poison: None) -> Iterator[torch.device]:
    """Force the CUDA kernels on poisoned memory; the suites imported above get this fixture."""
    if not ON_GPU:
        use_host()
    with backends.use("cuda"):
        yield torch.device("cuda" if ON_GPU else "cpu")


# Terms

USES: dict[str, dict[str, Any]] = {
    "RMSNorm": {"rms": True},
    "dropout": {"dropout_p": P},
    "Add & Norm": {"residual": True},
    "Add & Norm, dropout": {"residual": True, "dropout_p": P},
    "Add & RMSNorm, dropout": {"residual": True, "rms": True, "dropout_p": P},
}
# One N for each regime of the forward or the backward.
COLS = (64, 100, 256, 500, 769, 1024, 1500, 4096, 8192, 12288, 20000, 50001)
HALVES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_uses(kernels: torch.device, use: dict[str, Any], cols: int, dtype: torch.dtype) -> None:
    """Outputs and every gradient are no further from the truth than those of unfused torch."""
    rows = 11 if cols < 2000 else 2
    assert_accurate(lambda: make((1, rows), cols, dtype, kernels, use))


@pytest.mark.parametrize("dtype", HALVES[:2], ids=str)
@pytest.mark.parametrize("cols", [256, 1000, 3000, 9000, 50000])
def test_float32_parameters_of_half_precision_rows(
    kernels: torch.device, cols: int, dtype: torch.dtype
) -> None:
    """Their gradients are float32 as well."""

    def draw() -> Case:
        case = make_case(5, cols, dtype, kernels)
        assert case.weight is not None
        assert case.bias is not None
        return replace(case, weight=case.weight.float(), bias=case.bias.float())

    assert_accurate(draw)


@pytest.mark.parametrize("cols", [96, 5000, 9000, 60000])
@pytest.mark.parametrize("frozen", ["x", "weight", "weight and bias"])
def test_frozen_inputs(kernels: torch.device, cols: int, frozen: str) -> None:
    """A gradient that is not wanted changes no other one."""
    case = make_case(5, cols, torch.float32, kernels)
    full = run(fusednorm.layer_norm, case)
    leaves = {"x": case.x, "weight": case.weight, "bias": case.bias}
    wanted = [name for name in leaves if name not in frozen]
    for name in wanted:
        leaves[name] = leaves[name].clone().requires_grad_()  # type: ignore[union-attr]
    y = fusednorm.layer_norm(leaves["x"], cols, leaves["weight"], leaves["bias"])
    gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], case.dy)
    for name, gradient in zip(wanted, gradients, strict=True):
        assert torch.equal(gradient, full[f"d{name}"]), name


@pytest.mark.parametrize("cols", [96, 5000, 20000])
@pytest.mark.parametrize("dropout_p", [0.0, P])
def test_unused_output(kernels: torch.device, cols: int, dropout_p: float) -> None:
    """The gradients through z alone and through h alone add up to those through both."""
    x, dz, dh = (torch.randn(3, cols, device=kernels) for _ in range(3))
    leaves = [torch.randn(3, cols, device=kernels), torch.randn(cols, device=kernels)]
    x, residual, weight = (leaf.requires_grad_() for leaf in (x, *leaves))
    outputs = fusednorm.add_layer_norm(x, residual, cols, weight, dropout_p=dropout_p)

    def gradients(*cotangents: torch.Tensor | None) -> list[torch.Tensor]:
        used = [pair for pair in zip(outputs, cotangents, strict=True) if pair[1] is not None]
        return [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(
                (x, residual, weight),
                torch.autograd.grad(
                    [output for output, _ in used],
                    (x, residual, weight),
                    [cotangent for _, cotangent in used],
                    retain_graph=True,
                    allow_unused=True,
                ),
                strict=True,
            )
        ]

    parts = zip(gradients(dz, None), gradients(None, dh), strict=True)
    for both, (one, other) in zip(gradients(dz, dh), parts, strict=True):
        torch.testing.assert_close(both, one + other, rtol=1e-5, atol=1e-5)


# Regimes


@pytest.mark.skipif(ON_GPU, reason="the host stands in for older GPUs, too")
@pytest.mark.parametrize("dtype", HALVES[1:], ids=str)
@pytest.mark.parametrize("cols", [64, 1024, 8192])
@pytest.mark.parametrize("processors", [1, 3, 132])
def test_without_clusters(
    use_host: Callable[..., None],
    kernels: torch.device,
    cols: int,
    dtype: torch.dtype,
    processors: int,
) -> None:
    """On sm_80 rows stay in their blocks, and partial rows are added up by one kernel."""
    use_host(processors, "8.0")
    use = USES["Add & Norm, dropout"]
    assert_accurate(lambda: make((1, 23), cols, dtype, kernels, use))


@pytest.mark.skipif(ON_GPU, reason="a GPU has the shared memory that it has")
@pytest.mark.parametrize("dtype", HALVES[1:], ids=str)
@pytest.mark.parametrize(
    ("capability", "cols"),
    [*(("8.6", cols) for cols in (200, 257, 600, 1100, 2048, 3000, 8192)), ("12.0", 65536)],
)
def test_little_shared_memory(
    use_host: Callable[..., None],
    kernels: torch.device,
    capability: str,
    cols: int,
    dtype: torch.dtype,
) -> None:
    """Where fewer blocks have room than have registers, each still has room for a row."""
    use_host(3, capability)
    use = USES["Add & Norm, dropout"]
    assert_accurate(lambda: make((1, 23 if cols < 9000 else 2), cols, dtype, kernels, use))


@pytest.mark.skipif(ON_GPU, reason="a GPU has the shared memory that it has")
@pytest.mark.parametrize(
    ("capability", "widest"), [("8.0", 8192), ("8.6", 8192), ("9.0", 2**16), ("12.0", 2**16)]
)
def test_widest_rows(
    use_host: Callable[..., None], kernels: torch.device, capability: str, widest: int
) -> None:
    """The kernels say how wide a row a device has room for, and refuse wider ones."""
    use_host(3, capability)
    message = f"expected at most {widest} columns on this device, got {widest + 1}"
    with pytest.raises(ValueError, match=message):
        fusednorm.layer_norm(torch.ones(1, widest + 1), widest + 1)


@pytest.mark.skipif(ON_GPU, reason="a GPU has the processors that it has")
@pytest.mark.parametrize("cols", [64, 1024, 4096, 12288])
def test_processors_change_no_row(
    use_host: Callable[..., None], kernels: torch.device, cols: int
) -> None:
    """Y and dx have the same bits on a device of any size; the sums over rows are close."""
    case = make_case(40, cols, torch.float32, kernels)
    results = []
    for processors in (1, 5, 132):
        use_host(processors)
        results.append(run(fusednorm.layer_norm, case))
    for result in results[1:]:
        for name in ("y", "dx"):
            assert torch.equal(result[name], results[0][name]), name
        for name in ("dweight", "dbias"):
            torch.testing.assert_close(result[name], results[0][name], rtol=1e-5, atol=1e-4)


# Groups of 16 and of 18 processors; columns, blocks of a cluster, clusters that run at a time.
GROUPS = [
    *(((6, 2), *plan) for plan in ((64, 4, 132), (2048, 4, 132), (5000, 4, 32), (8192, 4, 32))),
    *(((6, 2), *plan) for plan in ((16384, 2, 66), (32768, 4, 32), (65536, 8, 16))),
    *(((0, 8), *plan) for plan in ((8192, 4, 32), (32768, 4, 32), (65536, 8, 16))),
]


@pytest.mark.skipif(ON_GPU, reason="a GPU has the processors that it has")
@pytest.mark.parametrize("rows", [1000, 8192, 100_000])
@pytest.mark.parametrize(("groups", "cols", "cluster", "resident"), GROUPS)
def test_no_wave_of_clusters_is_partial(
    module: ModuleType,
    groups: tuple[int, int],
    cols: int,
    cluster: int,
    resident: int,
    rows: int,
) -> None:
    """A cluster runs within a group of processors: 33 of four blocks do not fit 132 of them."""
    library = ctypes.CDLL(module.__file__)
    library.simt_device(132, *DEVICES["9.0"])
    library.simt_groups(*groups)
    size, at_a_time = ctypes.c_int(), ctypes.c_int()
    arguments = ctypes.c_int64(rows), ctypes.c_int64(cols), True
    clusters = library.simt_clusters(*arguments, ctypes.byref(size), ctypes.byref(at_a_time))
    assert (size.value, at_a_time.value) == (cluster, resident)
    assert 0 < clusters <= resident
    # Rounding up the rows of each leaves some of them out, a quarter at the worst.
    rows_that_pay = 4 * (1 if cols > 8192 else 4 * (16 if cols <= 64 else 1))
    assert clusters >= 0.75 * min(resident, rows / rows_that_pay) - 1


@pytest.mark.skipif(ON_GPU, reason="a GPU has the processors that it has")
def test_more_partial_rows_than_warps(use_host: Callable[..., None], kernels: torch.device) -> None:
    """Each warp of the finalize kernel adds up several: 66 partial rows here."""
    use_host(132, "8.0")
    assert_accurate(lambda: make_case(2100, 96, torch.float32, kernels))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cols", [64, 500, 1024, 4096, 12288])
def test_alignment_changes_no_bit(kernels: torch.device, cols: int, dtype: torch.dtype) -> None:
    """Rows that cannot be read 16 bytes at a time give what aligned rows give."""
    case = make_case(9, cols, dtype, kernels)
    assert case.weight is not None
    expected = run(fusednorm.layer_norm, case)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    for name in ("x", "dy", "weight"):
        apart = replace(case, **{name: moved(getattr(case, name))})
        for result, tensor in run(fusednorm.layer_norm, apart).items():
            assert torch.equal(tensor, expected[result]), (name, result)


# Requests that the kernels cannot meet


def _add(x: torch.Tensor, **terms: Any) -> object:
    return fusednorm.add_layer_norm(x, x, x.shape[-1], **terms)


REFUSED: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "gate": (lambda x: _add(x, gate=x[0]), "expected no gate, which the triton backend has"),
    "scale": (lambda x: _add(x, scale=x[0]), "expected no scale, which the triton backend has"),
    "shift": (lambda x: _add(x, shift=x[0]), "expected no shift, which the triton backend has"),
    "float64": (
        lambda x: fusednorm.layer_norm(x.double(), 8),
        "expected rows of float16, bfloat16 or float32, got torch.float64",
    ),
    "float64 weight": (
        lambda x: fusednorm.layer_norm(x, 8, x[0].double()),
        "expected weight and bias of one dtype, torch.float32 or float32, got torch.float64",
    ),
    "stream of another dtype": (
        lambda x: _add(x.half(), residual_dtype=torch.float32),
        "expected rows of one dtype, torch.float16, got torch.float32",
    ),
    "row too long": (
        lambda x: fusednorm.layer_norm(x.new_empty(1, 2**16 + 1), 2**16 + 1),
        "expected at most 65536 columns on this device, got 65537",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_do_not_have(
    kernels: torch.device, call: Callable[[torch.Tensor], object], message: str
) -> None:
    """It is refused by name before anything is launched."""
    with pytest.raises(ValueError, match=f"cuda backend: {message}"):
        call(torch.ones(3, 8, device=kernels))


@pytest.mark.skipif(ON_GPU, reason="has the kernels and a GPU")
def test_without_gpu_or_kernels() -> None:
    """The request says which of them is missing."""
    if (missing := backends.cuda_missing()) is not None:
        with pytest.raises(ValueError, match="no CUDA kernels"), backends.use("cuda"):
            pass
        assert "FUSEDNORM_BUILD=cuda" in missing
    else:
        with backends.use("cuda"), pytest.raises(ValueError, match="built for NVIDIA GPUs"):
            fusednorm.layer_norm(torch.ones(2, 8), 8)
