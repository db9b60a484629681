"""Rows that are evenly spaced but for jumps are read where they lie, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import DEVICE, Case, fused, make_case, oracle, run, unfused
from spies import Launch, few_programs
from test_layouts import assert_close_to
from test_terms import USES, make
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fusednorm
from fusednorm import backends
from fusednorm.triton_kernels import launch

Layout = Callable[[Tensor], Tensor]


def _packed(values: Tensor) -> Tensor:
    """Return heads [B, T, H, N] of one of two projections that were made in one: one jump."""
    batch, length, heads, cols = values.shape
    both = values.new_full((batch, length, 2 * heads * cols + 3), math.nan)
    return both[..., 3 : heads * cols + 3].view(values.shape).copy_(values)


def _packed_by_head(values: Tensor) -> Tensor:
    """Return heads [B, H, T, N] of a projection [B, T, 2, H, N], as attention takes them: two."""
    batch, heads, length, cols = values.shape
    both = values.new_full((batch, length, 2, heads, cols), math.nan)
    return both[:, :, 1].transpose(1, 2).copy_(values)


def _permuted(*order: int) -> Layout:
    inverse = [order.index(dim) for dim in range(4)]
    return lambda values: values.permute(order).contiguous().permute(inverse)


def _overlapping(values: Tensor) -> Tensor:
    return values.flatten().as_strided(values.shape, (7, 5, 1, 1))


# Each takes contiguous values [.., .., .., N]; those that repeat elements take the first ones.
LAYOUTS: dict[str, Layout] = {
    "packed": _packed,
    "packed, by head": _packed_by_head,
    "batch inside": _permuted(1, 2, 0, 3),
    "reversed": _permuted(2, 1, 0, 3),
    "expanded": lambda values: values[:1].expand_as(values),
    "expanded inside": lambda values: values[:, :1, :1].expand_as(values),
    "overlapping": _overlapping,
}
SIZES = ((2, 3, 4), (1, 3, 4), (2, 1, 4), (2, 3, 1), (1, 1, 1))


def laid_out(case: Case, layout: Layout) -> Case:
    """Return a case whose rows all lie in a layout."""
    terms = case.terms
    if terms is not None:
        streams: dict[str, Any] = {}
        for name in ("residual", "dh", "gate_input"):
            if (rows := getattr(terms, name)) is not None:
                streams[name] = layout(rows)
        terms = replace(terms, **streams)
    return replace(case, x=layout(case.x), dy=layout(case.dy), terms=terms)


def assert_as_copied(case: Case, layout: Layout) -> None:
    """Assert that a call has the bits of one on contiguous copies."""
    there = laid_out(case, layout)
    results, copied = (run(fused, each) for each in (there, laid_out(there, Tensor.contiguous)))
    for name, result in results.items():
        assert torch.equal(result, copied[name]), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("use", ["LayerNorm", "RMSNorm", "Add & Norm, dropout"])
def test_right_and_as_copied(kernels: torch.device, use: str, layout: Layout) -> None:
    """Outputs and gradients have the errors of torch's, and the bits of a call on copies."""
    case = laid_out(make((2, 3, 4), 17, torch.float32, kernels, USES[use]), layout)
    assert_close_to(oracle(case), run(fused, case), run(unfused, case))
    assert_as_copied(make((2, 3, 4), 16, torch.bfloat16, kernels, USES[use]), layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("use", ["everything", "AdaLN-Zero", "gated LayerNorm in groups"])
def test_right_with_every_term(kernels: torch.device, use: str, layout: Layout) -> None:
    """With terms that differ from sample to sample, and two gradients through the rows."""
    case = laid_out(make((2, 3, 4), 16, torch.float32, kernels, USES[use]), layout)
    assert_close_to(oracle(case), run(fused, case), run(unfused, case))
    assert_as_copied(make((2, 3, 4), 34, torch.bfloat16, kernels, USES[use]), layout)


@pytest.mark.parametrize("layout", ["packed", "packed, by head", "reversed", "expanded"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dimensions_of_one(kernels: torch.device, size: tuple[int, ...], layout: str) -> None:
    """A dimension of one row is no place to jump at, whatever its stride."""
    assert_as_copied(make_case(size, 16, torch.float32, kernels), LAYOUTS[layout])


@pytest.mark.parametrize("cols", [1, 2050, 20000])
def test_one_column_and_long_rows(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, cols: int
) -> None:
    """In each form of the kernels."""
    few_programs(monkeypatch)
    assert_as_copied(make_case((2, 2, 2), cols, torch.bfloat16, kernels), _packed_by_head)


def test_no_rows(kernels: torch.device) -> None:
    """Nothing to read, nothing to jump over."""
    x = torch.empty(3, 2, 5, 16, device=kernels).transpose(0, 1)[:, :0].requires_grad_()
    y = fusednorm.rms_norm(x, 16)
    (dx,) = torch.autograd.grad(y, x, y)
    assert y.shape == dx.shape == (2, 0, 5, 16)


def test_rows_have_the_bits_that_they_have_alone(kernels: torch.device) -> None:
    """Whatever lies between them."""
    case = laid_out(make_case((2, 3, 4), 96, torch.bfloat16, kernels), _packed_by_head)
    together = run(fusednorm.layer_norm, case)
    for i in range(2):
        alone = run(
            fusednorm.layer_norm, replace(case, x=case.x[i, 1:2, 3:], dy=case.dy[i, 1:2, 3:])
        )
        for name in ("y", "dx"):
            assert torch.equal(alone[name], together[name][i, 1:2, 3:])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("layout", ["packed", "packed, by head"])
def test_first_and_second_derivatives(kernels: torch.device, layout: str) -> None:
    """Through the view of the packed projection, to every order that training takes."""
    case = make_case((1, 2, 2), 3, torch.float64, kernels)
    assert case.weight is not None

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return fusednorm.rms_norm(LAYOUTS[layout](x * 2), 3, weight)

    leaves = (case.x.requires_grad_(), case.weight.requires_grad_())
    assert gradcheck(norm, leaves)
    assert gradgradcheck(norm, leaves)


def allocated(function: Callable[[], Any]) -> int:
    """Return the bytes that torch allocates in a call."""
    function()  # what is made once
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


def _both_ways(norm: Callable[..., Tensor], case: Case) -> Callable[[], Any]:
    assert case.weight is not None
    x, weight = (t.detach().requires_grad_() for t in (case.x, case.weight))
    shape = case.shape

    def call() -> Any:
        return torch.autograd.grad(norm(x, shape, weight), (x, weight), case.dy)

    return call


def test_a_row_number_is_divided_exactly() -> None:
    """By every number of rows, up to the most rows that a kernel takes with jumps."""
    for every in (2, 3, 7, 641, 2**16 + 1, 2**30 - 1, 2**31 - 1):
        factor, by = launch.jump_arguments([every, -5]) or (0, 0)
        assert factor % 2 == by % 2 == 1
        assert 2**31 <= factor < 2**63
        for multiple in (1, 2, 3, 1000, launch.MOST_ROWS // every - 1, launch.MOST_ROWS // every):
            for row in (every * multiple - 1, every * multiple):
                if row < launch.MOST_ROWS:
                    assert 2 * row * factor >> 64 == row // every


def test_more_rows_than_can_be_numbered_are_copied() -> None:
    """And jumps in more than two places."""
    rows = torch.empty(2, 2**30, 8, device="meta")[..., :4]
    jumping = rows[:, 1:]
    assert launch.as_rows(jumping, (4,)).tensor is jumping
    more = torch.empty(2, 2**30 + 2, 8, device="meta")[:, 1:, :4]
    assert launch.as_rows(more, (4,)).tensor is not more
    four = torch.empty(2, 2, 2, 2, 4, device="meta").permute(3, 2, 1, 0, 4)
    assert launch.as_rows(four, (4,)).tensor is not four


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what is allocated on the CPU")
@pytest.mark.skipif("cpu" not in backends.available(), reason="needs the compiled extension")
@pytest.mark.parametrize("norm", ["ours", "torch's, enabled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_copied_on_the_cpu(layout: str, norm: str) -> None:
    """A call allocates as much as one on contiguous rows; where rows jump in three places, more."""
    case = make_case((2, 3, 4), 64, torch.float32, DEVICE)
    there = laid_out(case, LAYOUTS[layout])
    five = torch.randn(2, 3, 2, 2, 64).permute(3, 2, 1, 0, 4)
    with backends.use("cpu"):
        if norm == "ours":
            ways = [_both_ways(fusednorm.rms_norm, each) for each in (case, there)]
            copies = _both_ways(fusednorm.rms_norm, replace(case, x=five, dy=five))
        else:
            fusednorm.enable()
            ways = [_both_ways(torch.nn.functional.rms_norm, each) for each in (case, there)]
            copies = _both_ways(torch.nn.functional.rms_norm, replace(case, x=five, dy=five))
        try:
            plain, jumping = map(allocated, ways)
            assert plain == jumping
            assert allocated(copies) == plain + 3 * case.x.nbytes  # x twice, and dy
        finally:
            fusednorm.disable()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_is_given_what_the_caller_has(launches: list[Launch], layout: str) -> None:
    """The kernels get the addresses of x, residual, dz and dh, not those of copies."""
    case = laid_out(make((2, 3, 4), 32, torch.float32, DEVICE, USES["Add & Norm"]), LAYOUTS[layout])
    run(fused, case)
    assert case.terms is not None
    forward, backward = launches[0].arguments, launches[1].arguments
    rows = {"x": case.x, "residual": case.terms.residual}
    gradients = {"dz": case.dy, "dh": case.terms.dh}
    for arguments, tensors in ((forward, rows), (backward, gradients)):
        for name, tensor in tensors.items():
            assert tensor is not None
            assert arguments[f"{name}_ptr"].data_ptr() == tensor.data_ptr()
            assert arguments[f"{name}_jumps"] is not None
    assert backward["h_jumps"] is None
