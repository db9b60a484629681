"""`fusednorm.recognition`: the probe tries all that the forward of a norm may branch on.

Each of these norms computes what Llama's does, except in one circumstance. A call in that
circumstance has the result of the norm's own forward, whatever became of the norm.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusednorm import backends, functional, swapped
from fusednorm.replace import replace_norms


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    """Run torch's own operators, except where a test forces the kernels."""
    with backends.use("torch"):
        yield


@pytest.fixture
def calls(monkeypatch) -> list[torch.dtype]:
    """The dtypes of the inputs that are run fused, in order."""
    fused, seen = functional.norm, []

    def spy(op, operands, *args, **kwargs):
        seen.append(operands.x.dtype)
        return fused(op, operands, *args, **kwargs)

    monkeypatch.setattr(functional, "norm", spy)
    return seen


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The calls of a swapped norm that were run fused."""
    fused, seen = swapped.fused, []
    monkeypatch.setattr(swapped, "fused", lambda *args: seen.append("fused") or fused(*args))
    return seen


class PlainRMSNorm(nn.Module):
    def __init__(self, size=6, eps=0.01):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 1.5, size))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Case(NamedTuple):
    """When a norm computes something else, and a call in which it does."""

    differs: Callable[[nn.Module, Tensor], Any]
    x: Callable[[], Tensor] = lambda: torch.randn(2, 3, 6)
    around: Callable[[], Any] = torch.no_grad
    training: bool = True
    size: int = 6
    dtype: torch.dtype = torch.float32
    change: Callable[[nn.Module], Any] = lambda norm: None


class BranchingRMSNorm(PlainRMSNorm):
    case: Case

    def forward(self, x):
        y = super().forward(x)
        return y[..., :1] + 1 if bool(self.case.differs(self, x)) else y


def row(*values: float) -> Callable[[], Tensor]:
    """Rows that begin with some values."""

    def make() -> Tensor:
        x = torch.ones(2, 3, 6)
        x[..., : len(values)] = torch.tensor(values)
        return x

    return make


def of(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def set_weight(value: float) -> Callable[[nn.Module], Any]:
    return lambda norm: norm.weight.data.fill_(value)


CASES = {
    "rank 1": Case(lambda n, x: x.dim() == 1, of(6)),
    "rank 2": Case(lambda n, x: x.dim() == 2, of(4, 6)),
    "rank 3": Case(lambda n, x: x.dim() == 3),
    "rank 4": Case(lambda n, x: x.dim() == 4, of(2, 3, 5, 6)),
    "rank 5": Case(lambda n, x: x.dim() == 5, of(2, 1, 3, 5, 6)),
    "training": Case(lambda n, x: n.training),
    "evaluation": Case(lambda n, x: not n.training, training=False),
    "evaluation with gradients": Case(
        lambda n, x: torch.is_grad_enabled() > n.training, around=nullcontext, training=False
    ),
    "gradients": Case(lambda n, x: torch.is_grad_enabled(), around=nullcontext),
    "no gradients": Case(lambda n, x: not torch.is_grad_enabled()),
    "inference": Case(lambda n, x: torch.is_inference_mode_enabled(), around=torch.inference_mode),
    "an input that needs a gradient": Case(
        lambda n, x: x.requires_grad, lambda: torch.randn(2, 6).requires_grad_()
    ),
    "a frozen weight": Case(
        lambda n, x: not n.weight.requires_grad, change=lambda n: n.requires_grad_(False)
    ),
    "a weight that needs a gradient": Case(lambda n, x: n.weight.requires_grad),
    "a strided input": Case(
        lambda n, x: not x.is_contiguous(), lambda: torch.randn(2, 6, 3).transpose(1, 2)
    ),
    "channels last": Case(
        lambda n, x: (
            x.is_contiguous()
            < (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        ),
        lambda: torch.randn(2, 3, 4, 6).contiguous(memory_format=torch.channels_last),
    ),
    "one row": Case(lambda n, x: x.numel() == 6, of(1, 1, 6)),
    "no rows": Case(lambda n, x: x.numel() == 0, of(0, 4, 6)),
    "a square": Case(lambda n, x: x.dim() > 1 and x.shape[-2] == x.shape[-1], of(2, 6, 6)),
    "a large square": Case(
        lambda n, x: x.dim() > 1 and x.shape[-2] == x.shape[-1], of(2, 96, 96), size=96
    ),
    "as many channels as columns": Case(
        lambda n, x: x.dim() == 4 and x.shape[1] == x.shape[-1] != x.shape[-2], of(2, 6, 3, 6)
    ),
    "as many samples as columns": Case(
        lambda n, x: x.dim() > 2 and x.shape[0] == x.shape[-1] != x.shape[1], of(6, 3, 6)
    ),
    "all lengths equal": Case(lambda n, x: x.dim() == 3 and len(set(x.shape)) == 1, of(6, 6, 6)),
    "zeros": Case(lambda n, x: (x == 0).all(-1).any(), lambda: torch.zeros(2, 6)),
    "a constant": Case(lambda n, x: x.numel() and (x == x[..., :1]).all(-1).any(), row()),
    "one large column": Case(lambda n, x: (x.abs() > 5e4).any(), row(5.5e4)),
    "above float16": Case(lambda n, x: (x.abs() > 1e6).any(), row(1e7)),
    "huge": Case(lambda n, x: (x.abs() > 1e14).any(), row(1e16)),
    "an overflow": Case(lambda n, x: (x.abs() > 1e25).any(), row(1e30)),
    "tiny": Case(
        lambda n, x: x.numel() and (x.abs().amax(-1) < 1e-25).any(), lambda: row()() * 1e-30
    ),
    "infinity": Case(lambda n, x: (x == torch.inf).any(), row(torch.inf)),
    "minus infinity": Case(lambda n, x: (x == -torch.inf).any(), row(-torch.inf)),
    "nan": Case(lambda n, x: x.isnan().any(), row(torch.nan)),
    "a large x_hat": Case(
        lambda n, x: (x.abs() > 9 * x.abs().mean(-1, keepdim=True)).any(),
        lambda: torch.eye(96)[:2],
        size=96,
    ),
    "a large weight": Case(lambda n, x: (n.weight > 1e4).any(), change=set_weight(1e5)),
    "a small weight": Case(
        lambda n, x: ((n.weight.abs() < 1e-5) & (n.weight != 0)).any(), change=set_weight(1e-7)
    ),
    "a weight of 0": Case(lambda n, x: (n.weight == 0).any(), change=set_weight(0.0)),
    "an infinite weight": Case(lambda n, x: n.weight.isinf().any(), change=set_weight(torch.inf)),
    "a weight of nan": Case(lambda n, x: n.weight.isnan().any(), change=set_weight(torch.nan)),
    "another epsilon": Case(lambda n, x: n.eps > 0.1, change=lambda n: setattr(n, "eps", 0.5)),
    "bfloat16": Case(lambda n, x: x.dtype == torch.bfloat16, dtype=torch.bfloat16),
    "bfloat16 in training": Case(
        lambda n, x: x.dtype == torch.bfloat16 and n.training, dtype=torch.bfloat16
    ),
    "float16 without gradients": Case(
        lambda n, x: x.dtype == torch.float16 and not torch.is_grad_enabled(), dtype=torch.float16
    ),
    "autocast": Case(
        lambda n, x: torch.is_autocast_enabled("cpu"),
        around=lambda: torch.autocast("cpu", torch.bfloat16),
    ),
    "autocast to float16": Case(
        lambda n, x: (
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        ),
        around=lambda: torch.autocast("cpu", torch.float16),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_a_forward_may_branch_on_is_left_to_it(case):
    norm = BranchingRMSNorm(case.size)
    norm.case = case
    untouched, x = copy.deepcopy(norm), case.x().to(case.dtype)
    replace_norms(norm)
    for module in (norm, untouched):
        module.train(case.training).to(case.dtype)
        case.change(module)
    with case.around():
        assert bool(case.differs(untouched, x))
        y, expected = norm(x), untouched(x)
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_without_a_branch_it_is_run_fused(calls):
    replace_norms(norm := PlainRMSNorm())
    for case in CASES.values():
        if case.size == 6:
            with case.around():
                norm(case.x())
    ranks = [case.x().dim() for case in CASES.values() if case.size == 6]
    assert len(calls) == sum(rank < 5 for rank in ranks)


class FirstBatchRMSNorm(PlainRMSNorm):
    """Its statistics are those of the first sample."""

    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h[:1].square().mean(-1, keepdim=True) + self.eps))


class OtherAxisRMSNorm(PlainRMSNorm):
    """That of a channel for images, of a column for all else."""

    def forward(self, x):
        axis = 1 if x.dim() == 4 else -1
        h = x.float() * torch.rsqrt(x.float().square().mean(axis, keepdim=True) + self.eps)
        return h * (self.weight[:, None, None] if axis == 1 else self.weight)


class DetachedRMSNorm(PlainRMSNorm):
    """Its statistics are constants to autograd."""

    def forward(self, x):
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * rstd.detach()).to(x.dtype)


class DoubledGradientRMSNorm(PlainRMSNorm):
    """The gradient of its weight is another."""

    def forward(self, x):
        h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight * 1
        if weight.requires_grad:
            weight.register_hook(lambda gradient: 2 * gradient)
        return weight * h.to(x.dtype)


class DropoutRMSNorm(PlainRMSNorm):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class OtherEpsilonRMSNorm(PlainRMSNorm):
    """It has two attributes of one value, and reads the second."""

    def __init__(self):
        super().__init__()
        self.second = self.eps

    def forward(self, x):
        h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.second)
        return self.weight * h.to(x.dtype)


@pytest.mark.parametrize(
    "cls",
    [FirstBatchRMSNorm, DetachedRMSNorm, DoubledGradientRMSNorm, DropoutRMSNorm],
)
def test_a_norm_of_another_arithmetic_is_left(cls):
    replace_norms(norm := cls())
    assert type(norm) is cls


@pytest.mark.parametrize("size", [6, 96])
def test_a_norm_whose_axis_depends_on_the_rank(size, ran):
    norm = OtherAxisRMSNorm(size)
    inputs = [torch.randn(2, size, 3, size), torch.randn(2, 3, size), torch.randn(3, size)]
    expected = [norm(x) for x in inputs]
    replace_norms(norm)
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(norm(x), y)
    assert len(ran) == 3


def test_the_epsilon_is_the_attribute_that_the_forward_reads():
    norm, x = OtherEpsilonRMSNorm(), torch.randn(3, 6)
    replace_norms(norm)
    assert type(norm) is not OtherEpsilonRMSNorm
    for name in ("eps", "second"):
        setattr(norm, name, 0.7)
        torch.testing.assert_close(norm(x), OtherEpsilonRMSNorm.forward(norm, x))


class OptionalRMSNorm(PlainRMSNorm):
    def __init__(self):
        super().__init__()
        self.factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


def test_an_attribute_that_changes_after_the_swap(calls):
    norm, x = OptionalRMSNorm(), torch.randn(3, 6)
    replace_norms(norm)
    norm(x)
    assert calls == [torch.float32]
    norm.factor = 3.0
    torch.testing.assert_close(norm(x), OptionalRMSNorm.forward(norm, x))
    assert calls == [torch.float32]


class LoggingRMSNorm(PlainRMSNorm):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        self.log.append(len(x))
        return super().forward(x)


class ClampingRMSNorm(PlainRMSNorm):
    def forward(self, x):
        self.weight.data.clamp_(-1, 1)
        return super().forward(x)


@pytest.mark.parametrize("cls", [LoggingRMSNorm, ClampingRMSNorm])
def test_effects_on_what_the_module_holds(cls):
    norm = cls()
    weight = norm.weight.detach().clone()
    ((_, reason),) = replace_norms(norm).left
    assert reason.endswith("its forward changes the module or the input")
    assert torch.equal(norm.weight, weight)
    assert getattr(norm, "log", []) == []


# Layer norms, and other holders of parameters


class CastingLayerNorm(nn.LayerNorm):
    def forward(self, input):
        weight, bias = self.weight.float(), self.bias.float()
        y = F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(input.dtype)


class PlainLayerNorm(nn.LayerNorm):
    """Adds nothing."""


class CohereLayerNorm(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size))
        self.variance_epsilon = 1e-5

    def forward(self, hidden_states):
        h = hidden_states.float()
        h = h - h.mean(-1, keepdim=True)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * h).to(hidden_states.dtype)


class GammaBetaNorm(nn.Module):
    """The order and the names of its parameters are its own."""

    def __init__(self, size=6):
        super().__init__()
        self.beta = nn.Parameter(torch.linspace(-1, 2, size))
        self.gamma = nn.Parameter(torch.linspace(-2, 1, size))
        self.e = 1e-3

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=self.e) * (1 + self.gamma) + self.beta


class WeightlessRMSNorm(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.eps = 1e-3

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(x)


class DefaultEpsilonRMSNorm(nn.RMSNorm):
    """Its epsilon is None."""


class BiasedRMSNorm(PlainRMSNorm):
    def __init__(self, size=6):
        super().__init__(size)
        self.shift = nn.Parameter(torch.linspace(-1, 1, size))

    def forward(self, x):
        return super().forward(x) + self.shift


ALSO_OURS = {
    CastingLayerNorm: (torch.float16, torch.bfloat16, torch.float32),
    PlainLayerNorm: (torch.float16, torch.bfloat16, torch.float32),
    CohereLayerNorm: (torch.float16, torch.bfloat16, torch.float32),
    GammaBetaNorm: (torch.float32,),  # it rounds on the way
    WeightlessRMSNorm: (torch.float16, torch.bfloat16, torch.float32),
    DefaultEpsilonRMSNorm: (torch.float16, torch.bfloat16, torch.float32),
    BiasedRMSNorm: (torch.float32,),
}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("cls", "dtypes"), ALSO_OURS.items())
def test_other_norms_of_a_row_are_swapped(cls, dtypes, backend, calls):
    if backend not in backends.available():
        pytest.skip(f"the {backend} backend is not here")
    norm = cls(64)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    original = copy.deepcopy(norm)
    assert replace_norms(norm).swapped == ("",)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(5, 64).to(dtype)
        with backends.use(backend):
            y, expected = norm.to(dtype)(x), original.to(dtype)(x)
        assert y.dtype == expected.dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected, rtol=2 * eps, atol=16 * eps)
    assert set(calls) == set(dtypes)


def test_a_norm_without_a_weight_is_run_fused_at_any_size(calls):
    replace_norms(norm := WeightlessRMSNorm())
    for size in (1, 5, 300):
        x = torch.randn(3, size)
        torch.testing.assert_close(norm(x), WeightlessRMSNorm.forward(norm, x))
    assert len(calls) == 3


def test_a_norm_without_a_weight_that_is_made_for_one_size(calls):
    replace_norms(norm := PlainLayerNorm(6, elementwise_affine=False))
    assert type(norm) is not PlainLayerNorm
    torch.testing.assert_close(norm(x := torch.randn(3, 6)), F.layer_norm(x, (6,)))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.randn(3, 5))
    assert len(calls) == 1


def test_a_jagged_input_is_left_to_the_norm(calls):
    norm = PlainLayerNorm(8)
    replace_norms(norm)
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    assert norm(x).layout is torch.jagged
    assert calls == []


# What autocast does on CUDA


class CastBackLayerNorm(nn.LayerNorm):
    """open_clip's: under an autocast it is float32 on the way only."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class RoundingLayerNorm(nn.LayerNorm):
    """Under an autocast it rounds before the weight."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, eps=self.eps).to(x.dtype) * self.weight


def test_a_result_that_is_cast_back_under_autocast():
    half = ("cuda", (torch.bfloat16, torch.bfloat16))
    replace_norms(norm := CastBackLayerNorm(6))
    rule = type(norm)._fusednorm_autocast[half]
    assert (rule.rounded, rule.out) == (torch.float32, torch.bfloat16)
    single = type(norm)._fusednorm_autocast["cuda", (torch.float32, torch.float32)]
    assert single.out == torch.float32
    replace_norms(norm := RoundingLayerNorm(6, bias=False))
    assert half not in type(norm)._fusednorm_autocast


# Dimension 1, gates and numbers in the forward


class PermutingLayerNorm2d(nn.LayerNorm):
    """timm's, torchvision's and, with its own operators, ConvNeXt's."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class SamLayerNorm(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(size)) for _ in range(2))
        self.eps = 1e-6

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class OffsetSamLayerNorm(SamLayerNorm):
    """Its weight is counted from 1."""

    def forward(self, x):
        y = F.layer_norm(x.movedim(1, -1), (x.shape[1],), None, None, self.eps).movedim(-1, 1)
        return y * (1 + self.weight[:, None, None]) + self.bias[:, None, None]


