"""One suite for every machine: on a GPU the kernels run natively, elsewhere in the interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

    from interpreter import (
        fuse_multiply_add,
        patch_language_once_per_launch,
        round_to_nearest_bfloat16,
    )

    patch_language_once_per_launch()
    fuse_multiply_add()
    round_to_nearest_bfloat16()

from spies import Launch, record_launches

from fusednorm import backends


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what a module that runs the suites of another one says it leaves out."""
    left_out = [
        item
        for item in items
        if getattr(getattr(item, "module", None), "leaves_out", lambda item: False)(item)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which Triton runs here."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Give every test its own reproducible random numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def plans() -> None:
    """Let no test repeat launches that another one's launch policy made."""
    if torch.cuda.is_available():
        from fusednorm.triton_kernels import plans

        plans.forget()


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an element the kernel forgets cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels(device: torch.device, poison: None) -> Iterator[torch.device]:
    """Force the Triton kernels on poisoned memory; the value is their device."""
    with backends.use("triton"):
        yield device


@pytest.fixture
def launches(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The kernel launches of the test so far; the test may empty the list."""
    return record_launches(monkeypatch)
