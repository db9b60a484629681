"""The benchmark's arithmetic, refusals and files; real clocks belong in `bench selfcheck`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

# Last, so that the installed package stays the one that is tested.
sys.path.append(str(Path(__file__).parents[1]))

from bench import compare, excerpt, providers, report, results, selfcheck, text, timing
from bench.__main__ import main
from bench.cases import MODES, NORMS, Case, cases, compose, draw, floor_bytes
from bench.measure import COPY, Settings, calls_of, check, measure
from bench.providers import Provider, bind, find
from fusednorm import backends, torch_operators

CPU = torch.device("cpu")


class Clock:
    """A clock that only advances when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float) -> Callable[[], None]:
        """Return a call that takes this long."""

        def advance() -> None:
            self.now += seconds

        return advance


def torch_provider() -> Provider:
    """Return the provider that every device has."""
    (provider,), _ = find(["torch"], CPU)
    return provider


# The harness.


def test_rounds_rotate() -> None:
    order: list[str] = []

    def contestant(name: str) -> timing.Measure:
        def measure() -> dict[str, float]:
            order.append(name)
            return {"eager": float(len(order))}

        return measure

    found = timing.interleave({name: contestant(name) for name in "abcd"}, 40)
    rounds = [order[i : i + 4] for i in range(0, 160, 4)]
    assert all(sorted(each) == [*"abcd"] for each in rounds)
    assert [each[0] for each in rounds] == [*"abcd"] * 10
    # Whoever comes before leaves the cache in its state: nobody has a predecessor of its own.
    pairs = {pair for each in rounds for pair in pairwise(each)}
    assert len(pairs) == 12
    assert found["a"]["eager"] == [i + 1.0 for i, name in enumerate(order) if name == "a"]


@pytest.mark.parametrize("loop", [timing.loop_seconds, timing.median_seconds])
def test_planted_delay_shows(loop: Callable[..., float]) -> None:
    """What takes 10 % longer is reported as 10 % slower, at any number of calls."""
    clock = Clock()
    for calls in (1, 7, 200):
        base = loop(clock.call(0.25), calls, clock=clock)
        slow = loop(clock.call(0.275), calls, clock=clock)
        assert math.isclose(slow / base, 1.1)


def test_ratio_is_taken_round_by_round() -> None:
    """A machine that is three times as slow in some rounds is so for both."""
    drift = [1.0, 3.0, 1.0, 2.0, 1.0]
    base = [0.5 * factor for factor in drift]
    slow = [0.55 * factor for factor in drift]
    factor, noise = timing.ratio(slow, base)
    assert math.isclose(factor, 1.1)
    assert noise < 1e-12
    assert timing.spread(base) > 0.2


def test_number_of_calls() -> None:
    clock = Clock()
    assert timing.calls_within(clock.call(0.25), 1.0, 200, clock) == 4
    assert timing.calls_within(clock.call(2.0), 1.0, 200, clock) == 1
    assert timing.calls_within(clock.call(1e-6), 1.0, 200, clock) == 200


def test_spread() -> None:
    assert timing.spread([2.0]) == 0.0
    assert timing.spread([1.0, 1.0, 1.0]) == 0.0
    assert math.isclose(timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]), 1 / 3)


@pytest.mark.parametrize("mode", ["layer_norm/forward", "add/backward", "add/both"])
def test_norm_and_yardstick_write_to_as_many_blocks(mode: str) -> None:
    """What a call writes has left the cache before its next turn, or the copy alone would pay."""
    generator = torch.Generator().manual_seed(0)
    case = Case(mode, 64, 96, "float32", "float32")
    inputs = [draw(case, CPU, generator) for _ in range(5)]
    size = floor_bytes(case)
    for calls in (
        calls_of(case, torch_provider(), inputs),
        [timing.copy_call(size, CPU, size) for _ in inputs],
    ):
        call = timing.in_turn(calls)
        turns = [[_places(call()) for _ in inputs] for _ in range(3)]
        for turn in turns:
            assert len(set().union(*turn)) == sum(map(len, turn)) >= 5


def _places(results: Any) -> set[int]:
    given = results if isinstance(results, tuple) else (results,)
    return {tensor.data_ptr() for tensor in given}


