"""The example runs as a user runs it, and refuses options that cannot work."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_gpt.py"
TINY = "--steps 6 --layers 1 --heads 2 --width 32 --context 16 --batch-size 2 --sample-chars 20"

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_example(folder: Path, options: str) -> subprocess.CompletedProcess[str]:
    """Run the example in a process of its own, from `folder`."""
    command = [sys.executable, str(EXAMPLE), *options.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def train_gpt() -> ModuleType:
    """The example as a module: its options are checked without a start of Python for each."""
    spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ("--device cpu", 1e-4),
        ("--device cpu --dtype bf16", 1e-2),
        pytest.param("--device cuda", 1e-4, marks=needs_gpu),
        pytest.param("--device cuda --dtype bf16 --compile", 1e-2, marks=needs_gpu),
    ],
)
def test_train_gpt_curves_agree(tmp_path: Path, options: str, tolerance: float) -> None:
    done = run_example(tmp_path, f"{TINY} {options} --plot curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    table = [row.split() for row in re.findall(r"^ +\d+ +[\d.]+ +[\d.]+ .*$", done.stdout, re.M)]
    assert [int(row[0]) for row in table] == [1, 2, 3, 4, 5, 6]
    # An untrained model knows nothing: about log(number of characters), for both.
    assert all(3.5 < float(loss) < 6.0 for row in table for loss in row[1:3])
    largest = re.search(r"largest difference of the curves: (\S+) ", done.stdout)
    assert largest is not None
    assert 0.0 <= float(largest[1]) < tolerance  # false for nan, too
    for measure in ("validation loss, after", "tokens per second", "share of step time in norms"):
        numbers = re.search(rf"^{measure} +([\d.,]+)%? +([\d.,]+)%?$", done.stdout, re.M)
        assert numbers is not None, f"{measure} is missing in\n{done.stdout}"
        assert all(float(number.replace(",", "")) > 0 for number in numbers.groups())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--width 30 --heads 4", "--width"),
        ("--steps 0", "--steps"),
        ("--steps many", "--steps"),
        ("--batch-size -1", "--batch-size"),
        ("--context 100000000", "--context"),
        ("--lr nan", "--lr"),
        ("--dtype int8", "--dtype"),
        ("--device tpu", "--device"),
        ("--device cuda:99", "--device"),
        ("--seed -1", "--seed"),
        ("--plot no/such/folder/curves.png", "--plot"),
        ("--no-such-option", "--no-such-option"),
    ],
)
def test_train_gpt_refuses_in_one_line(
    train_gpt: ModuleType, capsys: pytest.CaptureFixture[str], options: str, named: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        train_gpt.main(options.split())
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert named in output.err


def test_train_gpt_refusal_is_the_exit_code(tmp_path: Path) -> None:
    done = run_example(tmp_path, "--width 30 --heads 4")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_train_gpt_fails_when_the_loss_does_not_fall(
    train_gpt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(train_gpt, "GATED_STEPS", 6)
    plot = str(tmp_path / "curves.png")
    assert train_gpt.main([*TINY.split(), "--lr", "1e-9", "--plot", plot]) == 1
    assert "FAILED: the loss of nn.LayerNorm went from 4." in capsys.readouterr().err
