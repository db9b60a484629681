"""Promise 12: an error names the operation, the argument, what was expected and what came."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SERVING
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusednorm
from fusednorm import backends

FLOATS = "float16, bfloat16, float32 or float64"
SEQUENCE = "layer_norm: expected normalized_shape to be an int or a sequence of ints, got "
UNFIT = "backends.use: expected tensors that the triton backend can serve, got "


@pytest.fixture(params=SERVING)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every message is the same whichever implementation would have run."""
    with backends.use(request.param):
        yield request.param


class _NoOperators(TorchDispatchMode):
    """Fails on every operator: nothing may be allocated, computed or written.

    Shapes may be left to torch's norm, which must refuse them, and does so before it allocates.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is torch.ops.aten.native_layer_norm.default:
            func(*args, **kwargs or {})
        raise AssertionError(f"{func} ran before the arguments were checked")


def _message(error: type[Exception], call: Callable[[], object]) -> str:
    """Return the message of the error that `call` raises before it runs any operator."""
    with pytest.raises(error) as caught, _NoOperators():  # type: ignore[no-untyped-call]
        call()
    assert caught.type is error
    return str(caught.value)


def _ones(*size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(size, dtype=dtype, device=device)


class _Whatever:
    def __repr__(self) -> str:
        return "whatever"


# layer_norm


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "NoneType"),
        ([[1.0, 2.0]], "list"),
        (1.5, "float"),
        (np.ones((2, 4), np.float32), "ndarray"),
    ],
)
def test_input_that_is_no_tensor(backend: str, value: Any, name: str) -> None:
    """Only the kind is shown: an array may be large."""
    message = _message(TypeError, lambda: fusednorm.layer_norm(value, 4))
    assert message == f"layer_norm: expected input to be a Tensor, got {name}"


OTHER_DTYPES = [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("argument", ["input", "weight", "bias"])
@pytest.mark.parametrize("rows", [2, 0])
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_dtype(backend: str, argument: str, dtype: torch.dtype, rows: int) -> None:
    """Integers, complex numbers and eight-bit floats are refused, also without elements."""
    arguments: dict[str, Any] = {"input": _ones(rows, 4), "weight": _ones(4), "bias": _ones(4)}
    arguments[argument] = arguments[argument].to(dtype)
    message = _message(TypeError, lambda: fusednorm.layer_norm(normalized_shape=4, **arguments))
    name = str(dtype).removeprefix("torch.")
    assert message == f"layer_norm: expected {argument} of dtype {FLOATS}, got {name}"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (4.0, "4.0"),
        ("4", "'4'"),
        ({4}, "{4}"),
        ({4: 4}, "{4: 4}"),
        (_Whatever(), "whatever"),
        ([4.0], "[4.0]"),
        ((4.0,), "(4.0,)"),
        ([4, None], "[4, None]"),
        (["4"], "['4']"),
        (("4",), "('4',)"),
        (b"4", "b'4'"),
    ],
    ids=repr,
)
def test_normalized_shape_of_another_kind(backend: str, value: Any, shown: str) -> None:
    """Whatever is not an int or a sequence of ints is shown as it was written."""
    x = _ones(2, 4)
    assert _message(TypeError, lambda: fusednorm.layer_norm(x, value)) == SEQUENCE + shown


@pytest.mark.parametrize("value", [True, (True,), [True]], ids=repr)
def test_normalized_shape_of_truth_values(backend: str, value: Any) -> None:
    """True is no size, as it is none to torch."""
    x = _ones(2, 1)
    assert _message(TypeError, lambda: fusednorm.layer_norm(x, value)) == SEQUENCE + repr(value)


@pytest.mark.parametrize("value", [(), [], torch.Size([])], ids=repr)
def test_empty_normalized_shape(backend: str, value: Any) -> None:
    """There is nothing to normalise over."""
    x = _ones(2, 4)
    message = _message(ValueError, lambda: fusednorm.layer_norm(x, value))
    assert message == "layer_norm: expected normalized_shape of at least one dimension, got ()"


@pytest.mark.parametrize(
    ("size", "shape", "expected"),
    [
        ((2, 4), 5, "(*, 5)"),
        ((2, 4), (5,), "(*, 5)"),
        ((2, 4), [3, 4], "(*, 3, 4)"),
        ((2, 4), (1, 2, 4), "(*, 1, 2, 4)"),
        ((2, 4), 2, "(*, 2)"),
        ((2, 4), -1, "(*, -1)"),
        ((2, 4), (2, -1), "(*, 2, -1)"),
        ((0, 4), 0, "(*, 0)"),
        ((2, 0), 4, "(*, 4)"),
        ((), 1, "(*, 1)"),
        ((4,), (4, 4), "(*, 4, 4)"),
        ((2, 4), 2**70, f"(*, {2**70})"),
    ],
    ids=str,
)
def test_input_of_another_shape(
    backend: str, size: tuple[int, ...], shape: Any, expected: str
) -> None:
    """The expected shape is spelled out, and -1 is not a wildcard."""
    x = _ones(*size)
    message = _message(ValueError, lambda: fusednorm.layer_norm(x, shape))
    assert message == f"layer_norm: expected input of shape {expected}, got {size}"


@pytest.mark.parametrize("argument", ["weight", "bias"])
@pytest.mark.parametrize(("value", "name"), [([1.0] * 4, "list"), (1.0, "float"), (4, "int")])
def test_parameter_that_is_no_tensor(backend: str, argument: str, value: Any, name: str) -> None:
    """A number is not broadcast."""
    x = _ones(2, 4)
    message = _message(TypeError, lambda: fusednorm.layer_norm(x, 4, **{argument: value}))
    assert message == f"layer_norm: expected {argument} to be a Tensor or None, got {name}"


@pytest.mark.parametrize("argument", ["weight", "bias"])
@pytest.mark.parametrize(
    ("shape", "given"),
    [((4,), (3,)), ((4,), (1,)), ((4,), ()), ((4,), (1, 4)), ((2, 4), (8,)), ((2, 4), (4, 2))],
    ids=str,
)
def test_parameter_of_another_shape(
    backend: str, argument: str, shape: tuple[int, ...], given: tuple[int, ...]
) -> None:
    """Parameters do not broadcast: their shape is normalized_shape."""
    x = _ones(3, 2, 4)
    parameter: dict[str, Any] = {argument: _ones(*given)}
    message = _message(ValueError, lambda: fusednorm.layer_norm(x, shape, **parameter))
    assert message == f"layer_norm: expected {argument} of shape {shape}, got {given}"


@pytest.mark.parametrize("argument", ["weight", "bias"])
@pytest.mark.parametrize(("input_device", "other"), [("cpu", "meta"), ("meta", "cpu")])
def test_parameter_on_another_device(
    backend: str, argument: str, input_device: str, other: str
) -> None:
    """Both devices are named before any kernel is given a foreign pointer."""
    x = _ones(2, 4, device=input_device)
    parameter: dict[str, Any] = {argument: _ones(4, device=other)}
    message = _message(ValueError, lambda: fusednorm.layer_norm(x, 4, **parameter))
    assert message == (
        f"layer_norm: expected {argument} on {input_device}, where input is, got {other}"
    )


@pytest.mark.parametrize(
    ("value", "name"), [(None, "NoneType"), ("1e-5", "str"), (1j, "complex"), ([1e-5], "list")]
)
def test_eps_that_is_no_number(backend: str, value: Any, name: str) -> None:
    """Eps is not parsed."""
    x = _ones(2, 4)
    message = _message(TypeError, lambda: fusednorm.layer_norm(x, 4, eps=value))
    assert message == f"layer_norm: expected eps to be a float, got {name}"


@pytest.mark.parametrize(
    "eps", [1, True, np.float64(0.5), np.float32(0.5), torch.tensor(0.5)], ids=repr
)
def test_eps_of_every_kind_that_torch_takes(backend: str, device: torch.device, eps: Any) -> None:
    """NumPy's numbers are numbers."""
    x = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    torch.testing.assert_close(
        fusednorm.layer_norm(x, 3, eps=eps), F.layer_norm(x, (3,), eps=float(eps))
    )


