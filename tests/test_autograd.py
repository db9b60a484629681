"""Every derivative, by every road that torch offers, and what a call saves for it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, Case, make_case
from spies import Launch, record_launches
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import backends, layer_norm

NAMES = ("x", "weight", "bias")

# Every way to leave parameters out, with every way to need a gradient of what is left.
COMBINATIONS = [
    pytest.param(present, needed, id=f"{'+'.join(present)}-needs-{'+'.join(needed)}")
    for present in (NAMES, ("x", "weight"), ("x", "bias"), ("x",))
    for count in range(1, len(present) + 1)
    for needed in itertools.combinations(present, count)
]

# (shape of x, normalized_shape)
SHAPES = [((2, 3), (3,)), ((2, 2, 2), (2, 2)), ((3,), (3,))]

EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)

Function = Callable[..., Any]


def names(launches: list[Launch]) -> list[str]:
    """Return the names of the kernels that were launched."""
    return [
        launch.kernel.removeprefix("layer_norm_").removesuffix("_kernel") for launch in launches
    ]


def draw(*shape: int, device: torch.device, needs: bool = True) -> Tensor:
    """Return random float64 numbers, as a leaf."""
    return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=needs)


def problem(
    device: torch.device,
    shape: tuple[int, ...] = (2, 3),
    normalized: tuple[int, ...] = (3,),
    present: tuple[str, ...] = NAMES,
    needed: tuple[str, ...] = NAMES,
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return a function of the needed tensors alone, and those tensors; the rest is constant."""
    sizes = {"x": shape, "weight": normalized, "bias": normalized}
    tensors = {
        name: draw(*sizes[name], device=device, needs=name in needed)
        for name in NAMES
        if name in present
    }

    def function(*values: Tensor) -> Tensor:
        arguments = tensors | dict(zip(needed, values, strict=True))
        weight, bias = arguments.get("weight"), arguments.get("bias")
        return layer_norm(arguments["x"], normalized, weight, bias)

    return function, tuple(tensors[name] for name in needed)


def leaves(case: Case) -> list[Tensor]:
    """Return fresh leaves x, weight and bias."""
    given = (case.x, case.weight, case.bias)
    return [tensor.detach().clone().requires_grad_() for tensor in given if tensor is not None]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same bits; NaN equals itself, -0.0 does not equal 0.0."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.detach().contiguous().view(bits), b.detach().contiguous().view(bits)
    )


