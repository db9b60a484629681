"""Who is measured: torch, fusednorm with each of its backends, and the peers that are installed.

A provider binds a case and its inputs to a call without arguments that returns the outputs, z and
also h where there is a residual. All of them are differentiated by autograd.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusednorm
from fusednorm import backends

from .cases import DROPOUT, EPS, Case, Inputs, compose

Outputs = tuple[Tensor, ...]
Forward = Callable[[], Outputs]
Norm = Callable[[Case, Inputs], Forward]


@dataclass(frozen=True)
class Provider:
    """Something that computes norms.

    Attributes:
        name: What the tables call it.
        version: Of its package.
        norms: What it can compute, by the keys of `cases.NORMS`.
        scope: What has to be entered around its calls.
        new_case: What to do before each case.
    """

    name: str
    version: str
    norms: dict[str, Norm]
    scope: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    new_case: Callable[[], None] = lambda: None


class MissingError(Exception):
    """A provider is not installed, or cannot run on the device; the text says why."""


def bind(norm: Callable[[Inputs, Case], Any]) -> Norm:
    """Turn a function of inputs and case into a norm; one output or several."""

    def bound(case: Case, inputs: Inputs) -> Forward:
        def forward() -> Outputs:
            outputs = norm(inputs, case)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return forward

    return bound


def _torch(device: torch.device) -> Provider:
    def norm(case: Case, inputs: Inputs) -> Forward:
        return lambda: compose(case, inputs)

    norms = dict.fromkeys(ALL, norm)
    return Provider("torch", torch.__version__, norms)


def _compiled(device: torch.device, mode: str | None = None) -> Provider:
    # A graph that is differentiated many times must keep its buffers.
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False

    def norm(case: Case, inputs: Inputs) -> Forward:
        def equation(*tensors: Any) -> Outputs:
            return compose(case, Inputs(*tensors, grads=()))

        compiled = torch.compile(equation, dynamic=False, fullgraph=True, mode=mode)
        tensors = [value for name, value in vars(inputs).items() if name != "grads"]
        return lambda: compiled(*tensors)

    name = "torch.compile" if mode is None else f"torch.compile-{mode}"
    norms = dict.fromkeys(ALL, norm)
    return Provider(name, torch.__version__, norms, new_case=torch._dynamo.reset)


def _fusednorm(backend: str) -> Callable[[torch.device], Provider]:
    def make(device: torch.device) -> Provider:
        probe = torch.empty(1, device=device)
        try:
            chosen = {backends.explain(probe, plain=plain).backend for plain in (True, False)}
            with backends.use(backend):
                backends.explain(probe)
        except ValueError as error:
            raise MissingError(str(error)) from None
        # Users get the automatic choice: a request costs every call a look at it.
        scope = contextlib.nullcontext if chosen == {backend} else lambda: backends.use(backend)
        norms = {name: norm for name, norm in OURS.items() if (backend, name) not in NOT_OURS}
        return Provider(f"fusednorm-{backend}", fusednorm.__version__, norms, scope)

    return make


BACKENDS = ("triton", "cuda", "cpu", "torch")
"""Ours; one that this version or this machine does not have is named as missing."""

OURS: dict[str, Norm] = {
    "layer_norm": bind(lambda i, c: fusednorm.layer_norm(i.x, c.cols, i.weight, i.bias, EPS)),
    "rms_norm": bind(lambda i, c: fusednorm.rms_norm(i.x, c.cols, i.weight, EPS)),
    "add": bind(
        lambda i, c: fusednorm.add_layer_norm(i.x, i.residual, c.cols, i.weight, i.bias, EPS)
    ),
    "add_rms": bind(lambda i, c: fusednorm.add_rms_norm(i.x, i.residual, c.cols, i.weight, EPS)),
    "dropout": bind(
        lambda i, c: fusednorm.add_layer_norm(
            i.x, i.residual, c.cols, i.weight, i.bias, EPS, dropout_p=DROPOUT
        )
    ),
    "adaln": bind(
        lambda i, c: fusednorm.modulated_layer_norm(i.x, c.cols, i.shift, i.scale, eps=EPS)
    ),
}
OURS["frozen"] = OURS["layer_norm"]
NOT_OURS = (("cuda", "adaln"),)
"""What a backend refuses by name."""
ALL = tuple(OURS)


def _package(name: str, module: str) -> tuple[Any, str]:
    """Import a peer; return its module and its version."""
    try:
        return importlib.import_module(module), importlib.metadata.version(name)
    except (ImportError, importlib.metadata.PackageNotFoundError):
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise MissingError(f"{name} is not installed") from None
        raise MissingError(f"{module} does not import here") from None
    except Exception as error:  # peers probe their device while they are imported
        raise MissingError(f"{module} does not import: {type(error).__name__}: {error}") from None


def _on_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise MissingError(f"its kernels need a cuda device, not {device.type}")


def _liger(device: torch.device) -> Provider:
    liger, version = _package("liger-kernel", "liger_kernel.transformers.functional")
    _on_cuda(device)
    # in_place writes the gradient of z over, which a second backward would read.
    norms = {
        "layer_norm": bind(lambda i, c: liger.liger_layer_norm(i.x, i.weight, i.bias, EPS)),
        "rms_norm": bind(lambda i, c: liger.liger_rms_norm(i.x, i.weight, EPS, in_place=False)),
        "add_rms": bind(
            lambda i, c: liger.liger_fused_add_rms_norm(
                i.x, i.residual, i.weight, EPS, in_place=False
            )
        ),
    }
    return Provider("liger", version, norms | {"frozen": norms["layer_norm"]})


def _fla(device: torch.device) -> Provider:
    fla, version = _package("flash-linear-attention", "fla.modules.layernorm")
    _on_cuda(device)

    def norm(rms: bool, prenorm: bool) -> Norm:
        return bind(
            lambda i, c: fla.layer_norm(
                *(i.x, i.weight, i.bias),
                residual=i.residual,
                eps=EPS,
                prenorm=prenorm,
                is_rms_norm=rms,
            )
        )

    norms = {
        "layer_norm": norm(False, False),
        "rms_norm": norm(True, False),
        "add": norm(False, True),
        "add_rms": norm(True, True),
    }
    return Provider("fla", version, norms | {"frozen": norms["layer_norm"]})


def _flash_attn(device: torch.device) -> Provider:
    flash, version = _package("flash-attn", "flash_attn.ops.triton.layer_norm")
    _on_cuda(device)

    def norm(rms: bool, prenorm: bool, dropout: float = 0.0) -> Norm:
        return bind(
            lambda i, c: flash.layer_norm_fn(
                *(i.x, i.weight, i.bias),
                residual=i.residual,
                eps=EPS,
                dropout_p=dropout,
                prenorm=prenorm,
                is_rms_norm=rms,
            )
        )

    norms = {
        "layer_norm": norm(False, False),
        "rms_norm": norm(True, False),
        "add": norm(False, True),
        "add_rms": norm(True, True),
        "dropout": norm(False, True, DROPOUT),
    }
    return Provider("flash-attn", version, norms | {"frozen": norms["layer_norm"]})


def _apex(device: torch.device) -> Provider:
    apex, version = _package("apex", "apex.normalization.fused_layer_norm")
    _on_cuda(device)
    norms = {
        "layer_norm": bind(
            lambda i, c: apex.fused_layer_norm_affine(i.x, i.weight, i.bias, (c.cols,), EPS)
        ),
        "rms_norm": bind(lambda i, c: apex.fused_rms_norm_affine(i.x, i.weight, (c.cols,), EPS)),
    }
    return Provider("apex", version, norms | {"frozen": norms["layer_norm"]})


def _transformer_engine(device: torch.device) -> Provider:
    te, version = _package("transformer-engine", "transformer_engine.pytorch")
    _on_cuda(device)

    def norm(module: Any) -> Norm:
        def bound(case: Case, inputs: Inputs) -> Forward:
            made = module(case.cols, eps=EPS, device=device)
            made.weight = inputs.weight
            if inputs.bias is not None:
                made.bias = inputs.bias
            return lambda: (made(inputs.x),)

        return bound

    norms = {"layer_norm": norm(te.LayerNorm), "rms_norm": norm(te.RMSNorm)}
    return Provider("transformer-engine", version, norms | {"frozen": norms["layer_norm"]})


def _quack(device: torch.device) -> Provider:
    quack, version = _package("quack-kernels", "quack.rmsnorm")
    _on_cuda(device)

    class LayerNorm(torch.autograd.Function):
        """Its two functions: it has a forward and a backward, but no autograd of its own."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            z, rstd, mean = quack.layernorm_fwd(
                x, weight, bias, eps=EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(x, weight, rstd, mean)
            return z

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            x, weight, rstd, mean = ctx.saved_tensors
            dx, dweight, dbias = quack.layernorm_bwd(x, weight, grads[0], rstd, mean)
            return dx, dweight, dbias

    norms = {
        "layer_norm": bind(lambda i, c: LayerNorm.apply(i.x, i.weight, i.bias)),
        "rms_norm": bind(lambda i, c: quack.rmsnorm(i.x, i.weight, eps=EPS)),
        "add_rms": bind(
            lambda i, c: quack.rmsnorm(i.x, i.weight, residual=i.residual, eps=EPS, prenorm=True)
        ),
    }
    return Provider("quack", version, norms)


