"""Compile the rungs of the launch policy for devices that are not here; read the machine code.

The launchers run on meta tensors with a stand-in for Triton's driver, so every signature,
alignment hint and compile-time constant is the one a launch would use; nothing is launched.

    python -m bench codegen --full --arch sm_90 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench import model, table
from fusednorm.spec import compute_dtype
from fusednorm.triton_kernels import backward, channels, finalize, forward, gated, launch
from fusednorm.triton_kernels.config import (
    VECTOR_BYTES,
    Architecture,
    BackwardConfig,
    backward_config,
    channels_backward_config,
    finalize_tile,
    forward_config,
    vector_elements,
)

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Architecture(32, 108, 166912, 65536)),
    "sm_90": (
        GPUTarget("cuda", 90, 32),
        Architecture(32, 132, 232448, 65536, launch.LARGEST_CLUSTER),
    ),
    "sm_100": (
        GPUTarget("cuda", 100, 32),
        Architecture(32, 148, 232448, 65536, launch.LARGEST_CLUSTER),
    ),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Architecture(64, 304, 65536, 0)),
    "gfx950": (GPUTarget("hip", "gfx950", 64), Architecture(64, 256, 163840, 0)),
}

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}

KINDS = ("forward", "backward", "backward_dx", "finalize")

# Powers of two, their multiples by 3 and 5, and widths that fill no tile or align to no vector.
COMMON = (
    *(1, 3, 17, 64, 96, 128, 256, 257, 384, 512, 768, 769, 1000, 1024, 1025, 1280, 1536, 2048),
    *(2560, 3000, 3072, 4096, 5120, 6144, 7168, 7680, 8192, 8193, 10240, 12288, 14336, 16384),
    *(20480, 24576, 32768, 40000, 65536, 131072, 262144),
)

FEW = (1024, 4096, 8192, 12288, 32768, 131072)

# The policy changes with every N while rows are short and with some multiple of 256 later; just
# under a multiple are the rows that end in a partial vector or a partial tile.
ALL = (
    *range(1, 2049),
    *(cols + step for cols in range(2304, 131073, 256) for step in (-255, -8, -1, 0)),
)

ELEMENTS = 2**25
"""About how many every launch is of: more than a cache holds."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a launcher; `planted` names a fault of `PLANTED` that the report has to show."""

    arch: str
    kind: str
    dtype: str
    parameters: str
    cols: int
    rows: int = 0  # of x, or images; 0 for those of about ELEMENTS
    padding: int = 0
    jumps: int = 0  # in how many places the rows that are read jump
    planted: str = ""
    terms: str = ""
    positions: int = 0  # of [rows, cols, positions], where that is what the launcher gets


SAMPLES = 5
"""Samples of launches whose terms differ between them; `sampled` terms have one row each."""


def width(job: Job) -> int:
    """Return the elements of a row of x, or of an image."""
    return job.cols * TERMS[job.terms].groups * max(1, job.positions)


