"""What compilers, exporters and dispatch modes make of a call, and what has to be compiled."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Case, make_case, plain_spec
from spies import Launch, kernels_of_package, record_launches
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusednorm
from fusednorm import autograd, backends, channels, gated, layer_norm, ops
from fusednorm.spec import Operands

FWD, BWD = ops.layer_norm_fwd, ops.layer_norm_bwd
COMPILED_FWD, COMPILED_BWD = ops.compiled[FWD], ops.compiled[BWD]

# torch scripts functions of its own when forward mode and inductor are first used.

needs_compiler = pytest.mark.skipif(
    not (torch.cuda.is_available() or shutil.which("g++")),
    reason="inductor compiles for the CPU with g++, and there is none",
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU, and the interpreter compiles nothing"
)

Function = Callable[..., Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The kernel launches of the test so far."""
    return record_launches(monkeypatch)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Let no test see what another one compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass
class Graphs:
    """A compiler backend that runs graphs as they are and keeps what they call."""

    forward: list[Any] = field(default_factory=list)
    backward: list[Any] = field(default_factory=list)

    @property
    def backend(self) -> Any:
        """The backend for torch.compile."""
        return aot_autograd(
            fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward)
        )

    @staticmethod
    def _keep(called: list[Any]) -> Function:
        def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Function:
            called.extend(calls(module))
            return make_boxed_func(module.forward)

        return compiler


def calls(module: torch.fx.GraphModule) -> list[Any]:
    """Return the operators that a graph calls, in order."""
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Normalise the last dimension."""
    return layer_norm(x, x.shape[-1:], weight, bias)


def block(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return a norm between a producer and an epilogue that compilers like to fuse with it."""
    y = norm(x * 2, weight, bias)
    return y / (y.abs() + 1e-6)


def forward_backward(function: Function, case: Case) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, weight and bias."""
    given = (case.x, case.weight, case.bias)
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in given]
    y = function(*inputs)
    wanted = [leaf for leaf in inputs if leaf is not None]
    return y.detach(), *torch.autograd.grad(y, wanted, case.dy)


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Assert that results are equal, bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# torch.compile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_equals_eager(
    kernels: torch.device, dtype: torch.dtype, weight: bool, bias: bool
) -> None:
    """A compiled call has the bits of an eager one, in one graph that holds our operators."""
    case = make_case(3, 5, dtype, kernels, weight=weight, bias=bias)
    graphs = Graphs()
    compiled = torch.compile(norm, fullgraph=True, backend=graphs.backend)
    assert_same_bits(forward_backward(compiled, case), forward_backward(norm, case))
    assert graphs.forward.count(COMPILED_FWD) == 1
    assert graphs.backward.count(COMPILED_BWD) == 1
    aten = {target for target in graphs.forward + graphs.backward if "layer_norm" in str(target)}
    assert aten == {COMPILED_FWD, COMPILED_BWD}


def test_compiled_under_no_grad(kernels: torch.device) -> None:
    """So has one that records no backward."""
    case = make_case((2, 3), 5, torch.float32, kernels)
    graphs = Graphs()
    with torch.no_grad():
        compiled = torch.compile(norm, fullgraph=True, backend=graphs.backend)
        y = compiled(case.x, case.weight, case.bias)
        assert_same_bits((y,), (norm(case.x, case.weight, case.bias),))
    assert graphs.forward.count(COMPILED_FWD) == 1
    assert graphs.backward == []


def gated_norm(x: Tensor, y: Tensor) -> Tensor:
    """Normalise the last dimension and gate the result."""
    return fusednorm.gated_rms_norm(x, y, x.shape[-1])


def norm_of_channels(x: Tensor, y: Tensor) -> Tensor:
    """Normalise dimension 1."""
    return fusednorm.layer_norm2d(x + y)


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        (gated_norm, gated.gated_norm_fwd, gated.gated_norm_bwd),
        (norm_of_channels, channels.layer_norm2d_fwd, channels.layer_norm2d_bwd),
    ],
)
def test_other_norms_have_no_autograd_in_a_graph_either(
    kernels: torch.device, function: Function, forward: Any, backward: Any
) -> None:
    """A compiled graph calls the operators' twins; an exported program the operators."""
    inputs = [torch.randn(2, 3, 5, device=kernels, requires_grad=True) for _ in range(2)]
    graphs = Graphs()
    compiled = torch.compile(function, fullgraph=True, backend=graphs.backend)
    found = []
    for run in (compiled, function):
        y = run(*inputs)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), inputs)))
    assert_same_bits(*found)
    assert graphs.forward.count(ops.compiled[forward]) == 1
    assert graphs.backward.count(ops.compiled[backward]) == 1

    class Module(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = function(x, y)
            return result

    given = tuple(tensor.detach() for tensor in inputs)
    assert calls(torch.export.export(Module(), given).graph_module).count(forward) == 1


@pytest.mark.parametrize("function", [norm, block])
@needs_compiler
def test_inductor(kernels: torch.device, function: Function) -> None:
    """Inductor, which fuses what surrounds the norm, gives what eager gives."""
    case = make_case(3, 5, torch.float32, kernels)
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    ours, expected = forward_backward(compiled, case), forward_backward(function, case)
    if function is norm:
        assert_same_bits(ours, expected)
    else:
        for mine, other in zip(ours, expected, strict=True):
            scale = other.abs().max().item()
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * scale)