class TransposingLayerNorm(nn.LayerNorm):
    """SqueezeBERT's."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class NormalizingRMSNorm(nn.Module):
    """Wan's: a weight of shape [C, 1, 1], no epsilon."""

    def __init__(self, size=6):
        super().__init__()
        self.scale, self.gamma = size**0.5, nn.Parameter(torch.randn(size, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.scale * self.gamma


class PerChannelRMSNorm(nn.Module):
    """LTX's: no weight, any rank, an argument that nobody gives."""

    def __init__(self, size=6):
        super().__init__()
        self.eps = 1e-8

    def forward(self, x, dim=None):
        return x / torch.sqrt(torch.mean(x**2, dim=dim or 1, keepdim=True) + self.eps)


CHANNELS_FIRST = {
    PermutingLayerNorm2d: (4,),
    SamLayerNorm: (4,),
    OffsetSamLayerNorm: (4,),
    TransposingLayerNorm: (3,),
    NormalizingRMSNorm: (4,),
    PerChannelRMSNorm: (3, 4, 5),
}
SHAPES = {3: (2, 6, 5), 4: (2, 6, 4, 5), 5: (2, 6, 3, 4, 5)}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("cls", "ranks"), CHANNELS_FIRST.items())
def test_norms_over_dimension_1_are_swapped(cls, ranks, backend, ran):
    if backend not in backends.available():
        pytest.skip(f"the {backend} backend is not here")
    norm = cls(6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    original = copy.deepcopy(norm)
    assert replace_norms(norm).swapped == ("",)
    inputs = [torch.randn(SHAPES[rank]) for rank in ranks]
    inputs += [x.contiguous(memory_format=torch.channels_last) for x in inputs if x.dim() == 4]
    inputs += [x[:, :, 1:] for x in inputs]
    for x in inputs:
        results = []
        for module in (norm, original):
            leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_()]
            leaves += module.parameters()
            with backends.use(backend):
                y = module(leaves[0])
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(ran) == (len(inputs) if backend == "cpu" or cls is not NormalizingRMSNorm else 0)


class ScaleNorm(nn.Module):
    """x-transformers': one number for a weight."""

    def __init__(self, size=6):
        super().__init__()
        self.scale, self.g = size**0.5, nn.Parameter(torch.tensor([0.7]))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale * self.g


class SimpleRMSNorm(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.scale = size**0.5

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale


class ConstantLayerNorm(nn.Module):
    """OLMo's and Chameleon's: the epsilon is a number in the forward."""

    def __init__(self, size=6):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return F.layer_norm(x, (x.shape[-1],), None, None, eps=1e-5) * self.gain


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("cls", [ScaleNorm, SimpleRMSNorm, ConstantLayerNorm])
@pytest.mark.parametrize("size", [6, 96, 768])
def test_an_epsilon_that_no_attribute_has(cls, size, backend, ran):
    """Zeros have a gradient: torch's own operators have none there, so that they are not used."""
    if backend not in backends.available():
        pytest.skip(f"the {backend} backend is not here")
    norm = cls(size)
    replace_norms(norm)
    x = torch.randn(4, size) * torch.tensor([1.0, 0.0, 1e-30, 1e-6])[:, None]
    results = []
    for forward in (norm, lambda x: cls.forward(norm, x)):
        leaves = [x.clone().requires_grad_(), *norm.parameters()]
        with backends.use(backend):
            y = forward(leaves[0])
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    assert len(ran) == (backend == "cpu" or cls is ConstantLayerNorm)


class ClampedNormalizingNorm(nn.Module):
    """The shortest length that it divides by is another one."""

    def __init__(self, size=6):
        super().__init__()
        self.scale = size**0.5

    def forward(self, x):
        return F.normalize(x, dim=-1, eps=1e-6) * self.scale


class MambaRMSNormGated(nn.Module):
    """Mamba 2's, Bamba's, Zamba 2's: the gate comes first, and groups have statistics."""

    def __init__(self, size=12, group_size=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.group_size, self.variance_epsilon = group_size, 1e-5

    def forward(self, hidden_states, gate=None):
        h = hidden_states.float()
        if gate is not None:
            h = h * F.silu(gate.float())
        groups = h.unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * groups.flatten(-2).to(hidden_states.dtype)


class QwenRMSNormGated(nn.Module):
    """Qwen3-Next's: the gate comes last, and the product before it is rounded."""

    def __init__(self, size=12):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(size)), 1e-6

    def forward(self, x, gate):
        h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * h.to(x.dtype) * F.silu(gate.float())).to(x.dtype)


class GatedLayerNorm(nn.LayerNorm):
    def forward(self, x, z):
        return super().forward(x) * F.silu(z)


class SigmoidRMSNormGated(QwenRMSNormGated):
    """Kimi's: fusednorm has no such gate."""

    def forward(self, x, gate):
        h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * h * torch.sigmoid(gate.float())).to(x.dtype)


