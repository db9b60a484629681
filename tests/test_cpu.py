"""The compiled CPU kernels at every instruction set: the suites of the Triton ones, and more."""

# ruff: noqa: F401  (imported tests run here, with this module's `kernels`)

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_accurate, errors, fused, make_case, oracle, run
from test_accuracy import (
    test_columns_that_stand_out,
    test_error_is_at_most_that_of_torch,
    test_error_without_weight_or_bias,
    test_large_mean_costs_no_digits,
    test_many_rows,
    test_variance_of_the_hardest_rows,
)
from test_autograd import (
    test_anomaly_detection,
    test_backward_of_the_kernels_under_a_transform,
    test_double_backward_of_some_gradients,
    test_dy_is_not_modified,
    test_gradcheck_in_every_mode,
    test_gradgradcheck_in_every_mode,
    test_hooks,
    test_inputs_are_not_modified,
    test_retain_graph,
    test_tensor_that_outlived_a_transform,
    test_undefined_gradients_of_backward,
)
from test_determinism import (
    test_row_alone_equals_row_among_thousands,
    test_row_alone_equals_row_in_batch,
    test_two_runs_are_equal,
)
from test_dropout import (
    test_checkpoint_replays_the_mask,
    test_follows_manual_seed,
    test_mask_is_the_published_one,
    test_rate_and_independence,
)
from test_jumps import (
    test_dimensions_of_one,
    test_first_and_second_derivatives,
    test_no_rows,
    test_one_column_and_long_rows,
    test_right_and_as_copied,
    test_right_with_every_term,
    test_rows_have_the_bits_that_they_have_alone,
)
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
    test_mixed_dtypes,
    test_non_finite_weight_bias_or_dy,
    test_non_finite_x,
    test_one_column,
    test_ranks,
    test_rows_beyond_int32,
    test_rows_whose_variance_eps_takes_away,
    test_small_eps_of_small_rows,
    test_strided_normalised_dimensions,
    test_strided_parameters_of_several_dimensions,
    test_y_is_laid_out_as_torchs,
)
from test_terms import (
    PAIRS,
    USES,
    make,
    test_dtype_of_the_stream,
    test_frozen_inputs,
    test_gradcheck,
    test_gradgradcheck,
    test_long_rows,
    test_opcheck,
    test_start_of_a_stream_is_not_copied,
    test_terms_of_every_row,
    test_unused_output,
    test_uses,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad as fwAD

import fusednorm
from fusednorm import backends

if "cpu" not in backends.available():
    pytest.skip("the compiled extension is not installed", allow_module_level=True)

from fusednorm import _C

ROOT = Path(__file__).parents[1]


def _runs(level: str) -> bool:
    before = _C.level()
    try:
        _C.level(level)
    except ValueError:
        return False
    finally:
        _C.level(before)
    return True


LEVELS = tuple(filter(_runs, ("avx512_bf16", "avx512", "avx2", "portable")))

# Of the imported suites, those that depend on how wide a vector is and how it is converted; the
# others run at the level that is the default here.
AT_EVERY_LEVEL = {
    test_columns_that_stand_out,
    test_error_without_weight_or_bias,
    test_large_mean_costs_no_digits,
    test_layouts_in_half_precision,
    test_long_rows,
    test_mask_is_the_published_one,
    test_non_finite_x,
    test_one_column,
    test_row_alone_equals_row_in_batch,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the levels of each test."""
    if "level" in metafunc.fixturenames:
        every = metafunc.function in AT_EVERY_LEVEL or metafunc.function.__module__ == __name__
        metafunc.parametrize("level", LEVELS if every else LEVELS[:1], indirect=True)


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Put the kernels for one instruction set in use."""
    before = _C.level()
    yield _C.level(request.param)
    _C.level(before)


@pytest.fixture
def kernels(level: str) -> Iterator[torch.device]:
    """Force the compiled kernels; the suites imported above get this fixture, not Triton's."""
    with backends.use("cpu"):
        yield torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    """Let the test change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Conversions: without any term, a stream of another dtype is x converted.


def _as_stream(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return fusednorm.add_layer_norm(x, None, x.shape[-1], residual_dtype=dtype)[1]


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.float64], ids=str)
def test_every_half_is_widened_exactly(
    kernels: torch.device, source: torch.dtype, target: torch.dtype
) -> None:
    """All 65536 patterns: subnormal numbers, infinities and NaN among them."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(source).reshape(64, 1024)
    torch.testing.assert_close(_as_stream(x, target), x.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("source", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_to_nearest_even(
    kernels: torch.device, source: torch.dtype, target: torch.dtype
) -> None:
    """Every half, the middle between it and the next one, and what lies just beside the middle."""
    halves = torch.arange(0, 2**15 - 1, dtype=torch.int16)
    low, high = (half.view(target).float() for half in (halves, halves + 1))
    middle = torch.where(high.isfinite(), (low + high) / 2, low)
    beside = [torch.nextafter(middle, torch.tensor(to)) for to in (-torch.inf, torch.inf)]
    values = torch.cat([low, middle, *beside])
    x = torch.cat([values, -values]).to(source).reshape(8, -1)
    torch.testing.assert_close(_as_stream(x, target), x.to(target), rtol=0, atol=0, equal_nan=True)


# Terms


@pytest.mark.parametrize("use", PAIRS)
def test_pairs_in_double_precision(kernels: torch.device, use: dict[str, Any]) -> None:
    """Any two terms go together; that each is accurate, the uses of them show."""
    case = make((3, 7), 37, torch.float64, kernels, {"weight": False, "bias": False} | use)
    truth = oracle(case)
    for name, error in errors(run(fused, case), truth).items():
        assert error <= 1e-13 * max(1.0, abs(truth[name]).max()), name


def test_long_sums_of_narrow_vectors(kernels: torch.device) -> None:
    """The fewer elements a vector has, the more of them a sum over a row adds up."""
    use = USES["everything, RMS and scalars"]
    for seed in range(3):
        torch.manual_seed(seed)
        assert_accurate(lambda: make((2, 2), 12288, torch.float32, kernels, use))


# The ends of rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cols", [1, 7, 31, 33, 100, 4097])
def test_nothing_beside_the_rows_is_read(
    kernels: torch.device, cols: int, dtype: torch.dtype
) -> None:
    """Rows with NaN between them give what the same rows give alone, bit for bit."""
    case = make_case(5, cols, dtype, kernels)
    wide = {name: torch.full((5, cols + 40), torch.nan, dtype=dtype) for name in ("x", "dy")}
    for name, values in (("x", case.x), ("dy", case.dy)):
        wide[name][:, 3 : 3 + cols] = values
    apart = replace(case, **{name: tensor[:, 3 : 3 + cols] for name, tensor in wide.items()})
    for name, tensor in run(fusednorm.layer_norm, case).items():
        assert torch.equal(tensor, run(fusednorm.layer_norm, apart)[name]), name


# Threads

SHARED = [(3, 64), (64, 768), (37, 1000), (200, 8193)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "cols"), SHARED)
def test_threads_share_rows_not_sums(kernels: torch.device, rows: int, cols: int) -> None:
    """Y and dx have the same bits for any number of threads, dweight for the same number."""
    case = make_case(rows, cols, torch.float32, kernels)
    results = {}
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results[count] = run(fusednorm.layer_norm, case)
        again = run(fusednorm.layer_norm, case)
        for name, tensor in results[count].items():
            assert torch.equal(tensor, again[name]), (name, count)
    for count, result in results.items():
        for name in ("y", "dx"):
            assert torch.equal(result[name], results[1][name]), (name, count)
        for name in ("dweight", "dbias"):
            torch.testing.assert_close(result[name], results[1][name], rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("samples", [1, 2, 5, 40])
def test_threads_share_samples(kernels: torch.device, samples: int) -> None:
    """Gradients of terms do not depend on how samples fall to threads, but for rounding."""
    rows, cols = 40, 3000
    x, dz = (torch.randn(samples, rows // samples, cols) for _ in range(2))
    terms = {
        name: torch.randn(samples, 1, size).requires_grad_()
        for name, size in (("gate", 1), ("scale", cols), ("shift", cols))
    }
    weight = torch.randn(cols, requires_grad=True)
    results = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        z, _ = fusednorm.add_layer_norm(x, x, cols, weight, **terms)
        results.append(torch.autograd.grad(z, (weight, *terms.values()), dz))
    for result in results[1:]:
        for ours, alone in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-3)


MEMORY_OF_BACKWARD = """
import resource, torch, fusednorm
rows, cols = 16384, 1024
x, dz = (torch.randn(rows, cols).to(torch.bfloat16) for _ in range(2))
scale, shift = (torch.randn(rows, cols).to(torch.bfloat16).requires_grad_() for _ in range(2))
z = fusednorm.modulated_layer_norm(x, cols, shift, scale)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
gradients = torch.autograd.grad(z, (scale, shift), dz)
print((peak() - before) / sum(gradient.nbytes for gradient in gradients))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resource counts in other units")
def test_terms_of_every_row_need_no_partial_rows() -> None:
    """Their gradients, in half precision, are written where they belong: they are all it takes."""
    command = [sys.executable, "-c", MEMORY_OF_BACKWARD]
    grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(grown) < 1.5


# Calls that need no other check


PLAIN = torch.ones(3, 8)


class _Subclass(torch.Tensor):
    pass


def _outlived() -> torch.Tensor:
    """Return a tensor that a transform has left behind."""
    kept = []
    torch.func.grad(lambda x: kept.append(x) or x.sum())(PLAIN)
    return kept[0]


def _is_plain(**changed: Any) -> bool:
    arguments = {"shape": (8,), "input": PLAIN, "residual": None, "weight": None, "bias": None}
    return _C.is_plain(*(arguments | changed).values())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"shape": (3, 8)},
        {"input": torch.ones(2, 0), "shape": (0,)},
        {"residual": PLAIN.t().contiguous().t()},
        {"weight": nn.Parameter(torch.ones(8)), "bias": torch.ones(8, dtype=torch.float64)},
        {"input": PLAIN.to("meta"), "weight": torch.ones(8, device="meta")},
    ],
    ids=str,
)
def test_plain_calls(changed: dict[str, Any]) -> None:
    """What the general checks accept, for plain tensors."""
    assert _is_plain(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [8]},
        {"shape": ()},
        {"shape": 8},
        {"shape": (True,), "input": PLAIN[:, :1]},
        {"shape": (2, 3, 8)},
        {"shape": (7,)},
        {"shape": (4, 8)},
        {"shape": torch.Size([8])},
        {"input": None},
        {"input": 1.0},
        {"input": PLAIN.int()},
        {"input": PLAIN.cfloat()},
        {"input": PLAIN.to("meta"), "weight": torch.ones(8)},
        {"input": PLAIN.to_sparse()},
        {"input": PLAIN.as_subclass(_Subclass)},
        {"input": _outlived()},
        {"residual": PLAIN.double()},
        {"residual": PLAIN[0]},
        {"residual": PLAIN.to("meta")},
        {"weight": torch.ones(7)},
        {"weight": torch.ones(1, 8)},
        {"weight": torch.ones(8, dtype=torch.int32)},
        {"weight": torch.ones(8, device="meta")},
        {"weight": [1.0] * 8},
        {"bias": torch.ones(())},
        {"bias": torch.ones(8).as_subclass(_Subclass)},
    ],
    ids=lambda changed: ", ".join(f"{name} {str(value)[:30]}" for name, value in changed.items()),
)
def test_calls_that_are_not_plain(changed: dict[str, Any]) -> None:
    """The general checks take them, and say what is wrong or choose another way."""
    assert not _is_plain(**changed)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_not_plain() -> None:
    """Those of strided layout are of no class of their own."""
    assert not _is_plain(input=torch.nested.nested_tensor([PLAIN, PLAIN]))


def test_nothing_is_plain_under_a_mode_or_a_transform() -> None:
    """Something looks at the operators then."""
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(_is_plain())
        return x.sum()

    torch.func.grad(look)(PLAIN)
    torch.func.vmap(look)(PLAIN)
    with fwAD.dual_level():
        look(PLAIN)
    with FakeTensorMode(allow_non_fake_inputs=True):
        seen.append(_is_plain())
    assert seen == [False] * 4
    assert _is_plain()


# The extension itself


def _symbols(*options: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    command = ["nm", *options, _C.__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(maxsplit=1)[-1].split(maxsplit=1)[-1].split("@")[0] for line in lines]


def test_only_the_stable_abi_of_torch_is_used() -> None:
    """No C++ symbol of torch: its C shims alone keep their meaning from version to version."""
    undefined = _symbols("-D", "--undefined-only")
    cpp = [name for name in _symbols("-DC", "--undefined-only") if "at::" in name or "c10" in name]
    assert cpp == []
    assert {name for name in undefined if "torch" in name}
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in undefined if "torch" in name)


def test_only_the_limited_api_of_python_is_used() -> None:
    """What Python 3.10 and all later ones export."""
    assert Path(_C.__file__).name.endswith(".abi3.so")
    used = {name for name in _symbols("-D", "--undefined-only") if "Py" in name}
    assert used == {
        "PyArg_ParseTuple",
        "PyBool_FromLong",
        "PyBytes_AsString",
        "PyBytes_AsStringAndSize",
        "PyBytes_FromStringAndSize",
        "PyCapsule_GetPointer",
        "PyCapsule_New",
        "PyDict_New",
        "PyDict_SetItemString",
        "PyErr_Clear",
        "PyErr_Fetch",
        "PyErr_Format",
        "PyErr_NormalizeException",
        "PyErr_Occurred",
        "PyErr_SetString",
        "PyEval_RestoreThread",
        "PyEval_SaveThread",
        "PyExc_RuntimeError",
        "PyExc_TypeError",
        "PyExc_ValueError",
        "PyFloat_AsDouble",
        "PyFloat_FromDouble",
        "PyGILState_Ensure",
        "PyGILState_Release",
        "PyImport_ImportModule",
        "PyList_New",
        "PyList_SetItem",
        "PyLong_AsLongLong",
        "PyLong_AsUnsignedLongLong",
        "PyLong_AsVoidPtr",
        "PyLong_FromLongLong",
        "PyLong_Type",
        "PyModule_AddFunctions",
        "PyModule_AddStringConstant",
        "PyModule_Create2",
        "PyObject_Call",
        "PyObject_CallFunctionObjArgs",
        "PyObject_CallMethodObjArgs",
        "PyObject_CallObject",
        "PyObject_GetAttr",
        "PyObject_GetAttrString",
        "PyObject_IsTrue",
        "PyObject_RichCompareBool",
        "PyObject_Str",
        "PySequence_GetItem",
        "PySequence_Size",
        "PyTuple_GetItem",
        "PyTuple_New",
        "PyTuple_Pack",
        "PyTuple_SetItem",
        "PyTuple_Size",
        "PyTuple_Type",
        "PyUnicode_AsUTF8AndSize",
        "PyUnicode_AsUTF8String",
        "PyUnicode_CompareWithASCIIString",
        "PyUnicode_FromString",
        "PyUnicode_InternFromString",
        "Py_BuildValue",
        "_Py_Dealloc",
        "_Py_NoneStruct",
    }


def test_threads_are_torchs() -> None:
    """A second OpenMP would spin against torch's own."""
    openmp = ("GOMP_", "omp_", "__kmpc_")
    assert [name for name in _symbols("-D", "--undefined-only") if name.startswith(openmp)] == []


def test_levels_keep_to_themselves() -> None:
    """Code that two levels share would be compiled for one of them: they export their table."""
    exported = _symbols("-DC", "--defined-only")
    assert [name for name in exported if "cpu" in name or "vector_size" in name] == []


def test_a_level_that_is_not_there() -> None:
    """It is refused, and the one in use stays."""
    before = _C.level()
    with pytest.raises(ValueError, match="this processor cannot run 'sse9'"):
        _C.level("sse9")
    assert _C.level() == before


@pytest.mark.parametrize("name", ["forward", "backward", "is_plain", "triton_forward"])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_another_number_of_arguments(name: str, count: int) -> None:
    """Nothing is read that was not given."""
    expected = {"forward": 17, "backward": 18, "is_plain": 5, "triton_forward": 17}[name]
    given = count - 2 if name == "triton_forward" else count
    with pytest.raises(TypeError, match=f"^fusednorm: expected {expected} arguments, got {given}$"):
        getattr(_C, name)(*(None,) * count)
