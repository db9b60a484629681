"""The kernels below torch's own operators: contracts, errors, and whatever looks at operators."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, Case, add_terms, assert_accurate, make_case
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import backends, torch_operators

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    except ImportError:  # torch's cases need expecttest
        op_db, module_db = [], []

pytestmark = pytest.mark.skipif(
    backends.extension_missing() is not None, reason="no extension was built"
)

LAYER_NORM, LAYER_NORM_BWD, RMS_NORM, RMS_NORM_BWD = torch_operators.OPERATORS


@pytest.fixture
def enabled() -> Iterator[None]:
    """Torch's operators run in the CPU kernels."""
    with fusednorm.enable("cpu"):
        yield


@contextlib.contextmanager
def served(**expected: int) -> Iterator[None]:
    """Assert how many calls of which operators the kernels serve inside; of others none."""
    before = torch_operators.calls()
    yield
    now = torch_operators.calls()
    got = {name: now[name] - before[name] for name in now if now[name] != before[name]}
    assert got == expected


def theirs(function: Callable[[], Any]) -> Any:
    """Return what a function returns without the kernels."""
    fusednorm.disable()
    try:
        return function()
    finally:
        fusednorm.enable("cpu")


def layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def rms_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return a result and its gradients for a random cotangent that is always the same one."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_close(ours: Any, torchs: Any) -> None:
    """Assert that results equal torch's in everything but the last digits."""
    torch.testing.assert_close(ours, torchs, check_stride=True)


# Accuracy and determinism


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 7, 64, 1000])
def test_layer_norm_is_at_least_as_accurate_as_torchs(
    dtype: torch.dtype, cols: int, enabled: None
) -> None:
    def torchs(*arguments: Any) -> Any:
        return _Torchs.apply(*arguments)

    with served(**{LAYER_NORM: 2, LAYER_NORM_BWD: 2}):
        assert_accurate(
            lambda: make_case(33, cols, dtype, torch.device("cpu")), layer_norm, torchs, draws=2
        )