def assert_close(actual: Any, expected: Any) -> None:
    """Assert that float64 results agree to a few roundings."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def formula(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | float = 1.0,
    bias: Tensor | float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """Return what the definition says, in operations that torch differentiates to any order."""
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt() * weight + bias


# Derivatives against finite differences ----------------------------------------------------------


@pytest.mark.parametrize(("present", "needed"), COMBINATIONS)
def test_gradcheck(
    launches: list[Launch],
    kernels: torch.device,
    present: tuple[str, ...],
    needed: tuple[str, ...],
) -> None:
    """Backward is right for every set of parameters and every subset that needs a gradient."""
    function, inputs = problem(kernels, present=present, needed=needed)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert {"fwd", "bwd"} <= set(names(launches))


@pytest.mark.parametrize(("present", "needed"), COMBINATIONS)
def test_gradgradcheck(
    kernels: torch.device, present: tuple[str, ...], needed: tuple[str, ...]
) -> None:
    """So is double backward, in dy too."""
    function, inputs = problem(kernels, present=present, needed=needed)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("shape", "normalized"), SHAPES)
def test_gradcheck_in_every_mode(
    kernels: torch.device, shape: tuple[int, ...], normalized: tuple[int, ...]
) -> None:
    """Forward mode, batched and undefined gradients agree with finite differences as well."""
    function, inputs = problem(kernels, shape, normalized)
    assert torch.autograd.gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize(("shape", "normalized"), SHAPES)
def test_gradgradcheck_in_every_mode(
    kernels: torch.device, shape: tuple[int, ...], normalized: tuple[int, ...]
) -> None:
    """Forward over reverse, reverse over reverse and batched double backward are right."""
    function, inputs = problem(kernels, shape, normalized)
    assert torch.autograd.gradgradcheck(
        function,
        inputs,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
        fast_mode=True,
    )


# Derivatives against torch -----------------------------------------------------------------------


def third_derivatives(norm: Function, inputs: tuple[Tensor, ...], dy: Tensor) -> list[Any]:
    """Return the gradients of orders one to three, each of the last one along a fixed direction."""
    x, weight, bias = inputs
    generator = torch.Generator().manual_seed(1)
    scalar, found = (norm(x, weight.shape, weight, bias) * dy).sum(), []
    for _ in range(3):
        grads = torch.autograd.grad(scalar, (x, weight, dy), create_graph=True)
        found.append(grads)
        directions = (
            torch.randn(g.shape, generator=generator, dtype=g.dtype).to(g.device) for g in grads
        )
        scalar = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    return found


OF_TORCH = pytest.mark.xfail(reason="torch's operator, and pytorch issue 175754 with it")


@pytest.mark.parametrize("backend", ["triton", pytest.param("torch", marks=OF_TORCH)])
@pytest.mark.parametrize(("shape", "normalized"), SHAPES)
def test_third_derivatives(
    device: torch.device, backend: str, shape: tuple[int, ...], normalized: tuple[int, ...]
) -> None:
    """Gradients of gradients of gradients are right, in x, weight and dy."""
    inputs, dy = problem(device, shape, normalized)[1], draw(*shape, device=device)
    with backends.use(backend):
        ours = third_derivatives(layer_norm, inputs, dy)
    expected = third_derivatives(formula, inputs, dy)
    assert_close(ours, expected)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected[2])


@EVERY_BACKEND
def test_third_derivatives_by_torch_func(device: torch.device, backend: str) -> None:
    """Three nested `torch.func.grad` are right as well."""
    x, weight, bias = (p.detach() for p in problem(device)[1])
    direction = draw(2, 3, device=device, needs=False)

    def third(norm: Function) -> Tensor:
        def scalar(x: Tensor) -> Tensor:
            return (norm(x, (3,), weight, bias) * direction).sum()

        def along_direction(function: Function) -> Function:
            gradient = grad(function)
            return lambda x: (gradient(x) * direction.cos()).sum()

        return grad(along_direction(along_direction(scalar)))(x)

    with backends.use(backend):
        ours = third(layer_norm)
    assert_close(ours, third(formula))


@pytest.mark.xfail(reason="pytorch issue 175754: its double backward holds mean and rstd constant")
def test_third_derivatives_of_torch(device: torch.device) -> None:
    """Once this passes on every supported torch, its operator serves all orders."""
    inputs, dy = problem(device)[1], draw(2, 3, device=device)
    torchs = third_derivatives(F.layer_norm, inputs, dy)
    assert_close(torchs, third_derivatives(formula, inputs, dy))


@pytest.mark.parametrize(
    "used", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")]
)
def test_double_backward_of_some_gradients(kernels: torch.device, used: tuple[str, ...]) -> None:
    """The double backward takes gradients for any subset of dx, dweight and dbias."""
    _, inputs = problem(kernels)
    dy = draw(2, 3, device=kernels)

    def second(norm: Function) -> tuple[Tensor | None, ...]:
        y = norm(inputs[0], (3,), *inputs[1:])
        first = dict(zip(NAMES, torch.autograd.grad(y, inputs, dy, create_graph=True), strict=True))
        scalar = sum(first[name].square().sum() for name in used)
        return torch.autograd.grad(scalar, (*inputs, dy), allow_unused=True, materialize_grads=True)

    assert_close(second(layer_norm), second(formula))


def test_double_backward_gives_what_was_not_wanted_no_gradient(kernels: torch.device) -> None:
    """With a frozen weight the double backward differentiates dx alone."""
    function, (x,) = problem(kernels, needed=("x",))
    dy = draw(2, 3, device=kernels)
    (dx,) = torch.autograd.grad(function(x), x, dy, create_graph=True)
    ddx, ddy = torch.autograd.grad(dx.square().sum(), (x, dy))
    assert ddx.shape == ddy.shape == (2, 3)
    assert ddx.abs().max() > 1e-3


def test_mixed_derivative_of_dweight_in_dy(kernels: torch.device) -> None:
    """d(dweight)/d(dy) is x_hat, which is y without weight and bias."""
    x, weight, bias = problem(kernels)[1]
    dy = draw(2, 3, device=kernels)
    y = layer_norm(x, 3, weight, bias)
    (dweight,) = torch.autograd.grad(y, weight, dy, create_graph=True)
    cotangent = draw(3, device=kernels, needs=False)
    (ddy,) = torch.autograd.grad(dweight, dy, cotangent)
    assert_close(ddy, F.layer_norm(x, (3,)) * cotangent)


# Forward mode ------------------------------------------------------------------------------------


@EVERY_BACKEND
def test_jvp(device: torch.device, backend: str) -> None:
    """The tangent is the finite difference and torch's, and the primal output is y."""
    _, primals = problem(device)
    tangents = tuple(draw(*p.shape, device=device, needs=False) for p in primals)

    def move(step: float) -> Tensor:
        x, weight, bias = (p + step * t for p, t in zip(primals, tangents, strict=True))
        return F.layer_norm(x, (3,), weight, bias)

    with backends.use(backend):
        y, dy = jvp(lambda x, w, b: layer_norm(x, 3, w, b), primals, tangents)
    assert_close(y, move(0.0))
    assert_close(dy, jvp(lambda x, w, b: F.layer_norm(x, (3,), w, b), primals, tangents)[1])
    torch.testing.assert_close(dy, (move(1e-6) - move(-1e-6)) / 2e-6, rtol=1e-7, atol=1e-7)


