"""DTensors: the equation on every device's own part, and statistics of rows that are split.

A call runs on the local tensors as it would on any others. For each dimension of the mesh:

=========================  =================================  ==================================
x or residual              x, residual, z and h               every other operand
=========================  =================================  ==================================
is sharded by rows         sharded by rows                    sharded if it differs between rows
is sharded by columns      sharded by columns                 sharded if it has these columns
else                       replicated                         replicated
=========================  =================================  ==================================

What is sharded by rows needs nobody else. A row that is split over devices has the statistics of
the whole row: each device sends two numbers a row, and in a backward two again. The gradient of an
operand that is replicated beside sharded rows is a partial sum, which whoever reads it adds up.

These are no rules of `register_sharding`: such a rule says where the tensors go, and can neither
number the rows that dropout draws for nor communicate in the middle of an operator. Nor has it a
place for the statistics, [M], of rows that are sharded on any dimension but the first, or unevenly.
A graph has the operators on the parts; torch refuses one that is given a DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fusednorm import backends, observers, reference
from fusednorm.autograd import LayerNormFunction
from fusednorm.backends import Choice, Launchers
from fusednorm.spec import (
    Call,
    GatedOperands,
    GatedSpec,
    Gradients,
    Operands,
    Outputs,
    Saved,
    Spec,
    compute_dtype,
)
from fusednorm.validation import check_terms, fail

Run = Callable[[Call], tuple[Tensor, Tensor]]
Placements = tuple[Placement, ...]


def run(call: Call, torchs: Choice | None, run_local: Run) -> tuple[Tensor, Tensor]:
    """Run a call with DTensors, each part of it by `run_local`; return z and h as DTensors.

    What is one operator of torch on the parts, as `torchs` says, is one with the whole, by torch's
    own rules.
    """
    _check(call.op, call.operands)
    op, operands, spec, want_h = call
    plan = _plan_of(operands, spec)
    if torchs is not None and plan.split is None:
        backends.note(op, *torchs)
        return reference.around_torch(operands, spec)
    if plan.mesh.get_coordinate() is None:
        return _elsewhere(call, plan)
    local = Operands(*_parts(operands, plan.places))
    shape = tuple(local.x.shape[plan.leading :])
    if spec.dropout_p > 0.0:
        local = local._replace(gate=_with_dropout(call, plan, local))
    gate, scale, shift = check_terms(
        op, local.x, shape, gate=local.gate, scale=local.scale, shift=local.shift
    )
    local = local._replace(gate=gate, scale=scale, shift=shift)
    part = Call(op, local, spec._replace(normalized_shape=shape, dropout_p=0.0), want_h)
    z, h = run_local(part) if plan.split is None else _run_split(part, plan, plan.split)
    z, stored = _wholes((z, None if h is local.x else h), (plan.of_x, plan.of_x))
    return z, operands.x if stored is None else stored


def run_gated(
    op: str,
    operands: GatedOperands,
    spec: GatedSpec,
    run_local: Callable[[str, GatedOperands, GatedSpec], Tensor],
) -> Tensor:
    """Run a gated norm with DTensors, each part of it by `run_local`; rows are not split."""
    _check(op, operands)
    plan = _plan_of(operands, spec)
    local = GatedOperands(*_parts(operands, plan.places))
    inside = plan.mesh.get_coordinate() is not None
    z = run_local(op, local, spec) if inside else local.x.to(spec.out_dtype)
    return _wholes((z,), (plan.of_x,))[0]  # type: ignore[no-any-return]


def _check(op: str, operands: Operands | GatedOperands) -> None:
    """Check that every operand is a DTensor of one mesh: all devices meet the same error."""
    first: Any = next(tensor for tensor in operands if isinstance(tensor, DTensor))
    mesh = first.device_mesh
    for name, tensor in zip(operands._fields, operands, strict=True):
        if tensor is None or (isinstance(tensor, DTensor) and tensor.device_mesh is mesh):
            continue
        name = "input" if name == "x" else name
        if not isinstance(tensor, DTensor):
            expected = f"{name} to be a DTensor, as another argument is, with {first.placements}"
            fail(op, expected, "a plain Tensor", TypeError)
        if tensor.device_mesh != mesh:
            got = f"{tensor.device_mesh} with {tensor.placements}"
            fail(op, f"{name} on one mesh with the other arguments, {mesh}", got)


def _elsewhere(call: Call, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Return what a device outside of the mesh has of z and h: nothing."""
    x, spec, place = call.operands.x, call.spec, plan.of_x
    (nothing,) = _parts((x,), (place,))
    z, h = _wholes(
        (nothing.to(spec.out_dtype), nothing.to(spec.h_dtype or x.dtype)), (place, place)
    )
    return z, x if spec.h_dtype is None else h


