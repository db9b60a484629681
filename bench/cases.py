"""What is measured: modes, shapes, their fewest bytes, fresh inputs and the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
DROPOUT = 0.1
SAMPLES = 8
"""Samples of an AdaLN batch; fewer where the rows do not divide by it."""

NORMS = {
    "layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "add": "Add & LayerNorm",
    "add_rms": "Add & RMSNorm",
    "dropout": "dropout, Add & LayerNorm",
    "layer_scale": "LayerScale, Add & LayerNorm",
    "adaln": "AdaLN",
    "adaln_zero": "AdaLN-Zero",
    "gated_rms": "RMSNorm, times the SiLU of a gate",
    "gated_rms_first": "RMSNorm of x times the SiLU of a gate",
    "channels": "LayerNorm, channels first",
    "frozen": "LayerNorm, frozen weights",
}
ADDED = ("add", "add_rms", "dropout", "layer_scale", "adaln_zero")
"""Norms of a residual stream: h is an output, too."""

GATED = ("layer_scale", "adaln_zero")
MODULATED = ("adaln", "adaln_zero")
SILU = ("gated_rms", "gated_rms_first")
PHASES = ("inference", "forward", "backward", "both")
_NO_NEWS = ("dropout/inference", "frozen/inference", "frozen/forward")
MODES = tuple(
    mode for norm in NORMS for phase in PHASES if (mode := f"{norm}/{phase}") not in _NO_NEWS
)
"""A mode is a norm and a phase: the forward that saves nothing, the one that autograd records, the
backward alone, or forward and backward."""

COMMON = ("layer_norm/forward", "layer_norm/backward")
"""The modes of the plots."""

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Case:
    """One cell of the grid, for every provider."""

    mode: str
    rows: int
    cols: int
    dtype: str = "bfloat16"
    parameters: str = "bfloat16"
    group: str = ""
    sweep: str = ""  # "cols" or "rows" where the case is a point of a sweep

    @property
    def norm(self) -> str:
        """The key of `NORMS`."""
        return self.mode.split("/")[0]

    @property
    def phase(self) -> str:
        """One of `PHASES`."""
        return self.mode.split("/")[1]

    @property
    def samples(self) -> int:
        """Samples of the batch, for the terms that differ between samples."""
        return SAMPLES if self.rows % SAMPLES == 0 else 1

    def __str__(self) -> str:
        """Return the case as a row of the table names it."""
        dtype = self.dtype if self.parameters == self.dtype else f"{self.dtype}/{self.parameters}"
        return f"{self.mode} {self.rows}x{self.cols} {dtype}"


def floor_bytes(case: Case) -> int:
    """Return the fewest bytes that the case can move: each input read and each output written once.

    Statistics are float32. Where h is an output, its gradient is an input of the backward; dropout
    and a gate make the gradients of x and of the residual differ, a gate also reads x again, and
    the mask of dropout costs nothing.
    """
    x = case.rows * case.cols * DTYPES[case.dtype].itemsize
    vector = case.cols * DTYPES[case.parameters].itemsize
    statistics = case.rows * (4 if "rms" in case.norm else 8)
    forward, backward = (4, 4) if case.norm in ADDED else (2, 3)
    forward, backward = (3, 5) if case.norm in SILU else (forward, backward)
    backward += (case.norm == "dropout") + 2 * (case.norm in GATED)
    read, trained = {"frozen": (2, 0)}.get(case.norm, (1, 1) if "rms" in case.norm else (2, 2))
    if case.norm in MODULATED:
        read, trained = 2 * case.samples, 2 * case.samples
    gates = (case.samples if case.norm in MODULATED else 1) * (case.norm in GATED)
    # A backward reads the weight or the scale, not the bias or the shift.
    vectors = (read + gates, (case.samples if case.norm in MODULATED else 1) + trained + 2 * gates)
    inference = forward * x + vectors[0] * vector
    backward = backward * x + vectors[1] * vector + statistics
    return {
        "inference": inference,
        "forward": inference + statistics,
        "backward": backward,
        "both": inference + statistics + backward,
    }[case.phase]


@dataclass
class Inputs:
    """Fresh arguments of one call, and the gradients of its outputs."""

    x: Tensor
    residual: Tensor | None
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    gate_input: Tensor | None = None
    grads: tuple[Tensor, ...] = ()  # of z, and of h where h is an output

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradient is wanted."""
        return [tensor for tensor in self.tensors if tensor is not None and tensor.requires_grad]

    @property
    def tensors(self) -> list[Tensor | None]:
        """What the equation is given, in the order of the fields."""
        return [value for name, value in vars(self).items() if name != "grads"]