def test_dual_level(kernels: torch.device) -> None:
    """`torch.autograd.forward_ad`, which the functional API is built on, gives the same."""
    x, weight, bias = problem(kernels)[1]
    tangent = draw(2, 3, device=kernels, needs=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        y, dy = torch.autograd.forward_ad.unpack_dual(layer_norm(dual, 3, weight, bias))
    assert_close(y, F.layer_norm(x, (3,), weight, bias))
    assert_close(dy, jvp(lambda x: F.layer_norm(x, (3,), weight, bias), (x,), (tangent,))[1])


# pytorch issue 196700: sum(layer_norm([t, 0])) with weight [1, 2] and eps 0.25 is
# -t / sqrt(1 + t**2), whose second derivative is 3 t / (1 + t**2)**2.5.
NESTED_AT = 0.7
NESTED_EXPECTED = 0.7749142079590942


def nested_jvp(norm: Function, device: torch.device) -> Tensor:
    """Return the second derivative of the issue's function by forward over forward mode."""

    def function(t: Tensor) -> Tensor:
        x = torch.stack((t, torch.zeros_like(t))).reshape(1, 2)
        weight = torch.tensor([1, 2], dtype=t.dtype, device=device)
        bias = torch.zeros(2, dtype=t.dtype, device=device)
        return norm(x, (2,), weight, bias, 0.25).sum()

    def derivative(t: Tensor) -> Tensor:
        return jvp(function, (t,), (torch.ones_like(t),))[1]

    t = torch.tensor(NESTED_AT, dtype=torch.float64, device=device)
    second: Tensor = jvp(derivative, (t,), (torch.ones_like(t),))[1]
    return second


@EVERY_BACKEND
def test_nested_jvp(device: torch.device, backend: str) -> None:
    """Forward mode nests, where torch's own operator has the wrong sign."""
    with backends.use(backend):
        second = nested_jvp(layer_norm, device)
    assert pytest.approx(3 * NESTED_AT / (1 + NESTED_AT**2) ** 2.5) == NESTED_EXPECTED
    assert second.item() == pytest.approx(NESTED_EXPECTED, rel=1e-12)


@pytest.mark.xfail(reason="pytorch issue 196700: the very thing `reference.layer_norm` is for")
def test_nested_jvp_of_torch(device: torch.device) -> None:
    """Once this passes on every supported torch, the detour for forward mode may go."""
    assert nested_jvp(F.layer_norm, device).item() == pytest.approx(NESTED_EXPECTED, rel=1e-12)


@EVERY_BACKEND
@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_hessian_in_every_mode(
    device: torch.device, backend: str, outer: Function, inner: Function
) -> None:
    """All four ways to differentiate twice give the Hessian."""
    inputs = tuple(leaf.detach() for leaf in problem(device)[1])
    dy = draw(2, 3, device=device, needs=False)

    def second(norm: Function, outer: Function, inner: Function) -> Any:
        def scalar(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return (norm(x, (3,), weight, bias) * dy).sum()

        every = (0, 1, 2)
        return outer(inner(scalar, every), every)(*inputs)

    with backends.use(backend):
        ours = second(layer_norm, outer, inner)
    assert_close(ours, second(formula, jacrev, jacrev))


# torch.func --------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None),
        (1, None, None),
        (-1, None, None),
        (None, 0, None),
        (None, None, 0),
        (0, 0, 0),
        (1, 0, 1),
        (2, None, 1),
        (None, 1, 0),
    ],
    ids=str,
)
def test_vmap(
    device: torch.device, backend: str, in_dims: tuple[int | None, int | None, int | None]
) -> None:
    """A vmap over any mix of x, weight and bias is a loop over the batch."""
    batch, primals = 3, ((2, 4), (4,), (4,))
    arguments = []
    for shape, dim in zip(primals, in_dims, strict=True):
        tensor = draw(batch, *shape, device=device, needs=False)
        arguments.append(tensor[0] if dim is None else tensor.movedim(0, dim))

    def sample(i: int) -> Iterator[Tensor]:
        for tensor, dim in zip(arguments, in_dims, strict=True):
            yield tensor if dim is None else tensor.select(dim, i)

    with backends.use(backend):
        ours = vmap(lambda x, w, b: layer_norm(x, 4, w, b), in_dims)(*arguments)
    loop = [F.layer_norm(x, (4,), w, b) for x, w, b in map(sample, range(batch))]
    assert_close(ours, torch.stack(loop))


