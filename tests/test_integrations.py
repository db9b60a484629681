"""The examples for other libraries run where these are installed, which the suite does not need."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "trainer_callback": ("transformers", "accelerate"),
    "lightning_callback": ("lightning",),
    "accelerate_training": ("accelerate",),
}


@pytest.mark.parametrize("name", NEEDS)
def test_it_is_short_enough_to_copy(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize(("name", "needs"), NEEDS.items())
def test_it_trains(name, needs, tmp_path):
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    swapped, left = re.search(r"^(\d+) swapped, (\d+) left$", done.stdout, re.M).groups()
    assert (int(swapped) > 1, int(left)) == (True, 0)
    before, after = re.search(r"loss (\S+) before, (\S+) after", done.stdout).groups()
    assert float(after) < float(before)
