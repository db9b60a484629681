"""The whole equation: every use that has a name, and every pair of its terms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DIFFERENTIABLE_TERMS,
    Case,
    Terms,
    add_terms,
    assert_accurate,
    fused,
    make_case,
    philox,
)
from spies import few_programs, record_launches
from torch import Tensor

from fusednorm import add_layer_norm, backends, layer_norm, ops
from fusednorm.spec import Spec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COLS = (64, 769, 1024, 4097, 12288)


P = 0.3
USES: dict[str, dict[str, Any]] = {
    "LayerNorm": {},
    "RMSNorm": {"rms": True},
    "zero-centred weight": {"rms": True, "scale": "vector", "weight": False, "stream": True},
    "Add & Norm": {"residual": True},
    "Add & Norm, dropout": {"residual": True, "dropout_p": P},
    "Add & RMSNorm": {"residual": True, "rms": True},
    "LayerScale": {"residual": True, "gate": "vector"},
    "stochastic depth": {"residual": True, "gate": "scalar"},
    "AdaLN": {"scale": "sampled", "shift": "sampled", "weight": False, "bias": False},
    "AdaLN-Zero": {
        **{"residual": True, "gate": "sampled", "scale": "sampled", "shift": "sampled"},
        **{"weight": False, "bias": False},
    },
    "everything": {
        **{"residual": True, "dropout_p": P, "gate": "sampled"},
        **{"scale": "sampled", "shift": "sampled"},
    },
    "everything, RMS and scalars": {
        **{"residual": True, "dropout_p": P, "gate": "scalar", "rms": True},
        **{"scale": "scalar", "shift": "scalar"},
    },
    "gated LayerNorm": {"gated": "last"},
    "gated RMSNorm": {"gated": "last", "rms": True, "bias": False},
    "gated LayerNorm in groups": {"gated": "last", "grouped": True},
    "LayerNorm of the gated": {"gated": "first"},
    "RMSNorm of the gated in groups": {"gated": "first", "rms": True, "grouped": True},
}

# Terms of which each row may have its own, and the kernels store the gradients as they are.
OWN_TERMS: dict[str, dict[str, Any]] = {
    "own gate": {"gate": "sampled", "bias": False},
    "own scale, RMS": {"rms": True, "scale": "sampled", "weight": False},
    "own terms": {"residual": True, **dict.fromkeys(("gate", "scale", "shift"), "sampled")},
    "own scale beside a shift for all": {"scale": "sampled", "shift": "vector"},
}

GATED = tuple(name for name, use in USES.items() if "gated" in use)

# The same terms in the order of the equation; pairs are taken of different ones.
TERMS: dict[str, dict[str, Any]] = {
    "rms": {"rms": True},
    "residual": {"residual": True},
    "dropout": {"dropout_p": P},
    "gate [N]": {"gate": "vector"},
    "gate [B, 1, N]": {"gate": "sampled"},
    "gate [B, 1, 1]": {"gate": "scalar"},
    "weight": {"weight": True},
    "bias": {"bias": True},
    "scale [N]": {"scale": "vector"},
    "scale [B, 1, N]": {"scale": "sampled"},
    "scale [B, 1, 1]": {"scale": "scalar"},
    "shift [N]": {"shift": "vector"},
    "shift [B, 1, N]": {"shift": "sampled"},
    "shift [B, 1, 1]": {"shift": "scalar"},
}
PAIRS = [
    pytest.param(TERMS[a] | TERMS[b], id=f"{a} + {b}")
    for a, b in itertools.combinations(TERMS, 2)
    if TERMS[a].keys() != TERMS[b].keys() and {a, b} != {"rms", "bias"}
]


def make(
    batch: tuple[int, ...], cols: int, dtype: torch.dtype, device: torch.device, use: dict[str, Any]
) -> Case:
    """Draw a case with the terms of a use."""
    affine = {"weight": use.get("weight", True), "bias": use.get("bias", True)}
    terms = {name: value for name, value in use.items() if name not in affine}
    case = make_case(batch, cols, dtype, device, **affine)
    return add_terms(case, **terms) if terms else case


def batches(cols: int) -> tuple[tuple[int, ...], ...]:
    """Return batches whose samples fill the row blocks, and batches whose samples do not."""
    return ((2, 8), (3, 7)) if cols < 1024 else ((2, 2), (2, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_uses(
    kernels: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    use: dict[str, Any],
    cols: int,
    dtype: torch.dtype,
) -> None:
    """Outputs and every gradient are no further from the truth than those of unfused torch."""
    if cols > 1000:
        few_programs(monkeypatch)
    for batch in batches(cols):
        assert_accurate(
            lambda batch=batch: make(batch, cols, dtype, kernels, use),
            draws=2 if cols < 1000 else 1,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize(
    "use", ["AdaLN-Zero", "everything", "everything, RMS and scalars", *OWN_TERMS]
)
def test_terms_of_every_row(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, use: str, cols: int, dtype: torch.dtype
) -> None:
    """A sample may be one row: nothing is added up in the gradients of its terms."""
    few_programs(monkeypatch)
    terms = OWN_TERMS[use] if use in OWN_TERMS else USES[use]
    assert_accurate(lambda: make((7,), cols, dtype, kernels, terms), draws=2 if cols < 1000 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use", PAIRS)
def test_pairs(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, use: dict[str, Any], dtype: torch.dtype
) -> None:
    """Any two terms go together, each pair at every width, and each width with every dtype.

    Of the widths whose programs take the interpreter longest, a pair has one with each dtype.
    """
    few_programs(monkeypatch)
    alone = {"weight": False, "bias": False} | use
    shapes = dict(zip(COLS, ((3, 7), (2, 3), (2, 4), (2, 3), (2, 2)), strict=True))
    turn = [pair.values[0] for pair in PAIRS].index(use) + DTYPES.index(dtype)
    for cols in (64, 1024, (769, 4097, 12288)[turn % 3]):
        batch = shapes[cols]
        assert_accurate(
            lambda cols=cols, batch=batch: make(batch, cols, dtype, kernels, alone),
            draws=2 if cols < 1000 else 1,
        )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("cols", [40000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use", ["everything", "everything, RMS and scalars", *GATED])
def test_long_rows(
    kernels: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    use: str,
    cols: int,
    dtype: torch.dtype,
    rows: int,
) -> None:
    """Rows that forward walks in a loop and backward reads twice have all terms too."""
    few_programs(monkeypatch)
    assert_accurate(lambda: make((1, rows), cols, dtype, kernels, USES[use]))


def test_philox_known_answers() -> None:
    """The generator is the published one: the vectors of its authors' own test."""
    assert [hex(word) for word in philox(np.zeros(4, np.uint64), 0)] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    ones = np.full(4, 0xFFFFFFFF, np.uint64)
    assert [hex(word) for word in philox(ones, 2**64 - 1)] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]


