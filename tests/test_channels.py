"""Norms over dimension 1 of [B, C, *spatial]: every backend, layout, derivative and observer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    INTERPRETED,
    Case,
    Terms,
    assert_accurate,
    errors,
    make_case,
    oracle,
    rounding,
    run,
)
from spies import Launch, record_launches
from test_layouts import _between_nans, _far_apart, _GuardedMemory
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import backends, channels, functional
from fusednorm.triton_kernels import launch
from fusednorm.triton_kernels.config import MOST_CHANNELS, channels_forward_tile

# torch scripts functions of its own when forward mode and inductor are first used.

KERNELS = tuple(name for name in BACKENDS if name != "torch")
EPS = 1e-6


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, poison: None) -> Iterator[str]:
    """Each backend in turn, on poisoned memory."""
    with backends.use(request.param):
        yield request.param


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, poison: None) -> Iterator[str]:
    """Each backend with kernels of its own, on poisoned memory."""
    with backends.use(request.param):
        yield request.param


def to_channels(rows: Tensor) -> Tensor:
    """Return [B, *spatial, C] as contiguous [B, C, *spatial]."""
    return rows.movedim(-1, 1).contiguous()


def norm2d(x: Tensor, weight: Any, bias: Any, eps: float, rms: bool = False) -> Tensor:
    """Return the norm of [B, C, *spatial]."""
    if rms:
        return fusednorm.rms_norm2d(x, weight, eps)
    return fusednorm.layer_norm2d(x, weight, bias, eps)


def of_rows(
    x: Tensor, shape: tuple[int, ...], weight: Any, bias: Any, eps: float, terms: Any = None
) -> Tensor:
    """Take rows of channels, as the oracle has them, through the norm of [B, C, *spatial]."""
    y = norm2d(to_channels(x), weight, bias, eps, rms=terms is not None)
    assert y.is_contiguous()
    return y.movedim(1, -1)


def make(
    leading: tuple[int, ...], cols: int, dtype: torch.dtype, rms: bool = False, **options: Any
) -> Case:
    """Draw a case of rows of channels."""
    case = make_case(leading, cols, dtype, DEVICE, **options)
    return replace(case, bias=None, terms=Terms(rms=True)) if rms else case


# Values ------------------------------------------------------------------------------------------

# B and the spatial dimensions: 49 positions fill no vector, 130 leave less than one, 4 have none.
SPATIAL = [(2, 7, 7), (3, 4), (1, 130), (2, 3, 5, 4), (1, 2, 64)]


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("leading", SPATIAL, ids=str)
@pytest.mark.parametrize("cols", [3, 96, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_that_of_torch(
    kernels: str, dtype: torch.dtype, cols: int, leading: tuple[int, ...], rms: bool
) -> None:
    """Against the oracle in extended precision, y and every gradient."""
    assert_accurate(lambda: make(leading, cols, dtype, rms), of_rows)


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_error_without_weight_or_bias(backend: str, present: tuple[bool, bool]) -> None:
    """An absent parameter is 1 or 0."""
    weight, bias = present
    assert_accurate(lambda: make((2, 5, 5), 33, torch.float32, weight=weight, bias=bias), of_rows)


@pytest.mark.parametrize("cols", [MOST_CHANNELS, MOST_CHANNELS + 1])
def test_as_many_channels_as_a_program_holds(kernels: str, cols: int) -> None:
    """And one more, which are rows of a permuted copy."""
    assert_accurate(lambda: make((1, 9), cols, torch.bfloat16), of_rows)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the compiled kernels do not run here")
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize(("positions", "dtype"), [(2048, torch.float32), (4097, torch.bfloat16)])
def test_outputs_beyond_the_cache(positions: int, dtype: torch.dtype, level: str) -> None:
    """Outputs of over 4 MB are stored past the cache where vectors are whole, at every level."""
    from fusednorm import _C  # type: ignore[attr-defined]

    before = _C.level()
    try:
        _C.level(level)
    except ValueError as error:
        pytest.skip(str(error))
    x, dy = torch.randn(2, 2, 300, positions, dtype=torch.float64).to(dtype)
    given = (x, torch.randn(300).to(dtype), torch.randn(300).to(dtype))

    def results(dtype: torch.dtype, norm: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in given]
        y = norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), (300,), weight, bias, EPS).movedim(-1, 1)

    try:
        with backends.use("cpu"):
            ours = results(dtype, fusednorm.layer_norm2d)
    finally:
        _C.level(before)
    for mine, theirs, right in zip(
        ours, results(dtype, torchs), results(torch.float64, torchs), strict=True
    ):
        budget = (theirs.double() - right).norm() + torch.finfo(dtype).eps * right.norm()
        assert (mine.double() - right).norm() <= budget


def test_large_mean_costs_no_digits(kernels: str) -> None:
    """x_hat is not offset by the rounding of the mean."""
    mean = 40000.0
    x = (mean + torch.randn(2, 300, 20, dtype=torch.float64)).to(DEVICE, torch.float32)
    spacing = torch.finfo(torch.float32).eps * 2.0**15
    truth = F.layer_norm(x.double().movedim(1, -1), (300,)).movedim(-1, 1)
    assert (fusednorm.layer_norm2d(x, eps=1e-5) - truth).abs().max() < spacing / 32


def test_channels_that_stand_out(kernels: str) -> None:
    """A few channels far from the others are no measure of the mean; neighbours are no better."""
    x = torch.randn(1, 64, 40, dtype=torch.float64)
    x[:, ::16, ::3] += 1e5
    x = x.to(DEVICE, torch.float32)
    truth = F.layer_norm(x.double().movedim(1, -1), (64,)).movedim(-1, 1)
    error = (fusednorm.layer_norm2d(x, eps=1e-5) - truth).abs().amax((0, 1))
    assert error.max() <= 4 * rounding(torch.float32, truth.cpu().numpy())
    alone = fusednorm.layer_norm2d(x[..., 1:2].expand(-1, -1, 40).contiguous())
    assert torch.equal(alone[..., 1], fusednorm.layer_norm2d(x)[..., 1])


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(kernels: str, dtype: torch.dtype, parameters: torch.dtype) -> None:
    """Y has the dtype of x, and each gradient that of its tensor."""
    case = make((2, 5), 17, dtype)
    assert case.weight is not None
    assert case.bias is not None
    case = replace(case, weight=case.weight.to(parameters), bias=case.bias.to(parameters))
    result = run(of_rows, case)
    found = {name: tensor.dtype for name, tensor in result.items()}
    assert found == {"y": dtype, "dx": dtype, "dweight": parameters, "dbias": parameters}
    truth = oracle(case)
    wide = replace(case, weight=case.weight.double(), bias=case.bias.double())
    budget = errors(run(_reference, wide), truth)
    for name, error in errors(result, truth).items():
        assert error <= 2 * budget[name] + 2 * rounding(result[name].dtype, truth[name]), name


def _reference(
    x: Tensor, shape: tuple[int, ...], weight: Any, bias: Any, eps: float, terms: Any = None
) -> Tensor:
    """Return torch's norm of x in float32 at least, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.layer_norm(x.to(wide), shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