def sized(job: Job) -> Job:
    """Return the job with an odd number of rows if it names none."""
    return dataclasses.replace(job, rows=job.rows or ELEMENTS // width(job) | 1)


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of the equation that a launch has; gate, scale and shift need a gradient."""

    affine: bool = True
    rms: bool = False
    residual: bool = False
    dropout: bool = False
    gate: str = ""  # "vector", "sampled", "scalar" or, for each row, "own"
    modulation: str = ""
    stream: str = ""  # dtype of h, if it is not that of x
    gated: str = ""  # "first" or "last": the gate of a gated norm
    groups: int = 1  # of a gated norm, as wide as the job says


TERMS = {
    "": Terms(),
    "bare": Terms(affine=False),
    "rms": Terms(rms=True),
    "add": Terms(residual=True),
    "add rms": Terms(residual=True, rms=True),
    "fp32 stream": Terms(residual=True, stream="float32"),
    "dropout": Terms(residual=True, dropout=True),
    "layer scale": Terms(residual=True, gate="vector"),
    "stochastic depth": Terms(residual=True, gate="scalar"),
    "adaptive": Terms(affine=False, modulation="sampled"),
    "everything": Terms(residual=True, dropout=True, gate="sampled", modulation="sampled"),
    "own terms": Terms(residual=True, gate="own", modulation="own"),
    "own modulation": Terms(affine=False, modulation="own"),
    "gated": Terms(rms=True, gated="last"),
    "gated first": Terms(gated="first", groups=3),
}
"""What users call a norm, by its terms."""


IN_ALL_FORMS = ("everything", "gated", "gated first")
"""The terms that are compiled at every width and for every target."""

PERSISTENT = ("layer_norm_bwd_kernel", "gated_norm_bwd_kernel", "layer_norm2d_bwd_kernel")
READ: dict[str, tuple[str, ...]] = {
    "layer_norm_fwd_kernel": ("x", "residual"),
    "layer_norm_bwd_sums_kernel": ("dz", "h"),
    "layer_norm_bwd_kernel": ("dz", "dh", "h", "x"),
    "layer_norm_bwd_finalize_kernel": (),
    "gated_norm_fwd_kernel": ("x", "gate_input"),
    "gated_norm_bwd_sums_kernel": ("dz", "x", "gate_input"),
    "gated_norm_bwd_kernel": ("dz", "x", "gate_input"),
    "layer_norm2d_fwd_kernel": ("x",),
    "layer_norm2d_bwd_kernel": ("dz", "x"),
}
WRITTEN: dict[str, tuple[str, ...]] = {
    "layer_norm_fwd_kernel": ("z", "h"),
    "layer_norm_bwd_sums_kernel": (),
    "layer_norm_bwd_kernel": ("dx", "dresidual"),
    "layer_norm_bwd_finalize_kernel": (),
    "gated_norm_fwd_kernel": ("z",),
    "gated_norm_bwd_sums_kernel": (),
    "gated_norm_bwd_kernel": ("dx", "dgate_input"),
    "layer_norm2d_fwd_kernel": ("z",),
    "layer_norm2d_bwd_kernel": ("dx",),
}
"""The [M, N] or [B, N, S] arguments of each kernel."""

PLANTED: dict[str, dict[str, int]] = {
    "one warp": {"num_warps": 1},  # too few registers for a row of 4096
    "one stage": {"NUM_STAGES": 1},
    "odd stride": {},
}


def rungs(
    arch: str, kind: str, itemsize: int, candidates: Iterable[int], exact: bool = False
) -> list[int]:
    """Return one N, the last of the candidates, for every distinct kernel they lead to.

    Args:
        arch: A key of `TARGETS`.
        kind: One of `KINDS`.
        itemsize: Bytes of one element of x.
        candidates: The N to choose from.
        exact: Whether a tile counts three times: for rows that fill it, for rows of whole vectors
            that do not, and for rows that leave no vector aligned.
    """
    distinct: dict[object, int] = {}
    for cols in candidates:
        vector = vector_elements(cols, itemsize)
        chosen: Any
        if kind == "finalize":
            tile = finalize_tile(cols, TARGETS[arch][1])
            distinct[tile, exact and vector > 1] = cols
            continue
        if kind == "forward":
            chosen = forward_config(cols, itemsize, TARGETS[arch][1])
        else:
            chosen = backward_config(cols, itemsize, TARGETS[arch][1], 2 * itemsize)
        if not exact:
            distinct[chosen] = cols
        elif cols % (chosen.tile.block_n * chosen.tile.chunks) == 0:
            distinct[chosen, "full"] = cols
        elif vector * itemsize == VECTOR_BYTES or vector == 1:
            distinct[chosen, vector] = cols
    return list(distinct.values())


def jobs(full: bool) -> Iterator[Job]:
    """Yield every rung for every target, or a selection that the test suite has time for."""
    for arch in TARGETS:
        for dtype in ("bfloat16", "float32", "float64"):
            itemsize = DTYPES[dtype].itemsize
            for kind in ("forward", "backward", "finalize"):
                if full:
                    chosen = rungs(arch, kind, itemsize, ALL, exact=arch.startswith("sm_"))
                else:
                    common = arch == "sm_90" and dtype != "float64"
                    chosen = rungs(arch, kind, itemsize, COMMON if common else FEW)
                for cols in chosen:
                    yield Job(arch, kind, dtype, dtype, cols)
            if full or arch == "sm_90":
                for cols in rungs(arch, "backward", itemsize, COMMON if full else FEW):
                    yield Job(arch, "backward_dx", dtype, dtype, cols)
        if full or arch == "sm_90":
            for cols in (1024, 4096, 8192):
                for kind in ("forward", "backward"):
                    yield Job(arch, kind, "bfloat16", "float32", cols)
                    yield Job(arch, kind, "float16", "float16", cols)
    for arch in TARGETS:
        thorough = full or arch == "sm_90"
        for terms in TERMS if thorough else IN_ALL_FORMS:
            widths: tuple[int, ...] = FEW
            if not thorough:  # those that are split, which clusters begin later
                widths = (4096, 8192) if TARGETS[arch][1].cluster == 1 else (4096, 8192, 131072)
            elif not full and terms not in IN_ALL_FORMS:
                # Rows read in pieces, in each of their kernels, without a weight.
                widths = (4096, 131072) if terms == "bare" else (4096,)
            elif TERMS[terms].gated:
                widths = (128, *FEW)  # a head, or a group
            for cols in widths:
                for kind in ("forward", "backward"):
                    yield Job(arch, kind, "bfloat16", "bfloat16", cols, terms=terms)
                    if full or terms in IN_ALL_FORMS:
                        yield Job(arch, kind, "float32", "float32", cols, terms=terms)
    yield from _channels_first(full)
    yield from _variations()


# ConvNeXt's, segmentation's and the most that a program holds; whole vectors of positions and none.
CHANNELS = (3, 96, 192, 256, 384, 768, 1024, 1536, 2048)
POSITIONS = (1024, 49)


def _channels_first(full: bool) -> Iterator[Job]:
    """Yield norms over dimension 1."""
    for arch in TARGETS:
        for dtype in ("bfloat16", "float32", "float64"):
            thorough = full or (arch == "sm_90" and dtype != "float64")
            for cols in CHANNELS if full else (3, 96, 768, 2048) if thorough else (768,):
                for kind in (
                    ("forward", "backward", "backward_dx") if full else ("forward", "backward")
                ):
                    for positions in POSITIONS if thorough else POSITIONS[:1]:
                        yield Job(arch, kind, dtype, dtype, cols, positions=positions)


def _variations() -> Iterator[Job]:
    """Yield launches that differ in one thing, and launches with a planted fault."""
    base = Job("sm_90", "backward", "bfloat16", "bfloat16", 4096)
    for kind in ("forward", "backward", "finalize"):
        for rows in (1, 3, 10000):
            yield dataclasses.replace(base, kind=kind, rows=rows)
    for kind in ("forward", "backward"):
        job = dataclasses.replace(base, kind=kind)
        yield dataclasses.replace(job, padding=8)
        for jumps in (1, 2):
            yield dataclasses.replace(job, cols=128, jumps=jumps)
        yield dataclasses.replace(job, padding=1, planted="odd stride")
    yield dataclasses.replace(base, planted="one stage")
    for arch in ("sm_90", "gfx942"):
        yield dataclasses.replace(base, arch=arch, planted="one warp")


class _Driver:
    """As much of a Triton driver as compiling asks for; each target is a device of its own."""

    def __init__(self, arch: str) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._arch][0]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._arch)

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclasses.dataclass
class Compiled:
    """A kernel that a launcher would have launched, and what the policy said about it."""

    kernel: Any
    grid: int  # programs that are launched
    counted: int  # programs that the grid counts on per processor; 0 where it counts on none
    reads: int  # bytes read of a column of one row, once each
    writes: int


def compile_job(job: Job) -> list[Compiled]:
    """Call a launcher as on a device of the job's target; return what Triton compiled."""
    compiled: list[Compiled] = []
    chosen: list[BackwardConfig] = []

    def note(choose: Callable[..., BackwardConfig]) -> Callable[..., BackwardConfig]:
        def noted(*args: Any, **kwargs: Any) -> BackwardConfig:
            chosen.append(choose(*args, **kwargs))
            return chosen[-1]

        return noted

    def compile_only(kernel: Any, *args: object, warmup: bool, **kwargs: object) -> None:
        if ("finalize" in kernel.fn.__name__) == (job.kind == "finalize"):
            kwargs.update(PLANTED.get(job.planted, {}))
            named = dict(zip(kernel.arg_names, args, strict=False))
            name = kernel.fn.__name__
            counted = chosen[-1].programs_per_processor if name in PERSISTENT else 0
            built = type(kernel).run(kernel, *args, warmup=True, **kwargs)
            moved = (_bytes(named, tensors) for tensors in (READ[name], WRITTEN[name]))
            compiled.append(Compiled(built, math.prod(kwargs["grid"]), counted, *moved))

    triton.runtime.driver.set_active(_Driver(job.arch))
    for module in (forward, backward, finalize, gated, channels):
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel"):
                kernel.run = functools.partial(compile_only, kernel)

    with (
        mock.patch.multiple(
            launch,
            architecture=lambda device: TARGETS[job.arch][1],
            device_guard=lambda device: contextlib.nullcontext(),
        ),
        mock.patch.object(backward, "backward_config", note(backward_config)),
        mock.patch.object(gated, "backward_config", note(backward_config)),
        mock.patch.object(channels, "channels_backward_config", note(channels_backward_config)),
    ):
        (_call_launcher if job.positions == 0 else _call_launcher_of_channels)(job)
    return compiled


def _bytes(arguments: dict[str, Any], tensors: tuple[str, ...]) -> int:
    """Return the bytes of one element of each of the tensors that are there."""
    given = (arguments[f"{name}_ptr"] for name in tensors)
    return sum(tensor.element_size() for tensor in given if tensor is not None)


def _call_launcher(job: Job) -> None:
    terms, shape, rows = TERMS[job.terms], (job.cols,), job.rows
    dtype = DTYPES[job.dtype]

    def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def term(kind: str) -> torch.Tensor | None:
        sizes = {"vector": (1, job.cols), "sampled": (SAMPLES, job.cols), "scalar": (SAMPLES, 1)}
        sizes["own"] = (rows, job.cols)
        return meta(*sizes[kind]) if kind else None

    if terms.gated:
        _call_gated_launcher(job, terms, meta)
        return
    if terms.gate or terms.modulation:
        rows -= rows % SAMPLES
    x = meta(rows, job.cols + job.padding)[:, : job.cols]
    if job.jumps:  # heads of a packed projection, after their tokens or before them
        x = meta(2, rows, 3, 5, job.cols)[:, :, 0]
        x, rows = (x if job.jumps == 1 else x.transpose(1, 2)), 10 * rows
    weight = meta(*shape, dtype=DTYPES[job.parameters]) if terms.affine else None
    bias = None if terms.rms else weight
    gate, scale, shift = term(terms.gate), term(terms.modulation), term(terms.modulation)
    seed = meta(1, dtype=torch.int64) if terms.dropout else None
    dropout_p = 0.1 if terms.dropout else 0.0
    residual = x if terms.residual else None
    stream = DTYPES[terms.stream or job.dtype] if terms.residual else None
    if job.kind == "forward":
        forward.layer_norm_fwd(
            *(x, residual, gate, weight, bias, scale, shift, seed),
            *(shape, 1e-5, terms.rms, dropout_p, dtype, stream, None, True, True),
        )
        return
    stats = meta(rows, dtype=compute_dtype(dtype))
    mean = None if terms.rms else stats
    h = x if stream is None else x.to(stream)
    dh = None if stream is None else h
    everything = job.kind != "backward_dx"
    apart = terms.residual and (dropout_p > 0 or gate is not None or stream != dtype)
    wanted = (True, apart, *(everything,) * 5)
    backward.layer_norm_bwd(
        *(x, dh, x, h, mean, stats, gate, weight, bias, scale, shift, seed),
        *(shape, dropout_p, dtype, dtype if stream is None else stream, None, wanted),
    )


def _call_gated_launcher(job: Job, terms: Terms, meta: Callable[..., torch.Tensor]) -> None:
    cols = job.cols * terms.groups
    x, gate_input = meta(job.rows, 2 * cols + job.padding)[:, : 2 * cols].chunk(2, -1)
    weight = meta(cols, dtype=DTYPES[job.parameters])
    bias = None if terms.rms else weight
    before = terms.gated == "last"
    if job.kind == "forward":
        gated.gated_norm_fwd(
            *(x, gate_input, weight, bias, (cols,), job.cols, 1e-5, terms.rms, before),
            *(x.dtype, None, True),
        )
        return
    stats = meta(job.rows * terms.groups, dtype=compute_dtype(x.dtype))
    gated.gated_norm_bwd(
        *(x, x, gate_input, None if terms.rms else stats, stats, weight, bias),
        *((cols,), job.cols, before, None, (True,) * 4),
    )


def _call_launcher_of_channels(job: Job) -> None:
    dtype, compute = DTYPES[job.dtype], compute_dtype(DTYPES[job.dtype])
    x = torch.empty(job.rows, job.cols, job.positions, dtype=dtype, device="meta")
    weight = torch.empty(job.cols, dtype=DTYPES[job.parameters], device="meta")
    if job.kind == "forward":
        channels.layer_norm2d_fwd(x, weight, weight, 1e-6, False, dtype, True)
        return
    statistics = torch.empty(job.rows * job.positions, dtype=compute, device="meta")
    everything = job.kind != "backward_dx"
    wanted = True, everything, everything
    channels.layer_norm2d_bwd(x, x, statistics, statistics, weight, weight, wanted)


_GLOBAL = re.compile(r"(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+) ")
_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\.global(?:\.[\w:]+)* .*?\], *\[[^]]*\], *(\w+)")