@EVERY_BACKEND
def test_nested_vmap(device: torch.device, backend: str) -> None:
    """A vmap of a vmap is two loops."""
    x, weight = draw(2, 3, 4, device=device), draw(2, 4, device=device)
    with backends.use(backend):
        ours = vmap(vmap(lambda x, w: layer_norm(x, 4, w), (0, None)))(x, weight)
    assert_close(ours, F.layer_norm(x, (4,)) * weight[:, None])


@EVERY_BACKEND
def test_per_sample_gradients(device: torch.device, backend: str) -> None:
    """The vmap of grad gives each sample's own parameter gradients."""
    model = nn.Sequential(nn.Linear(4, 6), fusednorm.LayerNorm(6), nn.Linear(6, 2))
    model.to(device, torch.float64)
    nn.init.normal_(model[1].weight)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    data, target = draw(5, 4, device=device, needs=False), draw(5, 2, device=device, needs=False)

    def loss(parameters: dict[str, Tensor], x: Tensor, wanted: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, parameters, (x,)), wanted)

    with backends.use(backend):
        ours = vmap(grad(loss), (None, 0, 0))(parameters, data, target)
        for i in range(5):
            model.zero_grad()
            F.mse_loss(model(data[i]), target[i]).backward()
            for name, parameter in model.named_parameters():
                assert_close(ours[name][i], parameter.grad)


@EVERY_BACKEND
def test_func_transforms(device: torch.device, backend: str) -> None:
    """grad, vjp, jacrev, jacfwd and hessian of torch.func are right."""
    x, weight, bias = (p.detach() for p in problem(device)[1])
    dy = draw(2, 3, device=device, needs=False)

    def everything(norm: Function) -> list[Any]:
        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return norm(x, (3,), weight, bias)

        def scalar(*primals: Tensor) -> Tensor:
            return (function(*primals) * dy).sum()

        y, pullback = vjp(function, x, weight, bias)
        return [
            grad(scalar, (0, 1, 2))(x, weight, bias),
            y,
            pullback(dy),
            jacrev(function, (0, 1, 2))(x, weight, bias),
            jacfwd(function, (0, 1, 2))(x, weight, bias),
            hessian(scalar)(x, weight, bias),
        ]

    with backends.use(backend):
        ours = everything(layer_norm)
    for mine, torchs in zip(ours, everything(formula), strict=True):
        assert_close(mine, torchs)