@pytest.mark.parametrize(
    "shape", [4, (4,), [4], torch.Size([4]), range(4, 5), [np.int64(4)], (np.int32(4),)], ids=repr
)
def test_normalized_shape_of_every_kind(backend: str, device: torch.device, shape: Any) -> None:
    """An int stands for one dimension, and any sequence will do."""
    x = torch.randn(2, 4, device=device)
    torch.testing.assert_close(fusednorm.layer_norm(x, shape), F.layer_norm(x, (4,)))


@pytest.mark.parametrize(
    "convert", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn], ids=lambda f: f.__name__
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_input_without_strides(backend: str, convert: Callable[[Tensor], Tensor]) -> None:
    """What has no rows in memory is named, not handed to a kernel."""
    x = convert(_ones(2, 4))
    layout = str(x.layout).removeprefix("torch.")
    message = _message(TypeError, lambda: fusednorm.layer_norm(x, 4))
    assert message == f"layer_norm: expected input of strided layout, got {layout}"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensor() -> None:
    """Torch normalises jagged batches; the kernels say that they do not."""
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    torch.testing.assert_close(
        fusednorm.layer_norm(nested, 4).values(), F.layer_norm(torch.cat(rows), (4,))
    )
    with backends.use("triton"), pytest.raises((ValueError, TypeError), match="expected"):
        fusednorm.layer_norm(nested, 4)


