"""`fusednorm.replace`: a swap changes what computes, and nothing that anyone else can see."""

import copy
import doctest
import pickle
import warnings
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fusednorm import modules, replace
from fusednorm.modules import LayerNorm
from fusednorm.replace import Report, replace_norms, restore_norms


class OwnForward(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input.float())


class OwnReset(nn.LayerNorm):
    def reset_parameters(self):
        nn.init.zeros_(self.weight)


class FusedChild(LayerNorm):
    """Adds nothing."""


class SomeLayerNorm(nn.Module):
    """Named like a norm, and none of torch's."""


class Identity(nn.Module):
    def forward(self, tensor):
        return tensor


def small_model() -> nn.Sequential:
    """A model with the norms `0`, `2.0` and `2.1`."""
    return nn.Sequential(
        nn.LayerNorm(6),
        nn.Linear(6, 6),
        nn.Sequential(nn.LayerNorm([2, 6], bias=False), nn.LayerNorm(6, elementwise_affine=False)),
    )


def randomize(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def contents(model: nn.Module) -> list[list[tuple[str, int]]]:
    """The identity of everything that the modules of `model` hold, in their order."""
    return [
        [(name, id(value)) for held in (vars(m), m._parameters) for name, value in held.items()]
        for m in model.modules()
    ]


# What is swapped, and back


def test_every_exact_layer_norm_is_swapped_and_restored():
    model = small_model()
    before = classes(model)
    assert replace_norms(model) == Report(swapped=("0", "2.0", "2.1"), left=())
    changed = {name for name, cls in classes(model).items() if cls is not before[name]}
    assert changed == {"0", "2.0", "2.1"}
    assert all(type(norm) is LayerNorm for norm in (model[0], *model[2]))
    assert restore_norms(model) == Report(swapped=("0", "2.0", "2.1"), left=())
    assert classes(model) == before


def test_a_swapped_norm_computes_with_fusednorm(monkeypatch):
    norm = nn.LayerNorm(6)
    monkeypatch.setattr(modules, "layer_norm", lambda *args: "fused")
    replace_norms(norm)
    assert norm(torch.randn(2, 6)) == "fused"
    restore_norms(norm)
    assert torch.is_tensor(norm(torch.randn(2, 6)))


def test_the_root_may_be_the_norm():
    norm = nn.LayerNorm(6)
    assert replace_norms(norm, include="*").swapped == ("",)
    assert type(norm) is LayerNorm
    assert restore_norms(norm).swapped == ("",)
    assert type(norm) is nn.LayerNorm


def test_a_model_without_norms():
    assert replace_norms(nn.Linear(2, 2)) == restore_norms(nn.Linear(2, 2)) == Report((), ())


def test_calling_either_twice_is_harmless():
    model = small_model()
    replace_norms(model)
    again = replace_norms(model, include="2.*")
    assert again.swapped == ()
    assert dict(again.left) == dict.fromkeys(("0", "2.0", "2.1"), "already fusednorm.LayerNorm")
    assert len(restore_norms(model).swapped) == 3
    assert restore_norms(model).swapped == ()
    assert len(replace_norms(model).swapped) == 3


def test_restore_leaves_what_was_never_swapped():
    model = nn.Sequential(LayerNorm(6), nn.LayerNorm(6), nn.LayerNorm(6))
    replace_norms(model, exclude="1")
    assert restore_norms(model) == Report(
        swapped=("2",),
        left=(("0", "not swapped by replace_norms"), ("1", "not swapped by replace_norms")),
    )
    assert [type(norm) for norm in model] == [LayerNorm, nn.LayerNorm, nn.LayerNorm]


# What survives


def test_everything_that_the_modules_hold_survives():
    model = small_model()
    model[0].eval()
    model[0].note = ["kept"]
    model[0].register_buffer("count", torch.zeros(()))
    model[2][0].weight.requires_grad_(False)
    held, before = model[0], contents(model)
    replace_norms(model)
    marked = [[kept for kept in held if kept[0] != replace._ORIGINAL] for held in contents(model)]
    assert marked == before
    assert model[0] is held
    assert isinstance(held, nn.LayerNorm)
    restore_norms(model)
    assert contents(model) == before


def test_all_hooks_still_fire_in_order():
    norm, log = nn.LayerNorm(6), []
    norm.register_forward_pre_hook(lambda *_: log.append("forward_pre"))
    norm.register_forward_hook(lambda *_, **__: log.append("forward"), with_kwargs=True)
    norm.register_full_backward_pre_hook(lambda *_: log.append("backward_pre"))
    norm.register_full_backward_hook(lambda *_: log.append("backward"))
    norm.register_state_dict_pre_hook(lambda *_: log.append("state_dict_pre"))
    norm.register_state_dict_post_hook(lambda *_: log.append("state_dict_post"))
    norm.register_load_state_dict_pre_hook(lambda *_: log.append("load_pre"))
    norm.register_load_state_dict_post_hook(lambda *_: log.append("load_post"))

    def events():
        log.clear()
        norm(torch.randn(2, 6, requires_grad=True)).sum().backward()
        norm.load_state_dict(norm.state_dict())
        return list(log)

    before = events()
    assert len(before) == len(set(before)) == 8
    replace_norms(norm)
    assert events() == before
    restore_norms(norm)
    assert events() == before


def test_a_module_with_two_names_stays_one_module():
    norm = nn.LayerNorm(6)
    model = nn.ModuleDict({"a": norm, "b": nn.ModuleList([norm])})
    assert replace_norms(model).swapped == ("a", "b.0")
    assert model["a"] is model["b"][0] is norm
    assert restore_norms(model).swapped == ("a", "b.0")
    assert type(norm) is nn.LayerNorm


def test_tied_parameters_stay_tied():
    model = small_model()
    model[2].append(nn.LayerNorm(6))
    model[2][2].weight = model[0].weight
    replace_norms(model)
    assert model[2][2].weight is model[0].weight
    assert len(list(model.parameters())) == 6


def test_state_dict_and_repr_do_not_show_it():
    model = small_model()
    state, shown = model.state_dict(), repr(model)
    replace_norms(model)
    assert list(model.state_dict()) == list(state)
    assert model.state_dict()._metadata == state._metadata
    assert repr(model) == shown
    model.load_state_dict(small_model().state_dict(), strict=True)
    small_model().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_swapped_and_can_be_restored(duplicate):
    model, x = randomize(small_model()), torch.randn(3, 2, 6)
    expected = model(x)
    replace_norms(model)
    duplicated = duplicate(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(duplicated(x), expected)
    assert type(duplicated[0]) is LayerNorm
    assert restore_norms(duplicated).swapped == ("0", "2.0", "2.1")
    assert [type(m) for m in (duplicated[0], model[0])] == [nn.LayerNorm, LayerNorm]


@pytest.mark.parametrize("swap_back", [False, True])
def test_training_goes_on_bit_for_bit(swap_back):
    def train(model, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 2, 6)).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = randomize(small_model())
    other = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    ours = torch.optim.AdamW(model.parameters(), lr=0.1)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.1)
    for seed, change in enumerate((None, replace_norms, restore_norms if swap_back else None)):
        if change:
            assert len(change(model).swapped) == 3
        train(model, ours, seed)
        train(other, theirs, seed)
    for p, q, at_start in zip(model.parameters(), other.parameters(), start, strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, at_start)


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [6, [2, 6]], ids=str)
def test_every_kind_of_layer_norm_computes_the_same(shape, options, eps):
    norm, x = randomize(nn.LayerNorm(shape, eps, **options)), torch.randn(3, 2, 6)
    expected = norm(x)
    replace_norms(norm)
    assert norm.eps == eps
    assert torch.equal(norm(x), expected)


