"""Our operators on the CPU: the extension serves them, and Python what the extension does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import backends, gated, ops
from fusednorm.spec import GatedOperands, GatedSaved, GatedSpec, Operands, Saved, Spec

_C = backends.own_operators()
if _C is None:
    pytest.skip("the compiled extension was not built", allow_module_level=True)

FWD, BWD = "layer_norm_fwd", "layer_norm_bwd"
GATED_FWD, GATED_BWD = "gated_norm_fwd", "gated_norm_bwd"
SHAPE, COLS = (2, 3, 40), 40

Function = Callable[..., Any]


def served(name: str) -> int:
    """Return how many calls of an operator the extension has served."""
    count: int = _C.own_operator_calls()[name]
    return count


def strided(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor whose columns are not adjacent."""
    return torch.randn(*size[:-1], size[-1], 2, dtype=dtype)[..., 0]


PLAIN = {"x": torch.randn(SHAPE), "weight": torch.randn(COLS), "bias": torch.randn(COLS)}
STREAM = PLAIN | {"residual": torch.randn(SHAPE)}
NO_OPTIONS = {
    "eps": 1e-5,
    "rms": False,
    "dropout_p": 0.0,
    "out_dtype": torch.float32,
    "h_dtype": None,
    "x_hat_dtype": None,
}
HALF = {name: tensor.bfloat16() for name, tensor in STREAM.items()}

# Tensors, and options that differ from the usual ones.
USES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "layer norm": (PLAIN, {}),
    "RMS norm": ({"x": PLAIN["x"], "weight": PLAIN["weight"]}, {"rms": True, "eps": 1e-3}),
    "no parameters": ({"x": PLAIN["x"]}, {}),
    "float64": ({"x": PLAIN["x"].double()}, {"out_dtype": torch.float64}),
    "strided": ({"x": strided(*SHAPE), "weight": strided(COLS), "bias": strided(COLS)}, {}),
    "rows of wider rows": (PLAIN | {"x": torch.randn(2, 3, 64)[..., :COLS]}, {}),
    "transposed": (PLAIN | {"x": torch.randn(3, 2, COLS).transpose(0, 1)}, {}),
    "expanded": (PLAIN | {"x": torch.randn(3, COLS).expand(SHAPE)}, {}),
    "two dimensions": ({"x": PLAIN["x"], "weight": torch.randn(3, COLS)}, {"shape": (3, COLS)}),
    "one row": (PLAIN | {"x": torch.randn(COLS)}, {}),
    "no rows": (PLAIN | {"x": torch.randn(0, COLS)}, {}),
    "residual": (STREAM, {"h_dtype": torch.float32}),
    "float32 stream": (
        HALF | {"residual": STREAM["residual"]},
        {"out_dtype": torch.bfloat16, "h_dtype": torch.float32},
    ),
    "float32 parameters": (PLAIN | {"x": HALF["x"]}, {"out_dtype": torch.bfloat16}),
    "float32 result": (HALF | {}, {"h_dtype": torch.bfloat16}),
    "rounded x_hat": (
        {"x": HALF["x"], "weight": HALF["weight"]},
        {"rms": True, "out_dtype": torch.bfloat16, "x_hat_dtype": torch.bfloat16},
    ),
    "dropout": (
        STREAM | {"seed": torch.tensor([2**61 + 7])},
        {"dropout_p": 0.25, "h_dtype": torch.float32},
    ),
    "one vector a term": (
        STREAM | {name: torch.randn(1, COLS) for name in ("gate", "scale", "shift")},
        {"h_dtype": torch.float32},
    ),
    "terms a sample": (
        STREAM | {name: torch.randn(2, COLS) for name in ("gate", "scale", "shift")},
        {"h_dtype": torch.float32},
    ),
    "chunks of a wider term": (
        PLAIN | dict(zip(("scale", "shift"), torch.randn(2, 2 * COLS).chunk(2, 1), strict=True)),
        {},
    ),
    "strided terms": (
        PLAIN | {name: strided(2, COLS) for name in ("scale", "shift")},
        {},
    ),
    "numbers a sample": (
        STREAM | {name: torch.randn(2, 1) for name in ("gate", "scale", "shift")},
        {"h_dtype": torch.float32},
    ),
}


def call_of(use: str) -> tuple[Operands, Spec]:
    """Return the arguments of a forward."""
    tensors, options = USES[use]
    chosen = NO_OPTIONS | options
    shape = chosen.pop("shape", (COLS,))
    return Operands(**tensors), Spec(shape, **chosen)