# Derivatives ---------------------------------------------------------------------------------


Inputs = dict[str, Tensor]

ALONE: dict[str, dict[str, Any]] = {
    name: {"weight": False, "bias": False, **term} for name, term in TERMS.items()
} | {
    "everything": USES["everything"],
    "everything, RMS and scalars": USES["everything, RMS and scalars"],
    **{name: USES[name] for name in GATED},
    "gate without parameters": {"gated": "last", "weight": False, "bias": False},
    "different samples": {
        "residual": True,
        "gate": "scalar",
        "scale": "vector",
        "shift": "sampled",
    },
}


def problem(device: torch.device, use: dict[str, Any]) -> tuple[Callable[..., Any], Inputs]:
    """Return a function of all the float64 inputs of a use, and those inputs as leaves."""
    case = make((2, 3), 6 if "gated" in use else 5, torch.float64, device, use)
    terms = case.terms or Terms()
    given = {"x": case.x, "weight": case.weight, "bias": case.bias}
    given |= {name: getattr(terms, name) for name in DIFFERENTIABLE_TERMS}
    inputs = {name: value.requires_grad_() for name, value in given.items() if value is not None}

    def function(*values: Tensor) -> Any:
        named = dict(zip(inputs, values, strict=True))
        options = {name: named.get(name) for name in DIFFERENTIABLE_TERMS}
        given = replace(terms, **options) if case.terms else None
        return fused(
            named["x"], case.shape, named.get("weight"), named.get("bias"), case.eps, given
        )

    return function, inputs


def outputs(function: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
    """Return what a function of a problem returns, as a tuple."""
    result = function(*inputs.values())
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("use", ALONE.values(), ids=ALONE)
def test_gradcheck(kernels: torch.device, use: dict[str, Any]) -> None:
    """Backward of every term agrees with finite differences, in every input at once."""
    function, inputs = problem(kernels, use)
    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("use", ALONE.values(), ids=ALONE)
def test_gradgradcheck(kernels: torch.device, use: dict[str, Any]) -> None:
    """So does double backward."""
    function, inputs = problem(kernels, use)
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize(
    "use", ["everything", "everything, RMS and scalars", "different samples", *GATED]
)
def test_frozen_inputs(kernels: torch.device, use: str) -> None:
    """Every input that needs a gradient alone gets the one it has among all."""
    function, inputs = problem(kernels, ALONE[use])
    gradients = [torch.randn_like(output) for output in outputs(function, inputs)]

    def grads(needed: Inputs) -> list[Tensor]:
        return torch.autograd.grad(outputs(function, inputs), list(needed.values()), gradients)

    together = dict(zip(inputs, grads(inputs), strict=True))
    for name, tensor in inputs.items():
        for other in inputs.values():
            other.requires_grad_(other is tensor)
        torch.testing.assert_close(*grads({name: tensor}), together[name])


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("use", ["Add & Norm", "Add & Norm, dropout", "everything"])
def test_unused_output(kernels: torch.device, use: str, output: int) -> None:
    """Of one output alone the gradients are those with a zero gradient of the other."""
    function, inputs = problem(kernels, USES[use])
    leaves = list(inputs.values())
    outputs = function(*leaves)
    dy = torch.randn_like(outputs[output])
    zeros = [torch.zeros_like(dy), torch.zeros_like(dy)]
    zeros[output] = dy
    expected = torch.autograd.grad(function(*leaves), leaves, zeros)
    got = torch.autograd.grad(outputs[output], leaves, dy, allow_unused=True)
    for gradient, other in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if gradient is None else gradient, other)


