"""What a run leaves behind: one JSON file, and the machine that it was run on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
METRICS = ("device", "eager", "do_bench")
"""What is measured of a call, the main figure first."""

Results = dict[str, Any]
Cell = dict[str, Any]


def environment(device: torch.device) -> dict[str, str]:
    """Return what a figure depends on besides the code that is measured."""
    found = {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors before the run",
    }
    if device.type == "cpu":  # fresh pages cost a call as much as a norm, or nothing
        kept = "MALLOC_TRIM_THRESHOLD_" in os.environ
        found["memory"] = "kept by malloc" if kept else "as malloc likes"
    for package in ("fusednorm", "torch", "triton", "numpy"):
        found[package] = _version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        found["processors"] = str(properties.multi_processor_count)
        found["cache"] = f"{properties.L2_cache_size >> 20} MB"
        found |= _nvidia_smi(device)
    return found


def device_name(device: torch.device) -> str:
    """Return the name of the processor, the GPU or the CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "cpu"
    model = re.search(r"^model name\s*:\s*(.+)$", cpus, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or "cpu"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return (commit + (" with changes" if changed else "")) or "unknown"


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    line = _output(
        *("nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={','.join(fields)}"),
        "--format=csv,noheader",
    )
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def path_of(results: Results, folder: Path = FOLDER) -> Path:
    """Return the file of a device and a day."""
    name = re.sub(r"[^a-z0-9]+", "-", results["environment"]["device"].lower()).strip("-")
    return folder / f"{name}-{results['environment']['date'][:10]}.json"


def save(results: Results, path: Path) -> None:
    """Write results; one cell a line, so that a change can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in results.items() if key != "cells"}
    cells = ",\n".join(f"  {json.dumps(cell)}" for cell in results["cells"])
    text = json.dumps(head, indent=1).removesuffix("\n}")
    part = path.with_suffix(".part")
    part.write_text(f'{text},\n "cells": [\n{cells}\n ]\n}}\n', encoding="utf-8")
    part.replace(path)  # whoever is ended in the middle leaves the former file


def load(path: Path) -> Results:
    """Read results.

    Raises:
        ValueError: The file is not there, is no JSON, or has another schema.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{path}: expected JSON") from None
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: expected results of schema {SCHEMA}, got {schema!r}")
    return dict(results)


CASE_FIELDS = ("mode", "rows", "cols", "dtype", "parameters", "threads")


def case_key(cell: Cell) -> tuple[Any, ...]:
    """Return what two cells of the same case have in common."""
    return tuple(cell[field] for field in CASE_FIELDS)


def by_case(results: Results) -> dict[tuple[Any, ...], dict[str, Cell]]:
    """Return the cells of each case by provider, the yardstick `copy` among them."""
    cases: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for cell in results["cells"]:
        cases.setdefault(case_key(cell), {})[cell["provider"]] = cell
    return cases


def case_name(cell: Cell) -> str:
    """Return a case as the tables name it."""
    dtype = cell["dtype"]
    if cell["parameters"] != dtype:
        dtype += f"/{cell['parameters']}"
    return f"{cell['mode']} {cell['rows']}x{cell['cols']} {dtype}"


def metrics(results: Results) -> list[str]:
    """Return what was measured, the main figure first."""
    seen = {what for cell in results["cells"] for what in cell["seconds"]}
    return [what for what in METRICS if what in seen]