# The floor.


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("layer_norm/inference", 2 * 4096 * 1024 * 2 + 2 * 1024 * 4),
        ("layer_norm/forward", 2 * 4096 * 1024 * 2 + 2 * 1024 * 4 + 8 * 4096),
        ("layer_norm/backward", 3 * 4096 * 1024 * 2 + 3 * 1024 * 4 + 8 * 4096),
        ("add/forward", 4 * 4096 * 1024 * 2 + 2 * 1024 * 4 + 8 * 4096),
        ("add/backward", 4 * 4096 * 1024 * 2 + 3 * 1024 * 4 + 8 * 4096),
        ("rms_norm/forward", 2 * 4096 * 1024 * 2 + 1024 * 4 + 4 * 4096),
        ("frozen/backward", 3 * 4096 * 1024 * 2 + 1024 * 4 + 8 * 4096),
        ("dropout/backward", 5 * 4096 * 1024 * 2 + 3 * 1024 * 4 + 8 * 4096),
        ("layer_scale/forward", 4 * 4096 * 1024 * 2 + 3 * 1024 * 4 + 8 * 4096),
        ("layer_scale/backward", 6 * 4096 * 1024 * 2 + 5 * 1024 * 4 + 8 * 4096),
        ("adaln/backward", 3 * 4096 * 1024 * 2 + 8 * 3 * 1024 * 4 + 8 * 4096),
        ("adaln_zero/backward", 6 * 4096 * 1024 * 2 + 8 * 5 * 1024 * 4 + 8 * 4096),
    ],
)
def test_floor(mode: str, expected: int) -> None:
    assert floor_bytes(Case(mode, 4096, 1024, "bfloat16", "float32")) == expected


def test_both_phases_add_up() -> None:
    for norm in NORMS:
        parts = [floor_bytes(Case(f"{norm}/{p}", 64, 96)) for p in ("forward", "backward", "both")]
        assert parts[0] + parts[1] == parts[2], norm


# The check before the clock.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_right_results_pass(mode: str, dtype: str) -> None:
    """Torch, our own backends for the CPU and its peers are found right in every mode."""
    generator = torch.Generator().manual_seed(0)
    case = Case(mode, 64, 200, dtype, dtype)
    for provider in find(None, CPU)[0]:
        if provider.name == "torch.compile":
            continue  # it compiles for seconds
        if case.norm not in provider.norms or not provider.serves(case):
            continue
        with provider.scope(), torch.set_grad_enabled(case.phase != "inference"):
            problem = check(case, provider, draw(case, CPU, generator))
        assert problem == "", provider.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_planted_wrong_mean_is_refused(dtype: str) -> None:
    """A mean that is one percent off is named as wrong, and not timed."""
    case = Case("layer_norm/forward", 64, 200, dtype, dtype)
    planted = selfcheck.planted(torch_provider())[-1]
    (cells,) = measure([case], [planted], CPU, Settings(2, 0.0), progress=False)
    wrong = next(cell for cell in cells if cell["provider"] == "wrong mean")
    assert wrong["status"] == "wrong"
    assert "off by" in wrong["note"]
    assert wrong["seconds"] == {}
    assert len(next(cell for cell in cells if cell["provider"] == COPY)["seconds"]["eager"]) == 2


@pytest.mark.parametrize("fault", ["nan", "one row", "gradient"])
def test_other_planted_faults_are_refused(fault: str) -> None:
    norm = torch_provider().norms["layer_norm"]

    def faulty(inputs: Any, case: Case) -> torch.Tensor:
        (z,) = norm(case, inputs)()
        factor = torch.ones_like(z)
        if fault == "nan":
            factor[3, 5] = torch.nan
        elif fault == "one row":
            factor[3] = 1.1
        else:
            return z.detach() + 1.1 * (z - z.detach())
        return z * factor

    provider = Provider("faulty", "", {"layer_norm": bind(faulty)})
    case = Case("layer_norm/both", 512, 200, "float32", "float32")
    assert "off by" in check(case, provider, draw(case, CPU, torch.Generator().manual_seed(0)))


