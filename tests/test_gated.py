"""Gated norms beyond what test_terms.py holds all terms to: formulas, layouts, groups, errors."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    DEVICE,
    Case,
    add_terms,
    errors,
    fused,
    make_case,
    oracle,
    rounding,
    run,
    unfused,
)
from spies import Launch, few_programs
from test_layouts import _GuardedMemory
from test_terms import saved_by
from test_validation import _message
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import backends, functional, gated, gated_layer_norm, gated_rms_norm
from fusednorm.spec import GatedOperands, GatedSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of the interpreter
    pytest.mark.filterwarnings("ignore:invalid value encountered in multiply"),
]

EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
PLACES = ("last", "first")


def case_of(rows: int, cols: int, dtype: torch.dtype, place: str, **terms: Any) -> Case:
    """Draw a gated norm."""
    return add_terms(make_case(rows, cols, dtype, DEVICE), gated=place, **terms)


# Formulas ------------------------------------------------------------------------------------


def of_mamba(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
) -> Tensor:
    """Return what mamba's reference of its gated RMS norm computes."""
    x = x if norm_before_gate else x * F.silu(z)
    groups = x.reshape(*x.shape[:-1], -1, group_size or x.shape[-1])
    normed = groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()
    out = normed.reshape(x.shape) * weight + (0.0 if bias is None else bias)
    return out * F.silu(z) if norm_before_gate else out