def test_backward_of_the_kernels_under_a_transform(kernels: torch.device) -> None:
    """A graph that the kernels recorded can be pulled back by vmap and is_grads_batched."""
    function, inputs = problem(kernels)
    y = function(*inputs)
    basis = draw(4, 2, 3, device=kernels, needs=False)
    loop = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in basis]
    expected = tuple(map(torch.stack, zip(*loop, strict=True)))

    def pullback(dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, dy, retain_graph=True)

    assert_close(vmap(pullback)(basis), expected)
    batched = torch.autograd.grad(y, inputs, basis, is_grads_batched=True, retain_graph=True)
    assert_close(batched, expected)


def test_vmap_of_backward_under_autocast(kernels: torch.device) -> None:
    """A Jacobian by vmap over a mixed-precision model, which torch's own norm fails at on CUDA."""
    model = nn.Sequential(nn.Linear(4, 6), fusednorm.LayerNorm(6), nn.Linear(6, 3)).to(kernels)
    x = torch.randn(2, 4, device=kernels)
    with torch.autocast(kernels.type, torch.bfloat16):
        y = model(x).flatten()
    inputs = tuple(model.parameters())
    basis = torch.eye(y.numel(), dtype=y.dtype, device=kernels)

    def pullback(dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, dy, retain_graph=True)

    with torch.autocast(kernels.type, torch.bfloat16):
        jacobians = vmap(pullback)(basis)
    loop = [pullback(dy) for dy in basis]
    for jacobian, rows in zip(jacobians, zip(*loop, strict=True), strict=True):
        # The roundings to bfloat16 fall elsewhere in a batched backward.
        torch.testing.assert_close(jacobian, torch.stack(rows), rtol=0.05, atol=0.05)
        assert jacobian.abs().max() > 0.1


# What surrounds a backward -----------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(launches: list[Launch], kernels: torch.device, use_reentrant: bool) -> None:
    """A checkpointed norm has the same bits as one that saves its inputs."""
    case = make_case(5, 6, torch.float32, kernels)
    results = []
    for wrapped in (False, True):
        x, weight, bias = leaves(case)
        if wrapped:
            y = checkpoint(layer_norm, x, (6,), weight, bias, use_reentrant=use_reentrant)
        else:
            y = layer_norm(x, (6,), weight, bias)
        y.backward(case.dy)
        results.append((y, x.grad, weight.grad, bias.grad))
    assert all(itertools.starmap(same_bits, zip(*results, strict=True)))
    assert names(launches).count("fwd") == 3


def test_retain_graph(kernels: torch.device) -> None:
    """Backward twice through one graph gives the same bits; without retain_graph it is an error."""
    case = make_case(5, 6, torch.float32, kernels)
    inputs = leaves(case)
    y = layer_norm(inputs[0], 6, *inputs[1:])
    first = torch.autograd.grad(y, inputs, case.dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, case.dy)
    assert all(itertools.starmap(same_bits, zip(first, second, strict=True)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, case.dy)


def test_tensor_that_outlived_a_transform(kernels: torch.device) -> None:
    """What leaks out of a transform is a plain tensor again, inside of what it was there."""
    case, leaked = make_case(3, 5, torch.float32, kernels), []
    torch.func.grad(lambda x: (leaked.append(x), x.sum())[1])(case.x)
    weight = case.weight.requires_grad_()
    y, expected = (norm(leaked[0], (5,), weight) for norm in (layer_norm, F.layer_norm))
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(z, weight, case.dy)[0] for z in (y, expected))
    torch.testing.assert_close(ours, theirs)