class _Torchs(torch.autograd.Function):
    """Torch's own layer norm and its backward, whether enabled or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
        y, mean, rstd = theirs(lambda: torch.native_layer_norm(x, shape, weight, bias, eps))
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        arguments = (dy, x, ctx.shape, mean, rstd, weight, bias, [True] * 3)
        backward = torch.ops.aten.native_layer_norm_backward
        dx, dweight, dbias = theirs(lambda: backward(*arguments))
        return dx, None, dweight, dbias, None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_is_at_least_as_accurate_as_torchs(dtype: torch.dtype, enabled: None) -> None:
    def ours(*arguments: Any) -> Tensor:
        return rms_norm(*arguments[:5])

    def torchs(*arguments: Any) -> Any:
        return theirs(lambda: rms_norm(*arguments[:5]))

    def draw() -> Case:
        return add_terms(make_case(33, 1000, dtype, torch.device("cpu")), rms=True)

    with served(**{RMS_NORM: 2, RMS_NORM_BWD: 2}):
        assert_accurate(draw, ours, torchs, draws=2)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_batch(norm: Any, dtype: Any, enabled: None) -> None:
    case: Case = make_case(70, 1000, dtype, torch.device("cpu"))

    def run(rows: slice) -> list[Tensor]:
        x = case.x[rows].detach().requires_grad_()
        y = norm(x, (1000,), case.weight, case.bias, 1e-5)
        return [y.detach(), *torch.autograd.grad(y, x, case.dy[rows])]

    for whole, again, alone in zip(
        run(slice(None)), run(slice(None)), run(slice(41, 42)), strict=True
    ):
        assert torch.equal(whole, again)
        assert torch.equal(whole[41:42], alone)


# The contracts of the operators


def calls_of_operators() -> dict[str, Callable[[], Any]]:
    """Return calls of the operators themselves, valid and not, by what they show."""
    op = torch.ops.aten
    x, w = torch.randn(3, 5, 8), torch.randn(8)
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    mean, rstd = torch.randn(3, 5, 1), torch.rand(3, 5, 1)
    meta = torch.ones(8, device="meta")
    norm, bwd = torch.native_layer_norm, op.native_layer_norm_backward
    rms = torch._fused_rms_norm
    found: dict[str, Callable[[], Any]] = {
        "one row": lambda: norm(w, (8,), w, w, 1e-5),
        "two dimensions": lambda: norm(x, (5, 8), x[0], None, 1e-5),
        "transposed": lambda: norm(x.transpose(0, 1), (8,), w, w, 1e-5),
        "columns apart": lambda: norm(x.transpose(1, 2), (5,), None, None, 1e-5),
        "expanded": lambda: norm(x[:1].expand(4, 5, 8), (8,), w, w, 1e-5),
        "sliced": lambda: norm(x[..., 1:7], (6,), w[1:7], w[::2][:1].expand(6), 1e-5),
        "channels last": lambda: norm(last, (4, 5), None, None, 1e-5),
        "no rows": lambda: norm(x[:0], (8,), w, w, 1e-5),
        "no columns": lambda: norm(x[..., :0], (0,), None, None, 1e-5)[0],
        "wrong shape": lambda: norm(x, (7,), None, None, 1e-5),
        "no dimension": lambda: norm(x, (), None, None, 1e-5),
        "no dimension at all": lambda: norm(x[0, 0, 0], (), None, None, 1e-5),
        "more dimensions": lambda: norm(w, (3, 8), None, None, 1e-5),
        "wrong weight": lambda: norm(x, (8,), x[0], None, 1e-5),
        "wrong bias": lambda: norm(x, (8,), w, w[:4], 1e-5),
        "weight elsewhere": lambda: norm(x, (8,), meta, None, 1e-5),
        "integers": lambda: norm(x.long(), (8,), None, None, 1e-5),
        "complex": lambda: norm(x.cfloat(), (8,), None, None, 1e-5),
        "float8": lambda: norm(x.to(torch.float8_e5m2), (8,), None, None, 1e-5),
        "backward": lambda: bwd(x, x, (8,), mean, rstd, w, w, [True] * 3),
        "backward of dx": lambda: bwd(x, x, (8,), mean, rstd, w, w, [True, False, False]),
        "backward of dbias": lambda: bwd(x, x, (8,), mean, rstd, w, w, [False, False, True]),
        "backward of nothing": lambda: bwd(x, x, (8,), mean, rstd, w, w, [False] * 3),
        "backward expanded": lambda: bwd(
            x[0, 0, 0].expand(3, 5, 8), x, (8,), mean, rstd, w, None, [True, True, False]
        ),
        "backward strided": lambda: bwd(
            x.transpose(0, 1).contiguous().transpose(0, 1), x, (8,), mean, rstd, w, w, [True] * 3
        ),
        "backward without rows": lambda: bwd(
            x[:0], x[:0], (8,), mean[:0], rstd[:0], w, w, [True] * 3
        ),
        "backward of another dtype": lambda: bwd(x.double(), x, (8,), mean, rstd, w, w, [True] * 3),
        "rms": lambda: rms(x, (8,), w, None),
        "rms of two dimensions": lambda: rms(x, (5, 8), x[0], 1e-3),
        "rms transposed": lambda: rms(x.transpose(1, 2), (5,), None, 1e-5),
        "rms channels last": lambda: rms(last, (4, 5), None, 1e-5),
        "rms without rows": lambda: rms(x[:0], (8,), w, 1e-5),
        "rms of a wrong shape": lambda: rms(x, (7,), None, 1e-5),
        "rms of no dimension": lambda: rms(x, (), None, 1e-5),
        "rms of integers": lambda: rms(x.long(), (8,), None, 1e-5),
        "rms of complex": lambda: rms(x.cfloat(), (8,), None, 1e-5),
        "rms of another weight": lambda: rms(x, (8,), w.double(), 1e-5),
    }
    for dtype in DTYPES:
        for other in (*DTYPES, None):
            given, weight = x.to(dtype), None if other is None else w.to(other)

            def call(given: Tensor = given, weight: Tensor | None = weight) -> Any:
                return norm(given, (8,), weight, weight, 1e-5)

            found[f"{dtype} with {other}"] = call
    return found


CALLS = calls_of_operators() if backends.extension_missing() is None else {}


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeError as error:  # NotImplementedError is one
        return str(error)


@pytest.mark.parametrize("name", CALLS)
def test_operators_keep_torchs_contract(name: str, enabled: None) -> None:
    """Shapes, strides, dtypes, values and the words of errors.

    An error that comes out of an extension is a RuntimeError; where torch has its subclass
    NotImplementedError, the words are the same all the same.
    """
    ours, torchs = outcome(CALLS[name]), theirs(lambda: outcome(CALLS[name]))
    if isinstance(torchs, str):
        assert ours == torchs
        return
    assert_close(ours, torchs)


def test_fall_through_is_rare(enabled: None) -> None:
    """What the tests above call valid and the kernels can do runs in the kernels."""
    names = ("one row", "two dimensions", "transposed", "columns apart", "expanded", "sliced")
    with served(**{LAYER_NORM: len(names)}):
        for name in names:
            CALLS[name]()
    names = ("backward", "backward of dx", "backward expanded", "backward strided")
    with served(**{LAYER_NORM_BWD: len(names)}):
        for name in names:
            CALLS[name]()
    with served(**{RMS_NORM: 3}):
        for name in ("rms", "rms of two dimensions", "rms transposed"):
            CALLS[name]()


@pytest.mark.parametrize("name", ["integers", "wrong shape", "no rows"])
def test_calls_that_are_handed_on_leak_nothing(name: str, enabled: None) -> None:
    outcome(CALLS[name])
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        outcome(CALLS[name])
    gc.collect()
    assert len(gc.get_objects()) - before < 25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_statistics_lie_behind_the_rounded_ones(dtype: torch.dtype, enabled: None) -> None:
    """The backward takes them only while they round to the statistics that it is given."""
    x, w = torch.randn(64, 1000).to(dtype) + 3, torch.randn(1000).to(dtype)
    dy = torch.randn(64, 1000).to(dtype)
    _, mean, rstd = torch.native_layer_norm(x, (1000,), w, w, 1e-5)
    assert mean.dtype == rstd.dtype == dtype

    def dweight(mean: Tensor, rstd: Tensor) -> Tensor:
        arguments = (dy, x, (1000,), mean, rstd, w, w, [False, True, False])
        return torch.ops.aten.native_layer_norm_backward(*arguments)[1].double()

    wide = x.double()
    x_hat = (wide - wide.mean(-1, keepdim=True)) / (
        wide.var(-1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    exact = (dy.double() * x_hat).sum(0)
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (dweight(mean, rstd) - exact).abs().max() <= unit
    copied = dweight(mean.clone(), rstd.clone())
    assert (copied - exact).abs().max() > 2 * (dweight(mean, rstd) - exact).abs().max()
    assert_close(copied, dweight(mean.float(), rstd.float()))
    moved = mean.clone()
    mean.add_(1)
    assert_close(dweight(mean, rstd), dweight(moved + 1, rstd))


def test_a_graph_outlives_disable() -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with fusednorm.enable("cpu"):
        y, z = F.layer_norm(x, (8,)), F.rms_norm(x, (8,))
    torch.autograd.grad(y.sum() + z.sum(), x)
    y = F.layer_norm(x, (8,))
    with fusednorm.enable("cpu"), served(**{LAYER_NORM_BWD: 1}):
        torch.autograd.grad(y.sum(), x)


def test_rms_norm_of_complex_numbers_is_torchs(enabled: None) -> None:
    x = torch.randn(3, 6, dtype=torch.complex128, requires_grad=True)
    with served():
        assert torch.autograd.gradcheck(lambda x: F.rms_norm(x, (6,), eps=1e-3), x)


# Torch's own cases


SAMPLES = [
    (info, dtype)
    for info in op_db
    if info.name in ("native_layer_norm", "nn.functional.layer_norm", "nn.functional.rms_norm")
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
]


def sample_inputs(info: Any, dtype: torch.dtype, grad: bool) -> list[Any]:
    return [
        sample
        for sample in info.sample_inputs(torch.device("cpu"), dtype, requires_grad=grad)
        if isinstance(sample.input, Tensor)
    ]


@pytest.mark.parametrize(
    ("info", "dtype"), SAMPLES, ids=[f"{info.name}-{dtype}" for info, dtype in SAMPLES]
)
def test_torchs_samples(info: Any, dtype: torch.dtype, enabled: None) -> None:
    before = sum(torch_operators.calls().values())
    samples = sample_inputs(info, dtype, False)
    for sample in samples:
        call = lambda s=sample: info(s.input, *s.args, **s.kwargs)  # noqa: E731
        # Torch's own bfloat16 norm of a row of one column is not quite 0.
        half = dtype == torch.bfloat16
        tolerance = {"atol": torch.finfo(dtype).eps, "rtol": 0.016} if half else {}
        torch.testing.assert_close(call(), theirs(call), check_stride=True, **tolerance)
    assert sum(torch_operators.calls().values()) > before


@pytest.mark.parametrize("info", [info for info, dtype in SAMPLES[::3]], ids=lambda info: info.name)
def test_torchs_samples_differentiate(info: Any, enabled: None) -> None:
    """Gradcheck, gradgradcheck and forward AD, where torch says that it has them."""
    for sample in sample_inputs(info, torch.float64, True):
        leaves = [sample.input, *(a for a in sample.args if isinstance(a, Tensor))]
        if sample.input.numel() == 0 or sample.input.numel() > 200:
            continue

        def call(*leaves: Tensor, sample: Any = sample) -> Any:
            rest = iter(leaves[1:])
            args = [next(rest) if isinstance(a, Tensor) else a for a in sample.args]
            result = info(leaves[0], *args, **sample.kwargs)
            return result if isinstance(result, Tensor) else result[0]

        assert torch.autograd.gradcheck(
            call, leaves, check_forward_ad=info.supports_forward_ad, fast_mode=True
        )
        # Torch's double backward of a bias without a weight is wrong.
        if info.supports_gradgrad and not (len(leaves) == 2 and "weight" not in sample.kwargs):
            assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.skipif(not module_db, reason="torch's cases need expecttest")
@pytest.mark.parametrize("module", [nn.LayerNorm, nn.RMSNorm])
def test_torchs_module_samples(module: type[nn.Module], enabled: None) -> None:
    info = next(info for info in module_db if info.module_cls is module)
    inputs = info.module_inputs_func(
        info, device=torch.device("cpu"), dtype=torch.float32, requires_grad=True, training=True
    )
    assert inputs
    for given in inputs:
        made = module(*given.constructor_input.args, **given.constructor_input.kwargs)
        (x,) = given.forward_input.args

        def run(made: nn.Module = made, x: Tensor = x) -> list[Tensor]:
            return gradients(made, x)

        assert_close(run(), theirs(run))


# Whoever looks at operators


class Norms(nn.Module):
    """A layer norm and an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


