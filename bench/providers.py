"""Who is measured: torch, fusednorm with each of its backends, and the peers that are installed.

A provider binds a case and its inputs to a call without arguments that returns the outputs, z and
also h where there is a residual. All of them are differentiated by autograd.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusednorm
from fusednorm import backends

from .cases import DROPOUT, EPS, NORMS, SILU, Case, Inputs, compose

Outputs = tuple[Tensor, ...]
Forward = Callable[[], Outputs]
Norm = Callable[[Case, Inputs], Forward]
Function = Callable[[Inputs, Case], Any]


@dataclass(frozen=True)
class Provider:
    """Something that computes norms.

    Attributes:
        name: What the tables call it.
        version: Of its package.
        norms: What it can compute, by the keys of `cases.NORMS`.
        scope: What has to be entered around its calls.
        new_case: What to do before each case.
        serves: Whether it can compute a case of one of its norms.
        ran: What it ran for a case, where that is not known from its name.
    """

    name: str
    version: str
    norms: Mapping[str, Norm]
    scope: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    new_case: Callable[[], None] = lambda: None
    serves: Callable[[Case], bool] = lambda case: True
    ran: Callable[[Case, Inputs], str] = lambda case, inputs: ""


class MissingError(Exception):
    """A provider is not installed, or cannot run on the device; the text says why."""


def bind(norm: Function) -> Norm:
    """Turn a function of inputs and case into a norm; one output or several."""

    def bound(case: Case, inputs: Inputs) -> Forward:
        def forward() -> Outputs:
            outputs = norm(inputs, case)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return forward

    return bound


def _bound(**functions: Function) -> dict[str, Norm]:
    """Bind the functions of a provider; frozen weights need nothing else of a layer norm."""
    norms = {name: bind(function) for name, function in functions.items()}
    if "layer_norm" in norms:
        norms.setdefault("frozen", norms["layer_norm"])
    return norms


UNFUSED: dict[str, Norm] = dict.fromkeys(NORMS, bind(lambda i, c: compose(c, i)))


def _torch(device: torch.device) -> Provider:
    return Provider("torch", torch.__version__, UNFUSED, ran=_rms_norm_of_torch)


def _rms_norm_of_torch(case: Case, inputs: Inputs) -> str:
    """Return whose RMS norm torch runs: since 2.12 it may be QuACK's, by device, dtype and N."""
    if "rms" not in case.norm or not inputs.x.is_cuda:
        return ""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compose(case, inputs)
        torch.cuda.synchronize()
    return author(event.name for event in profile.events() or ())


def author(kernels: Iterable[str]) -> str:
    """Return whose RMS norm it was that launched kernels of these names."""
    names = " ".join(kernels).lower()
    # Its kernels are CuTe's, which ATen has none of.
    for word, who in (("quack", "QuACK"), ("cutlass", "QuACK"), ("at::native", "ATen")):
        if word in names:
            return f"ran {who}"
    return "ran unknown kernels"


def _formula(device: torch.device) -> Provider:
    """Norms over dimension 1 as the code of ConvNeXt and SAM has them; timm's permute, as torch."""
    return Provider("formula", torch.__version__, _bound(channels=_channels_formula))


def _channels_formula(inputs: Inputs, case: Case) -> Tensor:
    assert inputs.weight is not None
    assert inputs.bias is not None
    mean = inputs.x.mean(1, keepdim=True)
    variance = (inputs.x - mean).pow(2).mean(1, keepdim=True)
    x_hat = (inputs.x - mean) / torch.sqrt(variance + EPS)
    return inputs.weight[:, None] * x_hat + inputs.bias[:, None]


def _compile(device: torch.device) -> Provider:
    return _compiled(_torch(device), "torch.compile")


def _compiled(provider: Provider, name: str) -> Provider:
    """Return a provider that calls the norms of another one in compiled graphs."""
    # A graph that is differentiated many times must keep its buffers.
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False

    def compiled(norm: Norm) -> Norm:
        def bound(case: Case, inputs: Inputs) -> Forward:
            def equation(*tensors: Any) -> Outputs:
                return norm(case, Inputs(*tensors))()

            graph = torch.compile(equation, dynamic=False, fullgraph=True)
            return lambda: graph(*inputs.tensors)

        return bound

    norms = {name: compiled(norm) for name, norm in provider.norms.items()}
    return Provider(name, provider.version, norms, provider.scope, torch._dynamo.reset)


