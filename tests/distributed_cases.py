"""What the ranks of `test_distributed` run; each case is called by every rank."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fusednorm
from fusednorm import ops

Norm = Callable[..., Any]


@functools.cache
def mesh_of(name: str) -> DeviceMesh:
    """Return the mesh of all four ranks, one of two of them, or two by two."""
    if name == "4":
        return init_device_mesh("cpu", (4,))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return mesh if name == "2x2" else mesh["inner"]


MOVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


class Collectives(TorchDispatchMode):
    """Counts the collectives, and the bytes of what each of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let a DTensor say first what it does on the parts."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        if (
            space == "_c10d_functional"
            and name.partition(".")[0] in MOVES
            and isinstance(result, Tensor)
        ):
            self.ran[name.partition(".")[0]] += 1
            self.bytes[name.partition(".")[0]] += result.numel() * result.element_size()
        return result


def communicated(function: Callable[[], Any]) -> Counter[str]:
    """Return the collectives of a function by name, compiled or not, which no mode may see."""
    with profile(activities=[ProfilerActivity.CPU]) as ran:
        function()
    names = (event.name.split("::") for event in ran.events())
    return Counter(
        name[1].strip("_")
        for name in names
        if name[0] in ("c10d", "_c10d_functional") and name[1] != "wait_tensor"
    )


def placed(text: str) -> list[Placement]:
    """Return placements by their letters: R, P, or the number of the sharded dimension."""
    named = {"R": Replicate(), "P": Partial()}
    return [named.get(letter) or Shard(int(letter)) for letter in text.split()]


def spread(tensor: Tensor, mesh: DeviceMesh, places: Sequence[Placement]) -> DTensor:
    """Distribute a tensor; the parts of a partial one add up to it."""
    whole = [Replicate() if place.is_partial() else place for place in places]
    moved = distribute_tensor(tensor, mesh, whole)
    if any(place.is_partial() for place in places):
        share = 1
        for i, place in enumerate(places):
            share *= mesh.size(i) if place.is_partial() else 1
        moved = DTensor.from_local(moved.to_local() / share, mesh, places, run_check=False)
    return moved.detach().requires_grad_()


# The functions: what is given to each, by name, and whether its weights are those of a norm -------

N = 6


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Norm without another term, in the kernels: by itself it would be torch's operator."""
    with fusednorm.backends.use(kernels()):
        return (fusednorm.layer_norm(x, N, weight, bias),)


def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """RMS norm without another term."""
    return (fusednorm.rms_norm(x, N, weight),)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Add & Norm."""
    return fusednorm.add_layer_norm(x, residual, N, weight, bias)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """Add & Norm with a layer scale, and the stream in float32."""
    return fusednorm.add_rms_norm(x, residual, N, weight, gate=gate, residual_dtype=torch.float32)


def every_term(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    number: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, ...]:
    """The whole equation, with terms of a sample each."""
    return fusednorm.add_layer_norm(
        x, residual, N, weight, bias, gate=number, scale=scale, shift=shift
    )


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """AdaLN."""
    return (fusednorm.modulated_layer_norm(x, N, shift, scale),)


def modulated_rms_norm(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """AdaLN of an RMS norm, without a shift."""
    return (fusednorm.modulated_rms_norm(x, N, None, scale, weight),)


def layer_norm2d(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Norm of the channels, which lie apart."""
    z = fusednorm.layer_norm2d(x.movedim(-1, 1).contiguous(), weight, bias)
    return (z.movedim(1, -1),)


