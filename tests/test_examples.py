"""The examples run as a user runs them, and refuse options that cannot work."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest
import torch
from helpers import BACKENDS

from fusednorm import backends

EXAMPLES = Path(__file__).parent.parent / "examples"
WATCHED = Path(__file__).parent / "watched"
TINY_MODEL = "--layers 1 --heads 2 --width 32 --batch-size 2"
TINY = f"{TINY_MODEL} --steps 6 --context 16 --sample-chars 20"

# Two implementations of one norm round in different places. A block and the last norm make three
# norms, each with about 16 roundings in a row in either direction: two sums over 32 columns of
# log2(32) roundings each, and six operations on single elements. A rounding moves a float32 by up
# to 2^-24 of its size, and a step passes on what the steps before it moved. (Adam magnifies only
# gradients that are all rounding, such as those of the key biases, on which no loss depends.)
ROUNDING = 3 * 2 * 16 * 2.0**-24
STEPS = 12

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_example(folder: Path, name: str, options: str) -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own, from `folder`."""
    return run_watched([str(EXAMPLES / name), *options.split()], folder)


def run_watched(
    arguments: list[str], folder: Path, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run Python; it, and each process that it starts, is to end in time, or says where it is."""
    path = os.pathsep.join(filter(None, (str(WATCHED), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "END_AFTER_SECONDS": str(seconds)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )


def load_example(name: str) -> ModuleType:
    """An example as a module: its options are checked without a start of Python for each."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, and other examples, look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_gpt() -> ModuleType:
    return load_example("train_gpt")


@pytest.fixture(scope="module")
def adaln(train_gpt: ModuleType) -> ModuleType:
    return load_example("adaln")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each implementation that can run here in turn."""
    with backends.use(request.param):
        yield request.param


def printed_curves(output: str) -> list[list[float]]:
    """Return step and both losses of every row of the table."""
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +\S+$", output, re.M)
    return [[float(number) for number in row] for row in rows]


def printed_difference(output: str) -> float:
    largest = re.search(r"largest difference of the curves: (\S+)\s", output)
    assert largest is not None, output
    return float(largest[1])


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ("--device cpu", 1e-4),
        ("--device cpu --dtype bf16", 1e-2),
        ("--device cpu --swap", 1e-4),
        ("--device cpu --fused", 1e-4),
        pytest.param("--device cuda", 1e-4, marks=needs_gpu),
        pytest.param("--device cuda --dtype bf16 --compile", 1e-2, marks=needs_gpu),
        pytest.param("--device cuda --fused", 1e-4, marks=needs_gpu),
        pytest.param("--device cuda --fused --dtype bf16 --compile", 1e-2, marks=needs_gpu),
    ],
)
def test_train_gpt_curves_agree(tmp_path: Path, options: str, tolerance: float) -> None:
    done = run_example(tmp_path, "train_gpt.py", f"{TINY} {options} --plot curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    curves = printed_curves(done.stdout)
    assert [step for step, *_ in curves] == [1, 2, 3, 4, 5, 6]
    # An untrained model knows nothing: about log(number of characters), for both.
    assert all(3.5 < loss < 6.0 for _, *losses in curves for loss in losses)
    assert 0.0 <= printed_difference(done.stdout) < tolerance  # false for nan, too
    for measure in ("validation loss, after", "tokens per second", "share of step time in norms"):
        numbers = re.search(rf"^{measure} +([\d.,]+)%? +([\d.,]+)%?$", done.stdout, re.M)
        assert numbers is not None, f"{measure} is missing in\n{done.stdout}"
        assert all(float(number.replace(",", "")) > 0 for number in numbers.groups())


def test_a_process_that_hangs_says_where(tmp_path: Path) -> None:
    """Its children, which may have sessions of their own, do so too."""
    (tmp_path / "child.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, 'child.py'], start_new_session=True)\n"
        "sys.exit(1)\n"
    )
    done = run_watched(["parent.py"], tmp_path, seconds=4)
    assert done.returncode == 1
    assert 'child.py", line 2' in done.stderr
    assert 'parent.py", line 2' in done.stderr


@pytest.mark.parametrize("way", ["fsdp", "tp", "ddp"])
def test_train_gpt_in_two_processes(tmp_path: Path, way: str) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    if way == "tp" and torch.__version__.startswith("2.10."):
        pytest.skip("a DTensor of torch 2.10 does not flatten a dimension that is sharded")
    options = f"{TINY} --device cpu --fused --processes 2 --parallel {way}"
    done = run_example(tmp_path, "train_gpt.py", options)
    assert done.returncode == 0, done.stderr
    curves = printed_curves(done.stdout)
    assert [step for step, *_ in curves] == [1, 2, 3, 4, 5, 6]
    assert 0.0 <= printed_difference(done.stdout) < 1e-4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--width 30 --heads 4", "--width"),
        ("--processes 3", "--batch-size"),
        ("--processes 3 --parallel tp", "--heads"),
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
        ("--swap --fused", "--fused"),
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
    done = run_example(tmp_path, "train_gpt.py", "--width 30 --heads 4")
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


# The two models ----------------------------------------------------------------------------------


def test_one_state_dict_loads_in_both_gpts(train_gpt: ModuleType, device: torch.device) -> None:
    plain, fused, fresh = (train_gpt.GPT(50, 16, 2, 2, 32).to(device) for _ in range(3))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # norms at 1 and 0 would fit any module
    fused.add_norm = train_gpt.fused_add_norm
    fused.load_state_dict(plain.state_dict())
    fresh.load_state_dict(fused.state_dict())
    tokens = torch.randint(50, (2, 16), device=device)
    torch.testing.assert_close(fused(tokens), plain(tokens))
    assert torch.equal(fresh(tokens), plain(tokens))


def test_fused_gpt_trains_as_the_plain_one(
    train_gpt: ModuleType, device: torch.device, backend: str
) -> None:
    options = f"{TINY_MODEL} --context 16 --lr 1e-2 --device {device} --steps {STEPS}"
    args = train_gpt.parse_args(options.split(), longest_context=16)
    corpus = train_gpt.Corpus.load()
    model = train_gpt.GPT(len(corpus.vocab), args.context, 1, 2, 32).to(device)
    fused_model = copy.deepcopy(model)
    fused_model.add_norm = train_gpt.fused_add_norm
    plain = train_gpt.Run.start("plain", model, train_gpt.mean_loss, args)
    fused = train_gpt.Run.start("fused", fused_model, train_gpt.mean_loss, args)
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return train_gpt.random_batch(corpus.train, 2, 16, generator).to(device)

    train_gpt.train((plain, fused), draw, args)
    assert fmean(fused.losses[-3:]) < 0.85 * fused.losses[0]
    largest, _ = train_gpt.largest_difference(plain, fused)
    assert largest < STEPS * ROUNDING * plain.losses[0]


def test_fused_adaln_trains_as_the_plain_one(
    adaln: ModuleType, capsys: pytest.CaptureFixture[str], device: torch.device, backend: str
) -> None:
    options = f"{TINY_MODEL} --lr 1e-2 --device {device} --steps {STEPS}"
    assert adaln.main(options.split()) == 0
    output = capsys.readouterr().out
    assert f"{backend}, requested by backends.use" in output
    _, *losses = zip(*printed_curves(output), strict=True)
    for first, *_, third_last, second_last, last in losses:
        # The last layer starts at zero: so does the prediction of noise whose mean square is 1.
        assert first == pytest.approx(1.0, abs=0.2)
        assert fmean((third_last, second_last, last)) < 0.85
    assert printed_difference(output) < STEPS * ROUNDING


@pytest.mark.parametrize(
    "options",
    [
        "--device cpu --dtype bf16",
        pytest.param("--device cuda --dtype bf16 --compile", marks=needs_gpu),
    ],
)
def test_adaln_runs_as_a_script(tmp_path: Path, options: str) -> None:
    done = run_example(tmp_path, "adaln.py", f"{TINY_MODEL} --steps 6 {options}")
    assert done.returncode == 0, done.stderr
    assert [step for step, *_ in printed_curves(done.stdout)] == [1, 2, 3, 4, 5, 6]
    # The fused norm adds 1 to the scale in float32, plain torch in bfloat16.
    assert 0.0 <= printed_difference(done.stdout) < 1e-2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", ["--width 30 --heads 4", "--width 33 --heads 3"])
def test_adaln_refuses_in_one_line(
    adaln: ModuleType, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        adaln.main(options.split())
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "--width" in output.err


# The encoder that sorts, and the norms compared --------------------------------------------------


@pytest.fixture(scope="module")
def encoder(train_gpt: ModuleType) -> ModuleType:
    return load_example("encoder")


@pytest.fixture(scope="module")
def normalizations(train_gpt: ModuleType) -> ModuleType:
    return load_example("normalizations")


@pytest.mark.parametrize("form", ["", "--pre-norm"])
def test_readable_encoder_trains_as_torchs(
    encoder: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, form: str
) -> None:
    """In float64: its roundings are 2^29 times smaller than those of float32."""
    plot = tmp_path / "encoder.png"
    assert encoder.main([*form.split(), "--layers=1", f"--steps={STEPS}", f"--plot={plot}"]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    output = capsys.readouterr().out
    losses = re.findall(r"loss ([\d.]+) -> ([\d.]+), [\d.]+% sorted", output)
    assert len(losses) == 2
    # An untrained model knows nothing of ten digits: log(10) nats and what its start adds.
    assert all(2.2 < float(first) < 3.2 for first, _ in losses)
    assert all(float(last) < float(first) for first, last in losses)
    assert printed_difference(output) < STEPS * ROUNDING * 2.0**-29 * float(losses[0][0])


def test_readable_encoder_that_forgets_the_residual_is_found(
    encoder: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = encoder.Layer.forward
    monkeypatch.setattr(encoder.Layer, "forward", lambda self, x: whole(self, x) - 1e-6 * x)
    assert encoder.main(["--layers=1", "--steps=2", "--plot=/dev/null"]) == 0
    assert printed_difference(capsys.readouterr().out) > STEPS * ROUNDING * 2.0**-29


def test_normalizations_writes_table_and_picture(
    normalizations: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ["--seeds=1", "--samples=32", f"--folder={tmp_path}"]
    assert normalizations.main(small) == 0
    assert (tmp_path / "normalizations.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| a \| batch 1 \| [^|]*±[^|]*\| [^|]*±[^|]*\| refuses \|.*", lines[2])
    rows = (tmp_path / "normalizations.csv").read_text().splitlines()
    assert len(rows) == 1 + len(normalizations.NORMS) * (len(lines) - 2)
    assert {line.split("|")[1].strip() for line in lines[2:]} == set("abcde")


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("encoder", "--layers 0", "--layers"),
        ("encoder", "--steps 0", "--steps"),
        ("encoder", "--seed -1", "--seed"),
        ("encoder", "--plot no/such/folder/curves.png", "--plot"),
        ("encoder", "--no-such-option", "--no-such-option"),
        ("normalizations", "--seeds 0", "--seeds"),
        ("normalizations", "--samples many", "--samples"),
        ("normalizations", "--folder no/such/folder", "--folder"),
        ("normalizations", "--batch-size 0", "--batch-size"),
    ],
)
def test_other_examples_refuse_in_one_line(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: str,
    named: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        request.getfixturevalue(name).main(options.split())
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert named in output.err
