"""What the kernels are launched with: the one place where tests look behind the public API."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass
class Launch:
    """One launch: the kernel's name, the grid, the arguments by name, and the launch options."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class _Spy:
    """Stands in for a kernel; notes each launch, then lets it happen unless told otherwise."""

    def __init__(self, name: str, kernel: Any, launches: list[Launch], execute: bool) -> None:
        self.kernel, self.fn = kernel, kernel.fn
        self._name, self._launches, self._execute = name, launches, execute
        self._signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            own = {name: kwargs[name] for name in kwargs if name in self._signature.parameters}
            options = {name: value for name, value in kwargs.items() if name not in own}
            arguments = self._signature.bind(*args, **own).arguments
            self._launches.append(Launch(self._name, grid, dict(arguments), options))
            if self._execute:
                self.kernel[grid](*args, **kwargs)

        return launch


def kernels_of_package() -> dict[str, tuple[Any, Any]]:
    """Return every kernel of the package by name, each with the module that launches it."""
    from fusednorm.triton_kernels import backward, channels, finalize, forward, gated

    return {
        name: (module, kernel)
        for module in (forward, backward, finalize, gated, channels)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }


def record_launches(monkeypatch: pytest.MonkeyPatch, *, execute: bool = True) -> list[Launch]:
    """Return a list that every launch from now on is appended to; with `execute` False, instead."""
    from fusednorm.triton_kernels import plans

    launches: list[Launch] = []
    nobody = plans.Repeater("triton", "launches are recorded")
    monkeypatch.setattr(plans, "repeater", lambda device: nobody)
    for name, (module, kernel) in kernels_of_package().items():
        monkeypatch.setattr(module, name, _Spy(name, kernel, launches, execute))
    return launches


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the finalize kernel take wide blocks where every program costs milliseconds."""
    from fusednorm.triton_kernels import finalize
    from fusednorm.triton_kernels.config import RowTile

    if not torch.cuda.is_available():
        monkeypatch.setattr(finalize, "finalize_tile", lambda *_: RowTile(1024, 1, 4, 4))