@pytest.mark.parametrize("shape", [(5,), (2, 2, 4)], ids=str)
def test_torch_refuses_before_it_allocates(shape: tuple[int, ...]) -> None:
    """What the fast way through torch's norm leaves to it costs no memory when it is wrong."""
    x, weight = _ones(2, 4), _ones(*shape)
    # Without acc_events torch 2.10 warns that it keeps the events of one cycle.
    profiler = torch.profiler.profile(profile_memory=True, acc_events=True)  # type: ignore[no-untyped-call]
    with profiler as profile:
        for arguments in ((x, shape), (x, (4,), weight), (x, (4,), None, weight)):
            with pytest.raises(ValueError, match="expected"):
                fusednorm.layer_norm(*arguments)  # type: ignore[arg-type]
    ran = {(event.name, event.cpu_memory_usage) for event in profile.events()}  # type: ignore[union-attr]
    assert ran == {("aten::layer_norm", 0), ("aten::native_layer_norm", 0)}


def test_sizes_that_torch_would_take() -> None:
    """The fast way through torch's norm takes nothing that the checks refuse."""
    x, sizes = _ones(2, 4), (torch.tensor(4),)
    assert F.layer_norm(x, sizes).shape == (2, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected normalized_shape to be an int or"):
        fusednorm.layer_norm(x, sizes)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensor() -> None:
    """Torch's encoder layers make them in inference, and give them to their norms."""
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    norm, x = fusednorm.LayerNorm(4), torch.nested.nested_tensor(rows)
    expected = F.layer_norm(torch.cat(rows), (4,))
    torch.testing.assert_close(torch.cat(norm(x).unbind()), expected)


def test_too_many_arguments() -> None:
    """There is no sixth argument to be mistaken for another."""
    with pytest.raises(TypeError, match="takes from 2 to 5 positional arguments but 6 were given"):
        fusednorm.layer_norm(_ones(2, 4), 4, None, None, 1e-5, 1)  # type: ignore[call-arg]


def test_the_first_wrong_argument_is_named(backend: str) -> None:
    """The order is that of the arguments: input, its shape, weight, bias, eps."""
    wrong: dict[str, Any] = {"weight": _ones(3), "bias": _ones(2), "eps": "x"}
    x = _ones(2, 4)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("input", lambda: fusednorm.layer_norm(None, "4", **wrong)),  # type: ignore[arg-type]
        ("normalized_shape", lambda: fusednorm.layer_norm(x, "4", **wrong)),  # type: ignore[arg-type]
        ("input of shape", lambda: fusednorm.layer_norm(x, 5, **wrong)),
        ("weight", lambda: fusednorm.layer_norm(x, 4, **wrong)),
        ("bias", lambda: fusednorm.layer_norm(x, 4, **wrong | {"weight": None})),
        ("eps", lambda: fusednorm.layer_norm(x, 4, eps="x")),  # type: ignore[arg-type]
    ]
    for name, call in calls:
        with pytest.raises((TypeError, ValueError), match=f"^layer_norm: expected {name} "):
            call()