def test_provider_that_raises_does_not_stop_the_others() -> None:
    def broken(inputs: Any, case: Case) -> torch.Tensor:
        raise RuntimeError("planted\nsecond line")

    case = Case("layer_norm/forward", 8, 64, "float32", "float32")
    both = [Provider("broken", "", {"layer_norm": bind(broken)}), torch_provider()]
    (found,) = measure([case], both, CPU, Settings(2, 0.0), progress=False)
    cells = {cell["provider"]: cell for cell in found}
    assert cells["broken"]["status"] == "failed"
    assert cells["broken"]["note"] == "RuntimeError: planted"
    assert len(cells["torch"]["seconds"]["eager"]) == 2


def test_our_backends_are_taken_or_named_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the extension does not have is missing for its own reason, later it is measured."""
    absent = find(["fusednorm-cuda"], CPU)
    assert not absent[0]
    assert "cuda" in absent[1]["fusednorm-cuda"]
    used: list[str] = []

    def use(name: str) -> contextlib.AbstractContextManager[None]:
        used.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(backends, "use", use)
    (ours,), missing = find(["fusednorm-cuda"], CPU)
    assert not missing
    used.clear()
    with ours.scope():
        assert used == ["cuda"]


@pytest.mark.skipif(backends.own_operators() is None, reason="the extension was not built")
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "add"])
def test_enabled_norms_are_torchs_in_our_kernels(norm: str) -> None:
    """The kernels serve what the provider calls, and nothing that is called outside of it."""
    (provider,), _ = find(["fusednorm-enabled"], CPU)
    case = Case(f"{norm}/forward", 8, 64, "float32", "float32")
    inputs = draw(case, CPU, torch.Generator().manual_seed(0))
    before = sum(torch_operators.calls().values())
    with provider.scope():
        outputs = provider.norms[norm](case, inputs)()
    assert sum(torch_operators.calls().values()) == before + 1
    expected = compose(case, inputs)
    torch.testing.assert_close(outputs, expected if isinstance(expected, tuple) else (expected,))
    assert sum(torch_operators.calls().values()) == before + 1


@pytest.mark.skipif(backends.own_operators() is None, reason="the extension was not built")
@pytest.mark.parametrize("norm", ["add", "gated_rms"])
def test_compiled_norms_of_ours_are_our_operators(
    monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    """A graph of the provider calls the kernels, once for each call and direction."""
    compile = functools.partial(torch.compile, backend="aot_eager")  # in place of seconds of g++
    monkeypatch.setattr(torch, "compile", compile)
    (ours,), _ = find(["fusednorm-compiled"], CPU)
    case = Case(f"{norm}/both", 8, 64, "float32", "float32")
    inputs = draw(case, CPU, torch.Generator().manual_seed(0))
    with ours.scope():
        (call,) = calls_of(case, ours, [inputs])
        call()
        before = backends.own_operators().own_operator_calls()
        call()
        after = backends.own_operators().own_operator_calls()
    called = {name for name, count in after.items() if count == before[name] + 1}
    kind = "gated" if norm == "gated_rms" else "layer"
    assert called == {f"{kind}_norm_fwd", f"{kind}_norm_bwd"}


def test_missing_peers_are_named() -> None:
    found, missing = find(None, CPU)
    named = {provider.name for provider in found} | missing.keys()
    assert named == providers.MAKERS.keys() - set(providers.ON_REQUEST)
    assert named >= {"torch", "liger", "quack", "fla", "flash-attn", "apex", "transformer-engine"}
    assert named >= {"fusednorm", "fusednorm-cpu", "fusednorm-cuda", "fusednorm-enabled"}
    assert "onnxruntime" in named
    assert all(missing.values())


def test_onnxruntime_is_measured_at_inference_alone() -> None:
    """What it computes is checked with the others' results."""
    pytest.importorskip("onnxruntime")
    (provider,), _ = find(["onnxruntime"], CPU)
    assert provider.norms.keys() == {"layer_norm", "add", "add_rms"}
    modes = [f"{norm}/{phase}" for norm in provider.norms for phase in ("inference", "both")]
    chosen = [
        Case(mode, 8, 64, dtype, dtype) for mode in modes for dtype in ("float32", "bfloat16")
    ]
    found = measure(chosen, [provider], CPU, Settings(1, 0.0), progress=False)
    ran = [cell for cells in found for cell in cells if cell["provider"] == "onnxruntime"]
    assert {(c["mode"], c["dtype"], c["status"]) for c in ran} == {
        (f"{norm}/inference", "float32", "ok") for norm in provider.norms
    }
    assert find(["onnxruntime"], torch.device("meta"))[1] == {
        "onnxruntime": "it is measured on a cpu device, not meta"
    }