def _add(inputs: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """Add & Norm with the terms that a case has."""
    i = inputs
    return fusednorm.add_layer_norm(
        *(i.x, i.residual, (case.cols,), i.weight, i.bias, EPS),
        gate=i.gate,
        scale=i.scale,
        shift=i.shift,
        dropout_p=DROPOUT if case.norm == "dropout" else 0.0,
    )


def _gated(inputs: Inputs, case: Case) -> Tensor:
    """RMS norm with the SiLU of a gate."""
    assert inputs.gate_input is not None
    return fusednorm.gated_rms_norm(
        inputs.x,
        inputs.gate_input,
        case.cols,
        inputs.weight,
        eps=EPS,
        norm_before_gate=case.norm == "gated_rms",
    )


OURS = _bound(
    layer_norm=lambda i, c: fusednorm.layer_norm(i.x, (c.cols,), i.weight, i.bias, EPS),
    rms_norm=lambda i, c: fusednorm.rms_norm(i.x, (c.cols,), i.weight, EPS),
    add=lambda i, c: fusednorm.add_layer_norm(i.x, i.residual, (c.cols,), i.weight, i.bias, EPS),
    add_rms=lambda i, c: fusednorm.add_rms_norm(i.x, i.residual, (c.cols,), i.weight, EPS),
    channels=lambda i, c: fusednorm.layer_norm2d(i.x, i.weight, i.bias, EPS),
    adaln=lambda i, c: fusednorm.modulated_layer_norm(i.x, (c.cols,), i.shift, i.scale, eps=EPS),
    **dict.fromkeys(("dropout", "layer_scale", "adaln_zero"), _add),
    **dict.fromkeys(SILU, _gated),
)
NOT_OURS = {"cuda": ("layer_scale", "adaln", "adaln_zero", *SILU)}
"""What a backend refuses by name."""


def _automatic(device: torch.device) -> Provider:
    """What users get who ask for nothing."""
    return Provider("fusednorm", fusednorm.__version__, OURS)


def _fusednorm(backend: str, device: torch.device) -> Provider:
    scope = functools.partial(backends.use, backend)
    try:
        with scope():
            backends.choose(torch.empty(1, device=device))
    except ValueError as error:
        raise MissingError(str(error)) from None
    norms = {name: norm for name, norm in OURS.items() if name not in NOT_OURS.get(backend, ())}
    return Provider(f"fusednorm-{backend}", fusednorm.__version__, norms, scope)


def _own_compiled(device: torch.device) -> Provider:
    """Our operators in compiled graphs: on a CPU the automatic choice there is torch's."""
    backend = "cpu" if device.type == "cpu" else "triton"
    return _compiled(_fusednorm(backend, device), "fusednorm-compiled")


def _enabled(device: torch.device) -> Provider:
    """Torch's norms with our kernels below them."""
    scope = functools.partial(fusednorm.enable, device.type)
    try:
        with scope():
            pass
    except ValueError as error:
        raise MissingError(str(error)) from None
    return Provider("fusednorm-enabled", fusednorm.__version__, UNFUSED, scope)


def _package(name: str, module: str, device: torch.device, kind: str = "cuda") -> tuple[Any, str]:
    """Import a peer that runs on one kind of device; return its module and its version."""
    try:
        found = importlib.import_module(module), importlib.metadata.version(name)
    except (ImportError, importlib.metadata.PackageNotFoundError):
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise MissingError(f"{name} is not installed") from None
        raise MissingError(f"{module} does not import here") from None
    except Exception as error:  # peers probe their device while they are imported
        raise MissingError(f"{module} does not import: {type(error).__name__}: {error}") from None
    if device.type != kind:
        raise MissingError(f"it is measured on a {kind} device, not {device.type}")
    return found


def _liger(device: torch.device) -> Provider:
    liger, version = _package("liger-kernel", "liger_kernel.transformers.functional", device)
    # in_place writes the gradient of z over, which a second backward would read.
    keep = {"in_place": False}
    norms = _bound(
        layer_norm=lambda i, c: liger.liger_layer_norm(i.x, i.weight, i.bias, EPS),
        rms_norm=lambda i, c: liger.liger_rms_norm(i.x, i.weight, EPS, **keep),
        add_rms=lambda i, c: liger.liger_fused_add_rms_norm(i.x, i.residual, i.weight, EPS, **keep),
    )
    return Provider("liger", version, norms)


def _fla(device: torch.device) -> Provider:
    fla, version = _package("flash-linear-attention", "fla.modules.layernorm", device)
    return Provider("fla", version, _flash_norms(fla.layer_norm))


def _flash_attn(device: torch.device) -> Provider:
    flash, version = _package("flash-attn", "flash_attn.ops.triton.layer_norm", device)
    dropout = _flash_norms(flash.layer_norm_fn, dropout_p=DROPOUT)["add"]
    norms = _flash_norms(flash.layer_norm_fn) | {"dropout": dropout}
    return Provider("flash-attn", version, norms)


def _flash_norms(function: Callable[..., Any], **options: Any) -> dict[str, Norm]:
    """Return the norms of a function with flash-attn's signature, which fla has taken over."""

    def norm(inputs: Inputs, case: Case) -> Any:
        return function(
            *(inputs.x, inputs.weight, inputs.bias),
            residual=inputs.residual,
            eps=EPS,
            prenorm=inputs.residual is not None,
            is_rms_norm="rms" in case.norm,
            **options,
        )

    return _bound(layer_norm=norm, rms_norm=norm, add=norm, add_rms=norm)


def _apex(device: torch.device) -> Provider:
    apex, version = _package("apex", "apex.normalization.fused_layer_norm", device)
    norms = _bound(
        layer_norm=lambda i, c: apex.fused_layer_norm_affine(i.x, i.weight, i.bias, (c.cols,), EPS),
        rms_norm=lambda i, c: apex.fused_rms_norm_affine(i.x, i.weight, (c.cols,), EPS),
    )
    return Provider("apex", version, norms)


def _transformer_engine(device: torch.device) -> Provider:
    te, version = _package("transformer-engine", "transformer_engine.pytorch", device)

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
    quack, version = _package("quack-kernels", "quack.rmsnorm", device)

    class LayerNorm(torch.autograd.Function):
        """Its two functions: it has a forward and a backward, but no autograd of its own."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            z, rstd, mean = quack.layernorm_fwd(
                x, weight, bias, eps=EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(x, weight, rstd, mean)
            return z

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            x, weight, rstd, mean = ctx.saved_tensors
            return quack.layernorm_bwd(x, weight, grads[0], rstd, mean)

    apply: Callable[..., Tensor] = LayerNorm.apply
    norms = {
        "layer_norm": bind(lambda i, c: apply(i.x, i.weight, i.bias)),
        "rms_norm": bind(lambda i, c: quack.rmsnorm(i.x, i.weight, eps=EPS)),
        "add_rms": bind(
            lambda i, c: quack.rmsnorm(i.x, i.weight, residual=i.residual, eps=EPS, prenorm=True)
        ),
    }
    return Provider("quack", version, norms)


def _onnxruntime(device: torch.device) -> Provider:
    runtime, version = _package("onnxruntime", "onnxruntime", device, kind="cpu")
    onnx, _ = _package("onnx", "onnx", device, kind="cpu")  # its models are made with this
    # The operator, its domain, its inputs, and how many of its outputs come before h.
    operators = {
        "layer_norm": ("LayerNormalization", "", ("x", "weight", "bias"), 0),
        "add": ("SkipLayerNormalization", "com.microsoft", ("x", "residual", "weight", "bias"), 3),
        "add_rms": (
            *("SkipSimplifiedLayerNormalization", "com.microsoft"),
            *(("x", "residual", "weight"), 3),
        ),
    }

    def norm(case: Case, inputs: Inputs) -> Forward:
        operator, domain, names, before = operators[case.norm]
        outputs = ["z", *[""] * (before - 1), "h"] if before else ["z"]
        session = _session(runtime, onnx, operator, domain, names, outputs)
        given = {name: getattr(inputs, name).numpy() for name in names}
        wanted = [name for name in outputs if name]
        return lambda: tuple(map(torch.from_numpy, session.run(wanted, given)))

    def serves(case: Case) -> bool:
        return case.phase == "inference" and case.dtype == case.parameters == "float32"

    return Provider("onnxruntime", version, dict.fromkeys(operators, norm), serves=serves)


def _session(
    runtime: Any, onnx: Any, operator: str, domain: str, names: Sequence[str], outputs: list[str]
) -> Any:
    """Return a session for a model of one float32 operator, with as many threads as torch's."""
    node = onnx.helper.make_node(operator, names, outputs, domain=domain, epsilon=EPS)

    def value(name: str) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)

    graph = onnx.helper.make_graph(
        [node], operator, [*map(value, names)], [value(name) for name in outputs if name]
    )
    imports = [onnx.helper.make_opsetid(*pair) for pair in (("", 17), ("com.microsoft", 1))]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    made = model.SerializeToString()
    return runtime.InferenceSession(made, options, providers=["CPUExecutionProvider"])