def test_module_without_graph_breaks(kernels: torch.device) -> None:
    """The module compiles into one graph, forward and backward."""
    model = nn.Sequential(nn.Linear(4, 6), fusednorm.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
    model.to(kernels)
    x = torch.randn(3, 4, device=kernels)
    explanation = torch._dynamo.explain(model)(x)
    assert explanation.graph_break_count == 0
    assert explanation.graph_count == 1

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, model):
        y = run(x)
        grads = torch.autograd.grad(y, list(model.parameters()), torch.ones_like(y))
        results.append((y.detach(), *grads))
    assert_same_bits(*results)


ROWS = (2, 3, 5, 8, 13, 21)


@pytest.mark.parametrize(
    ("dynamic", "compiling"), [("automatic", [2, 3]), ("always", [2]), ("marked", [2])]
)
def test_number_of_rows_is_dynamic(
    kernels: torch.device, dynamic: str, compiling: list[int]
) -> None:
    """A changing number of rows is compiled once, after the static one if nobody announced it."""
    counter = CompileCounterWithBackend("aot_eager")
    always = True if dynamic == "always" else None
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=always)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        if dynamic == "marked":
            torch._dynamo.mark_dynamic(x, 0)
        return compiled(x, weight, bias)

    compiled_at = []
    for rows in ROWS:
        case, before = make_case(rows, 5, torch.float32, kernels), counter.frame_count
        assert_same_bits(forward_backward(run, case), forward_backward(block, case))
        if counter.frame_count > before:
            compiled_at.append(rows)
    assert compiled_at == compiling


def test_compiled_torch_backend(device: torch.device) -> None:
    """The torch backend compiles into torch's own operator, which inductor knows how to fuse."""
    case = make_case(3, 5, torch.float32, device)
    graphs = Graphs()
    with backends.use("torch"):
        compiled = torch.compile(norm, fullgraph=True, backend=graphs.backend)
        assert_same_bits(forward_backward(compiled, case), forward_backward(norm, case))
    assert COMPILED_FWD not in graphs.forward
    assert torch.ops.aten.native_layer_norm.default in graphs.forward