def gradient_call(
    operands: Operands, spec: Spec, results: tuple[Tensor, ...], mask: tuple[bool, ...]
) -> tuple[Any, ...]:
    """Return the arguments of the backward that belongs to a forward."""
    z, h, mean, rstd = results
    x, residual, *parameters = operands
    has_h = spec.h_dtype is not None
    saved = Saved(x, h if has_h else x, None if spec.rms else mean, rstd, *parameters)
    dz, dh = torch.randn_like(z), torch.randn_like(h) if has_h else None
    dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    return dz, dh, *saved, *spec[:4], *dtypes, spec.x_hat_dtype, list(mask)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Assert that results have the same bits, shapes, dtypes and strides."""
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True, check_stride=True)


def masks(*operands: Tensor | None) -> list[tuple[bool, ...]]:
    """Return what may be wanted of a backward: everything, and each gradient alone."""
    there = tuple(tensor is not None for tensor in operands)
    alone = [tuple(i == k for i in range(len(there))) for k in range(len(there)) if there[k]]
    return [there, *alone]


@pytest.mark.parametrize("use", USES)
def test_python_and_the_extension_return_the_same(use: str, poison: None) -> None:
    """Bits, shapes, dtypes and strides, forward and backward, whatever is wanted."""
    operands, spec = call_of(use)
    before = served(FWD), served(BWD)
    results = ops.layer_norm_fwd(*operands, *spec)
    assert_same(results, ops._layer_norm_fwd(*operands, *spec))
    wanted = masks(*operands[:-1])
    for mask in wanted:
        arguments = gradient_call(operands, spec, results, mask)
        assert_same(ops.layer_norm_bwd(*arguments), ops._layer_norm_bwd(*arguments))
    assert (served(FWD), served(BWD)) == (before[0] + 1, before[1] + len(wanted))


GATED = GatedOperands(PLAIN["x"], torch.randn(SHAPE), PLAIN["weight"], None)
GATED_SPEC = GatedSpec((COLS,), COLS, 1e-5, True, True, torch.float32, None)
GATED_USES: dict[str, tuple[dict[str, Tensor | None], dict[str, Any]]] = {
    "RMS norm": ({}, {}),
    "gate first": ({}, {"norm_before_gate": False}),
    "layer norm": ({"bias": PLAIN["bias"]}, {"rms": False}),
    "groups": ({"bias": PLAIN["bias"]}, {"rms": False, "group_size": 8}),
    "no parameters": ({"weight": None}, {}),
    "float64": ({"x": PLAIN["x"].double()}, {"out_dtype": torch.float64}),
    "rounded x_hat": (
        {"x": HALF["x"], "gate_input": HALF["residual"]},
        {"out_dtype": torch.bfloat16, "x_hat_dtype": torch.bfloat16},
    ),
    "strided": ({"x": strided(*SHAPE), "gate_input": strided(*SHAPE)}, {}),
    "two dimensions": ({"weight": torch.randn(3, COLS)}, {"normalized_shape": (3, COLS)}),
    "no rows": ({"x": torch.randn(0, COLS), "gate_input": torch.randn(0, COLS)}, {}),
}


@pytest.mark.parametrize("use", GATED_USES)
def test_gated_norms_are_the_same_as_well(use: str, poison: None) -> None:
    """Bits, shapes, dtypes and strides, forward and backward, whatever is wanted."""
    tensors, options = GATED_USES[use]
    operands, spec = GATED._replace(**tensors), GATED_SPEC._replace(**options)
    before = served(GATED_FWD), served(GATED_BWD)
    results = z, mean, rstd = gated.gated_norm_fwd(*operands, *spec)
    assert_same(results, gated._fwd(*operands, *spec))
    x, gate_input, *parameters = operands
    saved = GatedSaved(x, gate_input, None if spec.rms else mean, rstd, *parameters)
    wanted = masks(*operands)
    for mask in wanted:
        arguments = torch.randn_like(z), *saved, *spec[:5], spec.x_hat_dtype, list(mask)
        assert_same(gated.gated_norm_bwd(*arguments), gated._bwd(*arguments))
    assert (served(GATED_FWD), served(GATED_BWD)) == (before[0] + 1, before[1] + len(wanted))


def test_a_gated_norm_that_the_kernels_do_not_serve_is_handed_on() -> None:
    """Python gets the call with all of its arguments, and its error comes back."""
    before = served(GATED_FWD)
    given = GATED._replace(weight=torch.ones(COLS, dtype=torch.int32))
    with pytest.raises(TypeError) as expected:
        gated._fwd(*given, *GATED_SPEC)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        gated.gated_norm_fwd(*given, *GATED_SPEC)
    assert served(GATED_FWD) == before


def test_rows_without_columns() -> None:
    """Results of their shapes, and gradients of zero."""
    x, bias = torch.ones(3, 0), torch.ones(0)
    spec = Spec((0,), **NO_OPTIONS)
    operands = Operands(x, weight=bias, bias=bias)
    results = ops.layer_norm_fwd(*operands, *spec)
    assert [tuple(result.shape) for result in results] == [(3, 0), (0,), (3,), (3,)]
    wide = Operands(torch.ones(0, 4), weight=torch.ones(4), bias=torch.ones(4))
    spec = spec._replace(normalized_shape=(4,))
    results = ops.layer_norm_fwd(*wide, *spec)
    grads = ops.layer_norm_bwd(*gradient_call(wide, spec, results, (True,) * 7))
    assert torch.equal(grads[3], torch.zeros(4))
    assert torch.equal(grads[4], torch.zeros(4))


@pytest.mark.parametrize("missing", ["dz", "dh"])
def test_a_backward_of_one_output(missing: str, poison: None) -> None:
    """Gradients of z or of h alone."""
    operands, spec = call_of("residual")
    results = ops.layer_norm_fwd(*operands, *spec)
    arguments = list(gradient_call(operands, spec, results, (True,) * 7))
    arguments[("dz", "dh").index(missing)] = None
    assert_same(ops.layer_norm_bwd(*arguments), ops._layer_norm_bwd(*arguments))


def test_another_backend_is_asked() -> None:
    """What `backends.use` asks for runs, and the extension after it."""
    operands, spec = call_of("layer norm")
    before = served(FWD)
    for backend, by_extension in (("triton", 0), ("cpu", 1), ("torch", 1)):
        if backend in backends.available() and backends.serves(backend, torch.device("cpu")):
            with backends.use(backend):
                ops.layer_norm_fwd(*operands, *spec)
            assert served(FWD) == before + by_extension, backend
            before = served(FWD)
    ops.layer_norm_fwd(*operands, *spec)
    assert served(FWD) == before + 1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", torch.ones(2, 3, 40, dtype=torch.int64)),
        ("weight", torch.ones(40, dtype=torch.int32)),
        ("scale", torch.ones(40)),
    ],
)
def test_what_the_kernels_do_not_serve_is_handed_on(name: str, wrong: Tensor) -> None:
    """Python gets the call with all of its arguments, and its error comes back."""
    operands, spec = call_of("layer norm")
    before = served(FWD)
    given = operands._replace(**{name: wrong})
    with pytest.raises((TypeError, IndexError, RuntimeError)) as expected:
        ops._layer_norm_fwd(*given, *spec)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        ops.layer_norm_fwd(*given, *spec)
    assert served(FWD) == before


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the sum of both results of an Add & Norm."""
    z, h = fusednorm.add_layer_norm(x, residual, COLS, weight, bias)
    return z + h