MAKERS: dict[str, Callable[[torch.device], Provider]] = {
    "torch": _torch,
    "torch.compile": _compile,
    "formula": _formula,
    "fusednorm": _automatic,
    **{f"fusednorm-{name}": functools.partial(_fusednorm, name) for name in backends.NAMES},
    "fusednorm-compiled": _own_compiled,
    "fusednorm-enabled": _enabled,
    "onnxruntime": _onnxruntime,
    "liger": _liger,
    "quack": _quack,
    "fla": _fla,
    "flash-attn": _flash_attn,
    "apex": _apex,
    "transformer-engine": _transformer_engine,
}
ON_REQUEST = ("fusednorm-torch", "fusednorm-triton", "fusednorm-compiled")
"""Those that run only when asked for: torch's operators again, what `fusednorm` runs on a GPU and
an interpreter elsewhere, and what takes seconds to compile."""


def find(names: list[str] | None, device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """Return the providers that can run on `device`, and why the others cannot.

    Args:
        names: Those to look for; None for all that do not wait for a request.
        device: Where they are to run.
    """
    chosen = names or [name for name in MAKERS if name not in ON_REQUEST]
    tried = {name: _try(MAKERS[name], device) for name in chosen}
    found = [made for made in tried.values() if isinstance(made, Provider)]
    return found, {name: why for name, why in tried.items() if isinstance(why, str)}


def _try(make: Callable[[torch.device], Provider], device: torch.device) -> Provider | str:
    """Return a provider, or why there is none."""
    try:
        return make(device)
    except MissingError as error:
        return str(error)