# Where the parts are


class _Place(NamedTuple):
    """Where a contiguous DTensor is.

    Partial is one that is replicated and whose gradient is partial.
    """

    mesh: DeviceMesh
    placements: Placements
    shape: torch.Size
    stride: tuple[int, ...]


Places = tuple[_Place | None, ...]


class _Plan(NamedTuple):
    """Where the parts of a call are.

    Attributes:
        mesh: The devices.
        of_x: The place of x, residual, z and h.
        places: That of each operand.
        leading: The number of dimensions that count rows.
        split: The dimension of the mesh over which rows are split, or None.
    """

    mesh: DeviceMesh
    of_x: _Place
    places: Places
    leading: int
    split: int | None


def _dim(placement: Placement) -> int | None:
    """Return the dimension that a placement shards, or None."""
    return getattr(placement, "dim", None)


def _plan_of(operands: Any, spec: Spec | GatedSpec) -> _Plan:
    given = tuple(None if one is None else (one.shape, one.placements) for one in operands)
    # Symbolic sizes are no keys.
    plan: Any = _plan.__wrapped__ if observers.operators_watched() else _plan
    mesh, fields = operands.x.device_mesh, operands._fields
    return plan(mesh, fields, given, len(spec.normalized_shape))  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _plan(
    mesh: DeviceMesh, fields: tuple[str, ...], given: tuple[Any, ...], normalized: int
) -> _Plan:
    shape, _ = given[0]
    may_split = fields == Operands._fields
    leading = len(shape) - normalized
    split, placements = None, []
    for i in range(mesh.ndim):
        # Of x, and residual or gate_input; rows before columns, which cost a collective.
        both = [one[1][i] for one in given[:2] if one is not None]
        sharded = [placement for placement in both if _dim(placement) is not None]
        chosen: Any = min(sharded, key=_dim, default=Replicate())  # type: ignore[arg-type]
        if sharded and chosen.dim >= leading:
            if may_split and split is None and isinstance(chosen, Shard):
                split = i
            else:
                chosen = Replicate()
        placements.append(chosen)

    def beside(placement: Placement, sizes: torch.Size, first: int) -> Placement:
        """Return where a tensor goes whose dimensions are those of x from `first` on."""
        dim = _dim(placement)
        if dim is None:
            return placement
        if dim < first or sizes[dim - first] != shape[dim]:
            return Partial()
        return placement if first == 0 else Shard(dim - first)

    places: list[_Place | None] = []
    for name, one in zip(fields, given, strict=True):
        place = None
        if one is not None:
            sizes = one[0]
            first = leading if name in ("weight", "bias") else len(shape) - len(sizes)
            own = tuple(beside(placement, sizes, first) for placement in placements)
            place = _Place(mesh, own, sizes, torch.empty(sizes, device="meta").stride())
        places.append(place)
    of_x: Any = places[0]
    return _Plan(mesh, of_x, tuple(places), leading, split)


def _parts(tensors: Sequence[Any], places: Places) -> Any:
    """Return the parts of DTensors that are here, once they are where they should be."""
    if torch.is_grad_enabled():
        return _Parts.apply(places, *tensors)  # type: ignore[no-untyped-call]
    return tuple(map(_part, tensors, places))


def _wholes(locals_: Sequence[Any], places: Places) -> Any:
    """Return the DTensors whose parts here these are."""
    if torch.is_grad_enabled():
        return _Wholes.apply(places, *locals_)  # type: ignore[no-untyped-call]
    return tuple(map(_whole, locals_, places))