@pytest.mark.parametrize(
    ("kernels", "who"),
    [
        (["void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float, true>"], "ATen"),
        (["void at::native::LayerNormForwardCUDAKernel<float, float, true>"], "ATen"),
        (["at::native::fill", "kernel_cutlass_kernel_torch_vendorquackrmsnormRMSNorm"], "QuACK"),
        (["Memcpy DtoD"], "unknown kernels"),
        ([], "unknown kernels"),
    ],
)
def test_whose_kernel_was_torchs_rms_norm(kernels: list[str], who: str) -> None:
    assert providers.author(kernels) == f"ran {who}"


def test_what_ran_is_in_the_results() -> None:
    """Where torch's RMS norm may be somebody else's, the page and the table say whose it was."""
    (torchs,) = find(["torch"], CPU)[0]
    seen = dataclasses.replace(torchs, ran=lambda case, inputs: "ran QuACK")
    case = Case("rms_norm/forward", 8, 64, "float32", "float32")
    (cells,) = measure([case], [seen], CPU, Settings(2, 0.0), progress=False)
    found = made_up() | {"cells": cells}
    assert found["cells"][1]["note"] == "ran QuACK"
    assert not report.problems(found)
    assert ("torch", "ran QuACK in 1 cases") in report.facts(found)


# Files.


def made_up(scale: float = 1.0, noise: float = 0.0) -> results.Results:
    """Return results whose times are 10 us + 1 ns a row (forward) or three times that."""
    cells = []
    for case in cases(["bandwidth", "latency"], ["layer_norm/forward"], [("float32",) * 2], "cpu"):
        for provider, factor in ((COPY, 1.0), ("torch", 3.0), ("fusednorm-triton", 2.0 * scale)):
            base = factor * (10e-6 + 1e-9 * case.rows)
            rounds = [base * (1 + noise * step) for step in (-1, 0, 1)]
            cells.append(
                vars(case)
                | {"threads": 1, "bytes": floor_bytes(case), "provider": provider}
                | {"status": "ok", "note": "", "seconds": {"eager": rounds}}
            )
    cells.append(
        cells[1] | {"provider": "apex", "status": "wrong", "note": "z <off>", "seconds": {}}
    )
    return {
        "schema": results.SCHEMA,
        "environment": {"device": "A & B", "date": "2026-01-02 03:04 UTC", "commit": "abc"}
        | {"clock": "wall", "threads": "2", "load": "0.1 on 2 processors before the run"},
        "providers": {"torch": "2"},
        "missing": {"liger": "liger-kernel is not installed"},
        "copy_gbps": 10.0,
        "cells": cells,
    }


def test_results_survive_the_file(tmp_path: Path) -> None:
    found = made_up()
    path = results.path_of(found, tmp_path)
    assert path.name == "a-b-2026-01-02.json"
    results.save(found, path)
    assert results.load(path) == found


def test_compare_shows_what_moved_beyond_the_spread() -> None:
    before, after = made_up(), made_up(scale=1.1)
    moved = [c for c in compare.changes(before, after, "eager") if c.verdict]
    assert {c.provider for c in moved} == {"fusednorm-triton"}
    assert {c.verdict for c in moved} == {"slower"}
    assert all(math.isclose(c.factor, 1.1) for c in moved)
    assert {c.verdict for c in compare.changes(after, before, "eager")} == {"", "faster"}
    noisy = compare.changes(made_up(noise=0.2), made_up(1.1, noise=0.2), "eager")
    assert not any(c.verdict for c in noisy)
    assert "slower" in compare.describe(before, after)


def test_report_opens_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "made-up.json"
    written = {file.name for file in report.write(made_up(), path)}
    assert written == {
        *("made-up-bandwidth.svg", "made-up-latency.svg"),
        "made-up.html",
    }
    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "A &amp; B" in page
    assert "z &lt;off&gt;" in page
    assert "missing: liger-kernel is not installed" in page
    for plot in tmp_path.glob("*.svg"):
        drawing = plot.read_text(encoding="utf-8")
        assert not re.search(r"<image|<script|@import|url\([^#]|href=\"[^#]", drawing), plot