def ptx_accesses(ptx: str, arguments: list[str]) -> dict[str, dict[str, dict[int, int]]]:
    """Count the global accesses in PTX by kernel argument, kind (ld, st, async) and bytes.

    An access belongs to the pointer arguments from which its address is computed.
    """
    origins: dict[str, set[str]] = {}
    flow: list[list[str]] = []
    accesses: list[tuple[str, str, int]] = []
    for line in ptx.splitlines():
        if parameter := re.search(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]", line):
            index = int(parameter[2])
            if index < len(arguments) and arguments[index].endswith("_ptr"):
                origins[parameter[1]] = {arguments[index]}
        elif found := _GLOBAL.search(line):
            width = int(found[2] or 1) * int(found[3]) // 8
            accesses.append((re.findall(r"\[ *(%\w+)", line)[0], found[1], width))
        elif found := _ASYNC.search(line):
            accesses.append((re.findall(r"\[ *(%\w+)", line)[1], "async", int(found[1], 0)))
        else:
            flow.append(re.findall(r"%rd\d+", line))
    reached = -1
    while reached != (reached := sum(map(len, origins.values()))):
        for registers in flow:
            for source in registers[1:]:
                if source in origins:
                    origins.setdefault(registers[0], set()).update(origins[source])
    counts: dict[str, dict[str, dict[int, int]]] = {}
    for address, kind, width in accesses:
        for name in sorted(origins.get(address, {"unknown"})):
            widths = counts.setdefault(name.removesuffix("_ptr"), {}).setdefault(kind, {})
            widths[width] = widths.get(width, 0) + 1
    return counts