def _part(tensor: DTensor | None, place: _Place | None) -> Tensor | None:
    if tensor is None or place is None:
        return None
    placements = tuple(Replicate() if p.is_partial() else p for p in place.placements)
    if tensor.placements != placements:
        tensor = tensor.redistribute(placements=placements)
    local = tensor.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _whole(local: Tensor | None, place: _Place | None) -> DTensor | None:
    if local is None or place is None:
        return None
    local = local.contiguous()
    if observers.operators_watched():
        return _from_local(local, place)
    spec = copy(_spec(place, local.dtype))
    return DTensor(local.detach(), spec, requires_grad=False)


def _from_local(local: Tensor, place: _Place) -> DTensor:
    mesh, placements, shape, stride = place
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


@lru_cache(maxsize=1024)
def _spec(place: _Place, dtype: torch.dtype) -> Any:
    """Return what torch knows of a DTensor; to find it out takes longer than a small norm."""
    return _from_local(torch.empty(0, dtype=dtype), place)._spec


class _Parts(torch.autograd.Function):
    """The parts of DTensors that are here.

    Their gradients stay where the parts of them are: who reads one moves it, if need be. That of
    torch's `to_local` after `redistribute` is moved back first.
    """

    @staticmethod
    def forward(ctx: Any, places: Places, *tensors: DTensor | None) -> Any:
        """Move the tensors and return the local ones."""
        ctx.places = places
        ctx.set_materialize_grads(False)
        # As fresh tensors, of which autograd takes possession.
        parts = tuple(
            part if part is None else part.view_as(part) for part in map(_part, tensors, places)
        )
        needs = zip(parts, ctx.needs_input_grad[1:], strict=True)
        constant = (part for part, need in needs if part is not None and not need)
        ctx.mark_non_differentiable(*constant)
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Return the gradients as the DTensors that their parts make."""
        return None, *_wholes(gradients, ctx.places)


class _Wholes(torch.autograd.Function):
    """The DTensors that parts make; `_Parts` is its pullback, and it is that of `_Parts`."""

    @staticmethod
    def forward(ctx: Any, places: Places, *locals_: Tensor | None) -> Any:
        """Return the DTensors."""
        ctx.places = places
        ctx.set_materialize_grads(False)
        return tuple(map(_whole, locals_, places))

    @staticmethod
    def backward(ctx: Any, *gradients: DTensor | None) -> Any:
        """Return the parts of the gradients that are here."""
        return None, *_parts(gradients, ctx.places)


# Dropout

_agreed: set[DeviceMesh] = set()


def _with_dropout(call: Call, plan: _Plan, local: Operands) -> Tensor:
    """Return the gate times what dropout multiplies x by: one mask, however x is sharded."""
    spec, leading, device = call.spec, plan.leading, local.x.device
    seed = torch.randint(2**62, (1,), device=device)
    if not torch.compiler.is_compiling() and plan.mesh not in _agreed:
        _check_seed(call, plan, seed)
    cols = torch.Size(spec.normalized_shape).numel()
    compute = compute_dtype(local.x.dtype, spec.h_dtype)
    rows = _numbers(plan, 0, leading, device)
    factors = reference.dropout_factors(seed, rows, cols, spec.dropout_p, compute)
    if plan.split is not None:
        factors = factors[:, _numbers(plan, leading, len(plan.of_x.shape), device)]
    factors = factors.reshape(local.x.shape)
    return factors if local.gate is None else factors * local.gate


def _numbers(plan: _Plan, first: int, last: int, device: torch.device) -> Tensor:
    """Return the numbers that the parts here of the dimensions [first, last) have in the whole."""
    sizes = plan.of_x.shape[first:last]
    placements: list[Placement] = []
    for dim in map(_dim, plan.of_x.placements):
        inside = dim is not None and first <= dim < last
        placements.append(Shard(dim - first) if inside else Replicate())  # type: ignore[operator]
    numbers = torch.arange(sizes.numel(), device=device).reshape(sizes)
    everywhere = [Replicate()] * len(placements)
    whole = DTensor.from_local(numbers, plan.mesh, everywhere, run_check=False)
    return whole.redistribute(placements=placements).to_local().reshape(-1)


def _check_seed(call: Call, plan: _Plan, seed: Tensor) -> None:
    """Check, once for each mesh, that all its devices draw the same numbers."""
    places = [Shard(0)] * plan.mesh.ndim
    drawn: Any = DTensor.from_local(seed, plan.mesh, places, run_check=False)
    if (drawn.full_tensor() != seed[0]).any():
        expected = "dropout_p with one generator on all ranks (torch.manual_seed)"
        fail(call.op, expected, f"several, for input with {plan.of_x.placements}")
    _agreed.add(plan.mesh)


# Rows that are split


class _SplitRows(reference.Rows):
    """Rows [.., n] of which every device has some columns, and their sums over all devices.

    The launchers normalise what this one has by itself; without them, and where a derivative is
    recorded, plain torch does.
    """

    def __init__(self, plan: _Plan, split: int, launchers: Launchers | None) -> None:
        self.launchers = launchers
        shape = plan.of_x.shape
        dim: Any = _dim(plan.of_x.placements[split])
        self.group = plan.mesh.get_group(split).group_name
        self.rank = plan.mesh.get_local_rank(split)
        self.cols = shape[plan.leading :].numel()
        last, devices = shape[dim], plan.mesh.size(split)
        size = -(-last // devices)
        held = [max(0, min(size, last - i * size)) for i in range(devices)]
        self.counts = [self.cols // max(last, 1) * count for count in held]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums over all devices."""
        if torch.is_grad_enabled():
            return _Sum.apply(values, self)  # type: ignore[no-any-return, no-untyped-call]
        total = torch.ops._c10d_functional.all_reduce(values.contiguous(), "sum", self.group)
        return torch.ops._c10d_functional.wait_tensor(total)  # type: ignore[no-any-return]

    def gather(self, values: Tensor) -> Tensor:
        """Return the [devices, ..] values of all devices."""
        if torch.is_grad_enabled():
            return _Gather.apply(values, self)  # type: ignore[no-any-return, no-untyped-call]
        devices = len(self.counts)
        flat = torch.ops._c10d_functional.all_gather_into_tensor(
            values.contiguous(), devices, self.group
        )
        flat = torch.ops._c10d_functional.wait_tensor(flat)
        return flat.reshape(devices, *values.shape)  # type: ignore[no-any-return]

    def means(self, *values: Tensor) -> tuple[Tensor, ...]:
        sums = torch.stack([value.sum(-1, keepdim=True) for value in values])
        return tuple(self.sum(sums) / self.cols)

    def normalize(
        self, h: Tensor, spec: Spec | GatedSpec, mean: Tensor | None, rstd: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if rstd is None and self.launchers and h.numel() > 0 and not torch.is_grad_enabled():
            return self._normalize_parts(self.launchers, h, spec)
        if spec.rms:
            if rstd is None:
                rstd = self._rstd_of_squares(h.square().sum(-1, keepdim=True), spec)
            return h * rstd, None, rstd
        if mean is None or rstd is None:
            mean, rstd = self._merge(*self._moments(h), spec, h.dtype)
        nearest = mean.to(h.dtype)
        return (h - nearest).sub_((mean - nearest).to(h.dtype)).mul_(rstd), mean, rstd

    def _normalize_parts(
        self, launchers: Launchers, h: Tensor, spec: Spec | GatedSpec
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Normalise each part of a row by its own statistics, and then by those of the row."""
        cols = h.shape[-1]
        # Any eps serves: this one lets a part without variance stay finite.
        own = Spec((cols,), torch.finfo(h.dtype).tiny, spec.rms, 0.0, h.dtype, None, None)
        result: Any = launchers.forward(*Operands(h), *own, True, False)
        x_hat, _, near, own_rstd = result
        size = (*h.shape[:-1], 1)
        own_rstd = own_rstd.reshape(size)
        squares = cols / own_rstd.double().square()
        if spec.rms:
            rstd = self._rstd_of_squares(squares.to(h.dtype), spec)
            return x_hat.mul_(rstd / own_rstd), None, rstd
        # The kernel rounds the mean that it returns, not the one that it subtracts.
        near = near.reshape(size)
        own_mean = near.double() + (h - near).sum(-1, keepdim=True).double() / cols
        mean, rstd = self._merge(own_mean, squares, spec, h.dtype)
        shift = ((own_mean - mean) * rstd).to(h.dtype)
        return x_hat.mul_(rstd / own_rstd).add_(shift), mean, rstd

    def _rstd_of_squares(self, squares: Tensor, spec: Spec | GatedSpec) -> Tensor:
        """Return rstd of RMS from what each device has of the sums of squares."""
        return (self.sum(squares) / self.cols + spec.eps).sqrt().reciprocal()

    def _moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and sum of squared deviations of what is here, as float64."""
        count = max(h.shape[-1], 1)
        shift = h.sum(-1, keepdim=True) / count
        centred = h - shift
        correction = centred.sum(-1, keepdim=True) / count
        squares = (centred - correction).square().sum(-1, keepdim=True)
        return shift.double() + correction.double(), squares.double()

    def _merge(
        self, mean: Tensor, squares: Tensor, spec: Spec | GatedSpec, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return mean and rstd by Chan's formula, from the two numbers a row of each device.

        They are gathered: a sum of squares about no common centre would lose the digits that a
        large mean takes. They are float64, as the difference of two means needs.
        """
        means, squares = self.gather(torch.stack([mean, squares])).unbind(1)
        counts = torch.tensor(self.counts, dtype=means.dtype, device=means.device)
        counts = counts.reshape(-1, *(1,) * mean.dim())
        mean = (counts * means).sum(0) / self.cols
        squares = squares + counts * (means - mean).square()
        variance = squares.sum(0) / self.cols
        return mean, (variance + spec.eps).sqrt().reciprocal().to(dtype)


class _Sum(torch.autograd.Function):
    """`_SplitRows.sum` where it is differentiated again; before torch 2.13 a collective is not."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: _SplitRows) -> Tensor:
        """Return the sums."""
        ctx.rows = rows
        return rows.sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Return the sums of what all devices have of the gradient."""
        return ctx.rows.sum(gradient), None


class _Gather(torch.autograd.Function):
    """`_SplitRows.gather` where it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: _SplitRows) -> Tensor:
        """Return the values of all devices."""
        ctx.rows = rows
        return rows.gather(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Return what all devices have of the gradient for this one."""
        return ctx.rows.sum(gradient)[ctx.rows.rank], None


def _run_split(call: Call, plan: _Plan, split: int) -> tuple[Tensor, Tensor]:
    """Run the equation in plain torch on rows that are split; kernels normalise the parts."""
    backend, reason = backends.choose(call.operands.x, plain=False)
    if observers.operators_watched():
        backend = "torch"
    backends.note(call.op, backend, f"{reason}; rows are split over devices")
    launchers = None if backend == "torch" else backends.launchers(backend)
    rows = _SplitRows(plan, split, launchers)

    def forward(*arguments: Any) -> Outputs:
        count = len(Operands._fields)
        operands, (*options, _, _) = Operands(*arguments[:count]), arguments[count:]
        return reference.layer_norm(operands, Spec(*options), rows)

    def backward(dz: Tensor | None, dh: Tensor | None, *arguments: Any) -> Gradients:
        count = len(Saved._fields)
        saved, (_, _, *numbers, _, wanted) = Saved(*arguments[:count]), arguments[count:]
        if torch.is_grad_enabled():  # the statistics are functions of h, too
            saved = saved._replace(mean=None, rstd=None)
        return reference.layer_norm_bwd(
            dz, dh, saved, call.spec, (numbers[0], numbers[1]), wanted, rows
        )

    around = Launchers(forward, backward, differentiable=True)
    result: Any = LayerNormFunction.apply(  # type: ignore[no-untyped-call]
        call.spec, around, *call.operands
    )
    z, h = result if isinstance(result, tuple) else (result, call.operands.x)
    return z, h