@pytest.mark.parametrize("cls", [ClampedNormalizingNorm, SigmoidRMSNormGated])
def test_what_is_nearly_ours_is_left(cls):
    replace_norms(norm := cls())
    assert type(norm) is cls


GATED = {
    "Mamba": MambaRMSNormGated,
    "Mamba in one group": lambda: MambaRMSNormGated(group_size=12),
    "Qwen": QwenRMSNormGated,
    "LayerNorm": lambda: GatedLayerNorm(12),
}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("make", GATED.values(), ids=GATED)
def test_gated_norms_are_swapped(make, backend, ran):
    if backend not in backends.available():
        pytest.skip(f"the {backend} backend is not here")
    norm = make()
    original, name = copy.deepcopy(norm), [*inspect.signature(norm.forward).parameters][1]
    assert replace_norms(norm).swapped == ("",)
    for dtype in (torch.float32, torch.bfloat16):
        x, gate = torch.randn(2, 2, 5, 12, dtype=dtype)
        results = []
        for module in (norm.to(dtype), original.to(dtype)):
            leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
            with backends.use(backend):
                y = module(leaves[0], **{name: leaves[1]})
            leaves += module.parameters()
            results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
        eps = torch.finfo(dtype).eps
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            scale = b.float().abs().amax().item()
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=16 * eps * scale)
    assert len(ran) == 2