def looped_lines(ptx: str) -> list[str]:
    """Return the lines inside loops: what a program pays for once per row or chunk."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$")}
    looped: set[int] = set()
    for i, line in enumerate(lines):
        if jump := re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line):
            looped.update(range(labels[jump[1]], i))
    return [lines[i] for i in sorted(looped)]


def loop_barriers(ptx: str) -> int:
    """Count the barriers inside loops."""
    return sum(bool(re.search(r"\bbar(rier\.cta)?\.sync", line)) for line in looped_lines(ptx))


def _code(cubin: bytes) -> bytes:
    """Return the machine code in a cubin: the .text section of its ELF64 file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section: the offset of its name, the offset and the length of its content.
    sections = [
        (header[0], header[4], header[5])
        for header in (struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count))
    ]
    for name, offset, length in sections:
        if cubin.startswith(b".text.", sections[names][1] + name):
            return cubin[offset : offset + length]
    raise ValueError("cubin without a .text section")


class Instruction(NamedTuple):
    """One line of a disassembly."""

    position: int
    opcode: str
    modifiers: str
    operands: str


_DEVICE_MEMORY = ("LDG", "LDGSTS", "STG")
_MEMORY = (*_DEVICE_MEMORY, "LD", "ST", "ATOM", "ATOMG", "RED", "UBLKCP", "UTMALDG", "UTMASTG")
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z]\w*)((?:\.\w+)*)([^;]*);", re.MULTILINE
)


