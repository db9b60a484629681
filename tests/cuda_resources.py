"""What nvcc makes of the CUDA kernels: registers, stack, spills, shared memory of each.

    python tests/cuda_resources.py > bench/results/cuda-kernels.csv

nvcc reports the first three. Shared memory is given at launch: it is what the launcher asks for on
the host that stands in for an H200 (tests/simt).
"""

from __future__ import annotations

import csv
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from simt_library import load_host_kernels

from fusednorm import cuda

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {name: ROOT / "csrc" / "cuda" / f"{name}.cu" for name in ("forward", "backward")}
ARCHITECTURES = ("80", "90", "100")
DTYPES = {"float": torch.float32, "Float16": torch.float16, "BFloat16": torch.bfloat16}


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture; bytes, and registers of a thread."""

    kernel: str
    arguments: str  # of the template
    arch: str
    registers: int
    stack: int
    spills: int


def nvcc_flags() -> list[str]:
    """Return the flags that the extension is built with."""
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags: list[str] = script.NVCC_FLAGS
    return flags


def resources(source: Path, arch: str) -> list[Resources]:
    """Compile one source for one architecture and return what each kernel takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *nvcc_flags(), f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, source, "-o", Path(folder, "kernels.cubin")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    report = subprocess.run(
        ["c++filt"], input=done.stderr, capture_output=True, text=True, check=True
    ).stdout
    pattern = (
        r"Compiling entry function '.*?(\w+_kernel)(?:<(.*)>)?\(.*?\n.*?\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers"
    )
    return [
        Resources(
            kernel=kernel,
            arguments=arguments.replace("fusednorm::cuda::", ""),
            arch=arch,
            registers=int(registers),
            stack=int(stack),
            spills=int(stores) + int(loads),
        )
        for kernel, arguments, stack, stores, loads, registers in re.findall(pattern, report)
    ]


def tiers(direction: str) -> list[tuple[int, int]]:
    """Return threads and elements of each tier in csrc/cuda/policy.h."""
    policy = (ROOT / "csrc" / "cuda" / "policy.h").read_text()
    table = re.search(rf"{direction}_tiers\[\] = {{(.*?)}};", policy, re.DOTALL)
    assert table is not None
    return [(int(a), int(b)) for a, b in re.findall(r"{(\d+), (\d+)}", table[1])]


def first_shared(direction: str) -> int:
    """Return the first tier whose rows the blocks of a cluster share."""
    policy = (ROOT / "csrc" / "cuda" / "policy.h").read_text()
    found = re.search(rf"first_shared_{direction} = (\d+)", policy)
    assert found is not None
    return int(found[1])


def shared_memory(kernel: str, arguments: str, arch: str) -> int | None:
    """Return the bytes that a launch asks for on an A100 or H200; None where there is none."""
    host = ctypes.CDLL(str(cuda._C.__file__))
    host.simt_device(132, *((164, False) if arch == "80" else (228, True)))
    finalizes = kernel == "layer_norm_bwd_finalize_kernel"
    direction = "forward" if kernel == "layer_norm_fwd_kernel" else "backward"
    number, rows, *flags = ["0", "float"] if finalizes else arguments.split(", ")
    tier, dtype, stream = int(number), DTYPES[rows], flags == ["true"]
    threads, elements = tiers(direction)[tier]
    split = tier >= first_shared(direction)
    if split and arch == "80":
        return None
    cols = min(threads * elements * (2 if split else 1), cuda._C.cuda_widest_rows())
    x = torch.zeros(1, cols, dtype=dtype)
    shape, row = x.shape[1:], torch.zeros(1)
    if direction == "forward":
        terms = (x, x if stream else None, *(None,) * 6)
        options = (1e-5, False, 0.0, dtype, dtype if stream else None, None, True, True)
        cuda.layer_norm_fwd(*terms, shape, *options)
    else:
        weight = x[0] if finalizes else None
        tensors = (x, None, None, x, row, row, None, weight, *(None,) * 4)
        mask = (True, False, False, weight is not None, False, False, False)
        cuda.layer_norm_bwd(*tensors, shape, 0.0, dtype, dtype, None, mask)
    return int(host.simt_shared_bytes())


def main() -> int:
    """Print a line for each kernel and architecture."""
    if shutil.which("nvcc") is None:
        sys.exit("cuda_resources: expected nvcc on the path, got none")
    cuda._C = load_host_kernels()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*(field.name for field in fields(Resources)), "shared"])
    for arch in ARCHITECTURES:
        for source in SOURCES.values():
            for found in resources(source, arch):
                shared = shared_memory(found.kernel, found.arguments, arch)
                if shared is not None:  # there are no clusters on sm_80 to split a row over
                    writer.writerow([*astuple(found), shared])
    return 0


if __name__ == "__main__":
    sys.exit(main())
