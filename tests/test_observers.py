"""Promise 13: whoever looks at operators sees some that compute, never an allocation."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusednorm
from fusednorm import backends, observers

KEYS = [
    key
    for key in torch._C.DispatchKey.__members__.values()
    if torch._C.DispatchKeySet(key).raw_repr()
]
needs_extension = pytest.mark.skipif(
    "cpu" not in backends.available(), reason="the extension was not built"
)


def _extension_sees_nobody() -> bool:
    """Ask the extension about a call that is plain unless somebody looks."""
    return backends.is_plain()((8,), torch.empty(2, 8), None, None, None)


# The predicate


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_dispatch_key_that_a_thread_includes_is_an_observer(key: Any) -> None:
    """One that a later torch adds as well; both of the two that are always there are not."""
    usual = bool(observers.USUAL & torch._C.DispatchKeySet(key).raw_repr())
    with torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set() | torch._C.DispatchKeySet(key),
        torch._C._dispatch_tls_local_exclude_set(),
    ):
        seen = observers.operators_watched()
    assert seen is (not usual)


def _vmapped(check: Callable[[], Any]) -> None:
    torch.func.vmap(lambda x: (check(), x)[1])(torch.ones(2))


def _traced(check: Callable[[], Any]) -> None:
    torch.jit.trace(lambda x: (check(), x + 1)[1], torch.ones(2), check_trace=False)


def _made_fx(check: Callable[[], Any]) -> None:
    make_fx(lambda x: (check(), x + 1)[1])(torch.ones(2))


def _differentiated(check: Callable[[], Any]) -> None:
    torch.func.grad(lambda x: (check(), x.sum())[1])(torch.ones(2))


def _batched(check: Callable[[], Any]) -> None:
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: check())
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)


def _within(manager: Callable[[], Any]) -> Callable[[Callable[[], Any]], None]:
    def run(check: Callable[[], Any]) -> None:
        with manager():
            check()

    return run


OBSERVERS = {
    "dispatch mode": _within(lambda: _Operators()),
    "flop counter": _within(lambda: FlopCounterMode(display=False)),
    "fake tensors": _within(FakeTensorMode),
    "tracer": _traced,
    "make_fx": _made_fx,
    "vmap": _vmapped,
    "grad": _differentiated,
    "is_grads_batched": _batched,
    "forward mode": _within(forward_ad.dual_level),
}
NOBODY = {
    "nothing": _within(contextlib.nullcontext),
    "no_grad": _within(torch.no_grad),
    "inference mode": _within(torch.inference_mode),
    "autocast": _within(lambda: torch.autocast("cpu")),
    "saved tensors": _within(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    ),
}


@needs_extension
@pytest.mark.parametrize(("name", "run"), [*OBSERVERS.items(), *NOBODY.items()])
def test_the_extension_and_python_agree(name: str, run: Callable[..., None]) -> None:
    """The check of a plain call in C++ has the observers of the one in Python."""
    seen: list[tuple[bool, bool]] = []

    def check() -> None:
        python = observers.operators_watched() or observers.transforms_active()
        seen.append((python, not _extension_sees_nobody()))

    run(check)
    assert set(seen) == {(name in OBSERVERS, name in OBSERVERS)}


@pytest.mark.parametrize(("name", "run"), [*OBSERVERS.items(), *NOBODY.items()])
def test_a_backward_that_somebody_sees_is_not_for_the_launchers(
    name: str, run: Callable[..., None]
) -> None:
    """It skips the dispatcher: neither an observer nor a batched gradient may meet it."""
    seen: list[bool] = []

    def check() -> None:
        with torch.no_grad():
            seen.append(observers.nobody_looks(torch.empty(2), None))

    run(check)
    assert set(seen) == {name in NOBODY}


def test_a_backward_that_is_recorded_is_not_for_the_launchers() -> None:
    """Nor is one of a tensor that has rules of its own."""
    assert not observers.nobody_looks(torch.empty(2))
    with torch.no_grad():
        assert not observers.nobody_looks(None, torch.empty(2).as_subclass(_Subclass))


class _Subclass(Tensor):
    pass


# Tracing


def _module(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LayerNorm": (lambda: fusednorm.LayerNorm(8), 1),
    "RMSNorm": (lambda: fusednorm.RMSNorm(8), 1),
    "AddLayerNorm": (lambda: fusednorm.AddLayerNorm(8, prenorm=True, layer_scale=0.5), 2),
    "AddRMSNorm": (lambda: fusednorm.AddRMSNorm(8), 2),
    "AdaLayerNorm": (lambda: fusednorm.AdaLayerNorm(8, 8), 2),
}


def _inputs(name: str, count: int) -> tuple[Tensor, ...]:
    x = torch.randn(2, 3, 8)
    if name == "AdaLayerNorm":
        return x, torch.randn(2, 8)
    return (x, torch.randn(2, 3, 8))[:count]


def _assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


REQUESTS = [None, *(name for name in backends.available() if name in ("cpu", "torch", "triton"))]


def _requesting(backend: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if backend is None else backends.use(backend)


@pytest.mark.parametrize("backend", REQUESTS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_a_trace_computes(name: str, frozen: bool, backend: str | None) -> None:
    """What `torch.jit.trace` recorded gives the module's results for other inputs, from a file."""
    make, count = MODULES[name]
    module = _module(make).requires_grad_(not frozen)
    given = _inputs(name, count)
    with warnings.catch_warnings(), _requesting(backend):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`torch.jit.")
        traced = torch.jit.trace(module, given)
        file = io.BytesIO()
        torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for other in (_inputs(name, count), given):
        _assert_equal(loaded(*other), module(*other))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm"])
def test_a_trace_holds_no_number_of_rows(name: str) -> None:
    """A traced norm serves batches of any size, as a traced `nn.LayerNorm` does."""
    make, count = MODULES[name]
    module = _module(make).requires_grad_(False)
    traced = torch.jit.trace(module, _inputs(name, count))
    other = tuple(torch.randn(4, 5, 8) for _ in range(count))
    _assert_equal(traced(*other), module(*other))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_script(name: str) -> None:
    """`torch.jit.script` compiles the modules that are torch's, with torch's functions."""
    make, _ = MODULES[name]
    module = _module(make)
    x = torch.randn(2, 3, 8)
    _assert_equal(torch.jit.script(module)(x), module(x))


# Torch functions


class _Functions(TorchFunctionMode):
    """Notes what is called, and by whom it is called again."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.called.append(function)
        return function(*args, **(kwargs or {}))


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "layer_norm": lambda x: fusednorm.layer_norm(x, 8),
    "rms_norm": lambda x: fusednorm.rms_norm(x, (8,)),
    "add_layer_norm": lambda x: fusednorm.add_layer_norm(
        x, x, 8, gate=x.new_ones(8), dropout_p=0.5
    ),
    "add_rms_norm": lambda x: fusednorm.add_rms_norm(x, None, 8, eps=0.1, residual_dtype=x.dtype),
    "modulated_layer_norm": lambda x: fusednorm.modulated_layer_norm(x, 8, x.new_ones(8), None),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_mode_sees_the_function(name: str) -> None:
    """It is called by its public name with arguments that give the same result."""
    x = torch.randn(2, 3, 8)
    torch.manual_seed(1)
    expected = CALLS[name](x)
    with _Functions() as mode:
        torch.manual_seed(1)
        actual = CALLS[name](x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    ours = [f for f in mode.called if getattr(f, "__module__", "") == "fusednorm.functional"]
    assert ours == [getattr(fusednorm, name)]
    assert torch.empty_like not in mode.called


@pytest.mark.parametrize("name", MODULES)
def test_a_function_mode_sees_the_function_of_a_module(name: str) -> None:
    """So does one around a module."""
    make, count = MODULES[name]
    module, given = _module(make), _inputs(name, count)
    with _Functions() as mode:
        module(*given)
    assert [getattr(f, "__module__", "") for f in mode.called].count("fusednorm.functional") == 1
    assert torch.empty_like not in mode.called


class _Tagged(Tensor):
    """A subclass with the protocol of `Tensor` itself."""


@pytest.mark.parametrize("name", CALLS)
def test_a_subclass_comes_back(name: str) -> None:
    """As from a function of torch, results have the class of the argument."""
    results = CALLS[name](torch.randn(2, 3, 8).as_subclass(_Tagged))
    results = results if isinstance(results, tuple) else (results,)
    assert {type(result) for result in results} == {_Tagged}


@pytest.mark.parametrize("name", MODULES)
def test_fx(name: str) -> None:
    """A symbolic trace has the function as one node, and computes."""
    make, count = MODULES[name]
    module = _module(make)
    if name == "AdaLayerNorm":  # checks the shapes of its arguments, which a proxy has not
        with pytest.raises(TypeError, match="expected x to be a Tensor, got Proxy"):
            torch.fx.symbolic_trace(module)
        return
    graph = torch.fx.symbolic_trace(module)
    functions = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert sum(f.__module__ == "fusednorm.functional" for f in functions) == 1
    given = _inputs(name, count)
    torch.testing.assert_close(graph(*given), module(*given), rtol=0, atol=0)


# Modes of the dispatcher


class _Operators(TorchDispatchMode):
    """Notes the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.called.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", REQUESTS)
@pytest.mark.parametrize("name", CALLS)
def test_a_dispatch_mode_sees_operators_and_changes_no_bit(name: str, backend: str | None) -> None:
    """It sees the operator that computes, and the result is the one without it."""
    x = torch.randn(2, 3, 8)
    with _requesting(backend):
        torch.manual_seed(1)
        expected = CALLS[name](x)
        with _Operators() as mode:
            torch.manual_seed(1)
            actual = CALLS[name](x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert any("empty" not in operator for operator in mode.called)


def test_fake_tensors_of_a_device_that_is_not_there() -> None:
    """Shapes, dtypes and devices can be asked for without a driver, as of `nn.LayerNorm`."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, device="cuda", dtype=torch.bfloat16)
        for name, call in CALLS.items():
            results = call(x)
            for result in results if isinstance(results, tuple) else (results,):
                assert (result.device.type, result.dtype) == ("cuda", torch.bfloat16), name
                assert result.shape == x.shape


# Export to ONNX through the tracer


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "AddLayerNorm"])
def test_what_the_exporter_of_traces_sees(name: str) -> None:
    """The graph that legacy ONNX export reads holds operators of torch alone."""
    make, count = MODULES[name]
    module = _module(make).requires_grad_(False)
    traced = torch.jit.trace(module, _inputs(name, count))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::empty_like" not in kinds
    assert {kind for kind in kinds if not kind.startswith(("aten::", "prim::"))} == set()
    assert kinds & {"aten::layer_norm", "aten::rms_norm"}


def test_environment_of_the_tests() -> None:
    """These tests stand for what users get: nothing is requested."""
    assert os.environ.get("FUSEDNORM_BACKEND") is None
    x = torch.randn(2, 8)
    torch.testing.assert_close(fusednorm.layer_norm(x, 8), F.layer_norm(x, (8,)))