# What models write -------------------------------------------------------------------------------


class Torchvisions(nn.LayerNorm):
    """torchvision's LayerNorm2d, and timm's but for its name."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute, normalise, permute."""
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_against_torchvisions(backend: str, memory_format: torch.memory_format) -> None:
    """In float64, value and gradients, with its state dict, and x's memory format kept."""
    theirs = Torchvisions(12, eps=1e-6).double().to(DEVICE)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = fusednorm.LayerNorm2d(12, device=DEVICE, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 12, 5, 7, dtype=torch.float64, device=DEVICE)
    x = x.to(memory_format=memory_format).requires_grad_()
    dy = torch.randn(2, 12, 5, 7, dtype=torch.float64, device=DEVICE)
    results = []
    for norm in (ours, theirs):
        y = norm(x)
        results.append((y, *torch.autograd.grad(y, (x, *norm.parameters()), dy)))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-13)
    assert results[0][0].is_contiguous(memory_format=memory_format)
    if backend != "torch":
        assert results[0][1].is_contiguous(memory_format=memory_format)


# Layouts -----------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "slice of the channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "slice of the lines": lambda x: torch.cat([x, x[:, :, :1]], 2)[:, :, :-1],
    "slice of the positions": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "batch expanded": lambda x: x[:1].expand(x.shape),
    "channels expanded": lambda x: x[:, :1].expand(x.shape),
    "positions expanded": lambda x: x[..., :1].expand(x.shape),
    "every other position": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("which", ["x", "dy", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernels: str, layout: str, which: str) -> None:
    """Whatever the strides of x and dy are, the results are those of contiguous copies."""
    x, dy = torch.randn(2, 3, 20, 4, 6, device=DEVICE)
    weight, bias = torch.randn(2, 20, device=DEVICE)
    if which != "dy":
        x = LAYOUTS[layout](x)
    if which != "x":
        dy = LAYOUTS[layout](dy)
    before = x.clone(), dy.clone()
    results = []
    for given, gradient in ((x, dy), (x.contiguous(), dy.contiguous())):
        leaves = [t.detach().requires_grad_() for t in (given, weight, bias)]
        y = fusednorm.layer_norm2d(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, gradient)))
    for mine, right in zip(*results, strict=True):
        # channels_last takes the road of rows.
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before[0])
    assert torch.equal(dy, before[1])


