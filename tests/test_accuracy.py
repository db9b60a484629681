"""Promise 2: no further from the truth than torch in the same dtype, plus one rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, Case, assert_accurate, make_case, oracle, reference_layer_norm, run

import fusednorm
from fusednorm import backends

COLS = (1, 2, 3, 5, 17, 31, 33, 127, 769, 1000, 1023, 1025, 3000, 4097, 8193, 12288, 65536)
MEANS = (0.0, 1000.0, 40000.0)
AFFINE = ((True, True), (True, False), (False, True), (False, False))

# Enough elements of every tensor, dweight included, for the largest error to be a property of the
# arithmetic and not of the draw.
ELEMENTS = 1024


def _draws(cols: int) -> int:
    return max(1, min(8, ELEMENTS // cols))


def _rows(cols: int) -> int:
    """Several row blocks of a short row, more rows than programs of a long one."""
    return 37 if cols < 200 else 5


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLS)
def test_error_is_at_most_that_of_torch(
    kernels: torch.device, cols: int, dtype: torch.dtype, mean: float
) -> None:
    """Forward and every gradient, with weight and bias."""
    assert_accurate(
        lambda: make_case(_rows(cols), cols, dtype, kernels, mean=mean), draws=_draws(cols)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cols", [12289, 16384, 40000])
def test_error_of_rows_that_a_cluster_shares(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, cols: int, dtype: torch.dtype
) -> None:
    """Whole rows of any length are held where there are clusters, as interpreted ones may be."""
    from fusednorm.triton_kernels import launch

    if kernels.type == "cpu":
        with_clusters = replace(launch.architecture(kernels), cluster=8)
        monkeypatch.setattr(launch, "architecture", lambda device: with_clusters)
    assert_accurate(lambda: make_case(5, cols, dtype, kernels, mean=1000.0))


@pytest.mark.parametrize("affine", AFFINE[1:], ids=["weight", "bias", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [3, 769, 1024, 4097, 12288, 40000])
def test_error_without_weight_or_bias(
    kernels: torch.device, cols: int, dtype: torch.dtype, affine: tuple[bool, bool]
) -> None:
    """A parameter that is absent changes no other result's accuracy."""
    weight, bias = affine
    assert_accurate(
        lambda: make_case(_rows(cols), cols, dtype, kernels, weight=weight, bias=bias, mean=3.0),
        draws=_draws(cols),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [5, 769, 1024])
def test_reference_is_accurate(device: torch.device, cols: int, dtype: torch.dtype) -> None:
    """The plain-torch equation keeps the same budget, with means that cancel."""

    for mean in MEANS:
        assert_accurate(
            lambda mean=mean: make_case(37, cols, dtype, device, mean=mean),
            ours=reference_layer_norm,
            draws=_draws(cols),
        )


def test_many_rows(kernels: torch.device) -> None:
    """Dweight and dbias add up thousands of rows over many programs without losing digits."""
    assert_accurate(lambda: make_case(4099, 96, torch.float32, kernels), draws=4)


@pytest.mark.parametrize("cols", [769, 40000])
def test_large_mean_costs_no_digits(kernels: torch.device, cols: int) -> None:
    """x_hat is not offset by the rounding of the mean, which is up to half a spacing of float32."""
    mean = 40000.0
    x = (mean + torch.randn(3, cols, dtype=torch.float64)).to(kernels, torch.float32)
    spacing = torch.finfo(torch.float32).eps * 2.0**15
    y = fusednorm.layer_norm(x, cols)
    assert (y - F.layer_norm(x.double(), (cols,))).abs().max() < spacing / 32


@pytest.mark.parametrize("cols", [3, 769, 3000])
def test_large_mean_of_16_bits_costs_no_digits_of_a_wider_result(
    kernels: torch.device, cols: int
) -> None:
    """A z of float32, as under autocast, shows more of the mean's rounding than 16 bits do."""
    x = (200 + 10 * torch.randn(3, cols, dtype=torch.float64)).to(kernels, torch.bfloat16)
    terms = (None,) * 7
    shape_and_kind = (cols,), 1e-5, False, 0.0
    y, *_ = backends.launchers("triton").forward(
        x, *terms, *shape_and_kind, torch.float32, None, None, False, False
    )
    truth = F.layer_norm(x.double(), (cols,))
    assert (y - truth).abs().max() <= 4 * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("cols", [7, 41, 1000])  # a product with 1 / N would not be exact
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_equal_numbers_are_their_own_mean(
    kernels: torch.device, dtype: torch.dtype, cols: int
) -> None:
    """Such rows become 0 however large they are: nothing but eps bounds their rstd."""
    x = torch.tensor([[60000.0], [999.0], [-0.3], [0.0]]).to(kernels, dtype)
    assert not fusednorm.layer_norm(x.expand(-1, cols).contiguous(), cols).any()


def test_variance_of_the_hardest_rows(kernels: torch.device) -> None:
    """Rows on which E[x^2] - E[x]^2 gives NaN or nonsense."""
    rows = [
        torch.arange(40000.0, 40004.0),
        torch.arange(80000.0, 80004.0),
        2000 + torch.randn(4),
        1449.5 + 0.25 * torch.arange(4.0),
    ]
    x = torch.stack(rows).to(kernels)
    y = fusednorm.layer_norm(x, 4)
    truth = F.layer_norm(x.double(), (4,))
    assert (y - truth).abs().max() <= 2 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_columns_that_stand_out(kernels: torch.device) -> None:
    """A few columns far from all others are no measure of the mean, wherever they are."""
    cols = 40000
    x = torch.randn(3, cols)
    x.unflatten(1, (4, -1))[..., :16] += 1000
    y = fusednorm.layer_norm(x.to(kernels), cols).cpu()
    truth = F.layer_norm(x.double(), (cols,))
    assert (y - truth).abs().max() <= 2 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_oracle_is_the_derivative_of_torch(device: torch.device) -> None:
    """The oracle of all these tests agrees with torch's float64 autograd."""
    case = make_case((3, 5), 12, torch.float64, device)
    theirs = run(F.layer_norm, case)
    truth = oracle(case)
    for name, tensor in theirs.items():
        difference = abs(tensor.cpu().numpy() - truth[name]).max()
        assert difference < 1e-13, name


def test_budget_rejects_a_float16_mean(device: torch.device) -> None:
    """The budget is tight: rounding the mean to float16 is already too much."""

    def sloppy(
        x: torch.Tensor,
        shape: tuple[int, ...],
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True).half().float()
        var = (x - mean).square().mean(-1, keepdim=True)
        return (x - mean) * (var + eps).rsqrt() * weight + bias

    def draw() -> Case:
        return make_case(8, 256, torch.float32, device, mean=3.0)

    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate(draw, ours=sloppy)