def rms_norm2d(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """RMS norm of the channels, which lie apart."""
    return (fusednorm.rms_norm2d(x.movedim(-1, 1).contiguous(), weight).movedim(1, -1),)


def gated_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """Norm of groups, before the gate, which is where the residual of others is."""
    return (fusednorm.gated_layer_norm(x, residual, N, weight, bias, group_size=3),)


def gated_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Norm of a product, whose factor is where the residual of others is."""
    return (fusednorm.gated_rms_norm(x, residual, N, weight, norm_before_gate=False),)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Run torch's own."""
    return (F.layer_norm(x, (N,), weight, bias),)


def torch_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Run torch's own."""
    return (F.rms_norm(x, (N,), weight),)


def torch_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Run torch's own."""
    h = x + residual
    return F.layer_norm(h, (N,), weight, bias), h


FUNCTIONS: dict[str, tuple[Norm, str]] = {
    "layer_norm": (layer_norm, "x weight bias"),
    "rms_norm": (rms_norm, "x weight"),
    "add_layer_norm": (add_layer_norm, "x residual weight bias"),
    "add_rms_norm": (add_rms_norm, "x residual weight gate"),
    "every_term": (every_term, "x residual weight bias number scale shift"),
    "gated_layer_norm": (gated_layer_norm, "x residual weight bias"),
    "gated_rms_norm": (gated_rms_norm, "x residual weight"),
    "layer_norm2d": (layer_norm2d, "x weight bias"),
    "modulated_rms_norm": (modulated_rms_norm, "x weight scale"),
    "rms_norm2d": (rms_norm2d, "x weight"),
    "modulated_layer_norm": (modulated_layer_norm, "x scale shift"),
}
TORCHS: dict[str, Norm] = {
    "layer_norm": torch_layer_norm,
    "rms_norm": torch_rms_norm,
    "add_layer_norm": torch_add_layer_norm,
}


def drawn(names: str, batch: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Any:
    """Return random operands by name."""
    sample = (batch[0], *(1 for _ in batch[1:]))
    shapes = {
        "x": (*batch, N), "residual": (*batch, N), "weight": (N,), "bias": (N,), "gate": (N,),
        "number": (*sample, 1), "scale": (*sample, N), "shift": (*sample, N),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(shape, generator=generator) + (mean if name == "x" else 0)).to(dtype)
        for name, shape in shapes.items()
        if name in names.split()
    }


class Ran:
    """What a function of some operands returned, and what was communicated for it."""

    def __init__(self, function: Norm, operands: dict[str, Any]) -> None:
        leaves = [operand.detach().requires_grad_() for operand in operands.values()]
        with Collectives() as forward:
            self.outputs = function(*leaves)
        self.outputs = [self.outputs] if isinstance(self.outputs, Tensor) else [*self.outputs]
        cotangents = [self._cotangent(output, i) for i, output in enumerate(self.outputs)]
        with Collectives() as backward:
            grads = torch.autograd.grad(self.outputs, leaves, cotangents)
        self.gradients = dict(zip(operands, grads, strict=True))
        self.forward = {name: (n, forward.bytes[name]) for name, n in forward.ran.items()}
        self.backward = {name: (n, backward.bytes[name]) for name, n in backward.ran.items()}

    @staticmethod
    def _cotangent(output: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(output.shape, generator=generator).to(output.dtype)
        if not isinstance(output, DTensor):
            return drawn
        return distribute_tensor(drawn, output.device_mesh, output.placements)


def rule(
    name: str, mesh_name: str, batch: tuple[int, ...], dtype: torch.dtype, places: dict[str, str]
) -> list[tuple[Any, Any]]:
    """Compare a function of DTensors with the same function of whole tensors.

    Operands that `places` does not name are replicated. The result is what was communicated in
    both directions by it, and by torch's own operators where they compute the same.
    """
    mesh = mesh_of(mesh_name)
    function, names = FUNCTIONS[name]
    operands = drawn(names, batch, dtype)
    whole = Ran(function, operands)
    everywhere = " ".join("R" * mesh.ndim)
    sharded = {
        key: spread(value, mesh, placed(places.get(key, everywhere)))
        for key, value in operands.items()
    }
    ours = Ran(function, sharded)
    tolerance = of_parts(dtype)
    exact = not {"P", "2"} & set(places["x"] + places["z"])
    for output, want in zip(ours.outputs, whole.outputs, strict=True):
        if kernels() == "cpu" or name not in TORCHS:  # else torch's own rule places it
            assert list(output.placements) == placed(places["z"]), output.placements
        _compare("output", output.full_tensor(), want, tolerance, exact)
    for key, grad in ours.gradients.items():
        row = key in ("x", "residual")
        _compare(key, grad.full_tensor(), whole.gradients[key], tolerance, exact and row)
    whole_rows = "2" not in places["z"]  # others are normalised by no operator
    for seen, unseen in zip(ours.outputs, function(*sharded.values()), strict=True):
        _compare("nobody looks", unseen.to_local(), seen.to_local(), tolerance, whole_rows)
    ran = [ours]
    if name in TORCHS:
        with contextlib.suppress(RuntimeError):  # torch 2.10 has no rule for a sharded weight
            ran.append(Ran(TORCHS[name], sharded))
    return [(one.forward, one.backward) for one in ran]


def of_parts(dtype: torch.dtype) -> dict[str, float]:
    """Return the tolerance of a sum of parts, which is rounded once more than the whole."""
    return {"rtol": 2e-2, "atol": 5e-2} if dtype is torch.bfloat16 else {}


def _compare(name: str, ours: Tensor, whole: Tensor, tolerance: Any, exact: bool) -> None:
    if exact and kernels() == "cpu":  # torch's sums depend on how many rows there are
        assert torch.equal(ours, whole), f"{name}: {(ours - whole).abs().max()}"
    else:
        torch.testing.assert_close(ours, whole, **tolerance, msg=lambda text: f"{name}: {text}")


# Rows that are split ------------------------------------------------------------------------------


def moved(tensor: Tensor | None, mesh: DeviceMesh, places: str) -> Any:
    """Return a whole tensor as a DTensor, differentiably."""
    if tensor is None:
        return None
    everywhere = [Replicate()] * mesh.ndim
    whole = DTensor.from_local(tensor, mesh, everywhere, run_check=False)
    return whole.redistribute(placements=placed(places))


def split(mesh: DeviceMesh, x_places: str) -> Norm:
    """Return a function of whole tensors, in the signature of `helpers`, that splits its rows."""

    def function(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float, terms: Any) -> Any:
        def own(tensor: Tensor | None) -> Any:
            return moved(tensor, mesh, " ".join("R" * mesh.ndim))

        spread_x, residual = moved(x, mesh, x_places), moved(terms.residual, mesh, x_places)
        given = {name: own(getattr(terms, name)) for name in ("gate", "scale", "shift")}
        if terms.rms:
            z, h = fusednorm.add_rms_norm(spread_x, residual, shape, own(weight), eps, **given)
        else:
            z, h = fusednorm.add_layer_norm(
                spread_x, residual, shape, own(weight), own(bias), eps, **given
            )
        assert z.placements == h.placements == spread_x.placements
        return z.full_tensor(), h.full_tensor()

    return function


def split_accuracy(
    mesh_name: str, places: str, rms: bool, dtype: torch.dtype, mean: float, cols: int
) -> None:
    """Hold rows that are split to the float64 oracle, and to torch's error on whole rows."""
    import helpers

    def draw() -> Any:
        case = helpers.make_case((2, 3), cols, dtype, torch.device("cpu"), bias=not rms, mean=mean)
        terms = helpers.Terms(rms=rms, residual=torch.randn_like(case.x))
        # A gate that differs between columns would turn a large mean into a large variance.
        terms.gate = None if mean else torch.randn(2, 1, cols).to(dtype)
        terms.scale = torch.randn(cols).to(dtype)
        terms.shift, terms.dh = torch.randn(2, 1, 1).to(dtype), torch.randn_like(case.x)
        case.terms = terms
        return case

    helpers.assert_accurate(draw, split(mesh_of(mesh_name), places), helpers.unfused)


def split_plain(mesh_name: str, rms: bool, mean: float) -> list[tuple[Any, Any]]:
    """Return what was communicated for a split norm, by us and by torch."""
    mesh = mesh_of(mesh_name)
    name = "rms_norm" if rms else "layer_norm"
    operands = drawn(FUNCTIONS[name][1], (8, 4), torch.float32, mean)
    operands["x"] = torch.cat([operands["x"]] * 40, -1)
    shape = operands["x"].shape[-1:]
    for key in ("weight", "bias"):
        if key in operands:
            operands[key] = torch.cat([operands[key]] * 40)
    sharded = {
        key: spread(value, mesh, placed("2" if key == "x" else "0"))
        for key, value in operands.items()
    }
    ours: Any = fusednorm.rms_norm if rms else fusednorm.layer_norm
    ran = [Ran(lambda x, *rest: ours(x, shape, *rest), sharded)]
    exact = Ran(
        lambda x, *rest: ours(x, shape, *rest), {k: v.double() for k, v in operands.items()}
    )
    # A rounding for each operation on an element, and log2(240) for a sum, whatever the mean.
    for got, want in (
        (ran[0].outputs[0], exact.outputs[0]),
        (ran[0].gradients["x"], exact.gradients["x"]),
    ):
        error = (got.full_tensor() - want).abs().max() / want.abs().max()
        assert error < 16 * torch.finfo(torch.float32).eps, error
    _check_kernels(lambda x, *rest: ours(x, shape, *rest), [*sharded.values()])
    if not rms:  # torch's own fails
        replicated = {
            key: value if key == "x" else spread(operands[key], mesh, placed("R"))
            for key, value in sharded.items()
        }
        ran.append(Ran(lambda x, *rest: F.layer_norm(x, shape, *rest), replicated))
    return [(one.forward, one.backward) for one in ran]


def _check_kernels(function: Norm, operands: list[Tensor]) -> None:
    """Check that the kernels, which run where nobody looks, communicate what plain torch does."""

    def step() -> None:
        z = function(*operands)
        torch.autograd.grad(z, operands, z.detach())

    with fusednorm.backends.explain() as calls:
        ran = communicated(step)
    with fusednorm.backends.use("torch"):
        assert ran == communicated(step)
    assert [call.backend for call in calls] == [kernels()]


def split_parts(mesh_name: str, rms: bool, mean: float) -> None:
    """Check what the kernels make of parts of rows, some of which vary in one part only.

    Torch's own error with a large mean is too large a budget for what its correction brings.
    """
    mesh = mesh_of(mesh_name)
    x = torch.randn(6, 3, 241) + mean
    x[:2, :, :121], x[0] = mean, 3.0
    ours: Any = fusednorm.rms_norm if rms else fusednorm.layer_norm
    with fusednorm.backends.explain() as calls, torch.no_grad():
        z = ours(spread(x, mesh, placed("2")), 241).full_tensor()
    assert [call.backend for call in calls] == [kernels()]
    want = ours(x.double(), 241)
    error = (z - want).abs().max() / want.abs().max()
    assert error < 16 * torch.finfo(torch.float32).eps, error


def kernels() -> str:
    """Return what runs where torch would need several operators."""
    return "cpu" if "cpu" in fusednorm.backends.available() else "torch"


def second_derivatives(mesh_name: str, places: dict[str, str], rms: bool) -> None:
    """Compare gradients of gradients, in float64, with those of the whole."""
    mesh = mesh_of(mesh_name)
    names = "x residual weight scale"
    operands = {key: value.double() for key, value in drawn(names, (4, 3), torch.float32).items()}
    function: Any = fusednorm.add_rms_norm if rms else fusednorm.add_layer_norm

    def twice(x: Any, residual: Any, weight: Any, scale: Any) -> list[Any]:
        leaves = [x, residual, weight, scale]
        z, h = function(x, residual, N, weight, scale=scale)
        first = torch.autograd.grad((z.sin() * h).sum(), leaves, create_graph=True)
        numbers = [full(gradient).square().cos().sum() for gradient in first]
        second = torch.autograd.grad(sum(numbers), leaves)
        return [full(gradient).detach() for gradient in (*first, *second)]

    whole = twice(*(value.clone().requires_grad_() for value in operands.values()))
    sharded = (spread(value, mesh, placed(places.get(key, "R"))) for key, value in operands.items())
    for ours, want in zip(twice(*sharded), whole, strict=True):
        torch.testing.assert_close(ours, want)


def full(tensor: Any) -> Tensor:
    """Return a whole tensor of what may be one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


# Dropout ------------------------------------------------------------------------------------------


def dropout(mesh_name: str, places: str, dtype: torch.dtype) -> None:
    """Compare a sharded dropout with that of the whole, from the same state of the generator."""
    mesh = mesh_of(mesh_name)
    operands = drawn("x residual weight", (4, 6), dtype)

    def function(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        torch.manual_seed(7)
        return fusednorm.add_layer_norm(x, residual, N, weight, dropout_p=0.4)

    whole = Ran(function, operands)
    state = torch.get_rng_state()
    everywhere = " ".join("R" * mesh.ndim)
    sharded = {
        key: spread(value, mesh, placed(everywhere if key == "weight" else places))
        for key, value in operands.items()
    }
    Ran(function, sharded)  # the first one compares the generators
    ours = Ran(function, sharded)
    assert torch.equal(torch.get_rng_state(), state)
    by_rows = "2" not in places
    tolerance = {} if kernels() == "cpu" else of_parts(dtype)
    if by_rows:
        assert ours.forward == ours.backward == {}
    for output, want in zip(ours.outputs, whole.outputs, strict=True):
        _compare("output", output.full_tensor(), want, tolerance, by_rows)
    for key in ("x", "residual"):
        gradient = ours.gradients[key].full_tensor()
        _compare(key, gradient, whole.gradients[key], tolerance, by_rows)


def unshared_dropout() -> str:
    """Return the error of dropout where every rank draws for itself."""
    from fusednorm import distributed

    distributed._agreed.clear()
    x = spread(torch.randn(4, N), mesh_of("4"), placed("0"))
    torch.manual_seed(dist.get_rank())
    return message(lambda: fusednorm.add_layer_norm(x, None, N, dropout_p=0.5))


def message(function: Callable[[], Any]) -> str:
    """Return the error that a function raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# Bad input and faults -----------------------------------------------------------------------------


def bad_inputs() -> dict[str, str]:
    """Return the errors of operands that do not belong together."""
    mesh, other = mesh_of("2"), mesh_of("4")
    x, row = torch.randn(4, 3, N), placed("0")
    weight = spread(torch.ones(N), mesh, placed("R"))
    ours = spread(x, mesh, row)
    elsewhere = spread(x, other, row)
    add = fusednorm.add_layer_norm
    terms, options = (None,) * 7, ((N,), 1e-5, False, 0.0, torch.float32, None, None)
    return {
        "operator": message(lambda: ops.layer_norm_fwd(ours, *terms, *options)),
        "plain residual": message(lambda: add(ours, x, N)),
        "plain input": message(lambda: fusednorm.layer_norm(x, N, weight)),
        "plain scale": message(lambda: add(ours, ours, N, scale=torch.ones(4, 1, N))),
        "two meshes": message(lambda: add(ours, elsewhere, N)),
        "shape": message(lambda: add(ours, spread(x[:2], mesh, row), N)),
        "scale": message(lambda: add(ours, None, N, scale=spread(x[:2, :1], mesh, row))),
    }


def raising(places: str) -> str:
    """Let one rank fail in front of a call that it shares with others; return their errors."""
    from datetime import timedelta

    group = dist.new_group(timeout=timedelta(seconds=2))
    mesh = DeviceMesh.from_group(group, "cpu")
    x = spread(torch.randn(4, 8), mesh_of("4"), placed(places))
    x = DTensor.from_local(x.detach().to_local(), mesh, placed(places), run_check=False)

    def step() -> None:
        if dist.get_rank() == 1:
            raise MemoryError("rank 1 has none left")
        with fusednorm.backends.use(kernels()):
            fusednorm.layer_norm(x, 8)

    return message(step)


def backends_of_their_own() -> None:
    """Ask for another backend on each rank."""
    mesh = mesh_of("4")
    operands = drawn("x residual weight", (4, 3), torch.float32)
    whole = fusednorm.add_layer_norm(operands["x"], operands["residual"], N, operands["weight"])
    for places in ("0", "2"):
        sharded = [
            spread(value, mesh, placed("R" if key == "weight" else places))
            for key, value in operands.items()
        ]
        with fusednorm.backends.use((kernels(), "torch")[dist.get_rank() % 2]):
            z, h = fusednorm.add_layer_norm(sharded[0], sharded[1], N, sharded[2])
        torch.testing.assert_close(z.full_tensor(), whole[0])
        torch.testing.assert_close(h.full_tensor(), whole[1])


def outside_of_the_mesh(places: str, dropout_p: float) -> list[int]:
    """Return the sizes of what each rank has of a call on two of them."""
    mesh = DeviceMesh("cpu", [0, 1])
    torch.manual_seed(0)
    x: Any = spread(torch.randn(4, N), mesh, placed(places)) * 1  # outside it has no shape
    weight = spread(torch.ones(N), mesh, placed("R"))
    outputs: Any = fusednorm.add_layer_norm(x, x.detach(), N, weight, dropout_p=dropout_p)
    assert all(output.shape == (4, N) for output in outputs)
    return [output.to_local().numel() for output in outputs]


def waiting(before: str, after: str) -> None:
    """Give a call what a collective has not delivered yet."""
    mesh = mesh_of("4")
    x = torch.randn(4, 8, N)
    late = (
        spread(x, mesh, placed(before))
        .detach()
        .redistribute(placements=placed(after), async_op=True)
    )
    with torch.no_grad(), fusednorm.backends.explain() as ran:
        z, h = fusednorm.add_layer_norm(late, late, N)
    assert [call.backend for call in ran] == [kernels()]
    want = fusednorm.add_layer_norm(x, x, N)
    assert torch.equal(z.full_tensor(), want[0])
    assert torch.equal(h.full_tensor(), want[1])


def run(name: str, options: dict[str, Any]) -> None:
    """Run a case that takes options."""
    globals()[name](**options)


# Modules in parallel plans ------------------------------------------------------------------------

WIDTH = 8


class Tower(nn.Module):
    """A pre-norm block and a final norm, on a stream that is carried on."""

    def __init__(self, rms: bool, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        norm: Any = nn.RMSNorm if rms else nn.LayerNorm
        if fused:
            norm = functools.partial(
                fusednorm.AddRMSNorm if rms else fusednorm.AddLayerNorm, prenorm=True
            )
        self.fused = fused
        self.first, self.second = norm(WIDTH), norm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.last = getattr(fusednorm if fused else nn, "RMSNorm" if rms else "LayerNorm")(WIDTH)

    def _add(self, norm: Any, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        if self.fused:
            # SequenceParallel prepares the first argument and forgets other positional ones.
            return norm(x, residual=stream)  # type: ignore[no-any-return]
        stream = stream + x
        return norm(stream), stream

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:
        """Return the normalised stream."""
        x, stream = self._add(self.first, x, stream)
        x, stream = self._add(self.second, self.down(F.gelu(self.up(x))), stream)
        return self.last(x + stream)  # type: ignore[no-any-return]


def tensor_parallel(model: Tower, mesh: DeviceMesh) -> nn.Module:
    """Split the linear layers by features and all else by the sequence."""
    plan = {
        "": PrepareModuleInput(
            input_layouts=(Replicate(), Replicate()),
            desired_input_layouts=(Shard(1), Shard(1)),
        ),
        "first": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "second": SequenceParallel(),
        "last": SequenceParallel(),
    }
    return parallelize_module(model, mesh, plan)


def plan(rms: bool) -> list[tuple[Any, Any]]:
    """Compare a model in a plan with the whole; return what was communicated, by us and torch."""
    x, stream = torch.randn(2, 2, 4, WIDTH)
    whole = Tower(rms, fused=True)
    want = whole(x, stream)
    want.sin().sum().backward()
    ran = []
    for fused in (True, False):
        model = tensor_parallel(Tower(rms, fused), mesh_of("2"))
        with Collectives() as forward:
            got = model(x, stream)
        cotangent = distribute_tensor(want.cos().detach(), got.device_mesh, got.placements)
        with Collectives() as backward:
            got.backward(cotangent)
        torch.testing.assert_close(got.full_tensor(), want)
        gradients = {name: full(p.grad) for name, p in model.named_parameters()}
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)
        ran.append(
            tuple({k: (n, c.bytes[k]) for k, n in c.ran.items()} for c in (forward, backward))
        )
    return ran


def plan_and_fsdp(rms: bool) -> None:
    """Compare a model in a plan whose replicas FSDP2 shards with the whole."""
    mesh = mesh_of("2x2")
    x, stream = torch.randn(2, 2, 4, WIDTH)
    whole = Tower(rms, fused=True)
    want = whole(x, stream)
    want.sin().sum().backward()
    model = tensor_parallel(Tower(rms, fused=True), mesh["inner"])
    fully_shard(model, mesh=mesh["outer"])
    got: Any = model(x, stream)
    got.backward(distribute_tensor(want.cos().detach(), got.device_mesh, got.placements))
    torch.testing.assert_close(got.full_tensor(), want)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(full(ours.grad), theirs.grad)


class Stage(nn.Module):
    """Half of a pre-norm model, which takes and passes on a branch and the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = fusednorm.AddLayerNorm(WIDTH, prenorm=True)
        self.branch = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next branch, and the stream with the last one."""
        z, h = self.norm(x, stream)
        return self.branch(z), h


def pipeline() -> None:
    """Compare two stages on two ranks, which a branch and the stream cross, with the whole."""
    stages = Stage(), Stage()
    whole = copy.deepcopy(stages)
    x, stream, target = torch.randn(3, 4, 3, WIDTH)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return (sum(output) - target).square().mean()

    want = loss(whole[1](*whole[0](x, stream)), target)
    want.backward()
    mesh = mesh_of("2")
    own = mesh.get_local_rank()
    stage = PipelineStage(stages[own], own, 2, torch.device("cpu"), group=mesh.get_group())
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss)
    losses: list[Tensor] = []
    if own == 0:
        schedule.step(x, stream)
    else:
        schedule.step(target=target, losses=losses)
        torch.testing.assert_close(torch.stack(losses).mean(), want)
    for ours, theirs in zip(stages[own].parameters(), whole[own].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def context() -> None:
    """Compare a model within context parallel, whose ranks have parts of a sequence, with itself.

    Its attention has no kernel for the CPU: here is none.
    """
    mesh, model = mesh_of("2"), Stage()
    x, stream, cotangent = torch.randn(3, 2, 8, WIDTH)
    want = model(x, stream)
    (sum(want) * cotangent).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with context_parallel(mesh, buffers=[x, stream, cotangent], buffer_seq_dims=[1, 1, 1]):
        assert x.shape[1] == 4
        own = model(x, stream)
        (sum(own) * cotangent).sum().backward()
        wholes = context_parallel_unshard(mesh, [part.detach() for part in own], [1, 1])
    torch.testing.assert_close(tuple(wholes), want)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        dist.all_reduce(parameter.grad, group=mesh.get_group())
        torch.testing.assert_close(parameter.grad, gradient)


def adaptive() -> None:
    """Compare AdaLayerNorm on a sharded sequence, and on sharded samples, with the whole."""
    mesh = mesh_of("2")
    torch.manual_seed(3)
    whole = fusednorm.AdaLayerNorm(WIDTH, 4, elementwise_affine=True)
    nn.init.normal_(whole.linear.weight)
    model = distribute_module(copy.deepcopy(whole), mesh)
    x, condition = torch.randn(4, 6, WIDTH), torch.randn(4, 4)
    want = whole(x, condition)
    (want[0] + want[1]).sin().sum().backward()
    for places in (("1", "R"), ("0", "0")):
        model.zero_grad()
        z, gate = model(
            spread(x, mesh, placed(places[0])), spread(condition, mesh, placed(places[1]))
        )
        (z + gate).sin().sum().backward()
        assert list(z.placements) == placed(places[0])
        torch.testing.assert_close((full(z), full(gate)), want)
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(ours.grad), theirs.grad)


# Wrappers -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A norm and a linear layer; of torch's Sequential nothing would be compiled."""

    def __init__(self, device: str | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, device=device)
        self.linear = nn.Linear(WIDTH, WIDTH, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the stream."""
        return self.linear(self.norm(x))  # type: ignore[no-any-return]


class Tiny(nn.Module):
    """Two blocks with torch's norms, which may be swapped."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block(device) for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH, device=device)
        self.unused = nn.LayerNorm(WIDTH, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised stream."""
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)  # type: ignore[no-any-return]


def trained(model: nn.Module, batches: Sequence[Tensor], accumulate: int = 1) -> list[Tensor]:
    """Return the losses of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step, batch in enumerate(batches):
        last = step % accumulate == accumulate - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        loss = model(batch).float().sin().square().mean()
        loss.backward()
        losses.append(loss.detach())
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def data() -> tuple[list[Tensor], list[Tensor]]:
    """Return whole batches, and this rank's samples of each."""
    batches = list(torch.randn(4, 4, 3, WIDTH))
    return batches, [batch[dist.get_rank() :][:1] for batch in batches]


def fsdp(swap: str, compiled: bool = False, **options: Any) -> None:
    """Train under FSDP2 and compare parameters with those of one process on whole batches."""
    whole, parts = data()
    accumulate = options.pop("accumulate", 1)
    meta = options.pop("meta", False)
    if options.pop("mixed", False):
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if options.pop("offload", False):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    alone = Tiny()
    fusednorm.replace_norms(alone)
    trained(alone, whole, accumulate)

    model = Tiny("meta" if meta else None)
    if swap == "before":
        fusednorm.replace_norms(model)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh_of("4"), **options)
    if meta:
        model.to_empty(device="cpu")
        start = {name: tensor.detach() for name, tensor in Tiny().state_dict().items()}
        set_model_state_dict(
            model, start, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    if swap == "after":
        fusednorm.replace_norms(model)
    trained(model, parts, accumulate)
    kinds = {type(module).__name__ for module in model.modules()}
    assert any("LayerNorm" in kind for kind in kinds)
    assert isinstance(model.norm, fusednorm.RMSNorm)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if "mp_policy" in options else {}
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(ours), theirs, **tolerance)


def ddp(**options: Any) -> None:
    """Train under DDP and compare parameters with those of one process on whole batches."""
    whole, parts = data()
    alone, model = Tiny(), Tiny()
    for one in (alone, model):
        fusednorm.replace_norms(one)
        if not options.get("find_unused_parameters"):
            one.unused.requires_grad_(False)
    trained(alone, whole)
    trained(DistributedDataParallel(model, **options), parts)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def checkpoint(folder: str, ours_first: bool) -> None:
    """Save a model on four ranks, and load it on two, with the other library's norms."""
    saved, loaded = Tiny(), Tiny()
    fusednorm.replace_norms(saved if ours_first else loaded)
    for module in (saved, loaded):
        for index, parameter in enumerate(module.parameters()):
            nn.init.constant_(parameter, index if module is saved else -1)
    for module, mesh in ((saved, mesh_of("4")), (loaded, mesh_of("2"))):
        fully_shard(module, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoints.save(get_model_state_dict(saved), checkpoint_id=folder)
        state = get_model_state_dict(loaded)
        checkpoints.load(state, checkpoint_id=folder)
    set_model_state_dict(loaded, state)
    assert get_model_state_dict(saved).keys() == state.keys()
    for index, parameter in enumerate(loaded.parameters()):
        assert (full(parameter) == index).all(), index


# Compiled -----------------------------------------------------------------------------------------


def compiled(name: str, places: dict[str, str], dropout_p: float) -> tuple[Any, Any, bool]:
    """Compile a function of DTensors whole; return the collectives of both graphs.

    The outcome also says whether it computes what it does uncompiled.
    """
    mesh = mesh_of("2")
    if dist.get_rank() > 1:  # the other pair would do the same
        return None, None, True
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    function, names = FUNCTIONS[name]
    if dropout_p:

        def function(x: Tensor, residual: Tensor, *rest: Tensor) -> Any:
            return fusednorm.add_layer_norm(x, residual, N, *rest, dropout_p=dropout_p)

    graphs: list[list[str]] = []

    def seen(graph: Any, inputs: Any) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes]
        graphs.append([t.split(".")[1] for t in targets if "c10d" in t and "wait" not in t])
        return graph

    sharded = {
        key: spread(value, mesh, placed(places.get(key, "R")))
        for key, value in drawn(names, (4, 6), torch.float32).items()
    }
    compiled = torch.compile(
        function, fullgraph=True, backend=aot_autograd(fw_compiler=seen, bw_compiler=seen)
    )
    results = []
    for candidate in (function, compiled):
        leaves = [operand.detach().requires_grad_() for operand in sharded.values()]
        torch.manual_seed(5)
        outputs = candidate(*leaves)
        loss = sum((output.sin() * output).sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for ours, want in zip(*results, strict=True):
        assert ours.placements == want.placements, (ours.placements, want.placements)
        torch.testing.assert_close(full(ours), full(want))
    assert len(graphs) == 2, graphs
    return graphs[0], graphs[1], True


def compiled_model(way: str) -> list[Counter[str]]:
    """Train a compiled model once; return what that communicated, with torch's norms and ours."""
    mesh = mesh_of("2")
    if dist.get_rank() > 1:  # the other pair would do the same
        return []
    x, stream = torch.randn(2, 4, 4, WIDTH)
    ran, ends = [], []
    for ours in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if way == "tp":
            model: Any = tensor_parallel(Tower(rms=False, fused=ours), mesh)
            compiled: Any = torch.compile(model, fullgraph=True)
            arguments: Any = x, stream
        else:
            model = compiled = Tiny()
            if ours:
                fusednorm.replace_norms(model)
            for block in model.blocks:
                block.compile(fullgraph=True)
            for part in (*model.blocks, model):
                fully_shard(part, mesh=mesh)
            arguments = (x,)

        def step(compiled: Any = compiled, arguments: Any = arguments) -> None:
            full(compiled(*arguments)).sin().sum().backward()

        step()  # compiles
        model.zero_grad()
        ran.append(communicated(step))
        assert not torch._dynamo.utils.counters["graph_break"]
        ends.append(
            {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        )
    torch.testing.assert_close(*ends)
    return ran
