"""Every layout, shape, dtype and value that torch's layer norm takes, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    INTERPRETED,
    Case,
    Function,
    Result,
    errors,
    make_case,
    oracle,
    reference_layer_norm,
    rounding,
    run,
)
from spies import few_programs
from torch import Tensor

import fusednorm
from fusednorm.triton_kernels import launch
from fusednorm.triton_kernels.config import backward_config, forward_config

BATCH = (8, 15)
COLS = (16, 17)
AFFINE = ((True, True), (True, False), (False, True), (False, False))
AFFINE_IDS = ("weight+bias", "weight", "bias", "none")

Layout = Callable[[Tensor], Tensor]


def _nan(like: Tensor, *size: int) -> Tensor:
    return like.new_full(size, math.nan)


def _row_strided(values: Tensor) -> Tensor:
    wide = _nan(values, *values.shape[:-1], values.shape[-1] + 3)
    return wide[..., : values.shape[-1]].copy_(values)


def _column_strided(values: Tensor) -> Tensor:
    return _nan(values, *values.shape[:-1], 2 * values.shape[-1])[..., ::2].copy_(values)


def _transposed(first: int, second: int) -> Layout:
    return lambda values: values.transpose(first, second).contiguous().transpose(first, second)


def _offset_by_one(values: Tensor) -> Tensor:
    return _nan(values, values.numel() + 1)[1:].view(values.shape).copy_(values)


def _sliding_windows(values: Tensor) -> Tensor:
    *batch, cols = values.shape
    windows = values.flatten().unfold(0, cols, 1)[: math.prod(batch)]
    return windows.view(*batch, cols)


# Each takes contiguous values of shape [B, T, N]; those that repeat rows take the first ones.
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda values: values,
    "row_strided": _row_strided,
    "column_strided": _column_strided,
    "transposed_leading": _transposed(0, 1),
    "transposed_last": _transposed(-1, -2),
    "expanded_rows": lambda values: values[:1, :1].expand_as(values),
    "expanded_scalar": lambda values: values[:1, :1, :1].expand_as(values),
    "offset_by_one": _offset_by_one,
    "sliding_windows": _sliding_windows,
}

PARAMETER_LAYOUTS: dict[str, Layout] = {
    "strided": _column_strided,
    "offset_by_one": _offset_by_one,
    "expanded": lambda values: values[:1].expand_as(values),
    "column": lambda values: torch.stack([values, values * math.nan], 1)[:, 0],
}


def _bytes(tensor: Tensor) -> Tensor:
    """Return the whole storage behind a tensor, gaps between its elements included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@contextmanager
def _untouched(*tensors: Tensor | None) -> Iterator[None]:
    """Assert that the block changes neither the storage nor the version of what the caller owns."""
    held = [tensor for tensor in tensors if tensor is not None]
    before = [(tensor._version, _bytes(tensor).clone()) for tensor in held]
    yield
    for tensor, (version, storage) in zip(held, before, strict=True):
        assert tensor._version == version
        assert torch.equal(_bytes(tensor), storage)