def test_pruned_weight_is_still_used():
    norm, x = nn.LayerNorm(6), torch.randn(3, 6)
    prune.l1_unstructured(norm, "weight", amount=4)
    expected = norm(x)
    assert replace_norms(norm).swapped == ("",)
    assert (expected == 0).all(0).sum() == 4
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
def test_transformer_encoder(norm_first, mode):
    # Without gradients torch takes a fused path which reads the norms' weights, not their class.
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    nested = {"enable_nested_tensor": False} if norm_first else {}
    model = randomize(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), **nested))
    model.train(mode == "train")
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(mode != "eval without gradients"):
        expected = model(x)
        assert len(replace_norms(model).swapped) == 5
        assert torch.equal(model(x), expected)


def test_a_compiled_model_notices(monkeypatch):
    monkeypatch.setattr(modules, "layer_norm", lambda x, *args: torch.full_like(x, 7.0))
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 6)
    expected = compiled(x)
    assert replace_norms(compiled).swapped == ("_orig_mod.1",)
    assert (compiled(x) == 7).all()
    restore_norms(model)
    assert torch.equal(compiled(x), expected)


def test_meta_device():
    with torch.device("meta"):
        model = small_model()
    assert len(replace_norms(model).swapped) == 3
    assert model(torch.empty(3, 2, 6, device="meta")).is_meta


