"""The values at which a limit or a clamp changes sides; and short ways, which are to be taken."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import SERVING, plain_spec
from torch import Tensor

import fusednorm
from fusednorm import backends, functional, reference
from fusednorm.spec import Operands, drop_below
from fusednorm.triton_kernels.config import (
    Architecture,
    backward_config,
    finalize_tile,
    forward_config,
)
from fusednorm.validation import check_norm

ALMOST_ONE = math.nextafter(1.0, 0.0)
BELOW_ZERO = math.nextafter(0.0, -1.0)

# With this key the second word of the generator's first four is 2^32 - 1.
KEY = 454088803


@pytest.fixture(params=SERVING)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A limit is the same whatever computes."""
    with backends.use(request.param):
        yield request.param


# Rates of dropout


@pytest.mark.parametrize(
    ("p", "word"),
    [
        (0.0, 0),
        (2.0**-34, 0),
        (2.0**-32, 1),
        (0.5, 2**31),
        (1 - 2.0**-32, 2**32 - 1),
        (1 - 2.0**-33, 2**32 - 1),
        (ALMOST_ONE, 2**32 - 1),
    ],
)
def test_rate_as_a_word(p: float, word: int) -> None:
    """The rate is rounded to 32 bits, and 2^32, of which 32 bits would keep 0, is no word."""
    assert drop_below(p) == word


@pytest.mark.parametrize("p", [1 - 2.0**-33, ALMOST_ONE], ids=["1-2**-33", "1-2**-53"])
def test_rate_of_almost_one_drops_all(backend: str, device: torch.device, p: float) -> None:
    """One element in 2^32 is kept: of a few dozen none, in forward and backward."""
    x = torch.ones(3, 9, device=device, requires_grad=True)
    z, h = fusednorm.add_layer_norm(x, None, 9, dropout_p=p)
    assert not h.any()
    (dx,) = torch.autograd.grad((z, h), x, (torch.ones_like(z), torch.ones_like(h)))
    assert not dx.any()


def one_kept() -> Tensor:
    """Return which of the first row's elements a rate of almost one keeps with the key `KEY`."""
    kept = torch.zeros(1, 9, dtype=torch.bool)
    kept[0, 1] = True
    return kept


