"""Compile every rung of the launch policy for devices that are not there, and read the machine code.

The launchers run on meta tensors with a stand-in for Triton's driver, so that every signature,
alignment hint and compile-time constant is the one a launch would use; nothing is launched.

    python tests/codegen.py --arch sm_90 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from fusednorm.triton_kernels import backward, forward, launch
from fusednorm.triton_kernels.config import (
    Architecture,
    backward_config,
    forward_config,
    vector_elements,
)

ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), Architecture(32, 108, 166912)),
    "sm_90": (GPUTarget("cuda", 90, 32), Architecture(32, 132, 232448)),
    "sm_100": (GPUTarget("cuda", 100, 32), Architecture(32, 148, 232448)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Architecture(64, 304, 65536)),
    "gfx950": (GPUTarget("hip", "gfx950", 64), Architecture(64, 256, 163840)),
}

DTYPES = {d: getattr(torch, d) for d in ("bfloat16", "float16", "float32", "float64")}

# Powers of two, three times powers of two, and widths that fill no tile or align to no vector.
COLS = (
    *(1, 3, 17, 64, 96, 128, 256, 257, 384, 512, 768, 769, 1000, 1024, 1025, 1280, 1536, 2048),
    *(2560, 3000, 3072, 4096, 5120, 6144, 7168, 7680, 8192, 8193, 10240, 12288, 14336, 16384),
    *(20480, 24576, 32768, 40000, 65536, 131072),
)

ROWS = 10007  # not divisible by anything that Triton specializes on


@dataclasses.dataclass(frozen=True)
class Job:
    """One launcher call; `num_warps` overrides the policy."""

    arch: str
    kind: str
    dtype: str
    cols: int
    parameters: str
    num_warps: int | None = None


class _Driver:
    """As much of a Triton driver as compiling needs; device i is the i-th architecture."""

    def __init__(self, arch: str) -> None:
        self.target = ARCHITECTURES[arch][0]
        self.device = list(ARCHITECTURES).index(arch)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def rungs(arch: str, kind: str, itemsize: int) -> list[int]:
    """Return one N for every distinct kernel that the policy can ask for.

    Two N share a kernel up to constants when they share the tile, both fill it or both do not, and
    their rows allow the same vector; the largest of them stands for all.
    """
    distinct: dict[object, int] = {}
    for cols in COLS:
        policy: Any = forward_config if kind == "forward" else backward_config
        config = policy(cols, itemsize, ARCHITECTURES[arch][1])
        if kind != "forward":
            config = dataclasses.replace(config, programs_per_processor=0)
        full = cols % (config.tile.block_n * config.tile.chunks) == 0
        distinct[config, full, vector_elements(cols, itemsize)] = cols
    return list(distinct.values())


def jobs(arch: str, kinds: Iterable[str], dtypes: Iterable[str]) -> Iterator[Job]:
    """Yield a job for every rung."""
    for dtype in dtypes:
        for kind in kinds:
            for cols in rungs(arch, kind, DTYPES[dtype].itemsize):
                yield Job(arch, kind, dtype, cols, dtype)


def _launch(job: Job) -> list[Any]:
    """Run a launcher as on a device of the job's architecture; return the compiled kernels."""
    triton.runtime.driver.set_active(_Driver(job.arch))
    launch.architecture = lambda device: ARCHITECTURES[job.arch][1]  # type: ignore[assignment]
    launch.device_guard = lambda device: torch.device("meta")
    compiled: list[Any] = []

    def compile_only(kernel: Any, *args: object, warmup: bool, **kwargs: object) -> None:
        if job.num_warps is not None:
            kwargs["num_warps"] = job.num_warps
        compiled.append(type(kernel).run(kernel, *args, warmup=True, **kwargs))

    for kernel in (
        forward.layer_norm_fwd_kernel,
        backward.layer_norm_bwd_kernel,
        backward.layer_norm_bwd_sums_kernel,
        backward.layer_norm_bwd_finalize_kernel,
    ):
        kernel.run = functools.partial(compile_only, kernel)

    dtype, parameters = DTYPES[job.dtype], DTYPES[job.parameters]
    x = torch.empty(ROWS, job.cols, dtype=dtype, device="meta")
    weight = torch.empty(job.cols, dtype=parameters, device="meta")
    if job.kind == "forward":
        forward.layer_norm_fwd(x, weight, weight, 1e-5, dtype, save_stats=True)
    else:
        stats = torch.empty(ROWS, dtype=launch.compute_dtype(dtype), device="meta")
        wanted = (True, True, True) if job.kind == "backward" else (True, False, False)
        backward.layer_norm_bwd(x, x, stats, stats, weight, weight, wanted)
    return compiled


_PTX_WIDTH = re.compile(r"(?:\.v(\d))?\.[a-z]+(\d+)\b")


