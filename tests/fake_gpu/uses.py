"""Uses of the equation as calls of the launchers: a selection, or with CODEGEN_FULL all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SAMPLES = 4
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Resident with and without whole vectors; reloaded; split; and split where the forward loops.
COLS = (1024, 1023, 17, 9216, 20000, 40000)


@dataclass(frozen=True)
class Use:
    """One use: what terms there are, of which kind, dtype and size."""

    name: str
    cols: int = 1024
    rows: int = 64
    dtype: str = "bfloat16"
    parameters: str = ""  # dtype of weight and bias, if not that of x
    stream: str = ""  # dtype of h; "" for none, unless there is a residual or a gate
    rms: bool = False
    affine: bool = True
    residual: bool = False
    dropout_p: float = 0.0
    gate: str = ""  # vector, sampled, number or, for each row, own, as the other terms
    modulation: str = ""
    x_hat: str = ""
    padding: int = 0  # elements between the rows of x and of dz
    jumps: int = 0  # in how many places the rows of x, h and dz jump, up to 2
    trained: bool = True  # whether the parameters and terms need a gradient
    no_dz: bool = False  # only h is differentiated
    gated: str = ""  # first or last: a gated norm, in four groups

    def __str__(self) -> str:
        """Return a name for a report."""
        return f"{self.name}-{self.rows}x{self.cols}-{self.dtype}"


_LAYER_NORM = Use("layer_norm")
_ADD_NORM = Use("add_norm", residual=True)
_EVERYTHING = Use(
    "everything",
    residual=True,
    dropout_p=0.1,
    gate="sampled",
    modulation="sampled",
    stream="float32",
)
_OWN_TERMS = Use("own_terms", residual=True, gate="own", modulation="own")
TERMS = (
    _LAYER_NORM,
    _ADD_NORM,
    Use("rms_norm", rms=True),
    Use("no_affine", affine=False),
    Use("float32_parameters", parameters="float32"),
    Use("frozen", trained=False),
    Use("padded", padding=3),
    Use("packed_heads", cols=128, jumps=1),
    Use("packed_by_head", cols=128, jumps=2, rms=True),
    Use("rounded_x_hat", rms=True, x_hat="bfloat16"),
    Use("dropout", residual=True, dropout_p=0.1),
    Use("float32_stream", residual=True, stream="float32"),
    Use("only_h", residual=True, dropout_p=0.1, no_dz=True),
    Use("layer_scale", residual=True, gate="vector"),
    Use("drop_path", residual=True, gate="number"),
    Use("ada_ln", affine=False, modulation="sampled"),
    Use("ada_ln_of_numbers", modulation="number"),
    _OWN_TERMS,
    Use("gated", gated="last"),
    Use("gated_rms_first", gated="first", rms=True, padding=8),
    _EVERYTHING,
)
_SELECTION = (
    *TERMS[:10],
    Use("ada_ln", affine=False, modulation="sampled"),
    Use("drop_path", residual=True, gate="number", dtype="float16"),
    _OWN_TERMS,
    Use("only_h", residual=True, dropout_p=0.1, no_dz=True),
    Use("gated", gated="last"),
    Use("gated_rms_first", gated="first", rms=True, cols=40000, dtype="float32"),
    replace(_LAYER_NORM, cols=17, dtype="float64"),
    replace(_ADD_NORM, cols=9216),
    replace(_LAYER_NORM, cols=40000, dtype="float32"),
    _EVERYTHING,
)


def uses() -> list[Use]:
    """Return the uses to try."""
    if not os.environ.get("CODEGEN_FULL"):
        return list(_SELECTION)
    every = [replace(use, dtype=dtype) for use in TERMS for dtype in DTYPES]
    long = [
        replace(use, cols=cols, dtype=dtype)
        for use in (_LAYER_NORM, _ADD_NORM, _EVERYTHING)
        for cols in COLS[1:]
        for dtype in DTYPES
    ]
    return every + long


@dataclass(frozen=True)
class Call:
    """The arguments of a launcher, and the names of the tensors that they begin with."""

    arguments: tuple[Any, ...]
    tensors: dict[str, Tensor | None]


def forward(use: Use, *, save_stats: bool = True) -> Call:
    """Return a call of the forward launcher."""
    dtype, rows = DTYPES[use.dtype], _rows(use)
    tensors = {"x": rows, "residual": torch.ones(use.rows, use.cols, dtype=dtype)}
    if not use.residual:
        tensors["residual"] = None
    tensors |= _parameters(use)
    options = (use.cols,), 1e-5, use.rms, use.dropout_p, dtype, _stream(use), DTYPES.get(use.x_hat)
    return Call((*tensors.values(), *options, save_stats, True), tensors)


def backward(use: Use) -> Call:
    """Return a call of the backward launcher."""
    dtype, stream = DTYPES[use.dtype], _stream(use)
    statistics = torch.float64 if torch.float64 in (dtype, stream) else torch.float32
    rstd = torch.ones(use.rows, dtype=statistics)
    rows = _rows(replace(use, padding=0))
    h = rows if stream is None else torch.ones(rows.shape, dtype=stream)
    tensors: dict[str, Tensor | None] = {
        "dz": None if use.no_dz else _rows(use),
        "dh": None if stream is None else torch.ones_like(h),
        "x": rows.clone(),
        "h": h,
        "mean": None if use.rms else rstd.clone(),
        "rstd": rstd,
        **_parameters(use),
    }
    scaled = use.dropout_p > 0 or use.gate != ""
    mask = (True, scaled, *(use.trained,) * 5)
    dtypes = dtype, stream or dtype
    options = (use.cols,), use.dropout_p, *dtypes, DTYPES.get(use.x_hat), mask
    return Call((*tensors.values(), *options), tensors)


GROUPS = 4


def gated_forward(use: Use, *, save_stats: bool = True) -> Call:
    """Return a call of the forward launcher of a gated norm."""
    tensors: dict[str, Tensor | None] = {"x": _rows(use), "gate_input": _rows(use), **_affine(use)}
    options = (use.cols,), use.cols // GROUPS, 1e-5, use.rms, use.gated == "last"
    dtypes = DTYPES[use.dtype], DTYPES.get(use.x_hat)
    return Call((*tensors.values(), *options, *dtypes, save_stats), tensors)


def gated_backward(use: Use) -> Call:
    """Return a call of its backward launcher."""
    rstd = torch.ones(
        use.rows * GROUPS, dtype=torch.promote_types(DTYPES[use.dtype], torch.float32)
    )
    tensors: dict[str, Tensor | None] = {
        "dz": _rows(use),
        "x": _rows(use),
        "gate_input": _rows(use),
        "mean": None if use.rms else rstd.clone(),
        "rstd": rstd,
        **_affine(use),
    }
    mask = (True, True, use.trained, use.trained)
    options = (use.cols,), use.cols // GROUPS, use.gated == "last", DTYPES.get(use.x_hat), mask
    return Call((*tensors.values(), *options), tensors)


def channels_forward(use: Use) -> Call:
    """Return a call of the forward of norms over dimension 1."""
    tensors = {"x": _planes(use), **_affine(use)}
    return Call((*tensors.values(), 1e-6, use.rms, DTYPES[use.dtype], True), tensors)


def channels_backward(use: Use) -> Call:
    """Return a call of the backward of norms over dimension 1."""
    statistics = torch.float64 if use.dtype == "float64" else torch.float32
    rstd = torch.ones(use.rows, dtype=statistics)
    mean = None if use.rms else rstd.clone()
    tensors = {"dz": _planes(use), "x": _planes(use), "mean": mean, "rstd": rstd, **_affine(use)}
    return Call((*tensors.values(), (True, use.trained, use.trained)), tensors)


def _planes(use: Use) -> Tensor:
    whole = torch.ones(SAMPLES, use.cols + use.padding, use.rows // SAMPLES)
    return whole.to(DTYPES[use.dtype])[:, : use.cols]


def _rows(use: Use) -> Tensor:
    if use.jumps:
        # Heads of a packed projection: [tokens, heads, N], or [2, heads, tokens of each, N].
        packed = torch.ones(2, use.rows // 8, 3, 4, use.cols, dtype=DTYPES[use.dtype])[:, :, 1]
        return packed.flatten(0, 1) if use.jumps == 1 else packed.transpose(1, 2)
    padded = torch.ones(use.rows, use.cols + use.padding, dtype=DTYPES[use.dtype])
    return padded[:, : use.cols]


def _stream(use: Use) -> torch.dtype | None:
    return DTYPES[use.stream or use.dtype] if use.residual or use.gate or use.stream else None


def _parameters(use: Use) -> dict[str, Tensor | None]:
    """Return gate, weight, bias, scale, shift and seed."""
    dtype = DTYPES[use.dtype]

    def term(kind: str) -> Tensor | None:
        sizes = {"vector": (1, use.cols), "sampled": (SAMPLES, use.cols), "number": (SAMPLES, 1)}
        sizes["own"] = (use.rows, use.cols)
        return torch.ones(sizes[kind], dtype=dtype) if kind else None

    return {
        "gate": term(use.gate),
        **_affine(use),
        "scale": term(use.modulation),
        "shift": term(use.modulation),
        "seed": torch.ones(1, dtype=torch.int64) if use.dropout_p else None,
    }


def _affine(use: Use) -> dict[str, Tensor | None]:
    """Return weight and bias."""

    def parameter(wanted: bool) -> Tensor | None:
        return torch.ones(use.cols, dtype=DTYPES[use.parameters or use.dtype]) if wanted else None

    return {"weight": parameter(use.affine), "bias": parameter(use.affine and not use.rms)}