@pytest.mark.parametrize(
    "size", [(2, 5), (2, 5, 1), (2, 5, 1, 1), (2, 1, 3), (1, 5, 3), (4, 5, 1, 7)], ids=str
)
def test_sizes_of_one(backend: str, size: tuple[int, ...]) -> None:
    """No spatial dimension, one position, one channel, one image."""
    x = torch.randn(size, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.randn(size[1], dtype=torch.float64, device=DEVICE, requires_grad=True)
    dy = torch.randn_like(x)
    y = fusednorm.layer_norm2d(x, weight)
    right = F.layer_norm(x.movedim(1, -1), size[1:2], weight, None, EPS).movedim(-1, 1)
    assert y.is_contiguous()
    torch.testing.assert_close(y, right)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, weight), dy),
        torch.autograd.grad(right, (x, weight), dy),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (0, 4), (0, 0, 0)])
def test_empties(backend: str, size: tuple[int, ...]) -> None:
    """No images, channels or positions: results are empty, gradients of parameters 0."""
    x = torch.zeros(size, device=DEVICE, requires_grad=True)
    leaves = [x, *(torch.ones(size[1], device=DEVICE, requires_grad=True) for _ in range(2))]
    y = fusednorm.layer_norm2d(*leaves)
    assert y.shape == x.shape
    grads = torch.autograd.grad(y.sum(), leaves)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))
    assert fusednorm.rms_norm2d(x).shape == x.shape