def test_calls_of_a_gated_norm_that_nobody_compared(ran):
    norm = MambaRMSNormGated(group_size=12)
    replace_norms(norm)
    x = torch.randn(5, 12)
    wide, other = torch.randn(1, 12), torch.randn(5, 12).bfloat16()
    for given in ((x,), (x, None), (x, wide), (x, other)):
        torch.testing.assert_close(norm(*given), MambaRMSNormGated.forward(norm, *given))
    assert ran == []
    with pytest.raises(TypeError, match=r"forward\(\)"):
        norm(x, x, x)


class ActLayerNorm2d(PermutingLayerNorm2d):
    """timm's: what follows the norm is a part of it."""

    def __init__(self, size=6, act=nn.GELU):
        super().__init__(size)
        self.drop, self.act = nn.Dropout(0.0), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class ActFirstLayerNorm(ActLayerNorm2d):
    def forward(self, x):
        return PermutingLayerNorm2d.forward(self, self.act(self.drop(x)))


class OtherOrderLayerNorm(ActLayerNorm2d):
    def __init__(self):
        super().__init__()
        self.drop = nn.Tanh()

    def forward(self, x):
        return self.drop(self.act(PermutingLayerNorm2d.forward(self, x)))


def test_a_norm_with_an_activation(ran):
    norm = ActLayerNorm2d()
    nn.init.normal_(norm.weight)
    original, x = copy.deepcopy(norm), torch.randn(2, 6, 3, 4)
    assert replace_norms(norm).swapped == ("",)
    torch.testing.assert_close(norm(x), original(x))
    norm.act = nn.ReLU()
    assert (norm(x) >= 0).all()
    assert len(ran) == 2


@pytest.mark.parametrize("cls", [ActFirstLayerNorm, OtherOrderLayerNorm])
def test_parts_that_are_run_elsewhere(cls):
    replace_norms(norm := cls())
    assert type(norm) is cls
