"""The oracle and the error budget that every numerical test shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from fusednorm import backends, reference
from fusednorm.spec import Operands, Spec

INTERPRETED = not torch.cuda.is_available()

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SERVING = tuple(name for name in backends.available() if backends.serves(name, DEVICE))
# Those that take every dtype, which the CUDA kernels do not.
BACKENDS = tuple(name for name in SERVING if name != "cuda")


@dataclass
class Case:
    """The arguments of one call and the gradients of its outputs."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    eps: float = 1e-5
    terms: Terms | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """normalized_shape, which is the last dimension throughout."""
        return (self.x.shape[-1],)


@dataclass
class Terms:
    """What a norm has beside weight and bias.

    Attributes:
        rms: Whether the mean is taken as 0.
        residual: Of x's shape, or None.
        gate: Broadcastable to x, or None.
        scale: Broadcastable to x, or None.
        shift: Broadcastable to x, or None.
        keep: What dropout multiplies x by, of x's shape, or None.
        dh: Gradient of the stream as an output, or None where it is not used.
        dropout_p: The rate of dropout.
        seed: What the generator is seeded with before the call.
        gate_input: Of x's shape, for a gated norm, or None.
        groups: Groups of columns that a gated norm has statistics of.
        norm_before_gate: Whether it multiplies by the SiLU what has been normalised.
    """

    rms: bool = False
    residual: Tensor | None = None
    gate: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    keep: Tensor | None = None
    dh: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    gate_input: Tensor | None = None
    groups: int = 1
    norm_before_gate: bool = True


DIFFERENTIABLE_TERMS = ("residual", "gate", "scale", "shift", "gate_input")

Result = dict[str, Tensor]
Function = Callable[..., Any]


def make_case(
    rows: int | tuple[int, ...],
    cols: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    weight: bool = True,
    bias: bool = True,
    mean: float = 0.0,
) -> Case:
    """Draw fresh inputs of one dtype, with a random dy: dy = 1 would hide most errors of dx."""
    leading = (rows,) if isinstance(rows, int) else rows

    def put(value: Tensor) -> Tensor:
        return value.to(device, dtype)

    return Case(
        x=put(_draw(*leading, cols) + mean),
        weight=put(_draw(cols)) if weight else None,
        bias=put(_draw(cols)) if bias else None,
        dy=put(_draw(*leading, cols)),
    )


