"""Count the bytes that each use of the equation moves and keeps: `python tests/traffic.py`.

Nothing runs: the launchers get meta tensors, and what counts is every tensor argument of every
launch, once. Unfused torch is counted in the same way, by the arguments and results of the
operators that it dispatches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import Case, Terms, fused, unfused
from spies import record_launches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusednorm
from fusednorm import backends
from fusednorm.triton_kernels import launch
from fusednorm.triton_kernels.config import Architecture

SAMPLES, ROWS, COLS = 8, 1024, 4096
CHANNELS = 2048
DTYPE = torch.bfloat16
PROCESSORS = 132
_CHOICE = backends.Choice("triton", "it is counted")
_H200 = Architecture(warp_size=32, processors=PROCESSORS, shared_bytes=232448, registers=65536)

USES: dict[str, dict[str, Any]] = {
    "LayerNorm": {},
    "LayerNorm, channels first": {"channels": True},
    "RMSNorm": {"rms": True},
    "zero-centred RMSNorm weight": {"rms": True, "scale": "vector", "weight": False},
    "post-norm: Add & Norm, z used": {"residual": True, "stream": False},
    "pre-norm: Add & Norm, z and h used": {"residual": True},
    "pre-norm with dropout": {"residual": True, "dropout": True},
    "pre-norm with RMSNorm": {"residual": True, "rms": True},
    "pre-norm with LayerScale": {"residual": True, "gate": "vector"},
    "pre-norm with stochastic depth": {"residual": True, "gate": "drawn"},
    "AdaLN": {"scale": "sampled", "shift": "sampled", "weight": False},
    "AdaLN-Zero": {
        **{"residual": True, "gate": "sampled", "scale": "sampled", "shift": "sampled"},
        "weight": False,
    },
    "AdaLN, scale and shift for each row": {"scale": "own", "shift": "own", "weight": False},
    "gated RMSNorm": {"rms": True, "gated": "last"},
    "RMSNorm of the gated": {"rms": True, "gated": "first"},
}


def _meta(*size: int) -> Tensor:
    return torch.empty(size, dtype=DTYPE, device="meta").requires_grad_()


def _case(use: dict[str, Any]) -> Case:
    """Make the inputs of a use on the meta device; all but what is drawn need a gradient."""
    if "channels" in use:
        x = _meta(SAMPLES, CHANNELS, ROWS)
        return Case(x, _meta(CHANNELS), _meta(CHANNELS), x.detach())
    sizes = {"vector": (COLS,), "sampled": (SAMPLES, 1, COLS), "drawn": (SAMPLES, 1, 1)}
    sizes["own"] = (SAMPLES, ROWS, COLS)
    x = _meta(SAMPLES, ROWS, COLS)
    terms = {
        name: _meta(*sizes[use[name]]).requires_grad_(use[name] != "drawn")
        for name in ("gate", "scale", "shift")
        if name in use
    }
    affine = use.get("weight", True)
    stream = "residual" in use or "gate" in use
    return Case(
        x,
        _meta(COLS) if affine else None,
        _meta(COLS) if affine and "rms" not in use else None,
        x.detach(),
        terms=Terms(
            rms="rms" in use,
            residual=_meta(*x.shape) if "residual" in use else None,
            dropout_p=0.1 if "dropout" in use else 0.0,
            dh=x.detach() if stream or ("scale" in use and "rms" in use) else None,
            gate_input=_meta(*x.shape) if "gated" in use else None,
            norm_before_gate=use.get("gated") != "first",
            **terms,
        )
        if use
        else None,
    )


def _unfused(*arguments: Any) -> Any:
    """Return the unfused form.

    Dropout is torch's, not a mask that is given. RMS norm, which torch takes apart on the meta
    device, counts as a layer norm without bias: the fused kernel of CUDA moves the same.
    """
    x, shape, weight, bias, eps, terms = arguments
    if terms is not None:
        # What F.dropout calls on a GPU; elsewhere it is four operators.
        x = torch.native_dropout(x, terms.dropout_p, True)[0] if terms.dropout_p > 0 else x
        terms = replace(terms, rms=False)
    return unfused(x, shape, weight, bias, eps, terms)


def _of_channels(x: Tensor, _shape: Any, *arguments: Any) -> Any:
    weight, bias, eps, _ = arguments
    return fusednorm.layer_norm2d(x, weight, bias, eps)


def _permuted(x: Tensor, _shape: Any, *arguments: Any) -> Any:
    """Return what models write; the copy that torch's kernel makes is made here, to be counted.

    That of dz in the backward is not counted.
    """
    weight, bias, eps, _ = arguments
    rows = x.movedim(1, -1).contiguous()
    return F.layer_norm(rows, weight.shape, weight, bias, eps).movedim(-1, 1)


class _CountBytes(TorchDispatchMode):
    """Adds up the bytes of what operators read and write; views move nothing."""

    moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "detach" not in str(func) and "empty" not in str(func):
            self.moved += sum(
                t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)
            )
        return result


class _CountLaunches:
    """Adds up the bytes of the tensors that kernels are launched with."""

    def __init__(self, launches: list[Any]) -> None:
        self._launches = launches

    @property
    def moved(self) -> int:
        """The bytes of all launches so far."""
        return sum(
            argument.nbytes
            for launched in self._launches
            for argument in launched.arguments.values()
            if isinstance(argument, Tensor)
        )


@contextlib.contextmanager
def _kernels() -> Iterator[_CountLaunches]:
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.multiple(
            backends, choose=lambda tensor, *, plain: _CHOICE, kernels=lambda device: "triton"
        ),
        mock.patch.multiple(
            launch,
            architecture=lambda device: _H200,
            device_guard=lambda device: contextlib.nullcontext(),
        ),
    ):
        yield _CountLaunches(record_launches(patch, execute=False))


def _count(function: Callable[..., Any], counter: Any, use: dict[str, Any]) -> list[float]:
    """Return the bytes an element that forward and backward move, and that are kept between."""
    case = _case(use)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    terms = case.terms or Terms()
    with counter as count, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = function(case.x, case.shape, case.weight, case.bias, case.eps, case.terms)
        forward = count.moved
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if use.get("stream", True) is False:
            outputs = outputs[:1]
        named = (case.x, case.weight, case.bias, terms.residual, terms.gate, terms.scale)
        leaves = [
            t for t in (*named, terms.shift, terms.gate_input) if t is not None and t.requires_grad
        ]
        torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])
        backward = count.moved - forward
    return [total / math.prod(case.x.shape) for total in (forward, backward, sum(kept.values()))]


def table() -> str:
    """Return the table of all uses, in Markdown."""
    lines = [
        "| use | forward | unfused | backward | unfused | kept | unfused |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, use in USES.items():
        pair = (_of_channels, _permuted) if "channels" in use else (fused, _unfused)
        ours, theirs = (
            _count(function, counter, use)
            for function, counter in zip(pair, (_kernels(), _CountBytes()), strict=True)
        )
        pairs = [f"{a:.1f} | {b:.1f}" for a, b in zip(ours, theirs, strict=True)]
        lines.append(f"| {name} | {' | '.join(pairs)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