def gradients(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the result of a function, and the gradients of its arguments."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)


COMPILED = ["aot_eager", "inductor"]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("around", ["nothing", "checkpoint"])
def test_a_compiled_graph_has_no_python(
    monkeypatch: pytest.MonkeyPatch, backend: str, around: str
) -> None:
    """Neither autograd's nor the implementation's runs once it is compiled, and bits are those."""
    tensors = [STREAM[name] for name in ("x", "residual", "weight", "bias")]

    def function(*tensors: Tensor) -> Tensor:
        if around == "nothing":
            return add_norm(*tensors)
        result: Tensor = checkpoint(add_norm, *tensors, use_reentrant=False)
        return result

    torch._dynamo.reset()
    with backends.use("cpu"):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        expected = gradients(add_norm, *tensors)
        gradients(compiled, *tensors)
        monkeypatch.setattr(backends, "launchers", None)
        monkeypatch.setattr(torch._C, "_AutoDispatchBelowAutograd", None)
        before = served(FWD), served(BWD)
        again = gradients(compiled, *tensors)
    assert served(BWD) - before[1] == 1
    assert served(FWD) - before[0] >= 1
    for mine, other in zip(again, expected, strict=True):
        tolerance = {"rtol": 0, "atol": 0} if backend == "aot_eager" else {}
        torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch copies one of its own
def test_a_recorded_graph_can_be_differentiated() -> None:
    """What is not the compiler's, as an exported program, has the operators with autograd."""
    tensors = [STREAM[name] for name in ("x", "residual", "weight", "bias")]

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return add_norm(*tensors)

    with backends.use("cpu"):
        program = torch.export.export(Module(), tuple(tensors)).run_decompositions()
        assert_same(gradients(program.module(), *tensors), gradients(add_norm, *tensors))