@pytest.mark.skipif("triton" not in KERNELS, reason="Triton does not run here")
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((2, 100, 3, 7), torch.float32),
        ((3, 33, 70), torch.bfloat16),
        ((1, 600, 130), torch.float32),
    ],
)
def test_nothing_outside_the_tensors_is_read_or_written(
    poison: None, monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Inputs between NaNs and outputs between sentinels."""
    drawn = [torch.randn(n).to(DEVICE, dtype) for n in (size, size[1:2], size[1:2], size)]
    *leaves, dy = map(_between_nans, drawn)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with backends.use("triton"), monkeypatch.context() as patch:
        memory = _GuardedMemory(patch)
        y = fusednorm.layer_norm2d(*leaves)
        results = (y.detach(), *torch.autograd.grad(y, leaves, dy))
    assert len(memory.buffers) >= 3 + 3 + 2  # y and statistics, gradients, partials
    memory.assert_holds(*results)
    memory.assert_intact()
    assert not any(result.isnan().any() for result in results)


@pytest.mark.parametrize("strided", ["x", "dy"])
@pytest.mark.parametrize("channels_apart", [False, True])
def test_offsets_beyond_int32(kernels: str, strided: str, channels_apart: bool) -> None:
    """Of images, and of the channels of an image, whose offsets are 32 bits wide where they fit."""
    drawn = {name: torch.randn(2, 2, 10).to(DEVICE, torch.bfloat16) for name in ("x", "dy")}
    right = drawn[strided]
    far = _far_apart(right.reshape(2, 20), 2**31 + 8)
    if channels_apart:
        # [2, 20] of these rows are the two channels of two images, 10 elements apart.
        far = far.as_strided((2, 2, 10), (10, 2**31 + 8, 1))
        right = far.clone(memory_format=torch.contiguous_format)
    else:
        far = far.as_strided((2, 2, 10), (2**31 + 8, 10, 1))
    results = []
    for given in (far, right):
        tensors = drawn | {strided: given}
        x = tensors["x"].detach().requires_grad_()
        y = fusednorm.layer_norm2d(x)
        results.append((y, *torch.autograd.grad(y, x, tensors["dy"])))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif("triton" not in KERNELS, reason="Triton does not run here")
def test_kernels_read_and_write_the_tensors_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No permuted copy, of a contiguous tensor or of a slice of channels, in either direction."""
    launches = record_launches(monkeypatch)
    whole = torch.randn(2, 9, 5, 3, device=DEVICE)
    for x in (whole, whole[:, 2:]):
        dy = x.clone(memory_format=torch.contiguous_format)
        leaf = x.detach().requires_grad_()
        with backends.use("triton"):
            y = fusednorm.layer_norm2d(leaf)
            (dx,) = torch.autograd.grad(y, leaf, dy)
        forward, backward = launches
        assert forward.arguments["x_ptr"].data_ptr() == x.data_ptr()
        assert forward.arguments["z_ptr"].data_ptr() == y.data_ptr()
        assert backward.arguments["x_ptr"].data_ptr() == x.data_ptr()
        assert backward.arguments["dz_ptr"].data_ptr() == dy.data_ptr()
        assert backward.arguments["dx_ptr"].data_ptr() == dx.data_ptr()
        launches.clear()


# Bits --------------------------------------------------------------------------------------------

FORMS = [(96, 49, torch.float32), (33, 64, torch.bfloat16), (300, 20, torch.float64)]


@pytest.mark.parametrize(("cols", "positions", "dtype"), FORMS)
def test_an_image_alone_equals_the_image_in_a_batch(
    kernels: str, cols: int, positions: int, dtype: torch.dtype
) -> None:
    """Y and dx, bit for bit; and two runs are equal in all results."""
    case = make((7, positions), cols, dtype, mean=2.0)
    batch, again = run(of_rows, case), run(of_rows, case)
    for name, tensor in batch.items():
        assert torch.equal(tensor, again[name]), name
    for images in (slice(0, 1), slice(6, 7), slice(2, 5)):
        part = run(of_rows, replace(case, x=case.x[images], dy=case.dy[images]))
        for name in ("y", "dx"):
            assert torch.equal(part[name], batch[name][images]), (name, images)


# Derivatives -------------------------------------------------------------------------------------


def problem(rms: bool, positions: int = 3) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return the norm and float64 leaves for it."""
    sizes = [(2, 4, positions), (4,), (4,)][: 2 if rms else 3]
    leaves = tuple(
        torch.randn(size, dtype=torch.float64, device=DEVICE, requires_grad=True) for size in sizes
    )
    if rms:
        return lambda x, weight: fusednorm.rms_norm2d(x, weight, EPS), leaves
    return lambda x, weight, bias: fusednorm.layer_norm2d(x, weight, bias, EPS), leaves


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gradcheck_in_every_mode(backend: str, rms: bool) -> None:
    """Forward mode, batched and undefined gradients agree with finite differences as well."""
    function, leaves = problem(rms)
    assert torch.autograd.gradcheck(
        function,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gradgradcheck_in_every_mode(backend: str, rms: bool) -> None:
    """Forward over reverse, reverse over reverse and batched double backward are right."""
    function, leaves = problem(rms)
    assert torch.autograd.gradgradcheck(
        function,
        leaves,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
        fast_mode=True,
    )


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen_inputs(backend: str, needed: tuple[int, ...]) -> None:
    """What needs no gradient gets none; the others are right, as are their own gradients."""
    function, leaves = problem(rms=False)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in needed)
    wanted = [leaves[i] for i in needed]

    def of_needed(*given: Tensor) -> Tensor:
        tensors = list(leaves)
        for i, tensor in zip(needed, given, strict=True):
            tensors[i] = tensor
        return function(*tensors)

    assert torch.autograd.gradcheck(of_needed, wanted, fast_mode=True)
    assert torch.autograd.gradgradcheck(of_needed, wanted, fast_mode=True)


@pytest.mark.skipif("triton" not in KERNELS, reason="Triton does not run here")
def test_only_what_is_needed_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen parameters have no partial sums; without a gradient there are no statistics."""
    launches: list[Launch] = record_launches(monkeypatch)
    x, weight, bias = torch.randn(2, 4, 3, device=DEVICE), *torch.randn(2, 4, device=DEVICE)
    with backends.use("triton"):
        fusednorm.layer_norm2d(x, weight, bias)
        assert launches[0].arguments["mean_ptr"] is None
        launches.clear()
        fusednorm.layer_norm2d(x.requires_grad_(), weight, bias).sum().backward()
    assert [launch.kernel for launch in launches] == [
        "layer_norm2d_fwd_kernel",
        "layer_norm2d_bwd_kernel",
    ]
    assert launches[1].arguments["dz_sum_ptr"] is None


def test_transforms(backend: str) -> None:
    """vmap, grad, jacobians and jvp of torch.func, nested, give what the loop gives."""
    function, leaves = problem(rms=False)
    x, weight, bias = (leaf.detach() for leaf in leaves)
    batch = torch.randn(3, *x.shape, dtype=x.dtype, device=DEVICE)
    mapped = torch.func.vmap(function, in_dims=(0, None, None))(batch, weight, bias)
    torch.testing.assert_close(mapped, torch.stack([function(x, weight, bias) for x in batch]))

    def total(x: Tensor) -> Tensor:
        return function(x, weight, bias).square().sum()

    leaf = x.clone().requires_grad_()
    (right,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(x), right)
    hessian = torch.func.hessian(total)(x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(total, x))
    _, tangent = torch.func.jvp(torch.func.grad(total), (x,), (x,))
    torch.testing.assert_close(tangent, (hessian.reshape(x.numel(), -1) @ x.flatten()).view_as(x))


def test_checkpoint(backend: str) -> None:
    """A recomputation, under another backend too, saves what the forward saved."""
    function, leaves = problem(rms=False)
    right = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    y = checkpoint(function, *leaves, use_reentrant=False)
    for other in BACKENDS:
        with backends.use(other):
            grads = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        for mine, theirs in zip(grads, right, strict=True):
            torch.testing.assert_close(mine, theirs)


# Observers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(
    backend: str, dynamic: bool, memory_format: torch.memory_format
) -> None:
    """Forward and backward, with the strides that the fakes promise."""
    torch._dynamo.reset()
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    leaves = [
        torch.randn(2, 6, 5, 4, device=DEVICE).to(memory_format=memory_format).requires_grad_(),
        *(torch.randn(6, device=DEVICE, requires_grad=True) for _ in range(2)),
    ]
    results = []
    for function in (compiled, _block):
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right)
        assert mine.stride() == right.stride()
    torch._dynamo.reset()


