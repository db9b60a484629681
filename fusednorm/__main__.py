"""`python -m fusednorm`: what is installed, what would run where and why, and a self-check."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from fusednorm import backends

_ROWS, _COLS = 37, 1000


def main() -> int:
    """Print the report; return 1 if the self-check fails on a device."""
    print(f"fusednorm {fusednorm.__version__}")
    print(f"python    {platform.python_version()}")
    print(f"torch     {torch.__version__}")
    print(f"triton    {_version('triton')}")
    print(f"extension {_extension()}")
    print(f"backends  {', '.join(backends.available())}")
    failed = False
    for device in _devices():
        try:
            choice = backends.explain(torch.empty(0, device=device))
        except ValueError as error:
            print(f"{_name(device)}\n  runs      none: {error}")
            failed = True
            continue
        print(f"{_name(device)}\n  runs      {choice}")
        if (other := backends.explain(torch.empty(0, device=device), plain=False)) != choice:
            print(f"            all else in {other}")
        if choice.backend == "triton":
            print(f"  launches  {_repeater(device)}")
        with backends.use(choice.backend):
            failed |= not _self_check(device)
    if not torch.cuda.is_available():
        print("cuda\n  runs      torch: no cuda device is available to torch")
    return int(failed)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    """Return what the compiled extension has, or why there is none."""
    if (missing := backends.extension_missing()) is not None:
        return missing
    has_cuda = backends.cuda_missing() is None
    level = importlib.import_module("fusednorm._C").level()
    return f"cpu kernels for {level}, {'cuda kernels' if has_cuda else 'no cuda kernels'}"


def _repeater(device: torch.device) -> str:
    """Return who starts Triton's kernels on `device`, and why."""
    return str(importlib.import_module("fusednorm.triton_kernels.plans").repeater(device))


def _devices() -> list[torch.device]:
    return [torch.device("cpu")] + [
        torch.device("cuda", index) for index in range(torch.cuda.device_count())
    ]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _self_check(device: torch.device) -> bool:
    """Compare y, dx, dweight and dbias with float64 and print the largest error of each dtype."""
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((_ROWS, _COLS), (_COLS,), (_COLS,), (_ROWS, _COLS))
    ]
    passed = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = [value.to(device, dtype) for value in exact]
        ours = _results(fusednorm.layer_norm, given)
        truth = _results(F.layer_norm, [value.cpu().double() for value in given])
        # A few roundings of the dtype, relative to the largest value of each result.
        error = max(
            float((our.cpu().double() - true).abs().max() / true.abs().max())
            for our, true in zip(ours, truth, strict=True)
        )
        allowed = 4 * torch.finfo(dtype).eps
        passed &= error <= allowed
        verdict = "ok" if error <= allowed else "FAILED"
        name = str(dtype).removeprefix("torch.")
        print(f"  {name:9} forward and backward off by {error:.1e} of {allowed:.1e}: {verdict}")
    return passed


def _results(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    x, weight, bias, dy = (value.detach().requires_grad_() for value in given)
    y = function(x, (_COLS,), weight, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy.detach())]


if __name__ == "__main__":
    sys.exit(main())