def _over(shape: tuple[int, ...], function: Function, relayout: Layout | None = None) -> Function:
    """Return `function` over several dimensions, for cases that hold them flattened into one."""

    def call(
        x: Tensor, _: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        x = x.unflatten(-1, shape)
        y = function(
            x if relayout is None else relayout(x),
            shape,
            None if weight is None else weight.view(shape),
            None if bias is None else bias.view(shape),
            eps,
        )
        return y.flatten(-len(shape))

    return call


# One draw of a few elements tells no finer difference from torch's accuracy, which has tests of its
# own; an element read from or written to a wrong place is off by its whole size.
SLACK = 4


def _assert_right(
    case: Case, ours: Function = fusednorm.layer_norm, theirs: Function = F.layer_norm
) -> None:
    """Assert that y and every gradient are right to within a few roundings."""
    assert_close_to(oracle(case), run(ours, case), run(theirs, case))


def assert_close_to(truth: dict[str, np.ndarray], ours: Result, theirs: Result) -> None:
    truth = {name: truth[name] for name in ours}
    torch_errors = errors({name: theirs[name] for name in ours}, truth)
    for name, error in errors(ours, truth).items():
        budget = SLACK * (torch_errors[name] + rounding(ours[name].dtype, truth[name]))
        assert error <= budget, f"{name}: error {error:.3g} exceeds {budget:.3g}"


# Layouts


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_layouts_of_x_and_dy(
    kernels: torch.device, x_layout: str, dy_layout: str, cols: int
) -> None:
    """Every pair of layouts gives accurate results and leaves both tensors alone."""
    case = make_case(BATCH, cols, torch.float32, kernels)
    case = replace(case, x=LAYOUTS[x_layout](case.x), dy=LAYOUTS[dy_layout](case.dy))
    with _untouched(case.x, case.weight, case.bias, case.dy):
        _assert_right(case)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_half_precision(kernels: torch.device, layout: str, cols: int) -> None:
    """Two-byte elements, where one element off is the least aligned of all."""
    case = make_case(BATCH, cols, torch.bfloat16, kernels)
    case = replace(case, x=LAYOUTS[layout](case.x), dy=LAYOUTS[layout](case.dy))
    with _untouched(case.x, case.dy):
        _assert_right(case)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("layout", PARAMETER_LAYOUTS)
def test_layouts_of_weight_and_bias(kernels: torch.device, layout: str, cols: int) -> None:
    """Views of parameters are read as what they show, and left alone."""
    case = make_case(BATCH, cols, torch.float32, kernels)
    assert case.weight is not None
    assert case.bias is not None
    lay_out = PARAMETER_LAYOUTS[layout]
    case = replace(case, weight=lay_out(case.weight), bias=lay_out(case.bias))
    with _untouched(case.weight, case.bias):
        _assert_right(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_y_is_laid_out_as_torchs(kernels: torch.device, layout: str) -> None:
    """The output is contiguous, has torch's strides and shares no memory with x."""
    x = LAYOUTS[layout](torch.randn(*BATCH, 16, device=kernels))
    y = fusednorm.layer_norm(x, 16)
    assert y.stride() == F.layer_norm(x, (16,)).stride()
    assert y.is_contiguous()
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dy_that_a_residual_branch_shares(kernels: torch.device, dtype: torch.dtype) -> None:
    """A consumer that receives the very same dy finds it unchanged."""
    case = make_case(BATCH, 16, dtype, kernels)
    x, residual = case.x.requires_grad_(), torch.zeros_like(case.x).requires_grad_()
    y = fusednorm.layer_norm(x, 16)
    with _untouched(case.dy):
        (alone,) = torch.autograd.grad(y, x, case.dy, retain_graph=True)
        dx, dresidual = torch.autograd.grad(y + residual, (x, residual), case.dy)
    assert torch.equal(dx, alone)
    assert torch.equal(dresidual, case.dy)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_dy_expanded_from_one_number(
    kernels: torch.device, reduce: Callable[[Tensor], Tensor]
) -> None:
    """A loss that is a plain sum hands back one number seen M * N times."""
    x = torch.randn(*BATCH, 17, device=kernels)
    bias = torch.randn(17, device=kernels, requires_grad=True)
    y = fusednorm.layer_norm(x, 17, None, bias)
    (dbias,) = torch.autograd.grad(reduce(y), bias)
    rows = math.prod(BATCH)
    expected = rows if reduce is torch.sum else rows / y.numel()
    torch.testing.assert_close(dbias, torch.full_like(dbias, expected))


# Shapes

SHAPES = (
    ((), (12,)),
    ((), (3, 4)),
    ((), (2, 3, 2)),
    ((5,), (12,)),
    ((5,), (3, 4)),
    ((2, 5), (12,)),
    ((5,), (2, 3, 2)),
    ((2, 3), (3, 4)),
    ((2, 1, 5), (12,)),
    ((2, 3), (2, 3, 2)),
    ((2, 1, 3), (3, 4)),
    ((2, 1, 2, 3), (12,)),
)


@pytest.mark.parametrize("affine", AFFINE, ids=AFFINE_IDS)
@pytest.mark.parametrize(("batch", "shape"), SHAPES, ids=str)
def test_ranks(
    kernels: torch.device,
    batch: tuple[int, ...],
    shape: tuple[int, ...],
    affine: tuple[bool, bool],
) -> None:
    """Ranks 1 to 5 with one to three normalised dimensions, with and without parameters."""
    weight, bias = affine
    _assert_right(
        make_case(batch, 12, torch.float32, kernels, weight=weight, bias=bias),
        ours=_over(shape, fusednorm.layer_norm),
        theirs=_over(shape, F.layer_norm),
    )


@pytest.mark.parametrize(
    ("relayout", "shape"),
    [
        (_transposed(-1, -2), (3, 4)),
        (_transposed(0, 2), (3, 4)),
        (_transposed(1, 3), (3, 4)),
        (_column_strided, (3, 4)),
        (_transposed(-1, -3), (2, 3, 2)),
        (_transposed(-2, -3), (2, 3, 2)),
    ],
)
def test_strided_normalised_dimensions(
    kernels: torch.device, relayout: Layout, shape: tuple[int, ...]
) -> None:
    """Normalised dimensions need not be adjacent in memory, nor the others behind them."""
    _assert_right(
        make_case((4, 5), 12, torch.float32, kernels),
        ours=_over(shape, fusednorm.layer_norm, relayout),
        theirs=_over(shape, F.layer_norm, relayout),
    )


def test_strided_parameters_of_several_dimensions(kernels: torch.device) -> None:
    """A transposed weight gets its gradient element by element."""
    x = torch.randn(5, 3, 4, device=kernels)
    weight, bias = (torch.randn(4, 3, device=kernels).t().requires_grad_() for _ in range(2))
    dy = torch.randn_like(x)
    ours = torch.autograd.grad(fusednorm.layer_norm(x, (3, 4), weight, bias), (weight, bias), dy)
    torchs = torch.autograd.grad(F.layer_norm(x, (3, 4), weight, bias), (weight, bias), dy)
    for our, their in zip(ours, torchs, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((0, 5), (5,)),
        ((3, 0, 5), (5,)),
        ((0, 3, 5), (3, 5)),
        ((3, 0), (0,)),
        ((0,), (0,)),
        ((0, 0), (0,)),
        ((3, 2, 0), (2, 0)),
        ((0, 2, 0), (2, 0)),
    ],
    ids=str,
)
def test_empty_inputs(
    kernels: torch.device, size: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """No rows or no columns give what torch gives, and the next call works."""

    def gradients(function: Function) -> list[Tensor]:
        leaves = [
            torch.ones(*s, dtype=dtype, device=kernels, requires_grad=True)
            for s in (size, shape, shape)
        ]
        y = function(leaves[0], shape, leaves[1], leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    for our, their in zip(gradients(fusednorm.layer_norm), gradients(F.layer_norm), strict=True):
        assert our.dtype == their.dtype == dtype
        assert our.shape == their.shape
        assert torch.equal(our, their)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=kernels)
    torch.testing.assert_close(fusednorm.layer_norm(x, 4), F.layer_norm(x, (4,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "row_strided", "expanded_scalar"])
def test_one_column(kernels: torch.device, layout: str, dtype: torch.dtype) -> None:
    """A row of one element is its own mean: y is the bias, and x has no influence."""
    case = make_case((3, 5), 1, dtype, kernels)
    result = run(fusednorm.layer_norm, replace(case, x=LAYOUTS[layout](case.x)))
    assert case.bias is not None
    assert torch.equal(result["y"], case.bias.expand(3, 5, 1))
    assert not result["dx"].any()
    assert not result["dweight"].any()
    torch.testing.assert_close(result["dbias"], case.dy.double().sum((0, 1)).to(dtype))


@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("cols", [5, 100])
@pytest.mark.parametrize("around", ["row block", "processors", "all programs"])
def test_row_counts(kernels: torch.device, around: str, cols: int, delta: int) -> None:
    """Rows that fill no block and no wave of programs are neither dropped nor counted twice."""
    arch = launch.architecture(kernels)
    config = backward_config(cols, 4, arch, 8)
    assert config.tile.rows > 1
    blocks = {
        "row block": 1,
        "processors": arch.processors,
        "all programs": arch.processors * config.programs_per_processor,
    }[around]
    _assert_right(make_case(blocks * config.tile.rows + delta, cols, torch.float32, kernels))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_fewer_long_rows_than_programs(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """One row per program, from one program to more rows than programs."""
    few_programs(monkeypatch)
    assert backward_config(2050, 4, launch.architecture(kernels), 8).tile.rows == 1
    _assert_right(make_case(rows, 2050, torch.float32, kernels))


@pytest.mark.skipif(INTERPRETED, reason="hundreds of programs take minutes in the interpreter")
@pytest.mark.parametrize("affine", AFFINE, ids=AFFINE_IDS)
@pytest.mark.parametrize("rows", [65535, 65536, 65537, 2**17 + 1])
def test_more_rows_than_a_grid_axis(
    kernels: torch.device, rows: int, affine: tuple[bool, bool]
) -> None:
    """The second and third axis of a grid end at 65535; M does not."""
    weight, bias = affine
    _assert_right(
        make_case(rows, 128, torch.float32, kernels, weight=weight, bias=bias),
        ours=_over((8, 16), fusednorm.layer_norm),
        theirs=_over((8, 16), reference_layer_norm),
    )


# Memory

PAD = 16384
SENTINEL = 1234.0


class _GuardedMemory:
    """Hands out tensors that lie inside larger buffers, and checks what surrounds them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: list[Tensor] = []
        monkeypatch.setattr(torch, "empty", self._empty)

        def like(tensor: Tensor, *size: Any, device: torch.device | None = None) -> Tensor:
            return self._empty(*size, dtype=tensor.dtype, device=device or tensor.device)

        monkeypatch.setattr(torch, "empty_like", lambda tensor: like(tensor, tensor.shape))
        monkeypatch.setattr(Tensor, "new_empty", like)

    def _empty(self, *size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = size[0] if isinstance(size[0], Sequence) else size
        numel = math.prod(shape)
        buffer = torch.full((numel + 2 * PAD,), SENTINEL, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[PAD : PAD + numel].fill_(math.nan).view(shape)

    def assert_holds(self, *tensors: Tensor) -> None:
        """Assert that the tensors lie in guarded memory: else nothing was guarded."""
        storages = {buffer.untyped_storage().data_ptr() for buffer in self.buffers}
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors} <= storages

    def assert_intact(self) -> None:
        """Assert that nothing was written around any of the tensors."""
        for buffer in self.buffers:
            assert (buffer[:PAD] == SENTINEL).all()
            assert (buffer[-PAD:] == SENTINEL).all()


def _between_nans(values: Tensor) -> Tensor:
    buffer = _nan(values, values.numel() + 2 * PAD)
    return buffer[PAD : PAD + values.numel()].view(values.shape).copy_(values)


# rows, columns, dtype, several rows per program, looped forward, form of the backward
FORMS = (
    pytest.param(6, 100, torch.float32, True, False, "resident", id="rows-fp32"),
    pytest.param(19, 100, torch.bfloat16, True, False, "resident", id="rows-bf16"),
    pytest.param(130, 5, torch.float32, True, False, "resident", id="short-fp32"),
    pytest.param(3, 2050, torch.float32, False, False, "resident", id="row-fp32"),
    pytest.param(3, 4100, torch.bfloat16, False, False, "resident", id="row-bf16"),
    pytest.param(3, 8200, torch.bfloat16, False, False, "reload", id="reload-bf16"),
    pytest.param(5, 8200, torch.float32, False, False, "split", id="split-fp32"),
    pytest.param(5, 12300, torch.bfloat16, False, False, "split", id="split-bf16"),
    pytest.param(3, 32770, torch.float32, False, True, None, id="looped-fp32"),
    pytest.param(3, 32770, torch.bfloat16, False, True, None, id="looped-bf16"),
)


@pytest.mark.parametrize(("rows", "cols", "dtype", "several", "looped", "form"), FORMS)
def test_nothing_outside_the_tensors_is_read_or_written(
    kernels: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    several: bool,
    looped: bool,
    form: str | None,
) -> None:
    """Inputs between NaNs and outputs between sentinels, for every form of the kernels."""
    arch, itemsize = launch.architecture(kernels), dtype.itemsize
    config = forward_config(cols, itemsize, arch)
    assert (config.tile.rows > 1, config.looped) == (several, looped)
    assert form in (None, backward_config(cols, itemsize, arch, 2 * itemsize).form)
    if cols > 1000:
        few_programs(monkeypatch)

    drawn = make_case(rows, cols, dtype, kernels)
    assert drawn.weight is not None
    assert drawn.bias is not None
    x, weight, bias, dy = map(_between_nans, (drawn.x, drawn.weight, drawn.bias, drawn.dy))
    case = Case(x, weight, bias, dy)
    truth = oracle(case)
    torchs = run(F.layer_norm, case)

    # What the backward of `looped` rows does is what `split` shows.
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    with monkeypatch.context() as patch:
        memory = _GuardedMemory(patch)
        y = fusednorm.layer_norm(leaves[0], cols, leaves[1], leaves[2])
        results = {"y": y.detach()}
        forward_buffers = len(memory.buffers)
        if form is not None:
            grads = torch.autograd.grad(y, leaves, case.dy)
            results |= dict(zip(("dx", "dweight", "dbias"), grads, strict=True))
    assert forward_buffers >= 3  # y, mean and rstd
    assert form is None or len(memory.buffers) >= forward_buffers + 5  # and the partials
    memory.assert_holds(*results.values())
    memory.assert_intact()

    assert_close_to(truth, results, torchs)


def _far_apart(values: Tensor, stride: int) -> Tensor:
    """Return a copy of [M, N] `values` with rows `stride` elements apart, in untouched memory.

    As much memory lies before the rows, where an offset that has wrapped around finds zeros.
    """
    rows, cols = values.shape
    before = 2**31
    size = (before + (rows - 1) * stride + cols) * values.itemsize
    try:
        storage = torch.UntypedStorage(size, device=values.device)
    except RuntimeError as error:
        pytest.skip(f"no {size / 1e9:.1f} GB of address space: {error}")
    empty = torch.empty(0, dtype=values.dtype, device=values.device)
    return empty.set_(storage, before, values.shape, (stride, 1)).copy_(values)


@pytest.mark.parametrize(
    ("rows", "stride"),
    [
        pytest.param(2, 2**31 + 8, id="the stride exceeds int32"),
        pytest.param(3, 2**30 + 8, id="the product exceeds int32"),
    ],
)
@pytest.mark.parametrize("strided", ["x", "dy"])
def test_rows_beyond_int32(kernels: torch.device, strided: str, rows: int, stride: int) -> None:
    """Offsets of rows are 64 bits wide; only the rows themselves are ever in memory."""
    case = make_case(rows, 100, torch.bfloat16, kernels)
    setattr(case, strided, _far_apart(getattr(case, strided), stride))
    _assert_right(case)


# Dtypes


@pytest.mark.parametrize("bias", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("x", DTYPES, ids=str)
def test_mixed_dtypes(
    kernels: torch.device, x: torch.dtype, weight: torch.dtype, bias: torch.dtype
) -> None:
    """Every mix is taken: y has the dtype of x, and each gradient that of its tensor."""

    case = make_case(BATCH, 17, x, kernels)
    assert case.weight is not None
    assert case.bias is not None
    case = replace(case, weight=case.weight.to(weight), bias=case.bias.to(bias))
    results = run(fusednorm.layer_norm, case)
    dtypes = {name: tensor.dtype for name, tensor in results.items()}
    assert dtypes == {"y": x, "dx": x, "dweight": weight, "dbias": bias}
    assert_close_to(oracle(case), results, run(reference_layer_norm, case))


# Values


def _non_finite(function: Function, case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (t.isnan(), t.isinf()) for name, t in run(function, case).items()}


def _assert_non_finite_as_torch(case: Case) -> None:
    ours, torchs = _non_finite(fusednorm.layer_norm, case), _non_finite(F.layer_norm, case)
    for name, (nan, inf) in torchs.items():
        assert torch.equal(ours[name][0], nan), f"NaN in {name}"
        assert torch.equal(ours[name][1], inf), f"inf in {name}"


# NumPy, beneath the interpreter, warns of what the GPU does silently.
quiet = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@quiet
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [5, 100])
@pytest.mark.parametrize(
    "values", [(math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf), (math.nan, math.inf)]
)
def test_non_finite_x(
    kernels: torch.device, values: tuple[float, ...], cols: int, dtype: torch.dtype
) -> None:
    """A row with NaN or inf becomes what torch makes of it, and its neighbours stay finite."""
    case = make_case(7, cols, dtype, kernels)
    case.x[2, : len(values)] = torch.tensor(values, dtype=dtype, device=kernels)
    _assert_non_finite_as_torch(case)
    y = fusednorm.layer_norm(case.x, cols)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [2]


@quiet
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", ["weight", "bias", "dy"])
def test_non_finite_weight_bias_or_dy(kernels: torch.device, tensor: str, value: float) -> None:
    """NaN and inf of the other tensors reach what torch lets them reach."""
    case = make_case(7, 12, torch.float32, kernels)
    getattr(case, tensor).view(-1)[3] = value
    ours, torchs = run(fusednorm.layer_norm, case), run(F.layer_norm, case)
    for name, expected in torchs.items():
        # Whether a sum of infinities ends as inf or as NaN depends on how the formula is arranged.
        assert torch.equal(ours[name].isfinite(), expected.isfinite()), name


@quiet
def test_float16_overflow_of_y_asreference_layer_norm(kernels: torch.device) -> None:
    """A y beyond the range of float16 is an inf of the right sign."""
    case = make_case(7, 12, torch.float16, kernels)
    assert case.weight is not None
    case = replace(case, weight=torch.full_like(case.weight, 6e4))
    y = run(fusednorm.layer_norm, case)["y"]
    expected = run(F.layer_norm, case)["y"]
    assert expected.isinf().any()
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y.sign(), expected.sign())


@pytest.mark.parametrize("cols", [12, 1100])
def test_float16_up_to_its_range(kernels: torch.device, cols: int) -> None:
    """Squares and sums of large float16 values do not overflow."""

    case = make_case(7, cols, torch.float16, kernels)
    _assert_right(replace(case, x=(6e4 * case.x.sign() - 5e3 * case.x.abs()).clamp(-6e4, 6e4)))


@pytest.mark.parametrize("value", [0.0, 2.0, -0.1, 1e4, 5e-7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cols", [5, 376])  # 376 * (1 / 376) is not 1 in float32
def test_constant_rows(kernels: torch.device, cols: int, dtype: torch.dtype, value: float) -> None:
    """A row without variance gives the bias, and no rounding of the mean grows into an output."""
    case = make_case(7, cols, dtype, kernels)
    case = replace(case, x=torch.full_like(case.x, value))
    assert case.bias is not None
    assert torch.equal(
        fusednorm.layer_norm(case.x, cols, case.weight, case.bias), case.bias.expand(7, cols)
    )
    _assert_right(case)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-7, -1.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gamma_zero_tiny_negative(kernels: torch.device, dtype: torch.dtype, factor: float) -> None:
    """The gradients use the weight as it is, however small; a zero weight makes dx zero."""

    case = make_case(BATCH, 12, dtype, kernels)
    assert case.weight is not None
    case = replace(case, weight=case.weight * factor)
    _assert_right(case)
    if factor == 0:
        result = run(fusednorm.layer_norm, case)
        assert not result["dx"].any()
        assert result["dweight"].all()


@quiet
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-1, 1, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_eps(kernels: torch.device, dtype: torch.dtype, eps: float) -> None:
    """Every eps counts as given, zero as zero."""
    _assert_right(replace(make_case(BATCH, 12, dtype, kernels), eps=eps))


def test_small_eps_of_small_rows(kernels: torch.device) -> None:
    """Where the variance is as small as eps, eps decides the result in all its digits."""

    case = make_case(BATCH, 12, torch.float64, kernels)
    _assert_right(replace(case, x=case.x * 1e-6, eps=1e-12))


@quiet
@pytest.mark.parametrize("eps", [0.0, -0.5, -4.0])
def test_rows_whose_variance_eps_takes_away(kernels: torch.device, eps: float) -> None:
    """A sum of variance and eps that is zero or negative gives NaN where torch gives it."""
    case = replace(make_case(7, 16, torch.float32, kernels), eps=eps)
    case.x[2] = 2.0
    case.x[4] *= 0.5
    case.x[5] *= 3.0
    _assert_non_finite_as_torch(case)
    y, expected = run(fusednorm.layer_norm, case)["y"], run(F.layer_norm, case)["y"]
    assert not y.isfinite().all()
    assert y.isfinite().any()
    torch.testing.assert_close(y, expected, equal_nan=True)


def _hard_rows(name: str) -> Tensor:
    rows = {
        "40000": lambda: torch.arange(40000.0, 40004.0)[None],
        "80000": lambda: torch.arange(80000.0, 80004.0)[None],
        "2000 + randn": lambda: 2000 + torch.randn(64, 4),
        "1449.5": lambda: 1449.5 + 0.125 * torch.randint(-4, 5, (8, 16)),
        "100 + randn / 100": lambda: 100 + 0.01 * torch.randn(1, 8200),
        "looped 100 + randn / 100": lambda: 100 + 0.01 * torch.randn(1, 32770),
    }
    return rows[name]()


@pytest.mark.parametrize(
    "name",
    ["40000", "80000", "2000 + randn", "1449.5", "100 + randn / 100", "looped 100 + randn / 100"],
)
def test_large_mean_and_small_variance(kernels: torch.device, name: str) -> None:
    """Rows on which a variance from E[x^2] - E[x]^2 is NaN or nonsense."""
    x = _hard_rows(name).to(kernels)
    y = fusednorm.layer_norm(x, x.shape[-1:])
    case = Case(x, None, None, torch.zeros_like(x))
    truth = oracle(case)["y"]
    ours = errors({"y": y}, {"y": truth})["y"]
    torchs = errors({"y": F.layer_norm(x, x.shape[-1:])}, {"y": truth})["y"]
    assert ours <= torchs + rounding(x.dtype, truth)
    assert np.abs(truth).max() > 1