def test_report_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU machine without it still leaves the table and the page."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (page,) = report.write(made_up(), tmp_path / "made-up.json")
    assert "<table>" in page.read_text(encoding="utf-8")
    assert "no plots" in capsys.readouterr().err


def test_ours_is_what_users_get() -> None:
    """A backend that has to be asked for does not stand in for the automatic choice."""
    found = made_up()
    for cell in [c for c in found["cells"] if c["provider"] == "fusednorm-triton"]:
        slower = {what: [2 * s for s in rounds] for what, rounds in cell["seconds"].items()}
        found["cells"].append(cell | {"provider": "fusednorm", "seconds": slower})
    cells = next(iter(results.by_case(found).values()))
    assert report.best(cells, "eager", ours=True) == "fusednorm-triton"
    assert math.isclose((report.versus(cells, "eager") or (0.0,))[0], 0.75)


def test_summary_is_the_geometric_mean_over_cases() -> None:
    (line,) = report.summary(made_up(), "eager")
    assert line.startswith("forward: 1.50x as fast as the best other provider")
    cases = len(results.by_case(made_up()))
    assert line.endswith(f"faster in {cases} of {cases} cases")


def test_tables_align_numbers_to_the_right() -> None:
    rows = [["a", "1.5 us", "x"], ["bcd", "10.5 us", "yz"]]
    assert text.table(rows, ["name", "time", "what"]).splitlines() == [
        *("name     time  what", "----  -------  ----"),
        *("a      1.5 us  x", "bcd   10.5 us  yz"),
    ]
    assert text.table([["k", "v"], ["longer", "w"]]).splitlines() == ["k       v", "longer  w"]


def test_progress_says_how_far(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(text.progress([1, 2, 3], "case")) == [1, 2, 3]
    assert "3/3 cases" in capsys.readouterr().err


def test_table_marks_the_best_and_sets_ours_against_it() -> None:
    lines = report.table(made_up(), "eager").splitlines()
    row = next(line for line in lines if "8192x1024" in line or "16384x1024" in line)
    assert re.search(r"33%.*50% \*.*1\.50x", row), row
    assert any("WRONG" in line for line in lines)


# The page that quotes it.


def test_the_page_quotes_results_that_exist() -> None:
    """Its table is the one that the results file gives, and no other figure stands beside it."""
    page = excerpt.PAGE.read_text(encoding="utf-8")
    section = page.split("\n## Benchmark\n")[1].split("\n## ")[0]
    (name,) = re.findall(excerpt.FIRST.format(name="([^ ]+)"), section)
    found = results.load(results.FOLDER / f"{name}.json")
    before, _, rest = section.partition(excerpt.FIRST.format(name=name))
    quoted, _, after = rest.partition(excerpt.LAST)
    assert quoted.strip() == excerpt.markdown(found, name), "run python -m bench report --readme"
    assert not re.findall(r"\d[\d.]*\s?(?:x|%|[mun]s|[GT]B/s)(?!\w)", before + after)
    for plot in re.findall(r"\((\.\./bench/results/[^)]*)\)", quoted):
        assert (excerpt.PAGE.parent / plot).stat().st_size > 1000


def test_an_excerpt_takes_the_place_of_the_former(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    marks = excerpt.FIRST.format(name="old") + "\nold\n" + excerpt.LAST
    page.write_text(f"before\n{marks}\nafter\n", encoding="utf-8")
    for name in ("new", "newer"):
        excerpt.write(made_up(), name, page)
        made = page.read_text(encoding="utf-8")
        assert made.startswith(f"before\n<!-- bench/results/{name}.json -->\n| case | copy | torch")
        assert made.endswith(f"{name}-bandwidth.svg)\n<!-- end of the results -->\nafter\n")
    assert re.search(r"\n\| LayerNorm, forward \| .* \| \*\*.* 50%\*\* \| .*1\.50x ±0% \|\n", made)
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="expected one place for results, found 0"):
        excerpt.write(made_up(), "new", page)


# Bad input.

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--provider", "nobody"],
        ["--without", "nobody"],
        ["--seconds", "1"],
        ["--provider", "liger", "--device", "cpu"],
        ["--group", "nothing"],
        ["--mode", "layer_norm"],
        ["--threads", "0"],
        ["--group", "quick", "--full"],
        ["tune", "--device", "tpu"],
        ["nonsense"],
        ["compare", "absent.json", "absent.json"],
        ["report", "absent.json"],
        ["--clock", "process", "--threads", "2"],
        pytest.param(["--device", "cuda"], marks=WITHOUT_GPU),
        pytest.param(["tune", "--device", "cuda"], marks=WITHOUT_GPU),
    ],
    ids=" ".join,
)
def test_bad_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
    finally:
        torch.set_num_threads(threads)
    assert stopped.value.code == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"(bench|python -m bench[\w -]*): ", complaint), complaint