def test_change_of_backend_is_noticed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled function follows the backend in force at each call."""
    case = make_case(3, 5, torch.float32, device)
    launches = record_launches(monkeypatch)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    launched = []
    for backend in ("triton", "torch", "triton"):
        launches.clear()
        with backends.use(backend):
            compiled(case.x, case.weight, case.bias)
        launched.append(len(launches))
    assert launched == [1, 0, 1]


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_inside_compile(kernels: torch.device, transform: str) -> None:
    """torch.func transforms of a norm compile as well."""
    case = make_case((2, 3), 5, torch.float64, kernels)

    def transformed(x: Tensor, weight: Tensor, dy: Tensor) -> Any:
        if transform == "vmap":
            return torch.func.vmap(norm, (0, None))(x, weight)
        if transform == "grad":
            return torch.func.grad(lambda w: (norm(x, w) * dy).sum())(weight)
        return torch.func.jvp(lambda x: norm(x, weight), (x,), (dy,))[1]

    inputs = (case.x, case.weight, case.dy)
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), transformed(*inputs), rtol=1e-12, atol=1e-12)


# The operators -----------------------------------------------------------------------------------

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@dataclass
class Sample:
    """What one call of an operator is about."""

    shape: tuple[int, ...] = (3, 5)
    normalized: tuple[int, ...] = (5,)
    dtype: torch.dtype = F32
    parameters: torch.dtype | None = None
    weight: bool = True
    bias: bool = True
    layout: str = "contiguous"
    out_dtype: torch.dtype | None = None
    mask: tuple[bool, bool, bool] = (True, True, True)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return dy, x, weight and bias."""
        dtype = self.dtype
        x = torch.randn(self.shape, dtype=dtype, device=device)
        if self.layout == "transposed":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        elif self.layout == "row-strided":
            x = F.pad(x, (0, 3))[..., : self.shape[-1]]
        elif self.layout == "expanded":
            x = x[:1].expand(self.shape)
        dy = torch.randn(self.shape, dtype=self.out_dtype or dtype, device=device)
        weight, bias = (
            torch.randn(self.normalized, dtype=self.parameters or dtype, device=device)
            if there
            else None
            for there in (self.weight, self.bias)
        )
        return dy, x, weight, bias


SAMPLES = {
    "plain": Sample(),
    "no weight": Sample(weight=False),
    "no bias": Sample(bias=False),
    "no affine": Sample(weight=False, bias=False),
    "bfloat16": Sample(dtype=BF16),
    "float64": Sample(dtype=F64),
    "float32 parameters": Sample(dtype=BF16, parameters=F32),
    "float32 output": Sample(dtype=BF16, out_dtype=F32),
    "transposed": Sample(layout="transposed"),
    "row-strided": Sample(layout="row-strided"),
    "expanded": Sample(layout="expanded"),
    "two dimensions": Sample((3, 2, 4), (2, 4)),
    "one row": Sample((5,)),
    "no rows": Sample((0, 5)),
    "only dx": Sample(mask=(True, False, False)),
    "only dweight": Sample(mask=(False, True, False)),
    "only dbias": Sample(mask=(False, False, True)),
}

