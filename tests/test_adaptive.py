"""AdaLN modules of models: scale and shift are run with the norm, by the module's own forward."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fusednorm import backends, functional
from fusednorm.replace import replace_norms, restore_norms


@pytest.fixture(autouse=True)
def torch_backend():
    with backends.use("torch"):
        yield


@pytest.fixture
def calls(monkeypatch) -> list[tuple[bool, bool]]:
    """Whether each fused norm has a scale and a shift, in order."""
    fused, seen = functional.norm, []

    def spy(op, operands, *args, **kwargs):
        seen.append((operands.scale is not None, operands.shift is not None))
        return fused(op, operands, *args, **kwargs)

    monkeypatch.setattr(functional, "norm", spy)
    return seen


class AdaNorm(nn.Module):
    """As DiT's: what it returns depends on what is called `terms`."""

    terms = 3

    def __init__(self, norm=None, size=8, cond=5):
        super().__init__()
        self.linear = nn.Linear(cond, self.terms * size)
        self.norm = norm or nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)

    def forward(self, x, emb=None):
        shift, scale, gate = self.linear(nn.functional.silu(emb)).chunk(3, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate


class ScaleAdaNorm(AdaNorm):
    terms = 1

    def forward(self, x, emb):
        return self.norm(x) * (1 + self.linear(emb))[:, None]


class ShiftAdaNorm(AdaNorm):
    terms = 1

    def forward(self, x, emb):
        return self.norm(x) + self.linear(emb).unsqueeze(1)


class TwiceAdaNorm(AdaNorm):
    terms = 4

    def forward(self, x, emb):
        shift, scale, shift2, scale2 = self.linear(emb)[:, None].chunk(4, dim=-1)
        y = self.norm(x).to(x.dtype)
        return [y * (1 + scale) + shift, y * (1 + scale2) + shift2]


class TwoNorms(AdaNorm):
    terms = 2

    def __init__(self):
        super().__init__()
        self.norm_context = nn.LayerNorm(8)

    def forward(self, x, context, emb):
        scale, shift = self.linear(emb)[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift, self.norm_context(context).type_as(x) * scale


class EmbeddingAdaNorm(AdaNorm):
    """As the one of DiT in diffusers, which embeds the step and the label itself."""

    terms = 2

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 5)

    def forward(self, x, timestep=None, class_labels=None, emb=None):
        if emb is None:
            emb = self.emb(timestep) + self.emb(class_labels)
            emb = nn.functional.dropout(emb, 0.5, self.training)
        shift, scale = self.linear(emb)[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class GammaNorm(nn.Module):
    """x-transformers' layer norm."""

    def __init__(self):
        super().__init__()
        self.ln, self.gamma = nn.LayerNorm(8, elementwise_affine=False), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.ln(x) * (self.gamma + 1.0)


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


# What each runs fused: scale and shift of each norm.
BOTH = (True, True)
ADAPTIVE = {
    "zero": (AdaNorm, [BOTH]),
    "affine": (lambda: AdaNorm(nn.LayerNorm(8)), [BOTH]),
    "rms": (lambda: AdaNorm(nn.RMSNorm(8, eps=1e-6)), [BOTH]),
    "own rms": (lambda: AdaNorm(OwnRMSNorm()), [BOTH]),
    "scale": (ScaleAdaNorm, [(True, False)]),
    "shift": (ShiftAdaNorm, [(False, True)]),
    "twice": (TwiceAdaNorm, [BOTH, BOTH]),
    "two norms": (TwoNorms, [BOTH, (True, False)]),
    "gamma": (GammaNorm, [(True, False)]),
    "embedding": (EmbeddingAdaNorm, [BOTH]),
}


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def inputs(module: nn.Module, dtype=torch.float32) -> list[torch.Tensor]:
    shapes = {"GammaNorm": [(2, 3, 8)], "TwoNorms": [(2, 3, 8), (2, 5, 8), (2, 5)]}
    given = shapes.get(type(module).__name__, [(2, 3, 8), (2, 5)])
    made = [torch.randn(shape).to(dtype).requires_grad_() for shape in given]
    if isinstance(module, EmbeddingAdaNorm):
        made[1:] = torch.tensor([1, 2]), torch.tensor([3, 4])
        module.eval()
    return made


def outputs(result) -> list[torch.Tensor]:
    return [*result] if isinstance(result, tuple | list) else [result]


@pytest.mark.parametrize(("make", "fused"), ADAPTIVE.values(), ids=ADAPTIVE)
def test_an_adaln_module_is_one_call_for_each_norm(make, fused, calls):
    module = randomized(make())
    given, original = inputs(module), copy.deepcopy(module)
    report = replace_norms(module)
    assert report.left == report.others == ()
    assert dict(report.served)[""].endswith("with scale and shift in one call")
    calls.clear()
    actual, expected = outputs(module(*given)), outputs(original(*given))
    assert calls == fused
    leaves = [*given, *module.parameters()], [*given, *original.parameters()]
    for ys, of in zip((actual, expected), leaves, strict=True):
        of = [leaf for leaf in of if leaf.requires_grad]
        ys += torch.autograd.grad(sum(y.square().sum() for y in ys), of)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(restore_norms(module).swapped) == len(report.swapped)
    assert type(module) is type(original)


@pytest.mark.parametrize(("make", "fused"), ADAPTIVE.values(), ids=ADAPTIVE)
def test_in_bfloat16_it_is_at_least_as_exact_as_the_module(make, fused, calls):
    module = randomized(make()).bfloat16()
    given, exact = inputs(module, torch.bfloat16), copy.deepcopy(module).double()
    own = outputs(module(*given))
    replace_norms(module)
    calls.clear()
    fused_results = outputs(module(*given))
    assert calls == fused
    with torch.no_grad():
        truth = outputs(exact(*[x.double() if x.is_floating_point() else x for x in given]))
    for y, before, wanted in zip(fused_results, own, truth, strict=True):
        assert y.dtype == before.dtype
        error, its = ((t.double() - wanted).square().mean().sqrt() for t in (y, before))
        assert error <= its * 1.05


def test_what_is_no_modulation_computes_the_norm(calls):
    class OtherAdaNorm(AdaNorm):
        terms = 2

        def forward(self, x, emb, kind="usual"):
            scale, shift = self.linear(emb)[:, None].chunk(2, dim=-1)
            y = self.norm(x)
            if kind == "cat":
                return torch.cat([y, y * (1 + scale)])
            if kind == "slice":
                return y[:, :1] * (1 + scale) + shift
            if kind == "reflected":
                return shift + (1 + scale) * y
            if kind == "every row":
                return y * x + x
            if kind == "number":
                return y * 2 + 1
            if kind == "plain":
                return y
            return y * (1 + scale) + shift

    module = randomized(OtherAdaNorm())
    original = copy.deepcopy(module)
    assert replace_norms(module).swapped == ("", "norm")
    given = inputs(module)
    for kind in ("cat", "slice", "reflected", "every row", "number", "plain"):
        torch.testing.assert_close(module(*given, kind=kind), original(*given, kind=kind))
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x, given[1][:1]), original(x, given[1][:1]))
    x = torch.randn(1, 3, 8)  # which the condition makes two of
    torch.testing.assert_close(module(x, given[1]), original(x, given[1]))