def _block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = fusednorm.layer_norm2d(x * 2, weight, bias) + fusednorm.rms_norm2d(x, weight)
    return y * y.sigmoid()


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("size", [(2, 4, 5), (2, 0, 5), (0, 4, 5)], ids=str)
def test_opcheck(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], rms: bool, implementation: str
) -> None:
    """Schema, fake and autograd formula of both operators agree with what they do."""
    if implementation == "reference":
        monkeypatch.setattr(backends, "kernels", lambda device: None)
    x = torch.randn(size, device=DEVICE, requires_grad=True)
    weight = torch.randn(size[1], device=DEVICE, requires_grad=True)
    bias = None if rms else torch.randn(size[1], device=DEVICE, requires_grad=True)
    quick = ("test_schema", "test_faketensor")
    forward = x, weight, bias, EPS, rms, x.dtype
    torch.library.opcheck(
        channels.layer_norm2d_fwd, forward, test_utils=(*quick, "test_autograd_registration")
    )
    _, mean, rstd = (t.detach() for t in channels.layer_norm2d_fwd(*forward))
    given = [None if t is None else t.detach() for t in (x, weight, bias)]
    statistics = None if rms else mean, rstd
    for mask in ((True, True, not rms), (True, False, False), (False, True, False)):
        backward = given[0], given[0], *statistics, *given[1:], EPS, rms, mask
        torch.library.opcheck(channels.layer_norm2d_bwd, backward, test_utils=quick)