BOTH = {LAYER_NORM: 1, RMS_NORM: 1}
BOTH_WAYS = {**BOTH, LAYER_NORM_BWD: 1, RMS_NORM_BWD: 1}


@pytest.fixture
def norms() -> Norms:
    return Norms()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Torch deprecates scripts and traces, and warns of prototypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("make", ["script", "trace", "fx"])
def test_scripts_and_traces(make: str, norms: Norms, enabled: None) -> None:
    x = torch.randn(3, 16)
    expected = norms(x)
    with quietly():
        if make == "script":
            made: Any = torch.jit.script(norms)
        elif make == "trace":
            made = torch.jit.trace(norms, torch.randn(3, 16))
        else:
            made = torch.fx.symbolic_trace(norms)
        made(x)
    with served(**BOTH):
        y = made(x)
    assert torch.equal(y, expected)


def test_modes_see_torchs_operators(norms: Norms, enabled: None) -> None:
    functions, operators = [], []

    class Functions(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            functions.append(function)
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            operators.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.randn(3, 16)
    expected = norms(x)
    with Functions(), Operators(), served(**BOTH):
        assert torch.equal(norms(x), expected)
    assert {F.layer_norm, F.rms_norm} <= set(functions)
    assert torch.ops.aten.native_layer_norm.default in operators
    assert torch.ops.aten._fused_rms_norm.default in operators


def test_fake_tensors_promise_what_comes(enabled: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(3, 16).to(dtype), torch.randn(16).to(dtype)
        for operator in (
            lambda x, w: torch.native_layer_norm(x, (16,), w, w, 1e-5),
            lambda x, w: torch._fused_rms_norm(x, (16,), w, None),
        ):
            with FakeTensorMode() as mode, served():
                fakes = operator(mode.from_tensor(x), mode.from_tensor(w))
            for fake, real in zip(fakes, operator(x, w), strict=True):
                assert (fake.shape, fake.dtype, fake.stride()) == (
                    real.shape,
                    real.dtype,
                    real.stride(),
                )


def test_function_transforms(enabled: None) -> None:
    x, w = torch.randn(5, 3, 16), torch.randn(5, 16)
    for norm in (lambda x, w: F.layer_norm(x, (16,), w), lambda x, w: F.rms_norm(x, (16,), w)):
        for transformed in (
            torch.vmap(norm),
            torch.vmap(torch.func.grad(lambda x, w, norm=norm: norm(x, w).sin().sum())),
            lambda x, w, norm=norm: torch.func.jvp(norm, (x, w[0]), (x, w[1])),
        ):
            assert_close(transformed(x, w), theirs(lambda f=transformed: f(x, w)))
    with served(**{LAYER_NORM: 1}):
        torch.vmap(lambda x: F.layer_norm(x, (16,)))(x)


def test_export(norms: Norms, enabled: None) -> None:
    x = torch.randn(3, 16)
    expected = norms(x)
    exported = torch.export.export(norms, (torch.randn(3, 16),)).module()
    with served(**BOTH):
        assert torch.equal(exported(x), expected)


def assert_exports(model: nn.Module, *inputs: Tensor) -> None:
    """Assert that torch's exporter writes a model which computes what the module does."""
    pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript")
    from onnx.reference import ReferenceEvaluator

    expected = model.eval()(*inputs)
    others = tuple(torch.randn_like(value) for value in inputs)
    with quietly():
        proto = torch.onnx.export(model, others, dynamo=True, verbose=False).model_proto
    feeds = {
        name.name: value.numpy() for name, value in zip(proto.graph.input, inputs, strict=True)
    }
    found = [torch.from_numpy(one) for one in ReferenceEvaluator(proto).run(None, feeds)]
    torch.testing.assert_close(
        found, [expected] if isinstance(expected, Tensor) else [*expected], check_stride=False
    )


def modulated(x: Tensor, scale: Tensor) -> Tensor:
    return fusednorm.modulated_layer_norm(x, 16, scale, scale)


ROWS = (3, 2, 16)
EXPORTED: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "torch's layer norm": (lambda: nn.LayerNorm(16), (ROWS,)),
    "layer norm": (lambda: fusednorm.LayerNorm(16), (ROWS,)),
    "add layer norm": (lambda: fusednorm.AddLayerNorm(16), (ROWS, ROWS)),
    "modulated": (lambda: Called(modulated), (ROWS, (3, 1, 16))),
    "channels": (lambda: fusednorm.LayerNorm2d(4), ((2, 4, 3, 3),)),
    "gated": (lambda: fusednorm.GatedRMSNorm(16), (ROWS, ROWS)),
    "torch's rms norm": (lambda: nn.RMSNorm(16), (ROWS,)),
    "rms norm": (lambda: fusednorm.RMSNorm(16), (ROWS,)),
    "add rms norm": (lambda: fusednorm.AddRMSNorm(16), (ROWS, ROWS)),
}


class Called(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


@pytest.mark.parametrize(("make", "shapes"), EXPORTED.values(), ids=EXPORTED)
def test_onnx(make: Callable[[], nn.Module], shapes: Any) -> None:
    assert_exports(make(), *map(torch.randn, shapes))


@pytest.mark.parametrize(("make", "shapes"), EXPORTED.values(), ids=EXPORTED)
def test_onnx_while_enabled(
    make: Callable[[], nn.Module], shapes: Any, enabled: None, request: pytest.FixtureRequest
) -> None:
    if "rms norm" in request.node.callspec.id:
        # A device with a kernel keeps the operator in the graph, and ONNX has no word for it.
        reason = "torch exports an RMS norm for which a device has a kernel to no ONNX, as on a GPU"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    assert_exports(make(), *map(torch.randn, shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aot_eager(dtype: torch.dtype, norms: Norms, enabled: None) -> None:
    norms.to(dtype)
    x = torch.randn(3, 16).to(dtype)
    expected = gradients(norms, x)
    compiled = torch.compile(norms, backend="aot_eager", fullgraph=True)

    def run() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = compiled(leaf)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y.backward(dy)
        return [y.detach(), leaf.grad]

    run()
    with served(**BOTH_WAYS):
        y, dx = run()
    assert_close([y, dx], expected)


def test_what_was_compiled_before_does_not_stay(norms: Norms) -> None:
    """A graph that is compiled while enabled has the kernels, and one afterwards has not."""
    x = torch.randn(3, 16)

    def run() -> list[Tensor]:
        torch.compiler.reset()
        return gradients(torch.compile(norms, backend="aot_eager", fullgraph=True), x)

    with served():
        expected = run()
    with fusednorm.enable("cpu"), served(**BOTH_WAYS):
        ours = run()
    assert_close(ours, expected)
    with served():
        assert all(map(torch.equal, run(), expected))


def test_inductor(norms: Norms, enabled: None) -> None:
    x = torch.randn(3, 16)
    compiled = torch.compile(norms, fullgraph=True)
    assert_close(gradients(compiled, x), theirs(lambda: gradients(norms, x)))


def test_jagged_tensors(enabled: None) -> None:
    with quietly():
        ragged = torch.nested.nested_tensor(
            [torch.randn(2, 16), torch.randn(5, 16)], layout=torch.jagged
        )
        with served(**{LAYER_NORM: 1}):
            ours = F.layer_norm(ragged, (16,))
        torchs = theirs(lambda: F.layer_norm(ragged, (16,)))
        assert_close(ours.values(), torchs.values())


def test_fast_path_of_the_transformer_encoder(enabled: None) -> None:
    with quietly():
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        x = torch.randn(2, 5, 16)
        with torch.no_grad(), served(**{LAYER_NORM: 4}):
            ours = encoder(x)
        with torch.no_grad():
            assert_close(ours, theirs(lambda: encoder(x)))


SHARDED = """
import sys, torch, torch.nn.functional as F, torch.distributed as dist
import fusednorm
from fusednorm import torch_operators
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
x, w = torch.randn(4, 6, 16), torch.randn(16)
def run(norm):
    sharded = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    weight = distribute_tensor(w, mesh).requires_grad_()
    y = norm(sharded, (16,), weight)
    assert y.placements == (Shard(0),), y.placements
    grads = torch.autograd.grad(y.square().sum(), (sharded, weight))
    return [value.full_tensor().detach() for value in (y, *grads)]
for norm, names in ((F.layer_norm, torch_operators.OPERATORS[:2]),
                    (F.rms_norm, torch_operators.OPERATORS[2:])):
    torchs = run(norm)
    before = torch_operators.calls()
    with fusednorm.enable("cpu"):
        ours = run(norm)
    now = torch_operators.calls()
    for our, their in zip(ours, torchs):
        torch.testing.assert_close(our, their)
    assert all(now[name] == before[name] + 1 for name in names), (before, now)
dist.barrier()  # nobody leaves while the other one still reads
dist.destroy_process_group()
"""


def test_sharded_tensors_of_two_processes(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(rank), str(tmp_path / "rendezvous")],
            # By the loopback interface, whatever this machine calls itself.
            env=os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error


# On and off


def test_disable_gives_torchs_bits_back() -> None:
    x, w = torch.randn(33, 1000).bfloat16(), torch.randn(1000).bfloat16()

    def run() -> list[Tensor]:
        return [
            *gradients(lambda x, w: F.layer_norm(x, (1000,), w, w), x, w),
            *gradients(lambda x, w: F.rms_norm(x, (1000,), w), x, w),
        ]

    before = run()
    with fusednorm.enable("cpu"), served(**BOTH_WAYS):
        inside = run()
    with served():
        after = run()
    assert all(map(torch.equal, before, after))
    assert not all(map(torch.equal, before, inside))


def test_handles_take_out_what_they_put_in() -> None:
    assert not torch_operators.enabled("cpu")
    outer = fusednorm.enable("cpu")
    with fusednorm.enable(torch.device("cpu")) as inner:
        assert inner.devices == ()
    assert torch_operators.enabled("cpu")
    assert fusednorm.enable().devices == ()
    outer.disable()
    assert not torch_operators.enabled("cpu")
    with fusednorm.enable(["cpu"]):
        outer.disable()
        assert torch_operators.enabled("cpu")
    fusednorm.disable()
    fusednorm.disable("cpu")


def test_on_and_off_a_thousand_times_leaks_nothing() -> None:
    x = torch.randn(2, 8)

    def toggle(times: int) -> None:
        for _ in range(times):
            with fusednorm.enable("cpu"):
                F.layer_norm(x, (8,))

    toggle(300)  # as many registrations as are kept
    gc.collect()
    objects, before = len(gc.get_objects()), _resident()
    toggle(1000)
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert _resident() - before < 4 << 20


def _resident() -> int:
    """Return the memory of this process that is not shared, in bytes."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def test_one_thread_toggles_while_another_runs() -> None:
    x = torch.randn(16, 64)
    expected = F.layer_norm(x, (64,))
    wrong: list[float] = []
    done = threading.Event()

    def run() -> None:
        while not done.is_set():
            error = float((F.layer_norm(x, (64,)) - expected).abs().max())
            if error > 1e-5:
                wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(200):
        with fusednorm.enable("cpu"):
            F.layer_norm(x, (64,))
    done.set()
    thread.join()
    assert not wrong


ON_ITS_OWN = """
import os, torch, torch.nn.functional as F, fusednorm
from fusednorm import torch_operators
torch.set_num_threads(1)
def count():
    return torch_operators.calls()["native_layer_norm"]
x = torch.randn(4, 8)
expected = F.layer_norm(x, (8,))
assert count() == (1 if torch_operators.enabled("cpu") else 0)
with fusednorm.enable("cpu"):
    child = os.fork()
    before = count()
    torch.testing.assert_close(F.layer_norm(x, (8,)), expected)
    assert count() == before + 1
    if child == 0:
        fusednorm.disable()
        fusednorm.enable("cpu")
        F.layer_norm(x, (8,))
        os._exit(0 if count() == before + 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("variable", ["", "1"])
def test_forked_child_and_silence(variable: str) -> None:
    """Nothing is printed, neither by torch where a kernel is overridden nor by us."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", ON_ITS_OWN],
        env=os.environ | {"FUSEDNORM_ENABLE": variable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bad_input() -> None:
    for call in (fusednorm.enable, fusednorm.disable):
        with pytest.raises(ValueError, match="able: expected devices among 'cpu' and 'cuda', got"):
            call("tpu")
        with pytest.raises(ValueError, match="got 'cpu:0'"):
            call(["cpu", "cpu:0"])
        with pytest.raises(TypeError, match="able: expected devices as a name"):
            call(3)  # type: ignore[arg-type]
    assert not torch_operators.enabled("cpu")


def test_device_without_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda: no cuda device is available to torch"):
            fusednorm.enable(["cpu", "cuda"])
        assert not torch_operators.enabled("cpu")
    monkeypatch.setattr(torch_operators, "_extension", lambda: object())
    with pytest.raises(ValueError, match="cpu: the compiled extension is of another version"):
        fusednorm.enable("cpu")
    reason = "the compiled extension was not built (FUSEDNORM_BUILD=cpu)"
    monkeypatch.setattr(backends, "extension_missing", lambda: reason)
    with pytest.raises(ValueError, match="cpu: the compiled extension was not built"):
        fusednorm.enable("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"a device with a backend, got cpu: .*; cuda: "):
            fusednorm.enable()


def test_environment_that_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDNORM_ENABLE", "yes")
    with pytest.raises(ValueError, match="FUSEDNORM_ENABLE: expected 0 or 1, got 'yes'"):
        torch_operators.read_environment()


# The launchers in Python, as on CUDA


@pytest.fixture
def launchers() -> Iterator[None]:
    """Torch's operators run in the launchers, as on CUDA: Triton's if a GPU's interpreter is."""
    backend = "triton" if "triton" in backends.available() else "cpu"
    with backends.use(backend):
        registration = torch_operators._InPython("CPU")
        yield
        registration.remove()


@pytest.mark.parametrize("name", [name for name in CALLS if "float16" not in name])
def test_launchers_keep_torchs_contract(name: str, request: pytest.FixtureRequest) -> None:
    torchs = outcome(CALLS[name])
    request.getfixturevalue("launchers")
    ours = outcome(CALLS[name])
    if isinstance(torchs, str):
        assert ours == torchs
    else:
        assert_close(ours, torchs)


def test_launchers_run_under_torchs_autograd(request: pytest.FixtureRequest) -> None:
    x, w = torch.randn(5, 16), torch.randn(16)

    def run() -> list[Tensor]:
        return [
            *gradients(lambda x, w: F.layer_norm(x, (16,), w, w), x, w),
            *gradients(lambda x, w: F.rms_norm(x, (16,), w), x, w),
        ]

    torchs = run()
    request.getfixturevalue("launchers")
    with served(**BOTH_WAYS):
        ours = run()
    assert_close(ours, torchs)


# The road beside torch's operators ---------------------------------------------------------------

OURS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "layer_norm": (lambda x: fusednorm.layer_norm(x, 8), "native_layer_norm", "NativeLayerNorm"),
    "rms_norm": (lambda x: fusednorm.rms_norm(x, 8), "_fused_rms_norm", "FusedRmsNorm"),
    "LayerNorm": (fusednorm.LayerNorm(8), "native_layer_norm", "NativeLayerNorm"),
    "RMSNorm": (fusednorm.RMSNorm(8), "_fused_rms_norm", "FusedRmsNorm"),
}


@pytest.mark.parametrize("name", OURS)
def test_a_plain_norm_of_ours_calls_torchs_operator(name: str) -> None:
    """While enabled it is one operator of torch under torch's own node, and says so."""
    norm, operator, node = OURS[name]
    x = torch.randn(3, 8, requires_grad=True)
    before = torch_operators.calls()[operator]
    with fusednorm.enable("cpu"), backends.explain() as ran:
        y = norm(x)
    assert [call.reason for call in ran] == [
        "torch's operator runs in our kernels: fusednorm.enable"
    ]
    assert torch_operators.calls()[operator] == before + 1
    assert y.grad_fn is not None
    assert y.grad_fn.name() == f"{node}Backward0"
    torch.testing.assert_close(y, norm(x))
    with backends.explain() as ran:
        norm(x)
    assert "enable" not in ran[0].reason


@pytest.mark.parametrize("name", OURS)
def test_a_checkpoint_outlives_what_is_enabled(name: str) -> None:
    """A forward inside, its recomputation outside, and the other way around."""
    norm, _, _ = OURS[name]
    for inside in (True, False):
        x = torch.randn(3, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(norm(x).square().sum(), x)
        with fusednorm.enable("cpu") if inside else contextlib.nullcontext():
            y = checkpoint(norm, x, use_reentrant=False)
        with contextlib.nullcontext() if inside else fusednorm.enable("cpu"):
            y.square().sum().backward()
        torch.testing.assert_close(x.grad, expected)


def test_a_request_stands_above_what_is_enabled() -> None:
    """Backends.use decides for our own functions."""
    x = torch.randn(3, 8, requires_grad=True)
    with fusednorm.enable("cpu"), backends.use("cpu"):
        y = fusednorm.rms_norm(x, 8)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "LayerNormFunctionBackward"
