"""`python -m fusednorm`: what is installed, what would run where and why, and a self-check.

`--json` prints the same for machines. This is what belongs into a report of a problem.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from fusednorm import backends, coverage

_ROWS, _COLS = 5, 1000
_VARIABLES = ("FUSEDNORM_", "TRITON_", "CUDA_VISIBLE", "OMP_NUM", "TORCH_CUDA_ARCH")


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return 1 if the self-check fails on a device."""
    parser = argparse.ArgumentParser(prog="python -m fusednorm", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    as_json = parser.parse_args(arguments).json
    report = {**_installed(), "devices": [_device(device) for device in _devices()]}
    print(json.dumps(report, indent=2) if as_json else _text(report))
    return int(any("error" in one or _failed(one) for one in report["devices"]))


def _installed() -> dict[str, Any]:
    """Return what is there, whatever the device."""
    toolkit = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return {
        "fusednorm": fusednorm.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {toolkit}, {torch.get_num_threads()} threads",
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "driver": _driver(),
        "extension": _extension(),
        "backends": list(backends.available()),
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """Return what the NVIDIA driver says of itself."""
    said = Path("/proc/driver/nvidia/version")
    return said.read_text().splitlines()[0].strip() if said.exists() else "none of NVIDIA's"


def _extension() -> str:
    """Return what the compiled extension has, or why there is none."""
    if (missing := backends.extension_missing()) is not None:
        return missing
    has_cuda = backends.cuda_missing() is None
    built = importlib.import_module("fusednorm._C")
    kernels = (
        f"cpu kernels for {built.level()}, {'cuda kernels' if has_cuda else 'no cuda kernels'}"
    )
    return f"{kernels}; {built.built}"


def _repeater(device: torch.device) -> str:
    """Return who starts Triton's kernels on `device`, and why."""
    return str(importlib.import_module("fusednorm.triton_kernels.plans").repeater(device))


def _below_torch(device_type: str) -> str:
    """Return what runs below torch's layer norm and RMS norm on a kind of device."""
    if fusednorm.torch_operators.enabled(device_type):
        return "our kernels: fusednorm.enable"
    return "torch's own kernels (fusednorm.enable puts ours there)"


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + [
        torch.device("cuda", index) for index in range(torch.cuda.device_count())
    ]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{device} ({found.name}, {found.major}.{found.minor})"
    return f"{device} ({torch.backends.cpu.get_cpu_capability()})"


def _device(device: torch.device) -> dict[str, Any]:
    """Return what runs a few calls on a device, and how far each backend is from float64."""
    report: dict[str, Any] = {"device": _name(device)}
    x, scale = torch.ones(2, _COLS, device=device), torch.ones(_COLS, device=device)
    try:
        with backends.explain() as ran:
            fusednorm.layer_norm(x, _COLS)
            fusednorm.rms_norm(x, _COLS)
            fusednorm.add_layer_norm(x, x, _COLS)
            fusednorm.modulated_layer_norm(x, _COLS, None, scale)
        report["runs"] = {call.op: f"{call.backend}: {call.reason}" for call in ran}
        if any(call.backend == "triton" for call in ran):
            report["runs"]["starts kernels"] = _repeater(device)
        report["runs"]["torch's operators"] = _below_torch(device.type)
        report["self-check"] = [
            {"backend": name} | check
            for name in backends.available()
            if backends.serves(name, device)
            for check in _self_check(device, name)
        ]
    except (ValueError, RuntimeError) as error:
        report["error"] = f"{type(error).__name__}: {error}"
    return report


def _failed(device: dict[str, Any]) -> bool:
    return any(check["error"] > check["allowed"] for check in device.get("self-check", ()))


def _text(report: dict[str, Any]) -> str:
    lines = [f"{name:9} {_one_line(value)}" for name, value in report.items() if name != "devices"]
    for device in report["devices"]:
        lines.append(device["device"])
        lines += [f"  {call:20} {why}" for call, why in device.get("runs", {}).items()]
        for check in device.get("self-check", ()):
            verdict = "ok" if check["error"] <= check["allowed"] else "FAILED"
            off = f"off by {check['error']:.1e} of {check['allowed']:.1e}: {verdict}"
            what = f"{check['backend']} {check['dtype']}"
            lines.append(f"  {what:20} forward and backward {off}")
        if "error" in device:
            lines.append(f"  none: {device['error']}")
    if not torch.cuda.is_available():
        lines.append("cuda\n  no cuda device is available to torch")
    return "\n".join(lines)


def _one_line(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={text}" for name, text in value.items()) or "none set"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _self_check(device: torch.device, backend: str) -> list[dict[str, Any]]:
    """Return how far y, dx, dweight and dbias of a backend are from float64, for each dtype."""
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((_ROWS, _COLS), (_COLS,), (_COLS,), (_ROWS, _COLS))
    ]
    checks = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = [value.to(device, dtype) for value in exact]
        with backends.use(backend):
            ours = _results(fusednorm.layer_norm, given)
        truth = _results(F.layer_norm, [value.cpu().double() for value in given])
        error = max(
            float((our.cpu().double() - true).abs().max() / true.abs().max())
            for our, true in zip(ours, truth, strict=True)
        )
        # A few roundings of the dtype, relative to the largest value of each result.
        allowed = 4 * torch.finfo(dtype).eps
        checks.append(
            {"dtype": str(dtype).removeprefix("torch."), "error": error, "allowed": allowed}
        )
    return checks


def _results(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    x, weight, bias, dy = (value.detach().requires_grad_() for value in given)
    y = function(x, (_COLS,), weight, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy.detach())]


if __name__ == "__main__":
    if sys.argv[1:2] == ["coverage"]:
        sys.exit(coverage.main(sys.argv[2:]))
    sys.exit(main())