def of_fla(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> Tensor:
    """Return what fla's gated norms with swish compute: y * g * sigmoid(g)."""
    centred = x if rms else x - x.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return (y if bias is None else y + bias) * g * g.sigmoid()


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return the result of a function and its gradients for a fixed gradient of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    z = function(*leaves)
    dz = torch.linspace(-1, 1, z.numel(), dtype=z.dtype, device=z.device).reshape(z.shape).sin()
    return [z.detach(), *torch.autograd.grad(z, leaves, dz)]


def drawn(cols: int = 12) -> list[Tensor]:
    """Return x, g, weight and bias in float64."""
    sizes = ((2, 3, cols), (2, 3, cols), (cols,), (cols,))
    return [torch.randn(size, dtype=torch.float64, device=DEVICE) for size in sizes]


@EVERY_BACKEND
@pytest.mark.parametrize("group_size", [None, 4, 1])
@pytest.mark.parametrize("before", [True, False])
def test_formula_of_mamba(backend: str, before: bool, group_size: int | None) -> None:
    options = {"group_size": group_size, "norm_before_gate": before}
    inputs = drawn()
    with backends.use(backend):
        ours = with_gradients(
            lambda x, g, w, b: gated_rms_norm(x, g, 12, w, b, 1e-5, **options), *inputs
        )
    theirs = with_gradients(
        lambda x, g, w, b: of_mamba(x, w, b, g, 1e-5, group_size, before), *inputs
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@EVERY_BACKEND
@pytest.mark.parametrize("rms", [True, False])
def test_formula_of_fla(backend: str, rms: bool) -> None:
    norm = gated_rms_norm if rms else gated_layer_norm
    inputs = drawn()
    with backends.use(backend):
        ours = with_gradients(lambda x, g, w, b: norm(x, g, 12, w, b, 1e-5), *inputs)
    theirs = with_gradients(lambda x, g, w, b: of_fla(x, g, w, b, 1e-5, rms), *inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@EVERY_BACKEND
def test_epsilon_of_the_dtype_computed_in(backend: str) -> None:
    """Without eps it is that of float32, and of float64 where either input is."""
    x, g = torch.full((1, 4), 1e-4, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    with backends.use(backend):
        for gate, eps in ((g, 2.0**-23), (g.double(), 2.0**-52)):
            expected = 1e-4 / (1e-8 + eps) ** 0.5 * F.silu(g)
            torch.testing.assert_close(gated_rms_norm(x, gate, 4), expected)


@EVERY_BACKEND
@pytest.mark.parametrize("place", PLACES)
def test_rounded_x_hat(backend: str, place: str) -> None:
    """Models round x_hat to the dtype of x before the weight; dweight is that of the rounded."""
    x, g, weight, _ = (tensor.bfloat16() for tensor in drawn(64))

    def theirs(x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        silu = F.silu(g.float())
        h = x.float() if place == "last" else x.float() * silu
        y = F.rms_norm(h, (64,), eps=1e-5).bfloat16().float() * weight.float()
        return (y * silu if place == "last" else y).bfloat16()

    def ours(x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        return functional.gated_norm(
            "gated_rms_norm",
            GatedOperands(x, g, weight),
            64,
            1e-5,
            group_size=None,
            norm_before_gate=place == "last",
            rms=True,
            x_hat_dtype=torch.bfloat16,
        )

    with backends.use(backend):
        z, dx, dg, dweight = with_gradients(ours, x, g, weight)
    expected = with_gradients(theirs, x, g, weight)
    for got, one in ((z, expected[0]), (dweight, expected[3])):
        assert (got == one).double().mean() > 0.97
    # Autograd rounds their gradients where it passes the rounding of x_hat.
    torch.testing.assert_close([dx, dg], expected[1:3], rtol=2**-6, atol=2**-6)


# Layouts, dtypes, shapes -----------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("place", PLACES)
def test_slices_of_a_packed_projection(
    backend: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X, the gate and dz are read where they lie, in rows that are wider than theirs."""
    packed = torch.randn(2, 5, 3 * 64 + 8, device=DEVICE)
    g, x, dz = packed[..., :64], packed[..., 64:128], packed[..., 136:]
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("it was copied"))
    leaves = [tensor.requires_grad_() for tensor in (x.detach(), g.detach())]
    results = []
    for one in (backend, "torch"):
        monkeypatch.undo() if one == "torch" else None
        with backends.use(one):
            z = gated_rms_norm(*leaves, 64, group_size=16, norm_before_gate=place == "last")
            results.append([z, *torch.autograd.grad(z, leaves, dz)])
    torch.testing.assert_close(*results)


@EVERY_BACKEND
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t[:1, :1].expand_as(t),
        lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
    ],
    ids=["transposed", "columns apart", "expanded", "unaligned"],
)
def test_layouts_of_the_gate(backend: str, place: str, layout: Callable[[Tensor], Tensor]) -> None:
    x, g, weight, _ = (tensor.float() for tensor in drawn(16))
    g = layout(g)
    held = g.clone()

    def norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        options = {"group_size": 8, "norm_before_gate": place == "last"}
        return gated_rms_norm(x, gate, 16, weight, eps=1e-5, **options)

    results = []
    for one in (backend, "torch"):
        leaves = [x.detach().requires_grad_(), g.detach().requires_grad_(), weight.detach()]
        with backends.use(one):
            z = norm(*leaves)
            results.append([z, *torch.autograd.grad(z, leaves[:2], torch.ones_like(z) * x)])
    torch.testing.assert_close(*results)
    assert torch.equal(g, held)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@EVERY_BACKEND
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gate", DTYPES, ids=str)
@pytest.mark.parametrize("x", DTYPES, ids=str)
def test_mixed_dtypes(backend: str, x: torch.dtype, gate: torch.dtype, place: str) -> None:
    """Every tensor may have a dtype of its own, which its gradient has, and z has that of x."""
    inputs = [
        tensor.to(dtype)
        for tensor, dtype in zip(drawn(24), (x, gate, torch.float32, torch.bfloat16), strict=True)
    ]

    def norm(x: Tensor, g: Tensor, *affine: Tensor) -> Tensor:
        options = {"group_size": 8, "norm_before_gate": place == "last"}
        return gated_layer_norm(x, g, 24, *affine, **options)

    with backends.use(backend):
        ours = with_gradients(norm, *inputs)
    with backends.use("torch"):
        theirs = with_gradients(norm, *inputs)
        exact = with_gradients(norm, *(tensor.double() for tensor in inputs))
    assert [t.dtype for t in ours] == [x, x, gate, torch.float32, torch.bfloat16]
    for got, torchs, truth in zip(ours, theirs, exact, strict=True):
        unit = max(torch.finfo(got.dtype).eps, torch.finfo(x).eps, 2**-23 if x != gate else 0.0)
        if torch.float64 in (x, gate):
            unit = torch.finfo(got.dtype).eps
        allowed = (torchs.double() - truth).abs().max() + 4 * unit * truth.abs().max()
        assert (got.double() - truth).abs().max() <= allowed


@EVERY_BACKEND
def test_several_normalised_dimensions(backend: str) -> None:
    """Groups are runs of the numbers of a row, whatever its dimensions."""
    x, g, weight, bias = drawn(24)
    shape = (4, 6)
    with backends.use(backend):
        flat = gated_layer_norm(x, g, 24, weight, bias, group_size=3)
        rows = (tensor.unflatten(-1, shape) for tensor in (x, g))
        folded = gated_layer_norm(
            *rows, shape, *(p.reshape(shape) for p in (weight, bias)), group_size=3
        )
    assert torch.equal(folded.flatten(-2), flat)


@EVERY_BACKEND
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 0)], ids=str)
def test_empty(backend: str, place: str, shape: tuple[int, ...]) -> None:
    cols = shape[-1]
    x, g = (torch.ones(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(cols, device=DEVICE, requires_grad=True) for _ in range(2))
    with backends.use(backend):
        for norm in (gated_layer_norm, gated_rms_norm):
            group_size = 4 if cols else None
            z = norm(
                *(x, g, cols, weight, bias), group_size=group_size, norm_before_gate=place == "last"
            )
            assert z.shape == shape
            for gradient in torch.autograd.grad(z.sum(), (x, g, weight, bias)):
                assert not gradient.any()


@EVERY_BACKEND
@pytest.mark.parametrize("place", PLACES)
def test_gates_far_from_zero(backend: str, place: str) -> None:
    """The SiLU of large numbers is 0 or they themselves, and what is not finite spreads."""
    g = torch.tensor([[-1e4, -200.0, -90.0, -20.0, 20.0, 90.0, 200.0, 1e4]], device=DEVICE)
    x = torch.linspace(-2, 3, 8, device=DEVICE)[None]
    options = {"norm_before_gate": place == "last"}
    dz = torch.ones_like(x)
    results = []
    for one in (backend, "torch"):
        leaves = [x.clone().requires_grad_(), g.clone().requires_grad_()]
        with backends.use(one):
            z = gated_rms_norm(*leaves, 8, **options)
            results.append([z, *torch.autograd.grad(z, leaves, dz)])
            for value in (float("nan"), float("-inf")):
                bad = g.clone()
                bad[0, 3] = value
                assert gated_rms_norm(x, bad, 8, **options)[0, 3].isnan()
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("rows", "cols", "groups", "dtype"),
    [
        (6, 100, 2, torch.float32),
        (19, 300, 3, torch.bfloat16),
        (3, 4100, 1, torch.bfloat16),
        (3, 10300, 2, torch.bfloat16),
        (3, 8200, 1, torch.float32),
        (2, 32770, 1, torch.float32),
    ],
)
def test_nothing_outside_the_tensors_is_read_or_written(
    kernels: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    rows: int,
    cols: int,
    groups: int,
    dtype: torch.dtype,
) -> None:
    """Inputs between NaNs and outputs between sentinels, for every form of the kernels."""
    if cols > 1000:
        few_programs(monkeypatch)
    case = case_of(rows, cols, dtype, place)
    assert case.terms is not None
    case.terms.groups = groups
    truth, theirs = oracle(case), run(unfused, case)
    between = {}
    for name in ("x", "weight", "bias", "dy"):
        values = getattr(case, name)
        buffer = values.new_full((values.numel() + 64,), float("nan"))
        between[name] = buffer[32:-32].view(values.shape).copy_(values)
    gate = case.terms.gate_input
    buffer = gate.new_full((gate.numel() + 64,), float("nan"))
    between["gate"] = buffer[32:-32].view(gate.shape).copy_(gate)
    leaves = [between[name].requires_grad_() for name in ("x", "weight", "bias", "gate")]
    with monkeypatch.context() as patch:
        memory = _GuardedMemory(patch)
        x, weight, bias, gate = leaves
        y = gated_layer_norm(
            *(x, gate, cols, weight, bias),
            group_size=cols // groups,
            norm_before_gate=place == "last",
        )
        grads = torch.autograd.grad(y, leaves, between["dy"])
    results = dict(zip(("dx", "dweight", "dbias", "dgate_input"), grads, strict=True))
    results |= {"y": y.detach()}
    memory.assert_holds(*results.values())
    memory.assert_intact()
    budget = errors(theirs, truth)
    for name, error in errors(results, truth).items():
        assert error <= 4 * (budget[name] + rounding(results[name].dtype, truth[name])), name


# Promises ------------------------------------------------------------------------------------

FORMS = [
    (64, 1, torch.float32),
    (768, 3, torch.bfloat16),
    (5000, 1, torch.bfloat16),
    (9000, 1, torch.float32),
    (34000, 1, torch.float32),
]


@pytest.mark.parametrize("backend", [one for one in BACKENDS if one != "torch"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("cols", "groups", "dtype"), FORMS)
def test_bits(
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    cols: int,
    groups: int,
    dtype: torch.dtype,
    place: str,
) -> None:
    """Two runs are equal, and so is a row alone to the same row of a batch."""
    if cols > 1000:
        few_programs(monkeypatch)
    case = case_of(5, cols, dtype, place)
    assert case.terms is not None
    case.terms.groups = groups

    def part(rows: slice) -> Case:
        rest = add_terms(Case(case.x[rows], case.weight, case.bias, case.dy[rows]), gated=place)
        assert rest.terms is not None
        rest.terms.gate_input, rest.terms.groups = case.terms.gate_input[rows], groups
        return rest

    with backends.use(backend):
        batch, again, alone = run(fused, case), run(fused, case), run(fused, part(slice(3, 4)))
    for name, tensor in batch.items():
        assert torch.equal(tensor, again[name]), name
    for name in ("y", "dx", "dgate_input"):
        assert torch.equal(alone[name], batch[name][3:4]), name


@pytest.mark.parametrize("place", PLACES)
def test_one_pass_each_way(launches: list[Launch], place: str) -> None:
    """One kernel forward, one backward, and one for the partial sums if there are any."""
    x, g, weight, _ = (tensor.float() for tensor in drawn(16))
    leaves = [tensor.requires_grad_() for tensor in (x, g, weight)]
    options = {"group_size": 8, "norm_before_gate": place == "last"}
    z, saved = saved_by(lambda: gated_rms_norm(leaves[0], leaves[1], 16, leaves[2], **options))
    both = ["gated_norm_fwd_kernel", "gated_norm_bwd_kernel"]
    large = [tensor for tensor in saved if tensor.numel() == x.numel()]
    assert {tensor.data_ptr() for tensor in large} == {x.data_ptr(), g.data_ptr()}
    assert sum(tensor.numel() for tensor in saved) == 2 * x.numel() + 6 * 2 + 16
    torch.autograd.grad(z, leaves, torch.ones_like(z))
    assert [one.kernel for one in launches] == [*both, "layer_norm_bwd_finalize_kernel"]
    launches.clear()
    z = gated_rms_norm(leaves[0], leaves[1], 16, weight.detach(), **options)
    torch.autograd.grad(z, leaves[:2], torch.ones_like(z))
    assert [one.kernel for one in launches] == both
    launches.clear()
    with torch.no_grad():
        gated_rms_norm(x, g, 16, weight, **options)
    assert launches[0].arguments["rstd_ptr"] is None


@EVERY_BACKEND
@pytest.mark.parametrize("place", PLACES)
def test_each_gradient_alone(backend: str, place: str) -> None:
    """Only what is wanted is computed, and it is what it is among all."""
    inputs = [tensor.float() for tensor in drawn(16)]
    options = {"group_size": 8, "norm_before_gate": place == "last"}

    def gradients(*wanted: bool) -> list[Tensor]:
        leaves = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
        x, g, weight, bias = leaves
        z = gated_layer_norm(x, g, 16, weight, bias, **options)
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        return list(torch.autograd.grad(z, needed, inputs[1].cos()))

    with backends.use(backend):
        together = gradients(True, True, True, True)
        for i, gradient in enumerate(together):
            (alone,) = gradients(*(i == j for j in range(4)))
            torch.testing.assert_close(alone, gradient)


def test_long_rows_without_dx(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that backward takes in pieces, of which only some gradients are wanted."""
    few_programs(monkeypatch)
    x, g, weight, bias = (tensor.float() for tensor in drawn(9000))
    for before in (True, False):
        results = []
        for backend in ("triton", "torch"):
            gate, w = g.detach().requires_grad_(), weight.detach().requires_grad_()
            with backends.use(backend):
                z = gated_layer_norm(x, gate, 9000, w, bias, norm_before_gate=before)
                results.append(torch.autograd.grad(z, (gate, w), x.sin()))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_autocast(kernels: torch.device, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Under an autocast that runs norms in float32 z is float32, of inputs as they are."""
    monkeypatch.setattr(functional, "AUTOCAST_FLOAT32", frozenset({kernels.type}))
    x, g, weight, _ = drawn(40)
    x, g, weight = x.bfloat16().requires_grad_(), g.bfloat16(), weight.float()
    options = {"norm_before_gate": place == "last"}
    with torch.autocast(kernels.type, torch.bfloat16):
        z = gated_layer_norm(x, g, 40, weight, **options)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, gated_layer_norm(x.float(), g.float(), 40, weight, **options))
    (dx,) = torch.autograd.grad(z.sum(), x)
    assert dx.dtype == torch.bfloat16


# Who else looks ------------------------------------------------------------------------------


def _norm(x: Tensor, g: Tensor, weight: Tensor, before: bool = True) -> Tensor:
    return gated_rms_norm(x, g, 16, weight, eps=1e-5, group_size=8, norm_before_gate=before)


@EVERY_BACKEND
@pytest.mark.parametrize("before", [True, False])
def test_compiled(backend: str, before: bool) -> None:
    """One graph forward and backward, with the bits of an eager call, for any number of rows."""
    torch._dynamo.reset()
    compiled = torch.compile(_norm, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 7):
        leaves = [
            torch.randn(size, device=DEVICE, requires_grad=True)
            for size in ((rows, 16), (rows, 16), (16,))
        ]
        with backends.use(backend):
            pairs = [f(*leaves, before) for f in (compiled, _norm)]
            grads = [torch.autograd.grad(z, leaves, z.detach().cos()) for z in pairs]
        torch.testing.assert_close(*pairs)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
@pytest.mark.parametrize("rms", [True, False])
def test_opcheck(monkeypatch: pytest.MonkeyPatch, implementation: str, rms: bool) -> None:
    """Schema, fake and autograd formula of both operators agree with what they do."""
    served = implementation == "kernels"
    monkeypatch.setattr(backends, "kernels", lambda device: "triton" if served else None)
    inputs = [tensor.float().requires_grad_() for tensor in drawn(12)]
    spec = GatedSpec((12,), 4, 1e-5, rms, rms, torch.float32, None)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    full = (*utils, "test_aot_dispatch_dynamic") if served else utils
    torch.library.opcheck(gated.gated_norm_fwd, (*inputs, *spec), test_utils=full)
    x, g, weight, bias = (tensor.detach() for tensor in inputs)
    z, mean, rstd = gated.gated_norm_fwd(x, g, weight, bias, *spec)
    saved = (x, g, None if rms else mean, rstd, weight, bias)
    options = ((12,), 4, 1e-5, rms, rms, None, (True, True, True, True))
    torch.library.opcheck(gated.gated_norm_bwd, (z, *saved, *options), test_utils=utils)


def test_fake_tensors_of_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        x, g = (torch.empty(2, 3, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weight = torch.empty(16, device="cuda")
        z = _norm(x, g, weight)
        assert (z.shape, z.dtype, z.device.type) == (x.shape, x.dtype, "cuda")
        rstd = torch.empty(12, device="cuda")
        options = ((16,), 8, 1e-5, True, True, None, (True, True, True, False))
        dx, dg, dweight, _ = gated.gated_norm_bwd(z, x, g, None, rstd, weight, None, *options)
        assert (dx.shape, dg.shape, dweight.shape) == (x.shape, x.shape, (16,))
        assert (dx.dtype, dg.dtype, dweight.dtype) == (x.dtype, x.dtype, weight.dtype)


@EVERY_BACKEND
def test_traced_and_saved(backend: str) -> None:
    """What `torch.jit.trace` recorded serves other numbers of rows, from a file."""
    weight = torch.randn(16, device=DEVICE)
    inputs = [torch.randn(3, 16, device=DEVICE) for _ in range(2)]
    with backends.use(backend):
        traced = torch.jit.trace(lambda x, g: _norm(x, g, weight), tuple(inputs))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    others = [torch.randn(5, 16, device=DEVICE) for _ in range(2)]
    torch.testing.assert_close(torch.jit.load(file)(*others), _norm(*others, weight))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_across_backends(use_reentrant: bool) -> None:
    """A forward of one backend may be recomputed by another."""
    leaves = [tensor.float().requires_grad_() for tensor in drawn(16)[:3]]
    expected = torch.autograd.grad(_norm(*leaves).sum(), leaves)
    for backend in BACKENDS:
        with backends.use(backend):
            z = checkpoint(_norm, *leaves, use_reentrant=use_reentrant)
        for leaf in leaves:
            leaf.grad = None
        z.sum().backward()
        torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), expected)


@EVERY_BACKEND
def test_explained(backend: str) -> None:
    """`backends.explain` says what ran, by the public name."""
    x, g, weight = (tensor.float() for tensor in drawn(16)[:3])
    with backends.use(backend), backends.explain() as ran:
        gated_layer_norm(x, g, 16, weight)
        fusednorm.modulated_rms_norm(x, 16, None, weight)
    assert [(one.op, one.backend) for one in ran] == [
        ("gated_layer_norm", backend),
        ("modulated_rms_norm", backend),
    ]


def test_function_mode_sees_the_public_name() -> None:
    class Seen(TorchFunctionMode):
        names: ClassVar[list[str]] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x, g, weight = (tensor.float() for tensor in drawn(16)[:3])
    with Seen() as seen:
        z = gated_layer_norm(x, g, 16, weight, group_size=8, norm_before_gate=False)
        gated_rms_norm(x, g, 16, weight)
        fusednorm.modulated_rms_norm(x, 16, None, weight)
    assert {"gated_layer_norm", "gated_rms_norm", "modulated_rms_norm"} <= set(seen.names)
    torch.testing.assert_close(
        z, gated_layer_norm(x, g, 16, weight, group_size=8, norm_before_gate=False)
    )


# Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [gated_layer_norm, gated_rms_norm])
@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        (
            {"gate_input": torch.ones(2, 12)},
            ValueError,
            "gate_input of shape (2, 3, 12), got (2, 12)",
        ),
        ({"gate_input": 1.0}, TypeError, "gate_input to be a Tensor, got float"),
        ({"gate_input": None}, TypeError, "gate_input to be a Tensor, got NoneType"),
        (
            {"gate_input": torch.ones(2, 3, 12, dtype=torch.int32)},
            TypeError,
            "gate_input of dtype float16, bfloat16, float32 or float64, got int32",
        ),
        (
            {"gate_input": torch.ones(2, 3, 12, device="meta")},
            ValueError,
            "gate_input on cpu, where input is, got meta",
        ),
        ({"group_size": 5}, ValueError, "group_size that divides the 12 columns of a row, got 5"),
        ({"group_size": 0}, ValueError, "group_size that divides the 12 columns of a row, got 0"),
        ({"group_size": -3}, ValueError, "group_size that divides the 12 columns of a row, got -3"),
        ({"group_size": 4.0}, TypeError, "group_size to be an int or None, got float"),
        ({"group_size": True}, TypeError, "group_size to be an int or None, got bool"),
        ({"weight": torch.ones(4)}, ValueError, "weight of shape (12,), got (4,)"),
        ({"bias": torch.ones(4)}, ValueError, "bias of shape (12,), got (4,)"),
    ],
)
def test_bad_input(
    norm: Callable[..., Tensor], changes: dict[str, Any], error: type[Exception], expected: str
) -> None:
    """It is named, with what was expected and what came, before anything is allocated."""
    arguments = {"input": torch.ones(2, 3, 12), "gate_input": torch.ones(2, 3, 12)}
    message = _message(error, lambda: norm(**arguments | {"normalized_shape": 12} | changes))
    assert message == f"{norm.__name__}: expected {expected}"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    x = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    with pytest.raises(ValueError, match="expected no gate_input with a nested tensor, got one"):
        gated_rms_norm(x, x, 4)


def test_the_cuda_kernels_have_none() -> None:
    """They refuse it by name."""
    with pytest.raises(ValueError, match="cuda backend: expected no gate_input, which the triton"):
        backends.gated_launchers("cuda")


# The module ----------------------------------------------------------------------------------


def test_module() -> None:
    """The weight is trained, and the state dict is that of nn.RMSNorm."""
    norm = fusednorm.GatedRMSNorm(16, 1e-6, group_size=8, norm_before_gate=False, device=DEVICE)
    assert norm.load_state_dict(torch.nn.RMSNorm(16).state_dict())
    x, g = torch.randn(2, 3, 32, device=DEVICE).chunk(2, -1)
    expected = of_mamba(x, norm.weight, None, g, 1e-6, 8, False)
    torch.testing.assert_close(norm(x, g), expected)
    norm(x, g).sum().backward()
    assert norm.weight.grad is not None
    assert fusednorm.GatedRMSNorm(16, elementwise_affine=False).weight is None


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"group_size": 5}, ValueError, "group_size that divides the 16 columns of a row, got 5"),
        ({"norm_before_gate": 1}, TypeError, "norm_before_gate to be a bool, got int"),
    ],
)
def test_module_with_bad_options(
    options: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error) as caught:
        fusednorm.GatedRMSNorm(16, **options)
    assert str(caught.value) == f"GatedRMSNorm: expected {expected}"


# Modulated RMS norms --------------------------------------------------------------------------


@EVERY_BACKEND
def test_modulated_rms_norm(backend: str) -> None:
    """The terms of AdaLN around the other norm, with every gradient."""
    x, _, weight, _ = drawn(12)
    shift, scale = (torch.randn(2, 1, 12, dtype=torch.float64, device=DEVICE) for _ in range(2))
    with backends.use(backend):
        ours = with_gradients(
            lambda x, s, c, w: fusednorm.modulated_rms_norm(x, 12, s, c, w, 1e-5),
            *(x, shift, scale, weight),
        )
    theirs = with_gradients(
        lambda x, s, c, w: F.rms_norm(x, (12,), w, 1e-5) * (1 + c) + s, x, shift, scale, weight
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", [True, False])
def test_ada_rms_norm(gate: bool) -> None:
    """The module is the function around its linear layer, which starts at zero."""
    norm = fusednorm.AdaRMSNorm(8, 4, 1e-6, elementwise_affine=True, gate=gate, device=DEVICE)
    assert [name for name, _ in norm.named_parameters()] == [
        *("weight", "linear.weight", "linear.bias")
    ]
    assert not norm.linear.weight.any()
    torch.nn.init.normal_(norm.linear.weight)
    x, condition = torch.randn(2, 3, 8, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    shift, scale, *rest = norm.linear(F.silu(condition))[:, None].chunk(3 if gate else 2, -1)
    expected = F.rms_norm(x, (8,), norm.weight, 1e-6) * (1 + scale) + shift
    z = norm(x, condition)
    torch.testing.assert_close(z, (expected, *rest) if gate else expected)
