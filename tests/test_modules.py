"""`fusednorm.modules`: every module behaves as the torch module that it is derived from."""

import copy
import doctest
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fusednorm import modules
from fusednorm.modules import LayerNorm

AFFINE = [
    pytest.param({"elementwise_affine": affine, "bias": bias}, id=f"affine={affine},bias={bias}")
    for affine in (True, False)
    for bias in (True, False)
]
SHAPES = [7, (7,), [3, 7], torch.Size([2, 3, 7])]


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


def test_only_forward_differs_from_torch():
    assert {name for name in vars(LayerNorm) if not name.startswith("__")} == {"forward"}
    assert inspect.signature(LayerNorm) == inspect.signature(nn.LayerNorm)
    assert isinstance(LayerNorm(4), nn.LayerNorm)


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


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(modules)
    assert result.attempted
    assert not result.failed