# What is left, and why


def with_forward_on_the_instance() -> nn.LayerNorm:
    norm = nn.LayerNorm(6)
    norm.forward = lambda input: input
    return norm


def parametrized() -> nn.LayerNorm:
    norm = nn.LayerNorm(6)
    parametrize.register_parametrization(norm, "weight", Identity())
    return norm


LEFT = {
    "own forward": (OwnForward(6), "OwnForward, not nn.LayerNorm itself"),
    "own method": (OwnReset(6), "OwnReset, not nn.LayerNorm itself"),
    "no LayerNorm": (SomeLayerNorm(), "SomeLayerNorm, not nn.LayerNorm itself"),
    "RMSNorm": (nn.RMSNorm(6), "torch.nn.modules.normalization.RMSNorm, not nn.LayerNorm itself"),
    "fused": (LayerNorm(6), "already fusednorm.LayerNorm"),
    "fused child": (FusedChild(6), "already fusednorm.LayerNorm"),
    "instance forward": (with_forward_on_the_instance(), "replaced on the instance"),
    "parametrized": (parametrized(), "parametrized: swap it before register_parametrization"),
}


@pytest.mark.parametrize(("norm", "reason"), LEFT.values(), ids=LEFT)
def test_left_with_its_reason(norm, reason):
    model = nn.Sequential(norm, nn.LayerNorm(6))
    before, held = classes(model), contents(norm)
    report = replace_norms(model)
    assert report.swapped == ("1",)
    ((name, why),) = report.left
    assert (name, why[-len(reason) :]) == ("0", reason)
    assert classes(model) == {**before, "1": LayerNorm}
    assert contents(norm) == held


def test_left_when_somebody_replaced_the_forward_of_nn_layer_norm(monkeypatch):
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, input: input)
    model = small_model()
    report = replace_norms(model)
    assert report.swapped == ()
    assert set(dict(report.left).values()) == {f"nn.LayerNorm.forward was replaced by {__name__}"}


def test_a_scripted_norm_is_left_and_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript announces its end.
        model = torch.jit.script(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)))
    report = replace_norms(model)
    assert report.swapped == ()
    assert [name for name, _ in report.left] == ["0"]


def test_other_modules_are_not_reported():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.Linear(6, 6))
    assert replace_norms(model) == Report((), ())


def test_a_norm_parametrized_after_the_swap_is_restored_once_it_is_plain_again():
    norm = nn.LayerNorm(6)
    replace_norms(norm)
    parametrize.register_parametrization(norm, "weight", Identity())
    assert replace_norms(norm).left == (("", "already fusednorm.LayerNorm"),)
    changed = "its class was changed since, to ParametrizedLayerNorm"
    assert restore_norms(norm).left == (("", changed),)
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is LayerNorm
    restore_norms(norm)
    assert type(norm) is nn.LayerNorm


# The choice


