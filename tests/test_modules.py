"""`fusednorm.modules`: a module behaves as the torch module or the composition it stands for."""

import copy
import doctest
import inspect
import io
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from fusednorm import backends, modules
from fusednorm.modules import AdaLayerNorm, AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

AFFINE = [
    pytest.param({"elementwise_affine": affine, "bias": bias}, id=f"affine={affine},bias={bias}")
    for affine in (True, False)
    for bias in (True, False)
]
SHAPES = [7, (7,), [3, 7], torch.Size([2, 3, 7])]


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    """Run torch's own operators, bit for bit, except where a test forces the kernels."""
    with backends.use("torch"):
        yield


def make_pair(shape: Any = 7, **options: Any) -> tuple[LayerNorm, nn.LayerNorm]:
    """A fused norm and torch's, with the same random parameters."""
    fused, original = LayerNorm(shape, **options), nn.LayerNorm(shape, **options)
    for parameter, other in zip(fused.parameters(), original.parameters(), strict=True):
        nn.init.normal_(other)
        parameter.data.copy_(other.data)
    return fused, original


def output_and_gradients(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = norm(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(t.grad for t in (x, *norm.parameters()))]


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize(("fused", "original"), [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)])
def test_only_forward_differs_from_torch(fused, original):
    assert {name for name in vars(fused) if not name.startswith("__")} == {"forward"}
    assert inspect.signature(fused) == inspect.signature(original)
    assert list(inspect.signature(fused.forward).parameters) == list(
        inspect.signature(original.forward).parameters
    )
    assert isinstance(fused(4), original)


def test_forward_hands_everything_to_the_functional(monkeypatch):
    calls = []
    monkeypatch.setattr(modules, "layer_norm", lambda *args: calls.append(args))
    norm, x = LayerNorm([3, 7], eps=0.0), torch.randn(2, 3, 7)
    norm(x)
    ((*tensors, eps),) = calls
    for got, expected in zip(tensors, (x, (3, 7), norm.weight, norm.bias), strict=True):
        assert got is expected or got == expected
    assert eps == 0.0


@pytest.mark.parametrize("options", AFFINE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_construction_equals_torch(shape, options):
    fused, original = LayerNorm(shape, eps=1e-3, **options), nn.LayerNorm(shape, 1e-3, **options)
    assert repr(fused) == repr(original)
    assert fused.normalized_shape == original.normalized_shape
    assert vars(fused).keys() == vars(original).keys()
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in original.named_parameters()]
    for parameter, other in zip(fused.parameters(), original.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", AFFINE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_equal_torch_on_cpu(shape, options, dtype):
    fused, original = make_pair(shape, eps=0.1, dtype=dtype, **options)
    x = torch.randn(5, 2, 3, 7, dtype=dtype)
    assert_same_bits(output_and_gradients(fused, x), output_and_gradients(original, x))


def test_eval_computes_the_same_as_train():
    norm, x = make_pair()[0], torch.randn(5, 7)
    assert torch.equal(norm.train()(x), norm.eval()(x))


def test_autocast_gives_the_dtype_of_torch():
    fused, original = make_pair()
    x = torch.randn(5, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits([fused(x)], [original(x)])


def test_a_frozen_parameter_gets_no_gradient():
    norm = LayerNorm(7)
    norm.weight.requires_grad_(False)
    norm(torch.randn(5, 7)).sum().backward()
    assert norm.weight.grad is None
    assert torch.equal(norm.bias.grad, torch.full((7,), 5.0))


@pytest.mark.parametrize("options", AFFINE)
def test_reset_parameters(options):
    norm = make_pair(**options)[0]
    norm.reset_parameters()
    fresh = nn.LayerNorm(7, **options)
    for parameter, other in zip(norm.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_device_and_dtype_of_the_parameters():
    norm = LayerNorm(7, device="meta", dtype=torch.bfloat16)
    for parameter in (norm.weight, norm.bias):
        assert parameter.is_meta
        assert parameter.dtype == torch.bfloat16
    assert norm(torch.empty(5, 7, device="meta", dtype=torch.bfloat16)).shape == (5, 7)


@pytest.mark.parametrize("options", AFFINE)
def test_state_dict_loads_strictly_both_ways(options):
    fused, original = make_pair(**options)
    for source, target in (
        (fused, nn.LayerNorm(7, **options)),
        (original, LayerNorm(7, **options)),
    ):
        state = source.state_dict()
        target.load_state_dict(state, strict=True)
        assert list(target.state_dict()) == list(state)
        for name, tensor in target.state_dict().items():
            assert torch.equal(tensor, state[name])
    assert fused.state_dict()._metadata == original.state_dict()._metadata


def torch_save_and_load(norm: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n)), torch_save_and_load]
)
@pytest.mark.parametrize("options", AFFINE)
def test_copies_are_whole_and_independent(options, duplicate):
    norm, x = make_pair(eps=0.1, **options)[0], torch.randn(5, 7)
    expected = output_and_gradients(norm, x)
    duplicated = duplicate(norm)
    assert type(duplicated) is LayerNorm
    for parameter in norm.parameters():
        parameter.data.zero_()
        parameter.grad = None
    duplicated.zero_grad()
    assert_same_bits(output_and_gradients(duplicated, x), expected)