def draw(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    """Return fresh random inputs; their mean is not 0, so that a wrong mean shows."""
    shape: tuple[int, ...] = (case.rows, case.cols)
    if case.norm in MODULATED:
        shape = (case.samples, case.rows // case.samples, case.cols)
    if case.norm == "channels":
        shape = (case.samples, case.cols, case.rows // case.samples)
    trains = case.phase != "inference"

    def tensor(*size: int, dtype: str, offset: float = 0.0, trains: bool = trains) -> Tensor:
        value = torch.randn(size, generator=generator, device=device) + offset
        return value.to(DTYPES[dtype]).requires_grad_(trains)

    def parameter() -> Tensor:
        value = tensor(case.cols, dtype=case.parameters, offset=1.0, trains=False)
        return torch.nn.Parameter(value, requires_grad=trains and case.norm != "frozen")

    x = tensor(*shape, dtype=case.dtype, offset=2.0)
    if case.norm == "dropout":
        # No element is near 0, so that h shows which ones were dropped.
        away = torch.full_like(x, 0.5).copysign(x.detach())  # of 0 as well
        x = (x.detach() + away).requires_grad_(trains)
    added, modulated = case.norm in ADDED, case.norm in MODULATED

    def term(wanted: bool = modulated) -> Tensor | None:
        size = (case.samples, 1, case.cols) if modulated else (case.cols,)
        return tensor(*size, dtype=case.parameters) if wanted else None

    return Inputs(
        x=x,
        residual=tensor(*shape, dtype=case.dtype) if added else None,
        gate=term(case.norm in GATED),
        weight=None if modulated else parameter(),
        bias=None if modulated or "rms" in case.norm else parameter(),
        scale=term(),
        shift=term(),
        gate_input=tensor(*shape, dtype=case.dtype) if case.norm in SILU else None,
        grads=tuple(tensor(*shape, dtype=case.dtype, trains=False) for _ in range(1 + added)),
    )


def compose(case: Case, inputs: Inputs, keep: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the outputs in plain torch, the unfused form where there is more than a norm.

    Args:
        case: The case.
        inputs: Its inputs.
        keep: The elements that dropout kept, to repeat one; by default it draws its own.
    """
    x = inputs.x
    if inputs.gate_input is not None:
        return (_gated(case, x, inputs.gate_input, inputs.weight),)
    if case.norm == "dropout":
        x = F.dropout(x, DROPOUT) if keep is None else x * keep / (1 - DROPOUT)
    if inputs.gate is not None:
        x = inputs.gate * x
    h = x if inputs.residual is None else inputs.residual + x
    if case.norm == "channels":
        z = F.layer_norm(h.movedim(1, -1), (case.cols,), inputs.weight, inputs.bias, EPS)
        return (z.movedim(-1, 1),)
    if "rms" in case.norm:
        z = F.rms_norm(h, (case.cols,), inputs.weight, EPS)
    else:
        z = F.layer_norm(h, (case.cols,), inputs.weight, inputs.bias, EPS)
    if inputs.scale is not None and inputs.shift is not None:
        z = z * (1 + inputs.scale) + inputs.shift
    return (z,) if inputs.residual is None else (z, h)


def _gated(case: Case, x: Tensor, gate_input: Tensor, weight: Tensor | None) -> Tensor:
    """Return a gated RMS norm as models write it, in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    h, silu = x.to(dtype), F.silu(gate_input.to(dtype))
    if case.norm == "gated_rms_first":
        h = h * silu
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    h = h if weight is None else h * weight
    return (h if case.norm == "gated_rms_first" else h * silu).to(x.dtype)


def wide(inputs: Inputs) -> Inputs:
    """Return the same values in float64."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        return (
            value if value is None else value.detach().double().requires_grad_(value.requires_grad)
        )

    return Inputs(**{name: convert(value) for name, value in vars(inputs).items()})


def wrong(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...], grads: list[Tensor]) -> str:
    """Compare outputs and gradients with float64; return what is wrong, or nothing.

    The norm of the difference over that of the truth may reach one epsilon of the dtype, which is
    several times what rounding inputs, outputs and one intermediate costs, and in the worst row
    four times that. A sum over rows may have been rounded at every step, as torch's is on the CPU.
    """
    exact = wide(inputs)
    keep = None
    if case.norm == "dropout" and exact.residual is not None:
        added = outputs[1].double() - exact.residual.detach()
        keep = added.abs() > exact.x.detach().abs() / (1 - DROPOUT) / 2
        share = float(keep.double().mean())
        if abs(share - (1 - DROPOUT)) > 5 * (DROPOUT * (1 - DROPOUT) / keep.numel()) ** 0.5:
            return f"dropout keeps {share:.3f}"
    truth = list(compose(case, exact, keep))
    if grads:
        truth += torch.autograd.grad(truth, exact.leaves, exact.grads)
    names = ["z", "h"][: len(outputs)] + [f"gradient {i}" for i in range(len(grads))]
    allowed = max(torch.finfo(DTYPES[case.dtype]).eps, 1e-5)
    for name, got, tracked in zip(names, [*outputs, *grads], truth, strict=True):
        true = tracked.detach()
        error = got.detach().double().reshape(true.shape) - true
        summed = exact.x.numel() / true.numel()
        limit = allowed * max(1.0, summed**0.5 / 4)
        worst = max(float(error.norm() / true.norm()), _worst_row(error, true) / 4)
        if not worst <= limit:  # NaN is wrong as well
            return f"{name} off by {worst:.1e}, {limit:.1e} allowed"
    return ""


def _worst_row(error: Tensor, true: Tensor) -> float:
    """Return the largest relative error of a row; a NaN anywhere is one here."""
    return float((error.norm(dim=-1) / true.norm(dim=-1)).max())


MEBI = 1 << 20
SWEEP_COLS = (
    *(64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144),
    *(7168, 8192, 10240, 12288, 14336, 16384, 20480, 32768, 65536, 131072),
)
# Rows and columns of the norms of published models.
MODELS = (
    *((32 * 512, 768), (32 * 512, 1024)),  # BERT
    *((8 * 1024, cols) for cols in (768, 1024, 1280, 1600)),  # GPT-2
    *((32 * 1024, cols) for cols in (768, 1024, 1280, 1600)),
    *((2048, 12288), (4096, 12288)),  # GPT-3
    *((256 * 197, cols) for cols in (768, 1024, 1280)),  # ViT
    *((rows, cols) for rows in (4096, 8192, 16384) for cols in (4096, 5120, 8192, 16384)),  # Llama
    (8192, 3584),  # Qwen
    *((256 * 256, 1152), (4096, 3072), (8308, 3072), (4608, 6144)),  # DiT, SD3, Flux
    *((128 * side * side, cols) for side, cols in ((56, 96), (28, 192), (14, 384), (7, 768))),
    *((65536, 128), (32768, 256)),  # Evoformer
    *((1500, 512), (1500, 1280)),  # Whisper
    *((rows, cols) for rows in (32, 256) for cols in (16384, 50176, 65536)),  # [C, H, W] of CNNs
    *((8192 * 32, 128), (2048, 131072)),  # QK norm, and a very long row
)
LATENCY_COLS = (768, 1024, 4096, 8192, 16384)
LATENCY_ROWS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
AWKWARD_COLS = (100, 257, 1000, 1023, 3584, 5003, 7680, 10001, 50257)
# What our CPU kernels are compared with torch's operators on, and what `backends` chooses by.
CPU_SHAPES = (
    *((64, 768), (512, 768), (2048, 768), (4096, 1024)),
    *((1024, 4096), (4096, 4096), (512, 8192), (65536, 64)),
)
GATED_SHAPES = ((4096, 1024), (512, 4096))
USES_SHAPES = ((4, 64), (64, 768), (512, 768), (1024, 4096))
# Eight images: the stages of ConvNeXt-T, the first of ConvNeXt-L, SAM's neck. Then one small image.
CHANNELS_SHAPES = (
    *((SAMPLES * side**2, cols) for side, cols in ((56, 96), (28, 192), (14, 384), (7, 768))),
    *((SAMPLES * 56**2, 192), (SAMPLES * 32**2, 256), (49, 64)),
)
COMPILED_SHAPES = ((6144, 1024), (512, 768))
QUICK_COLS = (256, 1024, 4096, 16384)
QUICK_ROWS = (1, 32, 512)


def sweep(cols: tuple[int, ...], itemsize: int, size: int) -> list[tuple[int, int]]:
    """Return shapes of `size` bytes of x."""
    return [(max(1, size // (n * itemsize)), n) for n in cols]


GRID = ("bandwidth", "large", "latency", "tall", "awkward", "models")
GROUPS = (*GRID, "quick", "cpu", "uses", "gated", "channels", "compiled", "host")
SWEEPS = {"bandwidth": "cols", "large": "cols", "latency": "rows"}


def shapes(group: str, itemsize: int, device: str) -> list[tuple[int, int]]:
    """Return the (rows, columns) of a group of `GROUPS`."""
    if group == "quick":
        # What two minutes allow: one point of the sweeps for every factor of four. On a CPU more
        # than its caches hold, less than what malloc asks the system for at every call.
        size = 64 * MEBI if device == "cuda" else 24 * MEBI
        return sweep(QUICK_COLS, itemsize, size) + [(rows, 1024) for rows in QUICK_ROWS]
    return {
        "bandwidth": sweep(SWEEP_COLS, itemsize, 64 * MEBI),
        "large": sweep(SWEEP_COLS, itemsize, 256 * MEBI),
        "latency": [(rows, cols) for cols in LATENCY_COLS for rows in LATENCY_ROWS],
        "tall": [(2**power, cols) for cols in (64, 96, 128, 256) for power in (16, 18, 20)],
        "awkward": sweep(AWKWARD_COLS, itemsize, 64 * MEBI),
        "models": list(dict.fromkeys(MODELS)),
        "cpu": list(CPU_SHAPES),
        "uses": list(USES_SHAPES),
        "gated": list(GATED_SHAPES),
        "channels": list(CHANNELS_SHAPES),
        "compiled": list(COMPILED_SHAPES),
        # Next to nothing to normalise: what is left of an eager call is the way there.
        "host": [(64, 1024) if device == "cuda" else (4, 64)],
    }[group]


def cases(
    groups: Sequence[str], modes: Sequence[str], dtypes: Sequence[tuple[str, str]], device: str
) -> Iterator[Case]:
    """Yield the grid; of the group `quick`, the less common modes at one shape only."""
    for group in groups:
        for dtype, parameters in dtypes:
            for index, (rows, cols) in enumerate(shapes(group, DTYPES[dtype].itemsize, device)):
                along = SWEEPS.get(group, "")
                if group == "quick":
                    along = "cols" if index < len(QUICK_COLS) else "rows"
                for mode in modes:
                    if group != "quick" or mode in COMMON or index == 1:
                        yield Case(mode, rows, cols, dtype, parameters, group, along)