@WITHOUT_GPU
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "usage: bench/on_gpu.sh check|bench|tune OUTDIR"),
        (["nothing"], 2, "usage: bench/on_gpu.sh check|bench|tune OUTDIR"),
        (["check"], 1, "on_gpu: expected a GPU that torch can use, found none"),
    ],
    ids=["nothing", "no such command", "no GPU"],
)
def test_gpu_script_says_what_is_wrong(
    tmp_path: Path, arguments: list[str], code: int, complaint: str
) -> None:
    script = Path(__file__).parents[1] / "bench" / "on_gpu.sh"
    done = subprocess.run(
        ["bash", str(script), *arguments, *[str(tmp_path)] * bool(arguments)],
        env={**os.environ, "PYTHON": sys.executable, "DEVICE": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith(complaint)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": 0}', '{"schema": "1"}'])
def test_file_of_another_schema(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    for command in (["report"], ["compare", str(path)]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, str(path)])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"bench: {path}: expected ")


def test_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The smallest run leaves a file that `report` and `compare` read."""
    monkeypatch.setattr("bench.cases.shapes", lambda *_: [(8, 64), (4, 96)])
    monkeypatch.setattr(timing, "asymptotic_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    path = tmp_path / "small.json"
    arguments = ["--device", "cpu", "--mode", "layer_norm/forward", "--provider", "torch"]
    assert main([*arguments, "--out", str(path)]) == 0
    assert "one eager call" in capsys.readouterr().out
    found = results.load(path)
    assert {"device", "torch", "commit", "python", "date", "clock"} <= found["environment"].keys()
    assert {(cell["rows"], cell["provider"]) for cell in found["cells"]} == {
        (rows, provider) for rows in (8, 4) for provider in (COPY, "torch")
    }
    assert main(["report", str(path)]) == 0
    assert main(["compare", str(path), str(path)]) == 0
    assert "4 of 4 cells within the spread" in capsys.readouterr().out


def test_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of time, a run leaves what it has; the next one with the same file adds the rest."""
    monkeypatch.setattr("bench.cases.shapes", lambda *_: [(8, 64), (4, 96)])
    monkeypatch.setattr(timing, "asymptotic_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(timing, "WARM_UP", 0.0)
    path = tmp_path / "parts.json"
    arguments = ["--device", "cpu", "--mode", "layer_norm/forward", "--out", str(path)]
    arguments += ["--provider", "torch", "--provider", "fusednorm-torch"]
    arguments += ["--without", "fusednorm-torch"]
    assert main([*arguments, "--seconds", "-1"]) == 1
    assert results.load(path)["cells"] == []
    assert "2 of 2 cases are left" in capsys.readouterr().out
    clock = Clock()
    monkeypatch.setattr("bench.measure.time.monotonic", clock)

    def advance(*_: object) -> None:
        clock.now += 3.0

    monkeypatch.setattr("bench.measure.check", lambda *_: advance() or "")
    assert main([*arguments, "--seconds", "2"]) == 1
    first = results.load(path)["cells"]
    assert {cell["rows"] for cell in first} == {8}
    assert main([*arguments, "--seconds", "2"]) == 0
    cells = results.load(path)["cells"]
    assert cells[: len(first)] == first
    assert {cell["rows"] for cell in cells[len(first) :]} == {4}
    assert {cell["provider"] for cell in cells} == {COPY, "torch"}
    found = results.load(path)
    found["environment"]["device"] = "another"
    results.save(found, path)
    with pytest.raises(SystemExit):
        main([*arguments, "--seconds", "2"])
    assert "another device" in capsys.readouterr().err


def test_what_was_measured_outlives_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cases.shapes", lambda *_: [(8, 64), (4, 96)])
    monkeypatch.setattr(timing, "asymptotic_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(timing, "WARM_UP", 0.0)

    def end(case: Case, *_: object) -> str:
        if case.rows == 4:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr("bench.measure.check", end)
    path = tmp_path / "ended.json"
    arguments = ["--device", "cpu", "--mode", "layer_norm/forward", "--provider", "torch"]
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--out", str(path)])
    assert {cell["rows"] for cell in results.load(path)["cells"]} == {8}
    assert [file.name for file in tmp_path.iterdir()] == ["ended.json"]


# Tuning.


def test_tuning_proposes_what_gains_more_than_the_spread() -> None:
    pytest.importorskip("triton")
    from bench import tune

    now, better = (32, 4), (16, 2)
    gains = tune.choose(tune.Rung(1024, now, {now: [10e-6] * 3, better: [9e-6] * 3}))
    noise = tune.choose(tune.Rung(2048, now, {now: [7e-6, 10e-6, 13e-6], better: [9e-6] * 3}))
    assert gains.best == better
    assert gains.reason == "N=1024: 9.0 us, 10.0 us before"
    assert noise == tune.Choice(2048, now, "")
    tiers = tune.ladder([noise, gains, tune.Choice(4096, now, "")])
    assert [tier[:3] for tier in tiers] == [(1024, *better), (4096, *now)]
    before = tune.policy_text()
    for direction in ("forward", "backward"):
        for itemsize in (2, 4, 8):
            after = tune.rewrite(before, direction, itemsize, tiers)
            compile(after, "config.py", "exec")
            assert "+        Tier(1024, 16, 2)," in tune.diff(before, after)
            assert "+        # N=1024: 9.0 us, 10.0 us before" in tune.diff(before, after)
    with pytest.raises(ValueError, match="no forward tiers of 3 bytes"):
        tune.rewrite(before, "forward", 3, tiers)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_tuning_tries_no_tile_twice(direction: str) -> None:
    pytest.importorskip("triton")
    from bench import tune

    for cols, most in ((256, 12), (4096, 4)):
        now = tune.tier(direction, 2, cols)
        chosen = tune.different(tune.Where(direction, 2), cols, (now, *tune.CANDIDATES))
        assert chosen[0] == now
        assert 1 < len(chosen) <= most
        tiles = set()
        for candidate in chosen:
            with tune.forced_tier(direction, 2, candidate):
                tiles.add(tune.tile(direction, 2, cols))
        assert len(tiles) == len(chosen)


@WITHOUT_GPU
def test_tuning_runs_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every candidate is checked and timed; a wrong one and one that fails lose their place."""
    pytest.importorskip("triton")
    from bench import tune

    monkeypatch.setattr(tune, "COLS", (64, 257))
    monkeypatch.setattr(tune, "CANDIDATES", ((8, 1), (32, 1)))
    monkeypatch.setattr(tune, "choose", lambda rung: tune.Choice(rung.cols, (8, 1), "planted"))
    arguments = ["tune", "--device", "cpu", "--dtype", "float32", "--direction"]
    for direction in ("forward", "backward"):
        assert main([*arguments, direction]) == 0
        done = capsys.readouterr()
        assert "measured 2 of 2 rungs" in done.err
        assert "+        Tier(257, 8, 1)," in done.out
    assert main([*arguments, "forward", "--seconds", "-1"]) == 0
    done = capsys.readouterr()
    assert "measured 0 of 2 rungs" in done.err
    monkeypatch.setattr(tune, "check", lambda *_: "planted")
    assert tune.measure_rung(tune.Where("forward", 4), "float32", 64, CPU) is None


def test_forced_tier_is_undone() -> None:
    pytest.importorskip("triton")
    from bench import tune
    from fusednorm.triton_kernels.config import forward_config

    arch = tune.H100
    usual = forward_config(1024, 2, arch)
    with tune.forced_tier("forward", 2, (8, 1)):
        assert forward_config(1024, 2, arch) != usual
    assert forward_config(1024, 2, arch) == usual