# What compiled gradients cost in time, only the kernels' forward is worth.
QUICK = ("test_schema", "test_faketensor", "test_autograd_registration")
FULL = (*QUICK, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("implementation", ["kernels", "reference"])
@pytest.mark.usefixtures("kernels")  # the extension hands on what is asked of another backend
def test_opcheck(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, sample: Sample, implementation: str
) -> None:
    """Schema, fake and autograd formula of both operators agree with what they do."""
    kernels = implementation == "kernels"
    monkeypatch.setattr(backends, "kernels", lambda device: "triton" if kernels else None)
    launches = record_launches(monkeypatch)
    dy, x, weight, bias = sample.tensors(device)
    differentiable = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    spec = plain_spec(sample.normalized, 1e-5, sample.out_dtype or sample.dtype)
    forward = (x, None, None, weight, bias, None, None, None, *spec)
    torch.library.opcheck(FWD, forward, test_utils=FULL if kernels else QUICK)
    _, _, mean, rstd = (t.detach() for t in FWD(*forward))
    for tensor in differentiable:
        tensor.requires_grad_(False)
    dx, dweight, dbias = sample.mask
    mask = (dx, False, False, dweight, dbias, False, False)
    tensors = (dy, None, None, x, mean, rstd, None, weight, bias, None, None, None)
    backward = (*tensors, *spec[:4], x.dtype, x.dtype, None, mask)
    torch.library.opcheck(BWD, backward, test_utils=QUICK)
    assert bool(launches) == (kernels and x.numel() > 0)


# Export and tracing ------------------------------------------------------------------------------


class Model(nn.Module):
    """A norm between two layers."""

    def __init__(self) -> None:
        """Make random layers."""
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.norm = fusednorm.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised projection."""
        y: Tensor = self.norm(self.inner(x))
        return y.tanh()


@pytest.mark.parametrize("strict", [True, False])
def test_export(kernels: torch.device, strict: bool) -> None:
    """An exported program holds our operator and serves any batch."""
    model = Model().to(kernels).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        model,
        (torch.randn(3, 4, device=kernels),),
        dynamic_shapes=({0: batch},),
        strict=strict,
    )
    assert calls(program.graph_module).count(FWD) == 1
    for rows in (2, 3, 7):
        x = torch.randn(rows, 4, device=kernels)
        assert_same_bits((program.module()(x),), (model(x),))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(kernels: torch.device, mode: str) -> None:
    """A traced gradient holds both operators and computes what eager does."""
    case = make_case(3, 5, torch.float32, kernels)

    def gradients(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(t.detach().requires_grad_() for t in (x, weight, bias))
        return torch.autograd.grad(norm(*inputs), inputs, dy)

    assert case.weight is not None
    assert case.bias is not None
    inputs = (case.x, case.weight, case.bias, case.dy)
    traced = make_fx(gradients, tracing_mode=mode)(*inputs)
    assert calls(traced).count(FWD) == calls(traced).count(BWD) == 1
    assert_same_bits(traced(*inputs), gradients(*inputs))


def expected_of(sample: Sample) -> list[tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of y, dx, dweight and dbias."""
    shapes = [(sample.shape, sample.out_dtype or sample.dtype), (sample.shape, sample.dtype)]
    parameters = (sample.normalized, sample.parameters or sample.dtype)
    shapes += [parameters] * (sample.weight + sample.bias)
    return [(torch.Size(shape), dtype) for shape, dtype in shapes]


@pytest.mark.parametrize("name", ["plain", "no affine", "float32 parameters", "transposed"])
def test_fake_tensors(launches: list[Launch], kernels: torch.device, name: str) -> None:
    """Fake tensors go through forward and backward, and launch nothing."""
    sample = SAMPLES[name]
    with FakeTensorMode():
        dy, *tensors = sample.tensors(kernels)
        inputs = [t.requires_grad_() for t in tensors if t is not None]
        y = layer_norm(tensors[0], sample.normalized, *tensors[1:])
        results = [y, *torch.autograd.grad(y, inputs, dy)]
    assert all(isinstance(result, FakeTensor) for result in results)
    assert [(result.shape, result.dtype) for result in results] == expected_of(sample)
    assert all(result.is_contiguous() for result in results)
    assert launches == []


@pytest.mark.parametrize("name", ["plain", "no affine", "bfloat16", "float64", "two dimensions"])
def test_meta_tensors(name: str) -> None:
    """Meta tensors give meta tensors of the right shape and dtype."""
    sample = SAMPLES[name]
    dy, *tensors = sample.tensors(torch.device("meta"))
    inputs = [t.requires_grad_() for t in tensors if t is not None]
    y = layer_norm(tensors[0], sample.normalized, *tensors[1:])
    results = [y, *torch.autograd.grad(y, inputs, dy)]
    assert all(result.is_meta for result in results)
    assert [(result.shape, result.dtype) for result in results] == expected_of(sample)


class Log(TorchDispatchMode):
    """Keeps the operators that pass."""

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator and run it."""
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_operators(kernels: torch.device) -> None:
    """Profilers and counters that are dispatch modes see one operator for each pass."""
    case = make_case(3, 5, torch.float32, kernels)
    with Log() as log:
        logged = forward_backward(norm, case)
    assert log.seen.count(FWD) == log.seen.count(BWD) == 1
    assert_same_bits(logged, forward_backward(norm, case))


@pytest.mark.parametrize("wrap", [lambda f: f, torch.compile], ids=["eager", "compiled"])
def test_tensor_subclasses(kernels: torch.device, wrap: Function) -> None:
    """A subclass that wraps tensors gets our operators to unwrap, in both passes."""
    one, other = (make_case(3, 5, torch.float32, kernels) for _ in range(2))
    pairs = [
        TwoTensor(getattr(one, name), getattr(other, name)).requires_grad_()
        for name in ("x", "weight", "bias")
    ]
    function = norm if wrap is not torch.compile else torch.compile(norm, backend="aot_eager")
    y = function(*pairs)
    results = (y.detach(), *torch.autograd.grad(y, pairs, TwoTensor(one.dy, other.dy)))
    assert all(type(result) is TwoTensor for result in results)
    assert_same_bits(tuple(r.a for r in results), forward_backward(norm, one))
    assert_same_bits(tuple(r.b for r in results), forward_backward(norm, other))


# What Triton compiles ----------------------------------------------------------------------------

# Ones, multiples of 16 and their neighbours are what Triton would compile apart.
MANY_ROWS = (*range(1, 34), *(48, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 500, 512, 777))
MANY_ROWS = (*MANY_ROWS, 1000, 4096, 2**31)

# One for each form that forward and backward have.
COLS = (3, 64, 1000, 4096, 8192, 12288, 40000, 131072)


def compile_keys(launches: list[Launch]) -> dict[str, set[str]]:
    """Return by kernel what the launches would ask Triton to compile for compute capability 9.0.

    Triton's own binder makes the keys: types, alignments, specialised values, constants, options.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target = make_backend(GPUTarget("cuda", 90, 32))
    binders = {}
    for name, (_, kernel) in kernels_of_package().items():
        kernel = getattr(kernel, "kernel", kernel)
        if not isinstance(kernel, JITFunction):
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
        binders[name] = create_function_from_signature(kernel.signature, kernel.params, target)
    keys: dict[str, set[str]] = {}
    for launch in launches:
        _, specialization, _ = binders[launch.kernel](**launch.arguments)
        keys.setdefault(launch.kernel, set()).add(f"{specialization} {launch.options}")
    return keys


@pytest.fixture
def meta_launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches made for meta tensors, which the launchers take to lie on an H200."""
    pytest.importorskip("triton")
    from fusednorm.triton_kernels import launch
    from fusednorm.triton_kernels.config import Architecture

    h200 = Architecture(warp_size=32, processors=132, shared_bytes=232448, registers=65536)
    monkeypatch.setattr(launch, "architecture", lambda device: h200)
    monkeypatch.setattr(launch, "device_guard", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(backends, "kernels", lambda device: "triton")
    return record_launches(monkeypatch, execute=False)


def launch_both(rows: int, cols: int, dtype: torch.dtype, stride: int, eps: float = 1e-5) -> None:
    """Launch forward and backward for meta tensors whose rows are `stride` elements apart."""
    x, dy = (
        torch.empty_strided((rows, cols), (stride, 1), dtype=dtype, device="meta") for _ in range(2)
    )
    weight, bias = (torch.empty(cols, dtype=dtype, device="meta") for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    spec = plain_spec((cols,), eps, dtype)
    operands = Operands(x, weight=weight, bias=bias)
    y, _ = autograd.run(operands, spec, backends.launchers("triton"), want_h=False)
    torch.autograd.grad(y, inputs, dy)


def launch_every_term(rows: int, dropout_p: float) -> None:
    """Launch forward and backward of everything for `rows` rows of each of 2 to 6 samples."""
    samples, cols = 2 + rows % 5, 1024
    shapes = {"x": (samples * rows, cols), "residual": (samples * rows, cols)}
    shapes |= {"gate": (samples, cols), "weight": (cols,), "bias": (cols,)}
    shapes |= {"scale": (samples, cols), "shift": (samples, cols)}
    inputs = [
        torch.empty(shape, dtype=BF16, device="meta", requires_grad=True)
        for shape in shapes.values()
    ]
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    spec = plain_spec((cols,), 1e-5, BF16)._replace(h_dtype=BF16, dropout_p=dropout_p)
    launchers = backends.launchers("triton")
    z, h = autograd.run(Operands(*inputs, seed), spec, launchers, want_h=True)
    torch.autograd.grad([z, h], inputs, [torch.empty_like(z), torch.empty_like(z)])


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("rows", [1, 300])
def test_grids_of_the_longest_rows(
    meta_launches: list[Launch], rows: int, dtype: torch.dtype
) -> None:
    """The second and third axis of a grid end at 65535, so column blocks are on the first."""
    launch_both(rows, 2**28 + 8, dtype, stride=2**28 + 8)
    assert len(meta_launches) == 4
    for launch in meta_launches:
        first, *others = launch.grid
        assert first < 2**31, launch.kernel
        assert all(axis <= 65535 for axis in others), launch.kernel


def test_rows_samples_and_rates_compile_nothing(meta_launches: list[Launch]) -> None:
    """With every term neither M nor the number of samples nor the rate is compiled in.

    But samples of one row are rows with terms of their own, whose gradients are no sums.
    """
    for rows in MANY_ROWS:
        if rows > 1:
            launch_every_term(rows, 1 / (rows + 1))
    keys = compile_keys(meta_launches)
    assert len(keys) == 3
    assert {name: len(found) for name, found in keys.items()} == dict.fromkeys(keys, 1)
    for dropout_p in (0.0, 0.1, 0.5):
        launch_every_term(1, dropout_p)
    found = compile_keys(meta_launches)
    assert found.keys() == keys.keys()
    assert max(map(len, found.values())) == 2


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("cols", COLS)
def test_number_of_rows_compiles_nothing(
    meta_launches: list[Launch], cols: int, dtype: torch.dtype
) -> None:
    """Fifty numbers of rows need one compiled variant of each kernel."""
    assert len(set(MANY_ROWS)) == 50
    for rows in MANY_ROWS:
        launch_both(rows, cols, dtype, stride=cols)
    keys = compile_keys(meta_launches)
    assert {"layer_norm_fwd_kernel", "layer_norm_bwd_kernel"} <= set(keys)
    assert {name: len(found) for name, found in keys.items()} == dict.fromkeys(keys, 1)


def test_strides_and_eps_compile_nothing(meta_launches: list[Launch]) -> None:
    """Neither does a row stride, as long as rows stay as aligned as they were, nor eps."""
    for stride in (1024, 1032, 1040, 2048, 2**31 + 8, 2**32):
        for eps in (0.0, 1e-6, 1.0, 1):
            launch_both(7, 1024, BF16, stride, eps)
    keys = compile_keys(meta_launches)
    assert {name: len(found) for name, found in keys.items()} == dict.fromkeys(keys, 1)


def test_compile_keys_tell_variants_apart(meta_launches: list[Launch]) -> None:
    """The two tests above would see a difference: a dtype, a form, a misaligned row."""
    for cols, dtype, stride in ((1024, BF16, 1024), (1024, F32, 1024), (1024, BF16, 1025)):
        launch_both(7, cols, dtype, stride)
    keys = compile_keys(meta_launches)
    assert len(keys["layer_norm_fwd_kernel"]) == len(keys["layer_norm_bwd_kernel"]) == 3


@needs_cuda
@pytest.mark.parametrize("cols", [64, 1000, 8192, 40000])
def test_number_of_rows_compiles_nothing_on_the_device(kernels: torch.device, cols: int) -> None:
    """The same, counted in the caches of what Triton has really compiled."""

    def compiled() -> dict[str, int]:
        return {
            name: sum(len(cache[0]) for cache in kernel.device_caches.values())
            for name, (_, kernel) in kernels_of_package().items()
        }

    counts = []
    for rows in MANY_ROWS[:-1]:
        forward_backward(norm, make_case(rows, cols, torch.bfloat16, kernels))
        counts.append(compiled())
    assert counts[0]["layer_norm_fwd_kernel"] > 0
    assert counts[0]["layer_norm_bwd_kernel"] > 0
    assert counts == [counts[0]] * len(counts)


@needs_cuda
def test_cuda_graph_of_the_first_call(kernels: torch.device) -> None:
    """A capture may come before anything was compiled; its replay has the bits of an eager call."""
    case = make_case(37, 1111, torch.bfloat16, kernels)
    for _, kernel in kernels_of_package().values():
        kernel.device_caches.clear()
    leaves = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = norm(*leaves)
        grads = torch.autograd.grad(y, leaves, case.dy)
    for _ in range(2):
        with torch.no_grad():
            leaves[0].normal_()
        graph.replay()
        fresh = Case(leaves[0].detach(), case.weight, case.bias, case.dy)
        assert_same_bits((y.detach(), *grads), forward_backward(norm, fresh))