def test_the_word_that_is_kept(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded down to a word, the rate keeps the largest one."""
    x = torch.ones(1, 9, device=device)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([KEY], device=device))
    h = fusednorm.add_layer_norm(x, None, 9, dropout_p=ALMOST_ONE)[1]
    assert torch.equal((h != 0).cpu(), one_kept())


def test_the_word_that_is_kept_in_the_reference() -> None:
    """The equation in plain torch compares the same words with the same one."""
    x = torch.ones(1, 9)
    spec = plain_spec((9,), 1e-5, x.dtype)._replace(h_dtype=x.dtype, dropout_p=ALMOST_ONE)
    seed = torch.tensor([KEY])
    h = reference.layer_norm(Operands(x, seed=seed), spec)[1]
    assert torch.equal(h != 0, one_kept())


@pytest.mark.parametrize("p", [0.0, -0.0, 5e-324, ALMOST_ONE])
def test_rates_that_are_taken(backend: str, device: torch.device, p: float) -> None:
    """A rate may be all that is in [0, 1), of a function and of a module."""
    x = torch.ones(3, 9, device=device)
    kept = fusednorm.add_layer_norm(x, None, 9, dropout_p=p)[1]
    assert kept.all() == (p < 0.5)
    assert fusednorm.AddLayerNorm(9, dropout=p).dropout == p


@pytest.mark.parametrize("p", [1.0, BELOW_ZERO])
def test_rates_that_are_not_taken(backend: str, device: torch.device, p: float) -> None:
    """The next numbers outside are errors, of a function and of a module."""
    x = torch.ones(3, 9, device=device)
    with pytest.raises(ValueError, match=r"dropout_p in \[0, 1\)"):
        fusednorm.add_layer_norm(x, None, 9, dropout_p=p)
    with pytest.raises(ValueError, match=r"dropout in \[0, 1\)"):
        fusednorm.AddLayerNorm(9, dropout=p)


# Short ways: for a small tensor the checks in Python cost more than all else, and a call that needs
# none of them makes fewer calls.


def calls(function: Callable[[], object]) -> int:
    """Return how many functions written in Python `function` calls, once it has run before."""
    function()
    count = 0

    def notice(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(notice)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


X, W = torch.randn(3, 8), torch.ones(8)
FUNCTIONS: dict[str, Callable[[Any, Any], object]] = {
    "layer_norm": lambda shape, eps: fusednorm.layer_norm(X, shape, W, W, eps),
    "rms_norm": lambda shape, eps: fusednorm.rms_norm(X, shape, W, eps),
    "add_layer_norm": lambda shape, eps: fusednorm.add_layer_norm(X, X, shape, W, W, eps),
    "add_layer_norm_without_residual": lambda shape, eps: fusednorm.add_layer_norm(
        X, None, shape, W, W, eps
    ),
    "add_rms_norm": lambda shape, eps: fusednorm.add_rms_norm(X, X, shape, W, eps),
    "add_norm_in_evaluation": lambda shape, eps: fusednorm.add_rms_norm(
        X, X, shape, W, eps, dropout_p=0.5, training=False
    ),
}

needs_extension = pytest.mark.skipif(
    "cpu" not in backends.available(), reason="the compiled extension is not installed"
)


@needs_extension
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_short_way_to_the_kernels(function: Callable[[Any, Any], object]) -> None:
    """An int takes it as a tuple does; what has to be converted first does not."""
    with backends.use("cpu"):
        short = calls(lambda: function((8,), 1e-5))
        assert calls(lambda: function(8, 1e-5)) == short
        for long in ([8], 1e-5), (torch.Size([8]), 1e-5), ((8,), torch.tensor(1e-5)):
            assert 2 * short < calls(lambda long=long: function(*long)), long


@needs_extension
@pytest.mark.parametrize("residual", [False, True])
def test_short_way_to_the_kernels_of_a_gpu(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch, residual: bool
) -> None:
    """The checks in Python are for what the extension does not know to be valid."""
    checked = []

    def check(*arguments: Any) -> Any:
        checked.append(arguments)
        return check_norm(*arguments)

    monkeypatch.setattr(functional, "check_norm", check)
    x, weight = X.to(kernels).requires_grad_(), W.to(kernels)
    norm = fusednorm.add_layer_norm if residual else fusednorm.layer_norm
    leading = (x, x) if residual else (x,)
    norm(*leading, (8,), weight, weight)
    assert not checked
    norm(*leading, [8], weight, weight)
    assert len(checked) == 1


def test_short_way_to_torchs_layer_norm() -> None:
    """A layer norm of CPU tensors goes to torch at once, with or without parameters."""
    short = calls(lambda: fusednorm.layer_norm(X, (8,), W, W, 1e-5))
    assert calls(lambda: fusednorm.layer_norm(X, 8, W, W, 1e-5)) == short
    assert calls(lambda: fusednorm.layer_norm(X, (8,), W)) == short
    assert calls(lambda: fusednorm.layer_norm(X, (8,))) == short
    assert 2 * short < calls(lambda: fusednorm.layer_norm(X, [8], W, W, 1e-5))


def test_short_way_to_the_parameters() -> None:
    """Reading them as attributes of the module would be calls of its `__getattr__`."""
    norm = fusednorm.LayerNorm(8)
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    direct = calls(lambda: fusednorm.layer_norm(X, shape, weight, bias, eps))
    # Its forward, which asks whether it is scripted, and what reads the parameters.
    assert calls(lambda: norm.forward(X)) == direct + 3


# What a message shows


@pytest.mark.parametrize("count", [8, 9])
def test_names_in_a_message(count: int) -> None:
    """Up to eight are shown, and that there are more."""
    model = torch.nn.Sequential(*(torch.nn.LayerNorm(4) for _ in range(count)))
    shown = ", ".join(f"'{i}'" for i in range(8)) + (", '...'" if count > 8 else "")
    with pytest.raises(ValueError, match=rf"got none of \[{re.escape(shown)}\]"):
        fusednorm.replace_norms(model, include="nothing*")


# Launch policy


H100 = Architecture(warp_size=32, processors=132, shared_bytes=232448, registers=65536)


@pytest.mark.parametrize(("itemsize", "longest"), [(2, 32768), (4, 32768), (8, 8192)])
def test_longest_row_of_a_forward_that_reads_once(itemsize: int, longest: int) -> None:
    """One more column is walked in a loop."""
    assert not forward_config(longest, itemsize, H100).looped
    assert forward_config(longest + 1, itemsize, H100).looped


@pytest.mark.parametrize(
    ("itemsize", "gate_gradient", "resident", "reload"),
    [
        (2, False, 8192, 12288),
        (2, True, 4096, 6144),
        (4, False, 8192, 8192),
        (4, True, 4096, 4096),
        (8, False, 4096, 4096),
        (8, True, 2048, 2048),
    ],
)
def test_longest_row_of_each_form_of_the_backward(
    itemsize: int, gate_gradient: bool, resident: int, reload: int
) -> None:
    """Sixteen-bit rows are read twice before they are split; wider ones are split at once."""

    def form(cols: int) -> str:
        return backward_config(cols, itemsize, H100, 2 * itemsize, gate_gradient).form

    assert form(resident) == "resident"
    assert form(resident + 1) == ("reload" if reload > resident else "split")
    assert form(reload) == ("reload" if reload > resident else "resident")
    assert form(reload + 1) == "split"


def test_widest_row_of_narrow_partial_sums() -> None:
    """A block is a cache line up to 8192 columns, and a kilobyte of floats from there on."""
    assert finalize_tile(8192, H100).block_n == 32
    assert finalize_tile(8193, H100).block_n == 256


def test_most_registers() -> None:
    """A thread has at most 255, which is no multiple of eight, or what the others leave."""
    assert H100.max_registers(4) == 255
    assert H100.max_registers(8) == 255
    assert H100.max_registers(8, 2) == 128
    assert H100.max_registers(12) == 168