def test_a_hook_on_the_norm_sees_its_result(calls):
    module, seen = randomized(AdaNorm()), []
    replace_norms(module)
    module.norm.register_forward_hook(lambda *call: seen.append(call[2]))
    given = inputs(module)
    calls.clear()
    module(*given)
    assert calls == []
    torch.testing.assert_close(seen[0], nn.functional.layer_norm(given[0], (8,), eps=1e-6))


class SilentNorm(AdaNorm):
    """Does not modulate."""

    def forward(self, x, emb):
        return self.norm(x).relu()


class InheritedNorm(AdaNorm):
    def forward(self, x, emb):
        return super().forward(x, emb)[0]


class TakesOtherThingsNorm(AdaNorm):
    def forward(self, x, emb):
        shift, scale = emb["shift"], emb["scale"]
        return self.norm(x) * (1 + scale) + shift


class ConstantNorm(AdaNorm):
    """Equal in its result alone: x gets no gradient."""

    def forward(self, x, emb):
        shift, scale, _ = self.linear(emb)[:, None].chunk(3, dim=-1)
        with torch.no_grad():
            y = self.norm(x)
        return y * (1 + scale) + shift


@pytest.mark.parametrize("cls", [SilentNorm, InheritedNorm, TakesOtherThingsNorm, ConstantNorm])
def test_what_is_left_as_a_block_around_norms(cls):
    report = replace_norms(module := cls())
    assert type(module) is cls
    assert report.swapped == ("norm",)
    assert report.others == (("", "a block around norms, of which 1 of 1 are swapped"),)


def test_what_is_excluded():
    assert replace_norms(AdaNorm(), exclude="norm").swapped == ()
    model = nn.Sequential(AdaNorm())
    assert replace_norms(model, exclude="0").swapped == ("0.norm",)
    assert replace_norms(model, include="0").swapped == ("0",)


def test_copies(calls):
    module = randomized(AdaNorm())
    given = inputs(module)
    replace_norms(module)
    expected = module(*given)[0]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        calls.clear()
        assert torch.equal(copied(*given)[0], expected)
        assert calls == [BOTH]
        assert restore_norms(copied).swapped == ("", "norm")
        assert type(copied) is AdaNorm


def test_it_is_one_graph():
    module = randomized(AdaNorm())
    replace_norms(module)
    given = inputs(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given)[0], module(*given)[0])


def test_it_is_found_without_data():
    with torch.device("meta"):
        module = AdaNorm()
    assert replace_norms(module).swapped == ("", "norm")
    assert module.linear.weight.is_meta