MAKERS: dict[str, Callable[[torch.device], Provider]] = {
    "torch": _torch,
    "torch.compile": _compiled,
    "torch.compile-max-autotune": lambda device: _compiled(device, "max-autotune-no-cudagraphs"),
    **{f"fusednorm-{backend}": _fusednorm(backend) for backend in BACKENDS},
    "liger": _liger,
    "quack": _quack,
    "fla": _fla,
    "flash-attn": _flash_attn,
    "apex": _apex,
    "transformer-engine": _transformer_engine,
}
OPTIONAL = ("torch.compile-max-autotune",)
"""Providers that run only when asked for: their compilation takes minutes."""


def find(names: list[str] | None, device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """Return the providers that can run on `device`, and why the others cannot.

    Args:
        names: Those to look for; None for all that are not optional, where `fusednorm-torch` is
            left out if a backend of its own runs on the device.
        device: Where they are to run.
    """
    chosen = [name for name in MAKERS if name not in OPTIONAL] if names is None else names
    tried = {name: _try(MAKERS[name], device) for name in chosen}
    found = [made for made in tried.values() if isinstance(made, Provider)]
    missing = {name: why for name, why in tried.items() if isinstance(why, str)}
    ours = [p.name for p in found if p.name.startswith("fusednorm-")]
    if names is None and len(ours) > 1:
        found = [provider for provider in found if provider.name != "fusednorm-torch"]
    return found, missing


def _try(make: Callable[[torch.device], Provider], device: torch.device) -> Provider | str:
    """Return a provider, or why there is none."""
    try:
        return make(device)
    except MissingError as error:
        return str(error)
