"""Promises 4 and 5: equal bits from run to run, and for a row whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, Terms, add_terms, fused, make_case, run
from spies import few_programs

import fusednorm

# One N for each form: several rows a program, one row in chunks, reload (16-bit), split, looped.
FORMS = [
    (64, torch.float32),
    (769, torch.bfloat16),
    (1024, torch.float16),
    (5000, torch.float32),
    (9000, torch.bfloat16),
    (34000, torch.float32),
    (5000, torch.float64),
]


def _rows_of(case: Case, rows: slice) -> Case:
    return Case(case.x[rows].clone(), case.weight, case.bias, case.dy[rows].clone())


@pytest.mark.parametrize(("cols", "dtype"), FORMS)
def test_two_runs_are_equal(kernels: torch.device, cols: int, dtype: torch.dtype) -> None:
    """All outputs and gradients, bit for bit."""
    case = make_case(7, cols, dtype, kernels)
    first = run(fusednorm.layer_norm, case)
    second = run(fusednorm.layer_norm, case)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(("cols", "dtype"), FORMS)
def test_row_alone_equals_row_in_batch(
    kernels: torch.device, cols: int, dtype: torch.dtype
) -> None:
    """Y and dx of a row have the same bits alone, in pairs and in a batch of seven."""
    case = make_case(7, cols, dtype, kernels, mean=2.0)
    batch = run(fusednorm.layer_norm, case)
    for rows in (slice(0, 1), slice(6, 7), slice(3, 5)):
        part = run(fusednorm.layer_norm, _rows_of(case, rows))
        for name in ("y", "dx"):
            assert torch.equal(part[name], batch[name][rows]), (name, rows)


def _with_every_term(
    batch: tuple[int, ...], cols: int, dtype: torch.dtype, device: torch.device
) -> Case:
    case = make_case(batch, cols, dtype, device, mean=2.0)
    kinds = {"gate": "sampled", "scale": "sampled", "shift": "scalar"}
    return add_terms(case, residual=True, dropout_p=0.3, **kinds)


def _sample(case: Case, samples: slice, rows: slice) -> Case:
    """Return some rows of some samples; those of the first sample keep their dropout masks."""
    terms = case.terms
    assert terms is not None
    parts = {
        name: value[samples, rows].clone()
        for name in ("residual", "keep", "dh")
        if (value := getattr(terms, name)) is not None
    }
    parts |= {name: getattr(terms, name)[samples].clone() for name in ("gate", "scale", "shift")}
    return Case(
        case.x[samples, rows].clone(),
        case.weight,
        case.bias,
        case.dy[samples, rows].clone(),
        terms=Terms(**parts, dropout_p=terms.dropout_p, seed=terms.seed),
    )


@pytest.mark.parametrize(("cols", "dtype"), FORMS)
def test_row_with_its_own_terms(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, cols: int, dtype: torch.dtype
) -> None:
    """Its bits are the same alone, among others, and where another row has its terms as well."""
    few_programs(monkeypatch)
    kinds = dict.fromkeys(("gate", "scale", "shift"), "sampled")
    case = add_terms(make_case((5, 2), cols, dtype, kernels, mean=2.0), residual=True, **kinds)
    twice = run(fused, case)
    for samples in (slice(0, 5), slice(4, 5)):
        once = run(fused, _sample(case, samples, slice(0, 1)))
        for name in ("y", "h", "dx", "dresidual"):
            assert torch.equal(once[name], twice[name][samples, :1]), (name, samples)


@pytest.mark.parametrize(("cols", "dtype"), FORMS)
def test_every_term(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, cols: int, dtype: torch.dtype
) -> None:
    """With every term two runs are equal, and so are a row alone, its sample and its batch."""
    few_programs(monkeypatch)
    case = _with_every_term((2, 3), cols, dtype, kernels)
    batch = run(fused, case)
    again = run(fused, case)
    for name, tensor in batch.items():
        assert torch.equal(tensor, again[name]), name
    for rows in (slice(0, 3), slice(0, 1)):
        part = run(fused, _sample(case, slice(0, 1), rows))
        for name in ("y", "h", "dx", "dresidual"):
            assert torch.equal(part[name], batch[name][:1, rows]), (name, rows)


@pytest.mark.parametrize(("cols", "dtype"), [(64, torch.float32), (96, torch.bfloat16)])
def test_row_alone_equals_row_among_thousands(
    kernels: torch.device, cols: int, dtype: torch.dtype
) -> None:
    """The same for 4096 rows, which more programs share and each with many row blocks."""
    case = make_case(4096, cols, dtype, kernels)
    batch = run(fusednorm.layer_norm, case)
    for row in (0, 1, 2047, 4095):
        part = run(fusednorm.layer_norm, _rows_of(case, slice(row, row + 1)))
        for name in ("y", "dx"):
            assert torch.equal(part[name], batch[name][row : row + 1]), (name, row)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: 4096 long rows")
@pytest.mark.parametrize(("cols", "dtype"), FORMS)
def test_row_alone_equals_row_among_thousands_of_any_length(
    kernels: torch.device, cols: int, dtype: torch.dtype
) -> None:
    """Every form at 4096 rows."""
    case = make_case(4096, cols, dtype, kernels)
    batch = run(fusednorm.layer_norm, case)
    part = run(fusednorm.layer_norm, _rows_of(case, slice(2047, 2048)))
    for name in ("y", "dx"):
        assert torch.equal(part[name], batch[name][2047:2048]), name