@pytest.mark.parametrize(
    "use", ["everything", "AdaLN-Zero", "LayerScale", "zero-centred weight", *GATED]
)
def test_transforms(kernels: torch.device, use: str) -> None:
    """Forward mode, nested, and vmap over every input give what the unfused form gives."""
    options = {name: value for name, value in USES[use].items() if name != "dropout_p"}
    function, inputs = problem(kernels, options)
    case_inputs = tuple(value.detach() for value in inputs.values())
    tangents = tuple(map(torch.randn_like, case_inputs))

    def reverse(*values: Tensor) -> Any:
        leaves = [value.requires_grad_() for value in values]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(sum(map(torch.sum, outputs)), leaves)

    def total(*values: Tensor) -> Tensor:
        outputs = function(*values)
        return sum(map(torch.sum, outputs if isinstance(outputs, tuple) else (outputs,)))

    expected = reverse(*(value.clone() for value in case_inputs))
    forward = torch.func.jvp(total, case_inputs, tangents)[1]
    torch.testing.assert_close(
        forward, sum((a * b).sum() for a, b in zip(expected, tangents, strict=True))
    )
    by_transform = torch.func.grad(total, tuple(range(len(case_inputs))))(*case_inputs)
    torch.testing.assert_close(by_transform, expected)
    stacked = tuple(torch.stack([value, 2 * value]) for value in case_inputs)
    mapped = torch.func.vmap(total)(*stacked)
    alone = torch.stack([total(*case_inputs), total(*(2 * value for value in case_inputs))])
    torch.testing.assert_close(mapped, alone)