def test_an_optimizer_that_groups_by_class_finds_it():
    model = nn.Sequential(nn.Linear(7, 7), LayerNorm(7))
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert [p for m in norms for p in m.parameters()] == [model[1].weight, model[1].bias]


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_parametrized_weight_is_used_and_trained():
    fused, original = make_pair()
    x = torch.randn(5, 7)
    plain = fused(x) - fused.bias
    for norm in (fused, original):
        parametrize.register_parametrization(norm, "weight", Doubled())
    assert_same_bits(output_and_gradients(fused, x), output_and_gradients(original, x))
    torch.testing.assert_close(fused(x) - fused.bias, 2 * plain)


# RMSNorm


def make_rms_pair(shape: Any = 7, **options: Any) -> tuple[RMSNorm, nn.RMSNorm]:
    """A fused RMS norm and torch's, with the same random weight."""
    fused, original = RMSNorm(shape, **options), nn.RMSNorm(shape, **options)
    for parameter, other in zip(fused.parameters(), original.parameters(), strict=True):
        nn.init.normal_(other)
        parameter.data.copy_(other.data)
    return fused, original


def test_rms_forward_hands_everything_to_the_functional(monkeypatch):
    calls = []
    monkeypatch.setattr(modules, "rms_norm", lambda *args: calls.append(args))
    norm, x = RMSNorm([3, 7], eps=0.0), torch.randn(2, 3, 7)
    norm(x)
    ((got_x, shape, weight, eps),) = calls
    assert got_x is x
    assert weight is norm.weight
    assert (shape, eps) == ((3, 7), 0.0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_construction_equals_torch(shape, affine):
    options = {"eps": 1e-3, "elementwise_affine": affine}
    fused, original = RMSNorm(shape, **options), nn.RMSNorm(shape, **options)
    assert repr(fused) == repr(original)
    assert repr(RMSNorm(shape)) == repr(nn.RMSNorm(shape))
    assert vars(fused).keys() == vars(original).keys()
    assert fused.normalized_shape == original.normalized_shape
    assert fused.state_dict().keys() == original.state_dict().keys()
    for parameter, other in zip(fused.parameters(), original.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_forward_and_backward_equal_torch_on_cpu(shape, affine, dtype):
    fused, original = make_rms_pair(shape, eps=0.1, dtype=dtype, elementwise_affine=affine)
    x = torch.randn(5, 2, 3, 7, dtype=dtype)
    assert_same_bits(output_and_gradients(fused, x), output_and_gradients(original, x))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_rms_default_eps_is_that_of_torch(dtype):
    # So small that epsilon is what the result depends on.
    x = (1e-4 * torch.randn(5, 7, dtype=torch.float64)).to(dtype)
    assert_same_bits([RMSNorm(7, dtype=dtype)(x)], [nn.RMSNorm(7, dtype=dtype)(x)])
    assert not torch.equal(RMSNorm(7, dtype=dtype)(x), RMSNorm(7, 0.0, dtype=dtype)(x))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_rms_mixed_dtypes_give_those_of_torch(dtype, weight_dtype):
    fused, original = make_rms_pair(dtype=weight_dtype)
    x = torch.randn(5, 7, dtype=dtype)
    y, expected = fused(x), original(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_autocast_gives_the_dtype_of_torch(dtype):
    fused, original = make_rms_pair(dtype=dtype)
    x = torch.randn(5, 7, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits([fused(x)], [original(x)])


def test_rms_state_dict_loads_strictly_both_ways():
    fused, original = make_rms_pair()
    for source, target in ((fused, nn.RMSNorm(7)), (original, RMSNorm(7))):
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target.weight, source.weight)
    assert fused.state_dict()._metadata == original.state_dict()._metadata


# Add & Norm

ADD = [
    pytest.param(AddLayerNorm, LayerNorm, nn.LayerNorm, id="layer"),
    pytest.param(AddRMSNorm, RMSNorm, nn.RMSNorm, id="rms"),
]
OPTIONS = {"prenorm": False, "dropout": 0.0, "layer_scale": None, "residual_in_fp32": False}


def randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_add_norm_is_the_norm_with_options(add, norm, original):
    own = list(inspect.signature(add).parameters.values())
    inherited = list(inspect.signature(original).parameters.values())
    assert [p.name for p in own[: len(inherited)]] == [p.name for p in inherited]
    assert [p.default for p in own[: len(inherited)]] == [p.default for p in inherited]
    assert {p.name: p.default for p in own[len(inherited) :]} == OPTIONS
    assert {p.kind for p in own[len(inherited) :]} == {inspect.Parameter.KEYWORD_ONLY}
    assert isinstance(add(7), norm)
    assert add(7).dropout == 0.0


@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_add_norm_repr_shows_what_is_on(add, norm, original):
    plain = repr(original(7)).removesuffix(")")
    assert repr(add(7)) == f"Add{plain})"
    options = {"prenorm": True, "dropout": 0.1, "layer_scale": 0.0, "residual_in_fp32": True}
    shown = ", ".join(f"{name}={value}" for name, value in options.items())
    assert repr(add(7, **options)) == f"Add{plain}, {shown})"


@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_add_norm_checkpoints_are_those_of_torch(add, norm, original):
    options = {"prenorm": True, "dropout": 0.5, "residual_in_fp32": True}
    fused, plain = randomize(add(7, **options)), randomize(original(7))
    for source, target in ((fused, original(7)), (plain, add(7, **options))):
        target.load_state_dict(source.state_dict(), strict=True)
        for name, parameter in target.named_parameters():
            assert torch.equal(parameter, source.get_parameter(name))
    assert list(add(7, layer_scale=0.1).state_dict()) == [*plain.state_dict(), "layer_scale"]


@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_add_norm_parameters_start_and_restart_alike(add, norm, original):
    options = {"device": "cpu", "dtype": torch.bfloat16, "layer_scale": 0.25}
    fused = add([3, 7], **options)
    expected = {**dict(original([3, 7], dtype=torch.bfloat16).named_parameters())}
    expected["layer_scale"] = torch.full((3, 7), 0.25, dtype=torch.bfloat16)
    for _ in range(2):
        assert dict(fused.named_parameters()).keys() == expected.keys()
        for name, parameter in fused.named_parameters():
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, expected[name])
        randomize(fused).reset_parameters()
    assert add(7, device="meta", layer_scale=0.1).layer_scale.is_meta


def unfused(module: AddLayerNorm | AddRMSNorm, x: torch.Tensor, residual: torch.Tensor | None):
    """The composition that the module stands for, without dropout; torch's types decide."""
    h = x if module.layer_scale is None else x * module.layer_scale
    h = h if residual is None else residual + h
    if isinstance(module, nn.RMSNorm):
        y = F.rms_norm(h, module.normalized_shape, module.weight, module.eps)
    else:
        y = F.layer_norm(h, module.normalized_shape, module.weight, module.bias, module.eps)
    return (y, h) if module.prenorm else y


def outputs_and_gradients(function: Any, module: nn.Module, *tensors: torch.Tensor | None):
    """The outputs, and the gradients of a sum that weighs all of their elements differently."""
    module.zero_grad()
    inputs = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(
        (y * torch.linspace(-1, 2 + i, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum()
        for i, y in enumerate(outputs)
    )
    loss.backward()
    wanted = [t for t in (*inputs, *module.parameters()) if t is not None]
    return [*(y.detach() for y in outputs), *(t.grad for t in wanted)]


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_add_norm_is_the_composition(add, norm, original, prenorm, with_residual, layer_scale):
    options = {"prenorm": prenorm, "layer_scale": layer_scale, "dtype": torch.float64}
    module = randomize(add([3, 7], 0.1, **options))
    x, residual = torch.randn(2, 5, 3, 7, dtype=torch.float64)
    tensors = (x, residual if with_residual else None)
    fused = outputs_and_gradients(module, module, *tensors)
    plain = outputs_and_gradients(lambda *t: unfused(module, *t), module, *tensors)
    assert len(fused) == 1 + prenorm + 1 + with_residual + len(list(module.parameters()))
    for actual, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_add_norm_with_the_kernels(add, norm, original, prenorm, kernels):
    module = randomize(add(7, 0.1, prenorm=prenorm, layer_scale=0.5, device=kernels))
    x, residual = torch.randn(2, 5, 7, device=kernels)
    fused = outputs_and_gradients(module, module, x, residual)
    plain = outputs_and_gradients(lambda *t: unfused(module, *t), module, x, residual)
    for actual, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # nothing is saved for a backward
        torch.testing.assert_close(module(x, residual), unfused(module, x, residual))


@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_post_norm_does_not_ask_for_the_stream(add, norm, original, monkeypatch):
    add_norm, asked = modules.add_norm, []

    def spy(*args, want_h, **kwargs):
        asked.append(want_h)
        return add_norm(*args, want_h=want_h, **kwargs)

    monkeypatch.setattr(modules, "add_norm", spy)
    for prenorm in (False, True):
        add(7, prenorm=prenorm)(*torch.randn(2, 5, 7))
    assert asked == [False, True]


@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_residual_stream_in_float32(add, norm, original):
    x, residual = torch.randn(2, 5, 7).bfloat16()
    for in_fp32, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        module = add(7, 0.1, prenorm=True, residual_in_fp32=in_fp32, dtype=torch.bfloat16)
        y, h = module(x, residual)
        assert (y.dtype, h.dtype) == (torch.bfloat16, dtype)
        assert torch.equal(h, (residual.float() + x.float()).to(dtype))
        assert module(x)[1].dtype == dtype
        # Post-norm too has to normalise that h.
        plain = add(7, 0.1, residual_in_fp32=in_fp32, dtype=torch.bfloat16)
        assert torch.equal(plain(x, residual), y)
        torch.testing.assert_close(y.float(), original(7, 0.1)(h.float()), rtol=2**-8, atol=0)


@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_add_norm_default_eps(add, norm, original):
    x, residual = 1e-4 * torch.randn(2, 5, 7)
    assert torch.equal(add(7)(x, residual), original(7)(residual + x))
    wide = add(7, dtype=torch.float64)(x.double(), residual.double())
    assert torch.equal(wide, original(7, dtype=torch.float64)(residual.double() + x.double()))


@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_eval_turns_dropout_off(add, norm, original):
    x, residual = torch.ones(64, 7), torch.arange(7.0).expand(64, 7)
    module = add(7, prenorm=True, dropout=0.5)
    torch.manual_seed(1)
    y, h = module(x, residual)
    kept = h - residual
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(y, original(7)(h))
    torch.manual_seed(1)
    assert torch.equal(module(x, residual)[1], h)
    assert torch.equal(module.eval()(x, residual)[1], residual + 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 1.0}, ValueError, "dropout in [0, 1), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout in [0, 1), got -0.1"),
        ({"dropout": float("nan")}, ValueError, "dropout in [0, 1), got nan"),
        ({"dropout": "0.1"}, TypeError, "dropout to be a float, got str"),
        ({"dropout": True}, TypeError, "dropout to be a float, got bool"),
        ({"layer_scale": True}, TypeError, "layer_scale to be a float or None, got bool"),
        ({"layer_scale": "1"}, TypeError, "layer_scale to be a float or None, got str"),
        ({"prenorm": 1}, TypeError, "prenorm to be a bool, got int"),
        ({"residual_in_fp32": None}, TypeError, "residual_in_fp32 to be a bool, got NoneType"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_add_norm_options_that_cannot_be(add, norm, original, options, error, message):
    with pytest.raises(error) as raised:
        add(7, **options)
    assert str(raised.value) == f"{add.__name__}: expected {message}"


@pytest.mark.parametrize(("add", "norm", "original"), ADD)
def test_add_norm_survives_a_copy(add, norm, original):
    module = randomize(add(7, prenorm=True, layer_scale=0.5, residual_in_fp32=True))
    x, residual = torch.randn(2, 5, 7).bfloat16()
    for copied in (copy.deepcopy(module), torch_save_and_load(module)):
        assert repr(copied) == repr(module)
        assert_same_bits(list(copied(x, residual)), list(module(x, residual)))


# AdaLayerNorm


def test_ada_norm_starts_as_the_plain_norm_behind_a_shut_gate():
    norm, x = AdaLayerNorm(7, 4, 0.1), torch.randn(2, 5, 7)
    z, gate = norm(x, torch.randn(2, 4))
    torch.testing.assert_close(z, F.layer_norm(x, (7,), eps=0.1))
    assert gate.shape == (2, 1, 7)
    assert not gate.any()
    assert sorted(norm.state_dict()) == ["linear.bias", "linear.weight"]
    assert repr(norm).startswith(
        "AdaLayerNorm(\n  7, 4, eps=0.1, elementwise_affine=False, bias=False, gate=True\n"
    )


@pytest.mark.parametrize("with_gate", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("samples", [3, 1])
@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 7), (3, 2, 5, 7)], ids=str)
def test_ada_norm_is_the_composition(shape, samples, affine, with_gate):
    norm = AdaLayerNorm(7, 4, 0.1, affine, gate=with_gate, dtype=torch.float64)
    randomize(norm)
    x, condition = torch.randn(shape, dtype=torch.float64), torch.randn(samples, 4).double()

    def plain(x, condition):
        terms = norm.linear(F.silu(condition)).unflatten(-1, (-1, 7))
        terms = terms.reshape(samples, -1, *(1,) * (len(shape) - 2), 7)
        y = F.layer_norm(x, (7,), norm.weight, norm.bias, norm.eps)
        z = y * (1 + terms[:, 1]) + terms[:, 0]
        return (z, terms[:, 2]) if with_gate else z

    fused = outputs_and_gradients(norm, norm, x, condition)
    for actual, expected in zip(
        fused, outputs_and_gradients(plain, norm, x, condition), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_ada_norm_with_the_kernels(kernels):
    norm = randomize(AdaLayerNorm(7, 4, 0.1, device=kernels))
    x, condition = torch.randn(2, 3, 7, device=kernels), torch.randn(2, 4, device=kernels)

    def plain(x, condition):
        shift, scale, gate = norm.linear(F.silu(condition))[:, None].chunk(3, -1)
        return F.layer_norm(x, (7,), eps=0.1) * (1 + scale) + shift, gate

    fused = outputs_and_gradients(norm, norm, x, condition)
    for actual, expected in zip(
        fused, outputs_and_gradients(plain, norm, x, condition), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_ada_norm_hands_views_of_one_linear_on(monkeypatch):
    handed = []

    def spy(x, shape, shift, scale, *rest):
        handed.extend([shift, scale])
        return x

    monkeypatch.setattr(modules, "modulated_layer_norm", spy)
    norm = AdaLayerNorm(7, 4)
    _, gate = norm(torch.randn(2, 5, 7), torch.randn(2, 4))
    assert {t.stride() for t in (*handed, gate)} == {(21, 21, 1)}
    assert len({t.untyped_storage().data_ptr() for t in (*handed, gate)}) == 1


def test_training_opens_the_gate_of_a_block_that_starts_as_the_identity():
    norm, branch = AdaLayerNorm(7, 4), nn.Linear(7, 7)
    optimizer = torch.optim.SGD([*norm.parameters(), *branch.parameters()], lr=0.1)
    x, condition = torch.randn(2, 5, 7), torch.randn(2, 4)

    def block():
        z, gate = norm(x, condition)
        return x + gate * branch(z)

    assert torch.equal(block(), x)
    block().square().sum().backward()
    shift, scale, gate = norm.linear.weight.grad.chunk(3)
    assert gate.all()
    assert not shift.any()
    assert not scale.any()  # they get theirs through the gate, once it is open
    optimizer.step()
    norm.zero_grad()
    block().square().sum().backward()
    assert norm.linear.weight.grad.all()


@pytest.mark.parametrize("options", AFFINE)
def test_ada_norm_affine_parameters_and_reset(options):
    norm, plain = AdaLayerNorm(7, 4, **options), nn.LayerNorm(7, **options)
    for _ in range(2):
        for name in ("weight", "bias"):
            own, expected = getattr(norm, name), getattr(plain, name)
            assert (own is None) == (expected is None)
            assert own is None or torch.equal(own, expected)
        assert not norm.linear.weight.any()
        assert not norm.linear.bias.any()
        for module in randomize(norm).modules():
            getattr(module, "reset_parameters", lambda: None)()
    meta = AdaLayerNorm(7, 4, device="meta", dtype=torch.bfloat16, **options)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters())
    assert meta.linear.weight.shape == (21, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([7], 4), "normalized_shape to be an int, got [7]"),
        (((3, 7), 4), "normalized_shape to be an int, got (3, 7)"),
        ((True, 4), "normalized_shape to be an int, got True"),
        ((7, 4.0), "cond_features to be an int, got 4.0"),
        ((7, 4, 1e-5, False, True, 1), "gate to be a bool, got int"),
    ],
    ids=str,
)
def test_ada_norm_arguments_that_cannot_be(arguments, message):
    with pytest.raises(TypeError) as raised:
        AdaLayerNorm(*arguments)
    assert str(raised.value) == f"AdaLayerNorm: expected {message}"


@pytest.mark.parametrize(
    ("x", "condition", "message"),
    [
        ((2, 5, 7), (3, 4), "condition of shape (2, 4), got (3, 4)"),
        ((2, 5, 7), (2, 5), "condition of shape (2, 4), got (2, 5)"),
        ((2, 5, 7), (2, 1, 4), "condition of shape (2, 4), got (2, 1, 4)"),
        ((2, 5, 8), (2, 4), "x of shape (B, *, 7), got (2, 5, 8)"),
        ((7,), (1, 4), "x of shape (B, *, 7), got (7,)"),
    ],
)
def test_ada_norm_inputs_that_do_not_fit(x, condition, message):
    with pytest.raises(ValueError, match="AdaLayerNorm") as raised:
        AdaLayerNorm(7, 4)(torch.randn(x), torch.randn(condition))
    assert str(raised.value) == f"AdaLayerNorm: expected {message}"


@pytest.mark.parametrize("name", ["x", "condition"])
def test_ada_norm_inputs_of_another_kind(name):
    inputs = {"x": torch.randn(2, 7), "condition": torch.randn(2, 4), name: None}
    with pytest.raises(TypeError) as raised:
        AdaLayerNorm(7, 4)(**inputs)
    assert str(raised.value) == f"AdaLayerNorm: expected {name} to be a Tensor, got NoneType"


class _Checker(doctest.OutputChecker):
    """Compares without the bias where torch's own layer norm does not show it, before 2.11."""

    def check_output(self, want, got, optionflags):
        if "bias" not in repr(nn.LayerNorm(8)):
            want = re.sub("(elementwise_affine=[A-Za-z]+), bias=[A-Za-z]+", r"\1", want)
        return super().check_output(want, got, optionflags)


def test_the_examples_in_the_docstrings():
    runner = doctest.DocTestRunner(_Checker())
    for test in doctest.DocTestFinder().find(modules):
        runner.run(test)
    assert runner.tries
    assert not runner.failures


# Deferred initialisation ---------------------------------------------------------------------

EVERY_MODULE = {
    "LayerNorm": lambda: LayerNorm(7),
    "RMSNorm": lambda: modules.RMSNorm((3, 7)),
    "AddLayerNorm": lambda: modules.AddLayerNorm(7, layer_scale=0.1),
    "AddRMSNorm": lambda: modules.AddRMSNorm(7, layer_scale=0.1),
    "AdaLayerNorm": lambda: AdaLayerNorm(7, 4, elementwise_affine=True),
    "AdaLayerNorm without gate": lambda: AdaLayerNorm(7, 4, gate=False),
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", EVERY_MODULE)
def test_deferred_initialisation(name, backwards):
    """Made on meta, moved, and reset module by module in any order: what a constructor gives."""
    with torch.device("meta"):
        module = nn.Sequential(EVERY_MODULE[name]())
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    every = [m for m in module.modules() if hasattr(m, "reset_parameters")]
    for one in reversed(every) if backwards else every:
        one.reset_parameters()
    expected = nn.Sequential(EVERY_MODULE[name]()).state_dict()
    torch.testing.assert_close(module.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_a_module_resets_all_that_is_its_own_and_nothing_else(name):
    """Who resets every module, as sharding engines do, would otherwise undo it with the child."""
    module = EVERY_MODULE[name]()
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    module.reset_parameters()
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    for parameter in module.parameters():
        assert bool((parameter == 7.0).any()) is (id(parameter) not in own)