def _draw(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def add_terms(
    case: Case,
    *,
    rms: bool = False,
    residual: bool = False,
    gate: str = "",
    scale: str = "",
    shift: str = "",
    dropout_p: float = 0.0,
    stream: bool | None = None,
    gated: str = "",
    grouped: bool = False,
) -> Case:
    """Give a case the terms of the whole equation.

    Args:
        case: A case whose x is [B, .., N].
        rms: Whether the mean is taken as 0.
        residual: Whether there is a residual.
        gate: "vector" for all rows, "sampled" or "scalar" for each of the B samples, or "".
        scale: As gate.
        shift: As gate.
        dropout_p: The rate of dropout.
        stream: Whether h gets a gradient; None for: if it is not x.
        gated: "last" or "first" for the place of the SiLU of a gate, or "".
        grouped: Whether the columns are in as few groups as there can be, but several.
    """
    x = case.x
    samples, *others = x.shape[:-1]
    ones = (samples, *(1 for _ in others))
    sizes = {"vector": case.shape, "sampled": (*ones, *case.shape), "scalar": (*ones, 1)}

    def like_x() -> Tensor:
        return _draw(*x.shape).to(x)

    def term(kind: str, least: float = 0.0) -> Tensor | None:
        if not kind:
            return None
        drawn = _draw(*sizes[kind])
        return (drawn + least * drawn.sign()).to(x)

    seed = int(torch.randint(2**31, ()))
    keep = None
    if dropout_p > 0:
        # As the library draws it, of which this makes a contract: one 62-bit number a call.
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            key = int(torch.randint(2**62, (1,), device=x.device))
        keep = torch.from_numpy(keep_mask(key, x.numel() // x.shape[-1], x.shape[-1], dropout_p))
        keep = keep.reshape(x.shape).to(x.device)
    if stream is None:
        stream = residual or bool(gate) or dropout_p > 0
    terms = Terms(
        rms=rms,
        residual=like_x() if residual else None,
        # A norm divides by what is alone multiplied by a gate: near 0 errors have no variance.
        gate=term(gate, least=0.5),
        scale=term(scale),
        shift=term(shift),
        keep=keep,
        dh=like_x() if stream else None,
        dropout_p=dropout_p,
        seed=seed,
        gate_input=like_x() if gated else None,
        groups=_few_groups(x.shape[-1]) if grouped else 1,
        norm_before_gate=gated != "first",
    )
    return replace(case, bias=None if rms and not gated else case.bias, terms=terms)


def _few_groups(cols: int) -> int:
    """Return the smallest number of groups of at least two columns, 1 where there is none."""
    return next((n for n in range(2, cols // 2 + 1) if cols % n == 0), 1)


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Return the four words of Philox 4x32-10 for [.., 4] counters, as uint64 below 2^32."""
    word = np.uint64(0xFFFFFFFF)
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        c = [high_b ^ c[1] ^ k[0], b & word, high_a ^ c[3] ^ k[1], a & word]
        k = [(k[0] + np.uint64(0x9E3779B9)) & word, (k[1] + np.uint64(0xBB67AE85)) & word]
    return np.stack(c, -1)


def keep_mask(key: int, rows: int, cols: int, p: float) -> np.ndarray:
    """Return what dropout of rate `p` multiplies [rows, cols] by: 0 or 1 / (1 - p)."""
    counter = np.zeros((rows, -(-cols // 4), 4), np.uint64)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1] = np.arange(rows)[:, None]
    words = philox(counter, key).reshape(rows, -1)[:, :cols]
    return (words >= round(p * 2**32)) / (1 - p)


def plain_spec(shape: tuple[int, ...], eps: float, dtype: torch.dtype) -> Spec:
    """Return what a layer norm without any other term computes."""
    return Spec(shape, eps, False, 0.0, dtype, None, None)


def reference_layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return the layer norm of the plain-torch equation."""
    spec = plain_spec(shape, eps, x.dtype)
    return reference.layer_norm(Operands(x, weight=weight, bias=bias), spec)[0]


def fused(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    terms: Terms | None = None,
) -> Any:
    """Return z, and h where the case has a stream, of the library's functions."""
    if terms is None:
        return fusednorm.layer_norm(x, shape, weight, bias, eps)
    if terms.gate_input is not None:
        gated = fusednorm.gated_rms_norm if terms.rms else fusednorm.gated_layer_norm
        return gated(
            *(x, terms.gate_input, shape, weight, bias, eps),
            group_size=shape[0] // terms.groups if terms.groups > 1 else None,
            norm_before_gate=terms.norm_before_gate,
        )
    modulation = {"scale": terms.scale, "shift": terms.shift}
    modulated = terms.scale is not None or terms.shift is not None
    if terms.dh is None and not modulated:
        return fusednorm.rms_norm(x, shape, weight, eps)
    if terms.dh is None and not terms.rms:
        return fusednorm.modulated_layer_norm(x, shape, **modulation, weight=weight, bias=bias)
    if terms.dropout_p > 0:
        torch.manual_seed(terms.seed)
    options = modulation | {"gate": terms.gate, "dropout_p": terms.dropout_p}
    if terms.rms:
        z, h = fusednorm.add_rms_norm(x, terms.residual, shape, weight, eps, **options)
    else:
        z, h = fusednorm.add_layer_norm(x, terms.residual, shape, weight, bias, eps, **options)
    return z if terms.dh is None else (z, h)


def unfused(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    terms: Terms | None = None,
) -> Any:
    """Return what `fused` does as users of torch write it, in the dtype of x."""
    if terms is None:
        return F.layer_norm(x, shape, weight, bias, eps)
    if terms.gate_input is not None:
        return _unfused_gated(x, shape[0], weight, bias, eps, terms)
    h = x
    if terms.keep is not None:
        h = h * terms.keep.to(x.dtype)
    if terms.gate is not None:
        h = h * terms.gate
    if terms.residual is not None:
        h = h + terms.residual
    if terms.rms:
        z = F.rms_norm(h, shape, weight, eps)
    else:
        z = F.layer_norm(h, shape, weight, bias, eps)
    if terms.scale is not None:
        z = z * (1 + terms.scale)
    if terms.shift is not None:
        z = z + terms.shift
    return z if terms.dh is None else (z, h)


def _unfused_gated(
    x: Tensor, cols: int, weight: Tensor | None, bias: Tensor | None, eps: float, terms: Terms
) -> Tensor:
    """Return a gated norm as the models have it: in float32, rounded once."""
    assert terms.gate_input is not None
    dtype = torch.promote_types(x.dtype, torch.float32)
    silu, h = F.silu(terms.gate_input.to(dtype)), x.to(dtype)
    h = h if terms.norm_before_gate else h * silu
    h = h.unflatten(-1, (terms.groups, cols // terms.groups))
    y = (F.rms_norm if terms.rms else F.layer_norm)(h, h.shape[-1:], eps=eps).flatten(-2)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return (y * silu if terms.norm_before_gate else y).to(x.dtype)


def run(function: Function, case: Case) -> Result:
    """Return y (and h) and every gradient of `function(x, shape, weight, bias, eps[, terms])`."""
    named = {"x": case.x, "weight": case.weight, "bias": case.bias}
    if case.terms is not None:
        named |= {name: getattr(case.terms, name) for name in DIFFERENTIABLE_TERMS}
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in named.items()
        if tensor is not None
    }
    arguments = [leaves["x"], case.shape, leaves.get("weight"), leaves.get("bias"), case.eps]
    outputs, gradients = ["y"], [case.dy]
    if case.terms is not None:
        given = {name: leaves.get(name) for name in DIFFERENTIABLE_TERMS}
        arguments.append(replace(case.terms, **given))
        if case.terms.dh is not None:
            outputs, gradients = ["y", "h"], [case.dy, case.terms.dh]
    results = function(*arguments)
    results = dict(zip(outputs, results if isinstance(results, tuple) else (results,), strict=True))
    grads = torch.autograd.grad(
        list(results.values()),
        list(leaves.values()),
        [grad.to(y.dtype) for y, grad in zip(results.values(), gradients, strict=True)],
    )
    detached = {name: result.detach() for name, result in results.items()}
    return detached | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _sum_to(value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Add up the dimensions along which something of `shape` was broadcast to `value`."""
    extra = value.ndim - len(shape)
    value = value.sum(tuple(range(extra)))
    ones = tuple(i for i, size in enumerate(shape) if size == 1 and value.shape[i] != 1)
    return value.sum(ones, keepdims=True)


def oracle(case: Case) -> dict[str, np.ndarray]:
    """Return y (and h) and every gradient in extended precision (at least float64), in NumPy."""

    def wide(tensor: Tensor | None, absent: float = 0.0) -> np.ndarray:
        if tensor is None:
            return np.full((1,) * case.x.ndim, absent, np.longdouble)
        return tensor.detach().double().cpu().numpy().astype(np.longdouble)

    terms = case.terms or Terms()
    x, dz, dh = wide(case.x), wide(case.dy), wide(terms.dh)
    weight, bias = wide(case.weight, 1.0), wide(case.bias)
    gate, keep = wide(terms.gate, 1.0), wide(terms.keep, 1.0)
    scale, shift = wide(terms.scale), wide(terms.shift)
    before = after = np.longdouble(1.0)  # what is multiplied before and after the norm
    if terms.gate_input is not None:
        sigmoid = 1 / (1 + np.exp(-wide(terms.gate_input)))
        silu = wide(terms.gate_input) * sigmoid
        dsilu = sigmoid + silu * (1 - sigmoid)
        before, after = (before, silu) if terms.norm_before_gate else (silu, after)

    def mean_of(value: np.ndarray) -> np.ndarray:
        groups = value.reshape(*value.shape[:-1], terms.groups, -1)
        return np.broadcast_to(groups.mean(-1, keepdims=True), groups.shape).reshape(value.shape)

    h = wide(terms.residual) + gate * keep * x
    u = h * before
    mean = 0.0 if terms.rms else mean_of(u)
    rstd = 1 / np.sqrt(mean_of((u - mean) ** 2) + np.longdouble(case.eps))
    x_hat = (u - mean) * rstd
    y = x_hat * weight + bias
    dy = dz * after * (1 + scale)
    g = dy * weight
    du = rstd * (g - x_hat * mean_of(g * x_hat) - (0.0 if terms.rms else mean_of(g)))
    dh = dh + du * before
    dgate_input = None
    if terms.gate_input is not None:
        dgate_input = (dz * y if terms.norm_before_gate else du * h) * dsilu
    wanted = {
        "x": (case.x, dh * gate * keep),
        "weight": (case.weight, dy * x_hat),
        "bias": (case.bias, dy),
        "residual": (terms.residual, dh),
        "gate": (terms.gate, dh * keep * x),
        "scale": (terms.scale, dz * y),
        "shift": (terms.shift, dz),
        "gate_input": (terms.gate_input, dgate_input),
    }
    result = {"y": (y * (1 + scale) + shift) * after} | ({} if terms.dh is None else {"h": h})
    return result | {
        f"d{name}": _sum_to(value, tensor.shape)
        for name, (tensor, value) in wanted.items()
        if tensor is not None
    }


def errors(result: Result, truth: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest error of each tensor; a NaN counts as infinite."""
    assert result.keys() == truth.keys()
    largest = {}
    for name, tensor in result.items():
        assert tensor.shape == truth[name].shape, name
        got = tensor.double().cpu().numpy().astype(np.longdouble)
        error = np.abs(got - truth[name])
        largest[name] = float(np.max(np.where(np.isnan(error), np.inf, error), initial=0.0))
    return largest


def rounding(dtype: torch.dtype, truth: np.ndarray) -> float:
    """Return one rounding to `dtype` at the largest value of `truth`.

    Half a unit in the last place; a whole one in the interpreter, where NumPy has no fused
    multiply-add.
    """
    unit = torch.finfo(dtype).eps * (1.0 if INTERPRETED else 0.5)
    return unit * float(np.max(np.abs(truth), initial=0.0))


FEW_ELEMENTS = 4096


def assert_accurate(
    draw: Callable[[], Case],
    ours: Function = fused,
    theirs: Function = unfused,
    draws: int = 1,
) -> None:
    """Assert that no tensor is further from the truth than torch's plus one rounding.

    Torch's error is a property of the shape and the dtype, and the largest one of a few draws is as
    often lucky as not; it is taken over eight times as many as ours has to stand, and over 32 times
    where few elements make its tail long. The gradient of one number a sample has too few elements
    even so: its error is a sum of thousands, thus normal, and ours may be what torch's standard
    deviation exceeds once in 150,000 times, 4.5 of it.

    Args:
        draw: Makes fresh inputs.
        ours: The function under test.
        theirs: The torch computation in the same dtype whose error sets the budget.
        draws: How many inputs `ours` is judged on.
    """
    budget: dict[str, float] = {}
    largest: dict[str, float] = {}
    units: dict[str, float] = {}
    squares: dict[str, float] = {}
    case = draw()
    count = (32 if case.x.numel() <= FEW_ELEMENTS else 8) * draws
    for index in range(count):
        case = case if index == 0 else draw()
        truth = oracle(case)
        torchs = run(theirs, case)
        _raise(budget, errors(torchs, truth))
        for name in numbers(truth):
            difference = torchs[name].double().cpu().numpy() - truth[name]
            squares[name] = squares.get(name, 0.0) + float(np.mean(difference**2)) / count
        if index < draws:
            result = run(ours, case)
            _raise(largest, errors(result, truth))
            _raise(units, {name: rounding(result[name].dtype, truth[name]) for name in truth})
    _raise(budget, {name: 4.5 * math.sqrt(square) for name, square in squares.items()})
    for name, error in largest.items():
        allowed = budget[name] + units[name]
        assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"


def numbers(truth: dict[str, np.ndarray]) -> list[str]:
    """Return the names of the gradients that hold one number for each sample."""
    names = [f"d{name}" for name in DIFFERENTIABLE_TERMS]
    return [name for name in names if name in truth and truth[name].shape[-1] == 1]


def _raise(largest: dict[str, float], values: dict[str, float]) -> None:
    for name, value in values.items():
        largest[name] = max(value, largest.get(name, 0.0))