@pytest.mark.parametrize("use", [use for use in USES if "dropout_p" not in USES[use]])
def test_compiled_equals_eager(kernels: torch.device, use: str) -> None:
    """A compiled use has the bits of the eager one, in one graph; dropout: test_dropout.py."""
    torch._dynamo.reset()
    function, inputs = problem(kernels, USES[use])
    leaves = list(inputs.values())

    def both(run: Callable[..., Any]) -> list[Tensor]:
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        gradients = [torch.randn_like(output) for output in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]

    compiled = both(torch.compile(function, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, both(function), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "use", ["Add & Norm, dropout", "AdaLN-Zero", "everything, RMS and scalars"]
)
@pytest.mark.parametrize("implementation", ["kernels", "reference"])
@pytest.mark.usefixtures("kernels")  # the extension hands on what is asked of another backend
def test_opcheck(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, use: str, implementation: str
) -> None:
    """Schema, fake and autograd formula of both operators agree with what they do."""
    served = implementation == "kernels"
    monkeypatch.setattr(backends, "kernels", lambda device: "triton" if served else None)
    case = make((2, 3), 5, torch.float32, device, USES[use])
    terms = case.terms or Terms()
    flat = [
        None if term is None else term.reshape(-1, term.shape[-1])
        for term in (terms.gate, terms.scale, terms.shift)
    ]
    gate, scale, shift = flat
    seed = torch.tensor([7], device=device) if terms.dropout_p else None
    spec = Spec((5,), 1e-5, terms.rms, terms.dropout_p, torch.float32, torch.float32, None)
    tensors = (case.x, terms.residual, gate, case.weight, case.bias, scale, shift, seed)
    for tensor in tensors[:-1]:
        if tensor is not None:
            tensor.requires_grad_()
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    full = (*utils, "test_aot_dispatch_dynamic") if served else utils
    torch.library.opcheck(ops.layer_norm_fwd, (*tensors, *spec), test_utils=full)
    detached = [None if tensor is None else tensor.detach() for tensor in tensors]
    _, h, mean, rstd = ops.layer_norm_fwd(*detached, *spec)
    x, _, *parameters = detached
    mask = tuple(tensor is not None for tensor in tensors[:-1])
    backward = (case.dy, case.dy, x, h, None if terms.rms else mean, rstd, *parameters)
    torch.library.opcheck(
        ops.layer_norm_bwd,
        (*backward, *spec[:4], torch.float32, torch.float32, None, mask),
        test_utils=utils,
    )


# Only needed work ----------------------------------------------------------------------------


def saved_by(function: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """Return the result of a call and the tensors that it saved for backward, each once."""
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t
    ):
        result = function()
    return result, list(saved.values())


def test_frozen_gate_saves_neither_work_nor_memory(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the gradient of a gate reads x again."""
    launches = record_launches(monkeypatch)
    x, residual = (torch.randn(2, 3, 8, device=kernels, requires_grad=True) for _ in range(2))
    for trained in (True, False):
        gate = torch.randn(8, device=kernels, requires_grad=trained)
        (z, h), saved = saved_by(lambda gate=gate: add_layer_norm(x, residual, 8, gate=gate))
        assert any(t.data_ptr() == x.data_ptr() for t in saved) == trained
        assert not any(t.data_ptr() == residual.data_ptr() for t in saved)
        launches.clear()
        torch.autograd.backward([z, h], [torch.ones_like(z), torch.ones_like(h)])
        assert [launch.kernel for launch in launches] == [
            "layer_norm_bwd_kernel",
            *(["layer_norm_bwd_finalize_kernel"] if trained else []),
        ]
        assert (launches[0].arguments["x_ptr"] is not None) == trained
        assert (launches[0].arguments["dgate_ptr"] is not None) == trained


def test_unused_stream_costs_no_traffic(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No zeros are made for its gradient, and without a backward it is written only if returned."""
    launches = record_launches(monkeypatch)
    x, residual = (torch.randn(2, 3, 8, device=kernels, requires_grad=True) for _ in range(2))
    z, _ = add_layer_norm(x, residual, 8)
    z.sum().backward()
    assert launches[-1].arguments["dh_ptr"] is None
    assert launches[-1].arguments["dresidual_ptr"] is None
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    launches.clear()
    _, h = add_layer_norm(x, residual, 8)
    h.sum().backward()
    assert [launch.kernel for launch in launches] == ["layer_norm_fwd_kernel"]


@pytest.mark.parametrize("cols", [64, 1025, 34000])
def test_output_is_the_norm_of_the_stream(kernels: torch.device, cols: int) -> None:
    """What is normalised is the h that the caller gets, rounded as it is stored."""
    x, residual = torch.randn(2, 3, cols, device=kernels, dtype=torch.bfloat16)
    z, h = add_layer_norm(x, residual, cols)
    assert torch.equal(z, layer_norm(h, cols))


def test_start_of_a_stream_is_not_copied(kernels: torch.device) -> None:
    """Without a residual, and nothing done to x, the stream is x."""
    x = torch.randn(3, 8, device=kernels, requires_grad=True)
    z, h = add_layer_norm(x, None, 8)
    assert h is x
    z, h = add_layer_norm(x, None, 8, residual_dtype=torch.float64)
    assert h.dtype == torch.float64
    assert z.dtype == x.dtype


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, None])
def test_dtype_of_the_stream(
    kernels: torch.device, residual: torch.dtype | None, wanted: torch.dtype | None
) -> None:
    """It is the one asked for, else torch's promotion; gradients have the dtype of their inputs."""
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16, device=kernels, requires_grad=True)
    r = None
    if residual is not None:
        r = torch.randn(2, 3, 64, dtype=residual, device=kernels, requires_grad=True)
    z, h = add_layer_norm(x, r, 64, residual_dtype=wanted)
    promoted = x.dtype if residual is None else torch.promote_types(x.dtype, residual)
    assert h.dtype == (wanted or promoted)
    assert z.dtype == x.dtype
    exact = x.double() if r is None else x.double() + r.double()
    assert torch.equal(h, exact.float().to(h.dtype))
    torch.autograd.backward([z, h], [torch.randn_like(z), torch.randn_like(h)])
    assert x.grad.dtype == x.dtype
    assert r is None or r.grad.dtype == residual


def test_terms_of_a_chunk_are_not_copied(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one projection, cut into shift, scale and gate, are read where they lie."""
    launches = record_launches(monkeypatch)
    x, residual = torch.randn(2, 2, 3, 64, device=kernels)
    condition = torch.randn(2, 3 * 64, device=kernels)
    shift, scale, gate = condition[:, None].chunk(3, dim=-1)
    add_layer_norm(x, residual, 64, gate=gate, shift=shift, scale=scale)
    for name, term in (("gate", gate), ("scale", scale), ("shift", shift)):
        assert launches[0].arguments[f"{name}_ptr"].data_ptr() == term.data_ptr()
        assert launches[0].arguments[f"{name}_stride"] == 3 * 64