def test_fake_tensors_of_a_device_that_is_not_there() -> None:
    """The fakes need no device, and say what comes."""
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 6, 5, device="cuda", dtype=torch.bfloat16)
        y = fusednorm.layer_norm2d(x)
        rstd = torch.empty(10, device="cuda")
        mask = True, False, False
        dx, *_ = channels.layer_norm2d_bwd(y, x, None, rstd, None, None, EPS, True, mask)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "cuda")
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)


def test_traced_and_scripted() -> None:
    """A trace holds torch's operators, and so does a script."""
    norm = fusednorm.LayerNorm2d(6)
    x = torch.randn(2, 6, 5)
    traced, scripted = torch.jit.trace(norm, x), torch.jit.script(norm)
    assert "fusednorm::" not in str(traced.graph)
    for made in (traced, scripted):
        torch.testing.assert_close(made(x[:1]), norm(x[:1]))


def test_a_mode_sees_one_function() -> None:
    """By its public name, with its arguments."""
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 4, 3)
    with Mode():
        fusednorm.layer_norm2d(x)
        fusednorm.rms_norm2d(x)
    assert seen[0] is fusednorm.layer_norm2d
    assert fusednorm.rms_norm2d in seen


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast(
    kernels: str, monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format
) -> None:
    """Where layer norm runs in float32, y is float32 and dx has the dtype of x."""
    devices = functional.AUTOCAST_FLOAT32 | {DEVICE.type}
    monkeypatch.setattr(functional, "AUTOCAST_FLOAT32", devices)
    x = torch.randn(2, 6, 5, 4).to(DEVICE, torch.bfloat16, memory_format=memory_format)
    x.requires_grad_()
    weight = torch.randn(6, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = fusednorm.layer_norm2d(x, weight)
    assert y.dtype == torch.float32
    right = F.layer_norm(x.float().movedim(1, -1), (6,), weight, None, EPS).movedim(-1, 1)
    torch.testing.assert_close(y, right)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(dweight, torch.autograd.grad(right.sum(), weight)[0])


# Choice, modules and errors ----------------------------------------------------------------------


def test_choice_on_the_cpu() -> None:
    """Torch's form is several operators, so the kernels take it by themselves where they are."""
    x = torch.randn(2, 4, 3, requires_grad=True)
    name = type(fusednorm.layer_norm2d(x).grad_fn).__name__
    compiled = backends.extension_missing() is None
    assert ("ChannelNormFunction" in name) == compiled


def test_modules() -> None:
    """Constructors, parameters, repr and state dicts are those of torch's norms over (C,)."""
    norm = fusednorm.LayerNorm2d(4, bias=False, dtype=torch.float64)
    assert isinstance(norm, nn.LayerNorm)
    assert repr(norm) == repr(nn.LayerNorm(4, 1e-6, bias=False)).replace("Norm", "Norm2d")
    assert norm.bias is None
    assert norm.weight.dtype == torch.float64
    fusednorm.LayerNorm2d(4).load_state_dict(nn.LayerNorm(4).state_dict())
    assert not list(fusednorm.LayerNorm2d(4, elementwise_affine=False).parameters())
    rms = fusednorm.RMSNorm2d(4, eps=1e-3)
    assert isinstance(rms, nn.RMSNorm)
    assert repr(rms) == "RMSNorm2d((4,), eps=0.001, elementwise_affine=True)"
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(rms(x), fusednorm.rms_norm2d(x, rms.weight, 1e-3))
    torch.testing.assert_close(norm(x.double()), fusednorm.layer_norm2d(x.double(), norm.weight))


X = torch.zeros(2, 4, 3)
ERRORS = {
    "input to be a Tensor, got list": lambda: fusednorm.layer_norm2d([1.0]),  # type: ignore[arg-type]
    r"input of shape \(B, C, \*\), got \(4,\)": lambda: fusednorm.layer_norm2d(torch.zeros(4)),
    "input of dtype float16, .*, got int64": lambda: fusednorm.layer_norm2d(X.long()),
    "input of strided layout, got sparse_coo": lambda: fusednorm.layer_norm2d(X.to_sparse()),
    r"weight of shape \(4,\), got \(3,\)": lambda: fusednorm.layer_norm2d(X, torch.ones(3)),
    r"bias of shape \(4,\), got \(4, 1\)": lambda: fusednorm.layer_norm2d(
        X, None, torch.ones(4, 1)
    ),
    "weight on cpu, where input is, got meta": lambda: fusednorm.layer_norm2d(
        X, torch.ones(4, device="meta")
    ),
    "eps to be a float, got str": lambda: fusednorm.layer_norm2d(X, eps="1"),  # type: ignore[arg-type]
    "num_channels to be an int, got '4'": lambda: fusednorm.LayerNorm2d("4"),  # type: ignore[arg-type]
    r"num_channels to be an int, got \(4,\)": lambda: fusednorm.RMSNorm2d((4,)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    """Each names the operation, the argument, what was expected and what came."""
    name = "LayerNorm2d|RMSNorm2d" if "num_channels" in message else "layer_norm2d"
    with pytest.raises((TypeError, ValueError), match=f"^({name}): expected {message}"):
        ERRORS[message]()


def test_nested_tensors_are_refused() -> None:
    """They have no positions in common."""
    nested = torch.nested.nested_tensor([torch.zeros(4, 3), torch.zeros(4, 2)], layout=torch.jagged)
    with pytest.raises(TypeError, match="rms_norm2d: expected input of strided layout, got nested"):
        fusednorm.rms_norm2d(nested)


# Launch policy -----------------------------------------------------------------------------------


def test_tiles_hold_all_channels() -> None:
    """For every number of channels, images of any size, and never of the number of images."""
    arch = launch.architecture(torch.device("cpu")) if INTERPRETED else None
    if arch is None:
        pytest.skip("one architecture is enough")
    for cols in (*range(1, 300), 384, 768, 1000, 1536, MOST_CHANNELS):
        for itemsize in (2, 4, 8):
            for positions in (1, 4, 49, 3136):
                tile = channels_forward_tile(cols, positions, itemsize, arch)
                assert tile.block_n * tile.chunks >= cols
                assert tile.block_n * (tile.chunks - 1) < cols
                assert tile.rows * tile.block_n * tile.chunks <= 64 * 1024