def test_the_module_raises_the_same(backend: str) -> None:
    """`LayerNorm` adds no message of its own, and a failed call leaves it as it was."""
    norm = fusednorm.LayerNorm(4)
    x = _ones(2, 5).requires_grad_()
    before = [parameter.detach().clone() for parameter in norm.parameters()]
    message = _message(ValueError, lambda: norm(x))
    assert message == "layer_norm: expected input of shape (*, 4), got (2, 5)"
    for parameter, value in zip(norm.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None
    x = _ones(2, 4).to("meta")
    message = _message(ValueError, lambda: norm(x))
    assert message == "layer_norm: expected weight on meta, where input is, got cpu"
    assert isinstance(norm, nn.LayerNorm)


# backends


@pytest.mark.parametrize("name", ["cudnn", "Triton", "", None, 1, ["triton"]], ids=repr)
def test_unknown_backend(name: Any) -> None:
    """The known names are listed, and the request in force stays in force."""
    with backends.use("torch"):

        def enter() -> None:
            with backends.use(name):
                pytest.fail("entered")

        message = _message(ValueError, enter)
        assert message == f"backends.use: expected one of triton, cuda, cpu, torch, got {name!r}"
        assert backends.choose(_ones(1)).reason == "requested by backends.use"


def test_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason that detection found is part of the message."""
    absent = backends._TABLE["triton"]._replace(missing=lambda: "triton is on holiday")
    monkeypatch.setitem(backends._TABLE, "triton", absent)

    def enter() -> None:
        with backends.use("triton"):
            pytest.fail("entered")

    message = _message(ValueError, enter)
    assert message == (
        "backends.use: expected an installed backend, got 'triton': triton is on holiday"
    )
    with backends.use("torch"):
        assert backends.choose(_ones(1)).backend == "torch"


def test_request_that_does_not_serve_the_device() -> None:
    """No silent fallback from an explicit request, neither in the question nor in the call."""
    x, weight = _ones(2, 4, device="meta"), _ones(4, device="meta")
    expected = UNFIT + "meta: the kernels are built for cuda devices, not meta"
    with backends.use("triton"):
        assert _message(ValueError, lambda: backends.choose(x)) == expected
        assert _message(ValueError, lambda: fusednorm.layer_norm(x, 4, weight)) == expected


def test_request_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for Triton on the CPU says what makes it possible."""
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    x = _ones(2, 4)
    backends._triton_unfit.cache_clear()
    try:
        with backends.use("triton"):
            message = _message(ValueError, lambda: fusednorm.layer_norm(x, 4))
    finally:
        backends._triton_unfit.cache_clear()
    assert message == UNFIT + "cpu: cpu tensors need Triton's interpreter (TRITON_INTERPRET=1)"


def test_unknown_backend_in_the_environment() -> None:
    """The variable is named, at import, before anything else can go wrong."""
    done = subprocess.run(
        [sys.executable, "-c", "import fusednorm"],
        env=os.environ | {"FUSEDNORM_BACKEND": "cudnn"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ValueError: FUSEDNORM_BACKEND: expected one of triton, cuda, cpu, torch, got 'cudnn'"
    )


# The functions of the whole equation


def _add(**changes: Any) -> Callable[[], object]:
    """Return a call of `add_layer_norm` that is right but for what is changed."""
    arguments: dict[str, Any] = {"input": _ones(2, 3, 4), "residual": _ones(2, 3, 4)}
    arguments |= {"normalized_shape": 4} | changes
    return lambda: fusednorm.add_layer_norm(**arguments)


WRONG_TERMS = [
    (3,),
    (3, 4),
    (3, 1, 4),
    (2, 1, 3),
    (1, 3, 4),
    (2, 4),
    (1, 2, 1, 4),
    (5, 1, 1),
]


@pytest.mark.parametrize("size", WRONG_TERMS, ids=str)
@pytest.mark.parametrize("name", ["gate", "scale", "shift"])
def test_shape_of_a_term(backend: str, name: str, size: tuple[int, ...]) -> None:
    """Terms that cover no consecutive rows, or not all, are refused, and what fits is shown."""
    message = _message(ValueError, _add(**{name: _ones(*size)}))
    expected = "shape (4,), (2, 1, 4) or (2, 1, 1)"
    assert message == f"add_layer_norm: expected {name} of {expected}, got {size}"


@pytest.mark.parametrize(
    "size", [(), (1,), (4,), (1, 4), (1, 1, 4), (2, 1, 1), (2, 1, 4), (2, 3, 1), (2, 3, 4)]
)
@pytest.mark.parametrize("name", ["gate", "scale", "shift"])
def test_shapes_of_terms_that_fit(backend: str, name: str, size: tuple[int, ...]) -> None:
    """Whatever broadcasts over whole samples is taken, and gives what broadcasting gives."""
    x, residual = torch.randn(2, 2, 3, 4)
    term = torch.randn(size, requires_grad=True)
    z, h = fusednorm.add_layer_norm(x, residual, 4, **{name: term})
    expected_h = residual + x * term if name == "gate" else residual + x
    expected = F.layer_norm(expected_h, (4,))
    if name != "gate":
        expected = expected * (1 + term) if name == "scale" else expected + term
    torch.testing.assert_close(h, expected_h)
    torch.testing.assert_close(z, expected)
    dz = torch.randn_like(z)
    torch.testing.assert_close(
        torch.autograd.grad(z, term, dz), torch.autograd.grad(expected, term, dz)
    )


def test_terms_of_different_samples(backend: str) -> None:
    """One number for each sample and one vector for each row go together."""
    x = torch.randn(2, 3, 4)
    gate, scale = torch.randn(2, 1, 1), torch.randn(2, 3, 4)
    z, h = fusednorm.add_layer_norm(x, None, 4, gate=gate, scale=scale)
    torch.testing.assert_close(h, gate * x)
    torch.testing.assert_close(z, F.layer_norm(gate * x, (4,)) * (1 + scale))


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 5), (2, 3), (1, 3, 4), (6, 4)], ids=str)
def test_shape_of_the_residual(backend: str, size: tuple[int, ...]) -> None:
    """The residual is not broadcast."""
    message = _message(ValueError, _add(residual=_ones(*size)))
    assert message == f"add_layer_norm: expected residual of shape (2, 3, 4), got {size}"


