"""The way to a GPU without one: every use is compiled for it and started by the real launchers.

`CODEGEN_FULL=1` tries every use in every dtype and form instead of a selection.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="stands in for the driver of Linux")
def test_every_use_reaches_the_driver() -> None:
    """In a process in which Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(TESTS), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    # A torch that was built for CUDA asks this driver for its devices.
    command += ["-W", "ignore:CUDA initialization:UserWarning"]
    done = subprocess.run(
        [*command, TESTS / "fake_gpu" / "checks.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