def ptx_accesses(ptx: str, arguments: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Count the global accesses in PTX by kernel argument, kind and bytes.

    An address belongs to the arguments that any of its 64-bit operands derive from.
    """
    origins: dict[str, set[str]] = {}
    moves = []
    accesses = []
    for line in ptx.splitlines():
        statement = re.sub(r"^\s*(@!?%\w+\s+)?", "", line).rstrip(" ;")
        operation, _, operands = statement.partition(" ")
        if operation.startswith("ld.param"):
            register, index = re.search(r"(%\w+), \[\w+_param_(\d+)\]", operands).groups()  # type: ignore[union-attr]
            if int(index) < len(arguments) and arguments[int(index)].endswith("_ptr"):
                origins.setdefault(register, set()).add(arguments[int(index)])
        elif operation.startswith(("ld.global", "st.global", "cp.async.ca", "cp.async.cg")):
            address = re.findall(r"\[\s*(%\w+)", operands)[-1]
            if operation.startswith("cp.async"):
                kind, width = "async", int(operands.split(",")[2].strip(), 0)
            else:
                vector, bits = re.search(r"(?:\.v(\d))?\.[bsuf](\d+)$", operation).groups()  # type: ignore[union-attr]
                kind, width = operation[:2], int(vector or 1) * int(bits) // 8
            accesses.append((address, kind, width))
        elif registers := re.findall(r"%rd\d+", operands):
            moves.append(registers)
    changed = True
    while changed:
        changed = False
        for target, *sources in moves:
            for source in sources:
                new = origins.get(source, set()) - origins.get(target, set())
                if new:
                    origins.setdefault(target, set()).update(new)
                    changed = True
    found: dict[str, dict[str, dict[str, int]]] = {}
    for address, kind, width in accesses:
        name = "+".join(sorted(origins.get(address, {"?"})))
        counts = found.setdefault(name, {}).setdefault(kind, {})
        counts[str(width)] = counts.get(str(width), 0) + 1
    return found


def _tool(name: str, *args: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


def _nvidia(kernel: Any, arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(kernel.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", path)))
        sass = _tool("cuobjdump", "-sass", path)
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", sass, re.M))

    def widths(name: str) -> dict[str, int]:
        found: Counter[str] = Counter()
        for opcode, count in opcodes.items():
            first, *rest = opcode.split(".")
            if first == name:
                bits = [r for r in rest if re.fullmatch(r"[SU]?\d+", r)]
                found[str(int(bits[-1].lstrip("SU")) // 8) if bits else "4"] += count
        return dict(found)

    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "spills": sum(c for o, c in opcodes.items() if o.split(".")[0] in ("STL", "LDL")),
        "barriers": sum(c for o, c in opcodes.items() if o.startswith("BAR")),
        "accesses": ptx_accesses(kernel.asm["ptx"], arguments),
        "sass": {name: widths(name) for name in ("LDG", "STG", "LDGSTS", "LDS", "STS")},
    }


def _amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.M).group(1))  # type: ignore[union-attr]

    widths = Counter(re.findall(r"\b((?:global|buffer)_(?:load|store)_\w+)", text))
    return {
        "registers": value("vgpr_count"),
        "accumulation_registers": value("agpr_count"),
        "stack": value("private_segment_fixed_size"),
        "local": 0,
        "spills": value("vgpr_spill_count") + value("sgpr_spill_count"),
        "barriers": len(re.findall(r"\bs_barrier\b", text)),
        "accesses": {},
        "sass": dict(widths),
    }


def inspect(job: Job) -> list[dict[str, Any]]:
    """Compile what a job launches and return one entry per kernel."""
    entries = []
    for kernel in _launch(job):
        signature = kernel.src.signature
        constants = {kernel.src.fn.arg_names[i[0]]: v for i, v in kernel.src.constants.items()}
        arguments = [name for name, kind in signature.items() if kind != "constexpr"]
        nvidia = job.arch.startswith("sm_")
        entries.append(
            {
                **dataclasses.asdict(job),
                "kernel": kernel.metadata.name,
                "warps": kernel.metadata.num_warps,
                "shared": kernel.metadata.shared,
                "constants": {
                    k: v if isinstance(v, (int, str)) else str(v)
                    for k, v in constants.items()
                    if v is not None
                },
                **(_nvidia(kernel, arguments) if nvidia else _amd(kernel)),
            }
        )
    return entries


def compile_all(work: Iterable[Job], processes: int = 2) -> list[dict[str, Any]]:
    """Inspect jobs in parallel; entries come in the order of the jobs."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [entry for entries in pool.imap(inspect, list(work)) for entry in entries]


def row(e: dict[str, Any]) -> str:
    """Format an entry as a line of the report."""
    c = e["constants"]
    tile = f"{c.get('ROWS', 1)}x{c.get('CHUNKS', 1)}x{c.get('BLOCK_N', c.get('COLS'))}"
    form = c.get("FORM") or ("looped" if c.get("LOOPED") else "")
    used = " ".join(
        f"{name.replace('_ptr', '')}:" + ",".join(
            f"{kind}{width}*{n}" for kind, ws in kinds.items() for width, n in ws.items()
        )
        for name, kinds in e["accesses"].items()
    )
    kernel = e["kernel"].replace("layer_norm_", "").replace("_kernel", "")
    bad = "SPILL" if e["spills"] or e["stack"] or e["local"] else ""
    return (
        f"{e['arch']:6} {e['dtype']:8} {e['parameters']:8} {kernel:12} {e['kind']:11} {e['cols']:6} "
        f"{tile:12} {form:8} w{e['warps']:<2} st{c.get('NUM_STAGES', '-')} "
        f"reg{e['registers']:<3} stack{e['stack']:<4} spill{e['spills']:<4} {bad:5} "
        f"smem{e['shared']:<6} bar{e['barriers']:<3} {used} | "
        + (" ".join(f"{k}{v}" for k, v in e["sass"].items() if v) )
    )


def main() -> None:
    """Print the report of one or more architectures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--kind", action="append", choices=["forward", "backward", "backward_dx"])
    parser.add_argument("--cols", action="append", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if launch.interpreted():
        sys.exit("unset TRITON_INTERPRET: interpreted kernels have no machine code")
    work = [
        job
        for arch in args.arch or ["sm_90"]
        for job in jobs(
            arch, args.kind or ["forward", "backward"], args.dtype or ["bfloat16", "float32", "float64"]
        )
        if not args.cols or job.cols in args.cols
    ]
    entries = compile_all(work)
    if args.json:
        json.dump(entries, sys.stdout)
    else:
        print(f"triton {triton.__version__}")
        for entry in entries:
            print(row(entry))


if __name__ == "__main__":
    main()