def disassemble(arch: str, cubins: list[bytes]) -> list[list[Instruction]]:
    """Return the instructions of each cubin, without the padding at its end.

    The disassembler takes longer to start than to read one kernel, so it gets all of them as one.
    """
    if not cubins:
        return []
    codes = [_code(cubin) for cubin in cubins]
    ends = list(itertools.accumulate(map(len, codes)))
    name = arch.replace("sm_", "SM") + ("" if arch == "sm_80" else "a")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "code")
        with open(path, "wb") as file:
            file.writelines(codes)
        listing = _output(triton.knobs.nvidia.nvdisasm.path, "-b", name, "-ndf", path)
    kernels: list[list[Instruction]] = [[] for _ in cubins]
    for position, opcode, modifiers, operands in _INSTRUCTION.findall(listing):
        instruction = Instruction(int(position, 16), opcode, modifiers, operands)
        padding = opcode == "NOP" or _target(instruction) == instruction.position
        if not padding:
            kernels[bisect.bisect(ends, instruction.position)].append(instruction)
    return kernels


def _target(instruction: Instruction) -> int | None:
    """Return where a branch goes, or None for what is no branch to a known place."""
    found = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
    return int(found[1], 16) if instruction.opcode == "BRA" and found else None


def machine_widths(instructions: list[Instruction]) -> dict[str, dict[int, int]]:
    """Count memory instructions and barriers by opcode and bytes per thread."""
    counts: dict[str, dict[int, int]] = {}
    for instruction in instructions:
        if instruction.opcode in ("LDG", "STG", "LDGSTS", "LDL", "STL", "BAR"):
            bits = re.findall(r"\.[SU]?(8|16|32|64|128|256)(?=\.|$)", instruction.modifiers)
            width = int(bits[-1]) // 8 if bits else 4
            widths = counts.setdefault(instruction.opcode, {})
            widths[width] = widths.get(width, 0) + 1
    return counts