@pytest.mark.parametrize("p", [1, 1.0, 1.5, -0.1, float("nan"), float("inf")], ids=str)
def test_rate_of_dropout(backend: str, p: float) -> None:
    """A rate of 1 would divide by 0."""
    message = _message(ValueError, _add(dropout_p=p))
    assert message == f"add_layer_norm: expected dropout_p in [0, 1), got {float(p)}"


def test_rate_of_another_kind(backend: str) -> None:
    """The rate is one number."""
    message = _message(TypeError, _add(dropout_p="half"))
    assert message == "add_layer_norm: expected dropout_p to be a float, got str"


@pytest.mark.parametrize("name", ["residual", "gate", "scale", "shift"])
def test_device_of_a_term(backend: str, name: str) -> None:
    """Everything is where the input is."""
    size = (2, 3, 4) if name == "residual" else (4,)
    message = _message(ValueError, _add(**{name: _ones(*size, device="meta")}))
    assert message == f"add_layer_norm: expected {name} on cpu, where input is, got meta"


@pytest.mark.parametrize("name", ["residual", "gate", "scale", "shift"])
def test_kind_and_dtype_of_a_term(backend: str, name: str) -> None:
    """Everything is a floating-point tensor or None."""
    size = (2, 3, 4) if name == "residual" else (4,)
    message = _message(TypeError, _add(**{name: 1.0}))
    assert message == f"add_layer_norm: expected {name} to be a Tensor or None, got float"
    message = _message(TypeError, _add(**{name: _ones(*size, dtype=torch.int64)}))
    assert message == f"add_layer_norm: expected {name} of dtype {FLOATS}, got int64"


def test_dtype_of_the_stream(backend: str) -> None:
    """The stream has a floating-point dtype."""
    message = _message(TypeError, _add(residual_dtype=torch.int32))
    expected = f"residual_dtype to be None, {FLOATS}"
    assert message == f"add_layer_norm: expected {expected}, got torch.int32"


@pytest.mark.parametrize("function", ["rms_norm", "add_rms_norm", "modulated_layer_norm"])
def test_every_function_names_itself(backend: str, function: str) -> None:
    """What is checked in one place is reported for the function that was called."""
    more: dict[str, tuple[Any, ...]] = {"rms_norm": (), "add_rms_norm": (None,)}
    before = more.get(function, ())
    after = (None, None) if function == "modulated_layer_norm" else ()
    call, x = getattr(fusednorm, function), _ones(2, 5)
    message = _message(ValueError, lambda: call(x, *before, 4, *after))
    assert message == f"{function}: expected input of shape (*, 4), got (2, 5)"