def test_hooks(kernels: torch.device) -> None:
    """Hooks see each gradient once, and what they return is what goes on."""
    case = make_case(5, 6, torch.float32, kernels)
    plain, hooked = leaves(case), leaves(case)
    layer_norm(plain[0], 6, *plain[1:]).backward(case.dy * 2)

    seen: list[str] = []
    y = layer_norm(hooked[0], 6, *hooked[1:])
    y.register_hook(lambda dy: seen.append("y") or dy * 2)
    for name, leaf in zip(NAMES, hooked, strict=True):
        leaf.register_hook(lambda g, name=name: seen.append(name) or -g)
        leaf.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(f"after {name}"))
    y.backward(case.dy)
    assert seen[0] == "y"
    assert sorted(seen[1:]) == sorted([*NAMES, *(f"after {name}" for name in NAMES)])
    for leaf, other in zip(hooked, plain, strict=True):
        assert same_bits(leaf.grad, -other.grad)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_detection(kernels: torch.device) -> None:
    """Anomaly detection changes no gradient, and names our node when one is NaN."""
    case = make_case(5, 6, torch.float32, kernels)
    plain, watched = leaves(case), leaves(case)
    layer_norm(plain[0], 6, *plain[1:]).backward(case.dy)
    with torch.autograd.set_detect_anomaly(True):
        layer_norm(watched[0], 6, *watched[1:]).backward(case.dy)
        for leaf, other in zip(watched, plain, strict=True):
            assert same_bits(leaf.grad, other.grad)
        y = layer_norm(watched[0], 6, *watched[1:])
        with pytest.raises(RuntimeError, match=r"LayerNorm\w*' returned nan"):
            y.backward(torch.full_like(case.dy, torch.nan))


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_follows_its_forward(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    create_graph: bool,
) -> None:
    """Backward runs the implementation of its forward, whatever is requested by then."""
    launches = record_launches(monkeypatch)
    # The operator of a double backward runs the kernels of the device: these, and no others.
    monkeypatch.setattr(backends, "kernels", lambda device: "triton")
    if (extension := backends.own_operators()) is not None:
        extension.ask("triton")
        monkeypatch.setattr(backends, "own_operators", lambda: None)  # who would ask otherwise
        request.addfinalizer(lambda: extension.ask(None))
    function, inputs = problem(device)
    with backends.use("triton"):
        y = function(*inputs)
    dy = draw(2, 3, device=device, needs=False)
    with backends.use("torch"):
        torch.autograd.grad(y, inputs, dy, create_graph=create_graph)
    assert names(launches) == ["fwd", "bwd", "bwd_finalize"]

    launches.clear()
    with backends.use("torch"):
        y = function(*inputs)
    with backends.use("triton"):
        torch.autograd.grad(y, inputs, dy, create_graph=create_graph)
    assert names(launches) == []