def instructions_per_tile(instructions: list[Instruction], ptx: str) -> float:
    """Return the instructions that a thread issues for one tile: those of its loops, if any.

    The loops are those that touch the memory of the device, without what they nest. The assembler
    unrolls some: it then has more accesses than the PTX, whose loops handle one tile a time.
    """
    places = [instruction.position for instruction in instructions]
    looped: set[int] = set()
    for i, instruction in enumerate(instructions):
        target = _target(instruction)
        if target is not None and target < instruction.position:
            body = range(bisect.bisect_left(places, target), i + 1)
            if any(instructions[j].opcode in _DEVICE_MEMORY for j in body):
                looped.update(body)
    if not looped:
        return len(instructions)
    accesses = sum(instructions[j].opcode in _DEVICE_MEMORY for j in looped)
    asked = sum(bool(_GLOBAL.search(line) or _ASYNC.search(line)) for line in looped_lines(ptx))
    return len(looped) * asked / accesses


def dependence(instructions: list[Instruction]) -> dict[str, int | None]:
    """Return how a kernel goes about a launch that depends on it, or on which it depends.

    `lets_start` counts where it allows the next kernel onto the device; `too_early` counts accesses
    to the memory of the device before it waits for the last kernel, None where it does not wait.
    """
    opcodes = [instruction.opcode for instruction in instructions]
    before = opcodes[: opcodes.index("ACQBULK")] if "ACQBULK" in opcodes else None
    return {
        "lets_start": opcodes.count("PREEXIT"),
        "too_early": None if before is None else sum(code in _MEMORY for code in before),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _inspect_nvidia(arch: str, kernels: list[Any]) -> Iterator[dict[str, Any]]:
    cubins = [kernel.asm["cubin"] for kernel in kernels]
    for kernel, cubin, code in zip(kernels, cubins, disassemble(arch, cubins), strict=True):
        with tempfile.NamedTemporaryFile() as file:
            file.write(cubin)
            file.flush()
            dump = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
        ptx = kernel.asm["ptx"]
        signature = kernel.src.signature
        arguments = [name for name, kind in signature.items() if kind != "constexpr"]
        machine = machine_widths(code)
        yield {
            "registers": usage["REG"],
            "stack": usage["STACK"] + usage["LOCAL"],
            "spills": sum(sum(machine.get(opcode, {}).values()) for opcode in ("LDL", "STL")),
            "barriers": sum(machine.get("BAR", {}).values()),
            "loop_barriers": loop_barriers(ptx),
            "accesses": ptx_accesses(ptx, arguments),
            "machine": machine,
            "instructions": instructions_per_tile(code, ptx),
            **dependence(code),
        }


def _inspect_amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.findall(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)[0])

    return {
        "registers": metadata("vgpr_count"),
        "stack": metadata("private_segment_fixed_size"),
        # Scalar registers spill to lanes of vector registers; beyond those there is a stack.
        "spills": metadata("vgpr_spill_count"),
        "barriers": len(re.findall(r"\bs_barrier\b", text)),
        "loop_barriers": 0,
        "accesses": {},
        "machine": dict(Counter(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", text))),
        "instructions": 0,
    }


def _try_compile(job: Job) -> tuple[list[Compiled], str]:
    # One kernel that does not compile must not hide the others.
    try:
        return compile_job(job), ""
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"


def _widest(job: Job) -> int:
    """Return the bytes of the widest element that a job writes rows of."""
    return max(DTYPES[name].itemsize for name in (job.dtype, TERMS[job.terms].stream or job.dtype))


def _vector(job: Job, kernel: Any) -> int:
    """Return how many elements a thread can load or store at once."""
    if job.positions == 0:
        return vector_elements(job.cols, _widest(job))
    names = kernel.src.fn.arg_names
    tile = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
    held = max(1, tile["ROWS"] * tile["BLOCK_N"] // threads)
    return min(held, tile["ROWS"], vector_elements(job.positions, _widest(job)))


def inspect(arch: str, work: list[Job]) -> list[dict[str, Any]]:
    """Compile what jobs for one target launch and describe each kernel."""
    entries: list[dict[str, Any]] = []
    compiled: list[tuple[Job, Compiled]] = []
    for job in map(sized, work):
        kernels, error = _try_compile(job)
        compiled += [(job, kernel) for kernel in kernels]
        if error:
            entries.append({**dataclasses.asdict(job), "error": error})
    kernels = [found.kernel for _, found in compiled]
    nvidia = TARGETS[arch][0].backend == "cuda"
    details = _inspect_nvidia(arch, kernels) if nvidia else map(_inspect_amd, kernels)
    for (job, found), detail in zip(compiled, details, strict=True):
        kernel = found.kernel
        names = kernel.src.fn.arg_names
        itemsize = DTYPES[job.dtype].itemsize
        entry = {
            **dataclasses.asdict(job),
            "kernel": kernel.metadata.name,
            # Triton's hash is that of the source as well, which came out in two ways in one run
            # of 3.6.
            "specialised": repr((kernel.src.signature, kernel.src.constants, kernel.src.attrs)),
            "num_warps": kernel.metadata.num_warps,
            "cluster": kernel.metadata.num_ctas,
            "shared": kernel.metadata.shared,
            "shared_limit": TARGETS[arch][1].shared_bytes,
            # Of x; a tile for a wider stream holds fewer elements of it.
            "vector_bytes": _vector(job, kernel) * itemsize,
            "grid": found.grid,
            "elements": job.rows * width(job),
            "counted": found.counted,
            "reads": found.reads,
            "writes": found.writes,
            "constants": {
                names[path[0]]: value if isinstance(value, int | str) else str(value)
                for path, value in kernel.src.constants.items()
            },
            **detail,
        }
        entries.append(entry | (model.occupancy(entry) if nvidia else {}))
    _predict([entry for entry in entries if "seconds" in entry])
    return entries


def _predict(launches: list[dict[str, Any]]) -> None:
    """Note with the last launch of each job what its call is expected to reach."""
    keys = [field.name for field in dataclasses.fields(Job)]
    for _, call in itertools.groupby(launches, lambda entry: [entry[key] for key in keys]):
        together = list(call)
        together[-1]["predicted"] = model.predictions(together)


def complaints(entry: dict[str, Any]) -> list[str]:
    """Return why a kernel will not keep the memory of its device busy; empty where it will."""
    found = []
    if entry["spills"] or entry["stack"]:
        found.append("spills")
    if entry["shared"] > entry["shared_limit"]:
        found.append("too much shared memory")
    if entry["kind"] == "finalize" or "programs" not in entry:
        return found
    if entry["programs"] < entry["counted"]:
        found.append(f"grid counts on {entry['counted']} programs, {entry['programs']} fit")
    for gpu, (share, limit) in entry.get("predicted", {}).items():
        if share < table.LITTLE:
            found.append(f"{gpu}: {limit}")
    if entry["moved_bytes"] > entry["floor_bytes"]:
        found.append("reads twice")
    return found


def inspect_all(work: list[Job], processes: int = 2) -> list[dict[str, Any]]:
    """Inspect jobs in parallel; the entries come in the order of the jobs, target by target."""
    parts = []
    for arch in TARGETS:
        mine = [job for job in work if job.arch == arch]
        parts += [(arch, mine[i : i + 8]) for i in range(0, len(mine), 8)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return list(itertools.chain.from_iterable(pool.starmap(inspect, parts, chunksize=1)))


def describe(entry: dict[str, Any]) -> str:
    """Return the name of an entry's rung, for reports."""
    c = entry["constants"]
    form = c.get("FORM") or ("looped" if c.get("LOOPED") else "")
    stages = f"stages={c['NUM_STAGES']}" if "NUM_STAGES" in c else ""
    dtype = entry["dtype"]
    if entry["parameters"] != dtype:
        dtype += "/" + entry["parameters"]
    name = entry["kernel"].removeprefix("layer_norm").removeprefix("_").removesuffix("_kernel")
    name = name.removeprefix("gated_norm_")  # which the terms say
    name += f" S={entry['positions']}" if entry["positions"] else ""
    name += f" {entry['terms']}" if entry["terms"] else ""
    name += " dx only" if entry["kind"] == "backward_dx" else ""
    name += f" ({entry['planted']})" if entry["planted"] else ""
    return (
        f"{entry['arch']:6} {name:20} {dtype:16} N={entry['cols']:<6} {table.tile(entry):11} "
        f"{form:8} warps={table.warps(entry):4} {stages:8}"
    )


def row(entry: dict[str, Any]) -> str:
    """Return an entry as a line of the report."""
    if "error" in entry:
        return f"{entry['arch']:6} {entry['kind']} {entry['dtype']} N={entry['cols']} " + " ".join(
            entry["error"].split()
        )
    line = (
        f"{describe(entry)} reg={entry['registers']:<3} spills={entry['spills']:<3} "
        f"shared={entry['shared']:<6} bar={entry['loop_barriers']}"
    )
    if "programs" in entry:
        counted = f" of {entry['counted']}" if entry["counted"] else ""
        widths = "/".join(
            f"{opcode}{max(entry['machine'][opcode]) * 8}"
            for opcode in _DEVICE_MEMORY
            if opcode in entry["machine"]
        )
        line += (
            f" programs={entry['programs']}{counted:5} flight={entry['in_flight'] / 1024:3.0f}KB "
            f"instr/el={entry['instructions_per_element']:4.1f} "
            f"bytes/el={entry['moved_bytes']}/{entry['floor_bytes']:<2} {widths}"
        )
        for gpu, (share, _) in entry.get("predicted", {}).items():
            line += f" {gpu}={share:.0%}"
    return f"{line}  {'; '.join(complaints(entry))}".rstrip()


def tabulate(arch: str, path: Path, beside: Path | None) -> str:
    """Write the table of plain norms to a CSV file; return it, beside an earlier one if given."""
    work = [
        Job(arch, kind, dtype, dtype, cols)
        for kind in ("forward", "backward")
        for dtype in ("bfloat16", "float32")
        for cols in table.COLS
    ]
    rows = [table.row(entry) for entry in inspect_all(work)]
    table.save(rows, path)
    return table.show(rows, table.load(beside) if beside else rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench codegen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="every rung, not the suite's selection")
    parser.add_argument("--arch", action="append", choices=TARGETS)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--cols", action="append", type=int)
    parser.add_argument("--terms", action="append", choices=TERMS)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--table",
        metavar="CSV",
        type=Path,
        help="write a table of plain norms of N = 64 .. 131072 instead",
    )
    parser.add_argument(
        "--beside", metavar="CSV", type=Path, help="an earlier table to print it beside"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report."""
    args = parse(arguments)
    if triton.knobs.runtime.interpret:
        raise ValueError("unset TRITON_INTERPRET: interpreted kernels have no machine code")
    if args.table:
        arch, *others = args.arch or ["sm_90"]
        if others or arch not in model.GPUS:
            raise ValueError(f"--table: expected one --arch of {', '.join(model.GPUS)}")
        print(tabulate(arch, args.table, args.beside))
        return 0
    work = [
        job
        for job in jobs(args.full)
        if (not args.arch or job.arch in args.arch)
        and (not args.kind or job.kind in args.kind)
        and (not args.dtype or job.dtype in args.dtype)
        and (not args.cols or job.cols in args.cols)
        and (not args.terms or job.terms in args.terms)
    ]
    entries = inspect_all(work)
    if args.json:
        json.dump(entries, sys.stdout)
        return 0
    print(f"Triton {triton.__version__}")
    for entry in entries:
        print(row(entry))
    weak = [e for e in entries if "error" not in e and not e["planted"] and complaints(e)]
    print(f"\n{len(weak)} of {len(entries)} kernels will not saturate the memory; they are those")
    print("with a remark at the end of their line.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