@pytest.mark.parametrize(
    ("include", "exclude", "swapped"),
    [
        ("0", None, {"0"}),
        ("2.*", None, {"2.0", "2.1"}),
        ("*1", None, {"2.1"}),
        (["0", "*.1"], None, {"0", "2.1"}),
        ([], None, set()),
        (None, [], {"0", "2.0", "2.1"}),
        (None, "2.?", {"0"}),
        (None, iter(["0", "2.1"]), {"2.0"}),
        ("2.*", "*.0", {"2.1"}),
        (lambda name, norm: norm.bias is None, None, {"2.0", "2.1"}),
        (None, lambda name, norm: name == "0" or norm.weight is None, {"2.0"}),
        ("0", lambda name, norm: True, set()),
    ],
)
def test_include_and_exclude(include, exclude, swapped):
    model = small_model()
    report = replace_norms(model, include, exclude)
    assert set(report.swapped) == swapped
    assert {name for name, cls in classes(model).items() if cls is LayerNorm} == swapped
    assert {name for name, _ in report.left} == {"0", "2.0", "2.1"} - swapped


def test_the_report_says_which_choice_left_a_norm():
    report = replace_norms(small_model(), include=["0", "2.0"], exclude="0")
    assert report.left == (("0", "excluded"), ("2.1", "not included"))


@pytest.mark.parametrize(("argument", "swapped"), [("include", True), ("exclude", False)])
@pytest.mark.parametrize("selection", ["b", lambda name, norm: name == "b"])
def test_a_module_with_two_names_is_selected_by_either(argument, swapped, selection):
    norm = nn.LayerNorm(6)
    replace_norms(nn.ModuleDict({"a": norm, "b": norm}), **{argument: selection})
    assert (type(norm) is LayerNorm) is swapped


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_glob_that_matches_no_norm_is_an_error(argument):
    model = small_model()
    with pytest.raises(ValueError, match="norm") as error:
        replace_norms(model, **{argument: ["0", "1", "2.*"]})
    assert str(error.value) == (
        f"replace_norms: expected {argument} pattern '1' to match a norm of the model, "
        "got none of ['0', '2.0', '2.1']"
    )
    assert LayerNorm not in classes(model).values()


def test_a_long_list_of_norms_is_cut_in_the_error():
    model = nn.Sequential(*(nn.LayerNorm(2) for _ in range(9)))
    with pytest.raises(ValueError, match=r"'7', '\.\.\.'\]$"):
        replace_norms(model, include="x")


def test_a_glob_may_match_a_norm_that_is_left_anyway():
    model = nn.Sequential(OwnForward(6), nn.LayerNorm(6))
    assert replace_norms(model, exclude="0").swapped == ("1",)


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("value", "shown"), [(3, "3"), (["0", 3], "('0', 3)"), (nn.LayerNorm, repr(nn.LayerNorm))]
)
def test_a_selection_of_another_type_is_an_error(argument, value, shown):
    model = small_model()
    with pytest.raises(TypeError) as error:
        replace_norms(model, **{argument: value})
    assert str(error.value) == (
        f"replace_norms: expected {argument} to be None, a glob, an iterable of globs or a "
        f"callable, got {shown}"
    )
    assert LayerNorm not in classes(model).values()


@pytest.mark.parametrize("operation", [replace_norms, restore_norms])
def test_a_model_of_another_type_is_an_error(operation):
    with pytest.raises(TypeError) as error:
        operation(3)
    expected = f"{operation.__name__}: expected model to be an nn.Module, got 3"
    assert str(error.value) == expected


def test_nothing_is_swapped_when_a_callable_raises():
    model = small_model()

    def fails_at_the_last(name, norm):
        return 1 / (name != "2.1")

    with pytest.raises(ZeroDivisionError):
        replace_norms(model, include=fails_at_the_last)
    assert LayerNorm not in classes(model).values()


# The report


def test_report_for_reading():
    report = Report(swapped=("", "encoder.norm"), left=(("head", "excluded"),))
    assert str(report).splitlines() == [
        "2 swapped, 1 left",
        "  (root)        swapped",
        "  encoder.norm  swapped",
        "  head          left: excluded",
    ]
    assert str(Report((), ())) == "0 swapped, 0 left"


def test_report_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Report((), ()).swapped = ("0",)


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(replace)
    assert result.attempted
    assert not result.failed