def test_threads(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards of several threads do not disturb one another."""
    if kernels.type == "cpu":
        # The interpreter keeps the program id in a global: launches, and they alone, take turns.
        from triton.runtime.interpreter import InterpretedFunction

        launch, turn = InterpretedFunction.run, threading.Lock()

        def launch_in_turn(*args: Any, **options: Any) -> None:
            with turn:
                launch(*args, **options)

        monkeypatch.setattr(InterpretedFunction, "run", launch_in_turn)

    cases = [make_case(4, 4 + i, torch.float64, kernels) for i in range(2)]
    barrier = threading.Barrier(len(cases))

    def work(case: Case) -> list[tuple[Tensor, ...]]:
        results = []
        try:
            for _ in range(3):
                inputs = leaves(case)
                barrier.wait()
                y = layer_norm(inputs[0], case.shape, *inputs[1:])
                barrier.wait()
                results.append((y.detach(), *torch.autograd.grad(y, inputs, case.dy)))
        except BaseException:
            barrier.abort()
            raise
        return results

    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(work, cases))
    for case, results in zip(cases, found, strict=True):
        inputs = leaves(case)
        y = F.layer_norm(inputs[0], case.shape, *inputs[1:])
        expected = (y.detach(), *torch.autograd.grad(y, inputs, case.dy))
        for result in results:
            assert_close(result, expected)


# What the caller owns ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", ["contiguous", "transposed", "row-strided", "expanded", "scalar"]
)
def test_dy_is_not_modified(kernels: torch.device, layout: str) -> None:
    """Backward leaves every bit of dy as it was, whatever its strides, and reads it rightly."""
    case = make_case(5, 6, torch.float32, kernels)
    dy = {
        "contiguous": lambda: case.dy,
        "transposed": lambda: case.dy.T.contiguous().T,
        "row-strided": lambda: F.pad(case.dy, (0, 3))[:, :6],
        "expanded": lambda: case.dy[0].expand(5, 6),
        "scalar": lambda: case.dy[0, 0].expand(5, 6),
    }[layout]()
    before = dy.clone()
    inputs, again = leaves(case), leaves(case)
    layer_norm(inputs[0], 6, *inputs[1:]).backward(dy)
    assert same_bits(dy, before)
    layer_norm(again[0], 6, *again[1:]).backward(before)
    for leaf, other in zip(inputs, again, strict=True):
        assert same_bits(leaf.grad, other.grad)


def test_dy_may_be_shared(kernels: torch.device) -> None:
    """A residual branch gets dy itself, not what a norm made of it."""
    case = make_case(5, 6, torch.float32, kernels)
    inputs = leaves(case)
    residual = torch.zeros_like(case.x, requires_grad=True)
    (layer_norm(inputs[0], 6, *inputs[1:]) + residual).backward(case.dy)
    assert same_bits(residual.grad, case.dy)
    assert not torch.equal(inputs[0].grad, case.dy)


def test_inputs_are_not_modified(kernels: torch.device) -> None:
    """Neither pass writes to x, weight or bias."""
    inputs = leaves(make_case(5, 6, torch.float32, kernels))
    before = [leaf.detach().clone() for leaf in inputs]
    layer_norm(inputs[0], 6, *inputs[1:]).square().sum().backward()
    assert all(itertools.starmap(same_bits, zip(inputs, before, strict=True)))


@pytest.mark.parametrize("modified", ["x", "weight"])
def test_modifying_what_backward_needs_is_an_error(kernels: torch.device, modified: str) -> None:
    """The version counters of x and weight guard them, as they do for nn.LayerNorm."""
    for module in (nn.LayerNorm(6), fusednorm.LayerNorm(6)):
        module.to(kernels)
        x = torch.randn(5, 6, device=kernels, requires_grad=True) * 1
        y = module(x)
        with torch.no_grad():
            (x if modified == "x" else module.weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_output_may_be_modified(kernels: torch.device) -> None:
    """Backward does not need y, so an activation may overwrite it."""
    case = make_case(5, 6, torch.float32, kernels)
    inputs, again = leaves(case), leaves(case)
    layer_norm(inputs[0], 6, *inputs[1:]).relu_().backward(case.dy)
    layer_norm(again[0], 6, *again[1:]).relu().backward(case.dy)
    for leaf, other in zip(inputs, again, strict=True):
        assert same_bits(leaf.grad, other.grad)


def test_output_of_no_grad_may_be_modified(kernels: torch.device) -> None:
    """The output of a frozen norm is a tensor like any other, not a view made without gradient."""
    case = make_case(5, 6, torch.float32, kernels)
    scale = torch.ones(6, device=kernels, requires_grad=True)
    with torch.no_grad():
        y = layer_norm(case.x, 6, case.weight, case.bias)
    expected = (y * case.dy).sum(0)
    y.mul_(scale).backward(case.dy)
    torch.testing.assert_close(scale.grad, expected)


# Only needed work --------------------------------------------------------------------------------


@pytest.mark.parametrize(("present", "needed"), COMBINATIONS)
def test_only_what_is_needed_is_computed(
    launches: list[Launch],
    kernels: torch.device,
    present: tuple[str, ...],
    needed: tuple[str, ...],
) -> None:
    """Backward has neither memory nor work for the gradient of a frozen input."""
    function, inputs = problem(kernels, present=present, needed=needed)
    y = function(*inputs)
    launches.clear()
    y.backward(torch.ones_like(y))
    assert all(leaf.grad is not None for leaf in inputs)
    (main, *rest) = (launch for launch in launches if launch.kernel != "layer_norm_bwd_sums_kernel")
    outputs = {"x": "dx_ptr", "weight": "dz_x_hat_ptr", "bias": "dz_sum_ptr"}
    given = {name for name in NAMES if main.arguments[outputs[name]] is not None}
    assert given == set(needed)
    if given == {"x"}:
        assert rest == []
    else:
        (finalize,) = rest
        given = {n for n in NAMES[1:] if finalize.arguments[f"d{n}_ptr"] is not None}
        assert given == set(needed) - {"x"}


@pytest.mark.parametrize(("needed", "passes"), [("x", 1), ("weight", 0), ("bias", 0)])
def test_row_sums_only_for_dx(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, needed: str, passes: int
) -> None:
    """Rows too long for a program get a pass of their own for the sums that only dx reads."""
    launches = record_launches(monkeypatch, execute=False)
    function, inputs = problem(kernels, (1, 40000), (40000,), needed=(needed,))
    y = function(*inputs)
    y.backward(torch.ones_like(y))
    assert names(launches).count("bwd_sums") == passes


@pytest.mark.parametrize("mode", ["nothing needs it", "no_grad", "inference_mode"])
def test_nothing_is_saved_without_a_gradient(
    launches: list[Launch], kernels: torch.device, mode: str
) -> None:
    """Where no gradient can be asked for there is no node and no memory for statistics."""
    inputs = leaves(make_case(5, 6, torch.float32, kernels))
    expected = layer_norm(inputs[0], 6, *inputs[1:])
    assert launches.pop().arguments["mean_ptr"] is not None
    if mode == "no_grad":
        with torch.no_grad():
            y = layer_norm(inputs[0], 6, *inputs[1:])
    elif mode == "inference_mode":
        with torch.inference_mode():
            y = layer_norm(inputs[0], 6, *inputs[1:])
    else:
        inputs = [leaf.detach() for leaf in inputs]
        y = layer_norm(inputs[0], 6, *inputs[1:])
    (launch,) = launches
    assert launch.arguments["mean_ptr"] is None
    assert launch.arguments["rstd_ptr"] is None
    assert y.grad_fn is None
    assert not y.requires_grad
    assert y.is_inference() == (mode == "inference_mode")
    assert same_bits(y, expected)


class Cut(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the input."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        """Return an undefined gradient."""


def test_undefined_gradient_is_not_materialised(
    launches: list[Launch], kernels: torch.device
) -> None:
    """Where no gradient comes, backward launches nothing and gives none on."""
    function, inputs = problem(kernels)
    y = function(*inputs)
    launches.clear()
    Cut.apply(y).sum().backward()
    assert launches == []
    assert [leaf.grad for leaf in inputs] == [None, None, None]


def test_undefined_gradients_of_backward(kernels: torch.device) -> None:
    """The double backward, too, gives nothing on where none of its gradients is defined."""
    function, inputs = problem(kernels)
    dy = draw(2, 3, device=kernels)
    grads = torch.autograd.grad(function(*inputs), inputs, dy, create_graph=True)
    sum(Cut.apply(gradient).sum() for gradient in grads).backward()
    assert [leaf.grad for leaf in (*inputs, dy)] == [None, None, None, None]


@pytest.mark.parametrize("present", [NAMES, ("x", "weight"), ("x", "bias"), ("x",)], ids="+".join)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_saved_for_backward(kernels: torch.device, present: tuple[str, ...], layout: str) -> None:
    """A call keeps its own inputs alive, and two statistics per row; no copy of anything."""
    case = make_case(
        5, 6, torch.bfloat16, kernels, weight="weight" in present, bias="bias" in present
    )
    inputs = leaves(case)
    if layout == "transposed":
        inputs[0] = case.x.T.contiguous().T.requires_grad_()
    arguments = dict(zip(present, inputs, strict=True))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer_norm(arguments["x"], 6, arguments.get("weight"), arguments.get("bias"))
    known = {leaf.data_ptr() for leaf in inputs}
    assert known == {t.data_ptr() for t in saved if t.data_ptr() in known}
    statistics = [t for t in saved if t.data_ptr() not in known]
    assert [(t.shape, t.dtype) for t in statistics] == [((5,), torch.float32)] * 2
    assert len(saved) == len(present) + 2
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in inputs) + 2 * 5 * 4
    assert y.data_ptr() not in {t.data_ptr() for t in saved}


def test_saved_tensors_hooks(kernels: torch.device) -> None:
    """What is saved may be packed away, to host memory for instance, and comes back as it was."""
    case = make_case(5, 6, torch.float32, kernels)
    plain, packed = leaves(case), leaves(case)
    layer_norm(plain[0], 6, *plain[1:]).backward(case.dy)
    with torch.autograd.graph.save_on_cpu():
        y = layer_norm(packed[0], 6, *packed[1:])
    y.backward(case.dy)
    for leaf, other in zip(packed, plain, strict=True):
        assert same_bits(leaf.grad, other.grad)


def test_inference_tensors(kernels: torch.device) -> None:
    """Inference tensors are taken, and refused, where nn.LayerNorm takes and refuses them."""
    with torch.inference_mode():
        x = torch.randn(5, 6, device=kernels)
    for module in (nn.LayerNorm(6), fusednorm.LayerNorm(6)):
        module.to(kernels)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            module(x)
        module.requires_grad_(False)
        assert not module(x).requires_grad
