"""What the compilers make of the kernels: spills, vectors and pipelines, without a device.

`CODEGEN_FULL=1` compiles every rung for every target instead of a selection.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import triton
from filelock import FileLock  # comes with torch

pytest.importorskip("triton")

sys.path.append(str(Path(__file__).parents[1]))

from bench import model
from fusednorm.triton_kernels.config import Architecture, backward_config, forward_config
from fusednorm.triton_kernels.launch import LARGEST_CLUSTER

ROOT = Path(__file__).parents[1]
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942", "gfx950")
READ = ("ld", "async")
ACTIVATIONS = {
    **{"x": READ, "residual": READ, "dz": READ, "dh": READ},
    **{"z": ("st",), "dx": ("st",), "dresidual": ("st",), "h": (*READ, "st")},
    **{"gate_input": READ, "dgate_input": ("st",)},
}

Entry = dict[str, Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    """Every compiled kernel, from a process in which Triton does not interpret."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers of one run compile once between them
    path = folder / "codegen.json"
    with FileLock(folder / "codegen.lock"):
        if not path.exists():
            path.write_text(compile_everything())
    entries: list[Entry] = json.loads(path.read_text())
    return entries


def compile_everything() -> str:
    """Run the report outside of the interpreter; return its JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "codegen", "--json"]
    if os.environ.get("CODEGEN_FULL"):
        command.append("--full")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(done.stderr, pytrace=False)
    return done.stdout


@pytest.fixture(scope="module")
def rungs(report: list[Entry]) -> list[Entry]:
    """The kernels as users get them."""
    return [entry for entry in report if "error" not in entry and not entry["planted"]]


def planted(report: list[Entry], fault: str) -> list[Entry]:
    """Return the kernels with a planted fault."""
    return [entry for entry in report if entry["planted"] == fault]


def main_backward(entries: Iterable[Entry]) -> list[Entry]:
    """Return the persistent backward kernels."""
    return [e for e in entries if e["kernel"].endswith("_norm_bwd_kernel")]


def spill(entry: Entry) -> str:
    """Describe the registers that a kernel spills; empty where there are none."""
    if entry["spills"] or entry["stack"]:
        return f"{entry['spills']} spills, {entry['stack']} bytes of stack"
    return ""


def narrow(entry: Entry) -> str:
    """Describe the accesses to activations that are narrower than the rows allow."""
    narrower = [
        f"{name}: {kind} of {width} bytes"
        for name, kinds in ACTIVATIONS.items()
        for kind in kinds
        for width in entry["accesses"].get(name, {}).get(kind, {})
        if int(width) < entry["vector_bytes"]
    ]
    # The assembler has to keep what the compiler asked for.
    for opcode, kind in (("LDG", "ld"), ("STG", "st"), ("LDGSTS", "async")):
        asked = {w for kinds in entry["accesses"].values() for w in kinds.get(kind, {})}
        narrower += [
            f"{opcode} of {width} bytes, asked were {sorted(asked)}"
            for width in entry["machine"].get(opcode, {})
            if width not in asked
        ]
    return ", ".join(narrower)


def synchronous(entry: Entry) -> str:
    """Describe the activations that a pipelined kernel does not copy asynchronously."""

    def asynchronous(name: str) -> bool:
        widths = entry["accesses"][name].get("async", {})
        return any(int(width) >= entry["vector_bytes"] for width in widths)

    fetched = ("x", "gate_input", "dz") if entry["kernel"].startswith("gated") else ("h", "dz")
    waits = [name for name in fetched if not asynchronous(name)]
    if "LDGSTS" not in entry["machine"]:
        waits.append("no LDGSTS")
    return ", ".join(waits)


def check(entries: list[Entry], describe: Callable[[Entry], str]) -> None:
    """Fail with one line for each entry that `describe` finds something to say about."""
    assert entries, "nothing was compiled"
    lines = [f"{name(e)}: {text}" for e in entries if (text := describe(e))]
    if lines:
        pytest.fail(f"{len(lines)} of {len(entries)} kernels\n" + "\n".join(lines), pytrace=False)


def name(entry: Entry) -> str:
    """Return the name of an entry's rung."""
    constants = entry["constants"]
    return (
        f"{entry['arch']} {entry['kernel']} ({entry['kind']}) {entry['dtype']} N={entry['cols']} "
        f"rows={entry['rows']} warps={entry['num_warps']} {constants.get('FORM', '')} "
        f"tile={constants.get('ROWS')}x{constants.get('CHUNKS')}x{constants.get('BLOCK_N')}"
    )


@pytest.mark.parametrize("arch", NVIDIA + AMD)
def test_everything_compiles(report: list[Entry], arch: str) -> None:
    errors = [
        f"{e['kind']} {e['dtype']} N={e['cols']}: {e['error']}"
        for e in report
        if e["arch"] == arch and "error" in e
    ]
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)


@pytest.mark.parametrize("arch", NVIDIA + AMD)
def test_every_kernel_and_form_is_compiled(rungs: list[Entry], arch: str) -> None:
    entries = [e for e in rungs if e["arch"] == arch]
    assert {e["kernel"] for e in entries} == {
        "layer_norm_fwd_kernel",
        "layer_norm_bwd_kernel",
        "layer_norm_bwd_sums_kernel",
        "layer_norm_bwd_finalize_kernel",
        "gated_norm_fwd_kernel",
        "gated_norm_bwd_kernel",
        "gated_norm_bwd_sums_kernel",
        "layer_norm2d_fwd_kernel",
        "layer_norm2d_bwd_kernel",
    }
    assert {e["dtype"] for e in entries} >= {"bfloat16", "float32", "float64"}
    forms = {e["constants"]["FORM"] for e in main_backward(entries)}
    assert forms == {"resident", "reload", "split"}


TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def _tuned_since(releases: dict[str, tuple[int, int]]) -> list[Any]:
    """Return NVIDIA's targets; rows of 32768 columns spill before a release: slower, not wrong."""
    return [
        pytest.param(
            arch,
            marks=pytest.mark.xfail(
                releases.get(arch, (0, 0)) > TRITON,
                reason="Triton before it had clusters keeps rows of 32768 columns in spills",
                strict=True,
            ),
        )
        for arch in NVIDIA
    ]


@pytest.mark.parametrize("arch", [*_tuned_since({"sm_80": (3, 8), "sm_90": (3, 9)}), *AMD])
def test_nothing_spills(rungs: list[Entry], arch: str) -> None:
    check([e for e in rungs if e["arch"] == arch], spill)


@pytest.mark.parametrize("arch", NVIDIA + AMD)
def test_shared_memory_fits(rungs: list[Entry], arch: str) -> None:
    check(
        [e for e in rungs if e["arch"] == arch],
        lambda e: (
            f"{e['shared']} bytes of {e['shared_limit']}" if e["shared"] > e["shared_limit"] else ""
        ),
    )


@pytest.mark.parametrize("arch", NVIDIA)
def test_programs_that_the_grid_counts_on_fit(rungs: list[Entry], arch: str) -> None:
    """A program too many would wait until the others are done, and double the time."""
    counted = [e for e in rungs if e["arch"] == arch and e["counted"] > 0]
    assert {e["counted"] for e in counted} >= {1, 2, 3, 4}
    check(
        counted,
        lambda e: (
            f"{e['counted']} counted on, {e['programs']} fit: {e['registers']} registers, "
            f"{e['shared']} bytes"
            if e["programs"] < e["counted"]
            else ""
        ),
    )


@pytest.mark.parametrize("arch", _tuned_since({"sm_90": (3, 9)}))
def test_the_grid_counts_on_two_programs_where_two_fit(rungs: list[Entry], arch: str) -> None:
    """One alone waits for its rows: 54 to 82 % of a copy by the model, where two reach it."""
    plain = [e for e in main_backward(rungs) if e["arch"] == arch and not e["terms"]]
    # What arithmetic in float64 takes differs too much between devices.
    counted = [e for e in plain if e["kind"] == "backward" and e["dtype"] != "float64"]
    assert {min(2, e["programs"]) for e in counted} == {1, 2}
    check(
        counted,
        lambda e: f"{e['programs']} fit" if e["programs"] >= 2 > e["counted"] else "",
    )


@pytest.mark.parametrize("arch", NVIDIA)
def test_all_programs_of_a_backward_fit_at_once(rungs: list[Entry], arch: str) -> None:
    """A partial wave takes as long as a whole one, of clusters as well, and of samples."""

    def several(entry: Entry) -> bool:
        constants = entry["constants"]
        return bool(constants.get("SAMPLED")) or constants.get("GROUPS", 1) > 1

    def left_over(entry: Entry) -> str:
        places = [
            model.places(gpu, entry["counted"], entry["cluster"])
            for gpu in model.GPUS[arch].values()
        ]
        return f"{entry['grid']} in {places}" if entry["grid"] > min(places) else ""

    counted = [e for e in rungs if e["arch"] == arch and e["counted"] > 0]
    clusters = {1} if arch == "sm_80" or LARGEST_CLUSTER == 1 else {1, 4}
    assert {e["cluster"] for e in counted} >= clusters
    assert any(map(several, counted))

    def needed(entry: Entry) -> bool:
        """Each column block, of each sample or group, needs a program."""
        blocks = -(-entry["cols"] // entry["constants"]["BLOCK_N"])
        split = entry["constants"].get("FORM") == "split"
        return split and (several(entry) or entry["grid"] == blocks)

    check([e for e in counted if not needed(e)], left_over)


@pytest.mark.parametrize("arch", NVIDIA)
def test_activations_move_in_full_vectors(rungs: list[Entry], arch: str) -> None:
    entries = [e for e in rungs if e["arch"] == arch and e["kind"] != "finalize"]
    assert any(e["vector_bytes"] == 16 for e in entries)
    check(entries, narrow)


@pytest.mark.parametrize("arch", AMD)
def test_activations_move_in_full_vectors_on_amd(rungs: list[Entry], arch: str) -> None:
    def absent(entry: Entry) -> str:
        kinds = ("load", "store") if "sums" not in entry["kernel"] else ("load",)
        found = entry["machine"]
        return ", ".join(
            f"no {kind} of 16 bytes"
            for kind in kinds
            if not any(opcode.endswith(f"{kind}_dwordx4") for opcode in found)
        )

    aligned = [e for e in rungs if e["arch"] == arch and e["vector_bytes"] == 16]
    check([e for e in aligned if e["kind"] != "finalize"], absent)


@pytest.mark.parametrize("arch", NVIDIA)
def test_pipelined_backward_copies_asynchronously(rungs: list[Entry], arch: str) -> None:
    # An asynchronous copy moves at least four bytes.
    pipelined = [
        e
        for e in main_backward(rungs)
        if e["arch"] == arch and e["constants"]["NUM_STAGES"] > 1 and e["vector_bytes"] >= 4
    ]
    assert any(e["vector_bytes"] == 16 for e in pipelined)
    check(pipelined, synchronous)


@pytest.mark.skipif(LARGEST_CLUSTER == 1, reason="Triton before 3.9")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_long_rows_stay_in_a_cluster(rungs: list[Entry], arch: str) -> None:
    """They are read once, by the processors that add them up together."""
    names = "layer_norm_fwd_kernel", "layer_norm_bwd_kernel"
    long = [e for e in rungs if e["arch"] == arch and e["cols"] == 32768 and e["kernel"] in names]
    narrow = [e for e in long if e["dtype"] != "float64"]
    assert {(e["kernel"], e["cluster"]) for e in narrow} >= {*zip(names, (2, 4), strict=True)}
    check(
        narrow,
        lambda e: "" if e["cluster"] > 1 and e["moved_bytes"] == e["floor_bytes"] else "read twice",
    )


@pytest.mark.parametrize("arch", NVIDIA)
def test_finalize_waits_before_it_touches_memory(rungs: list[Entry], arch: str) -> None:
    """As a dependent launch it may run beside the kernel that writes its partial rows."""
    entries = [e for e in rungs if e["arch"] == arch]
    finalize = [e for e in entries if e["kind"] == "finalize"]
    backward = [e for e in main_backward(entries) if e["kind"] == "backward" and not e["terms"]]
    expected = None if arch == "sm_80" else 0
    check(finalize, lambda e: "" if e["too_early"] == expected else f"{e['too_early']} before")
    assert {bool(e["lets_start"]) for e in backward} == {arch != "sm_80"}
    others = [e for e in entries if e["kind"] != "finalize"]
    check(others, lambda e: "waits" if e["too_early"] is not None else "")


def test_number_of_rows_is_not_compiled_in(rungs: list[Entry]) -> None:
    """Rows that divide 16, that do not, and a lone row share one kernel."""
    variants: dict[tuple[object, ...], dict[str, set[int]]] = {}
    for e in rungs:
        key = (e["arch"], e["kernel"], e["kind"], e["dtype"], e["parameters"], e["cols"])
        kernels = variants.setdefault(
            (*key, e["padding"], e["jumps"], e["terms"], e["positions"]), {}
        )
        kernels.setdefault(e["specialised"], set()).add(e["rows"])
    assert any(len(set().union(*kernels.values())) > 1 for kernels in variants.values()), (
        "no kernel was compiled for two numbers of rows"
    )
    several = [
        f"{' '.join(map(str, key))}: rows {' | '.join(str(sorted(rows)) for rows in k.values())}"
        for key, k in variants.items()
        if len(k) > 1
    ]
    if several:
        pytest.fail("kernels by number of rows\n" + "\n".join(several), pytrace=False)


def test_report_shows_planted_spills(report: list[Entry]) -> None:
    entries = planted(report, "one warp")
    assert {e["arch"] for e in entries} == {"sm_90", "gfx942"}
    assert all(spill(e) for e in entries)


def test_report_shows_planted_narrow_access(report: list[Entry]) -> None:
    entries = planted(report, "odd stride")
    assert {e["kind"] for e in entries} == {"forward", "backward"}
    assert all("of 2 bytes" in narrow(e) for e in entries)


def test_report_shows_planted_synchronous_backward(report: list[Entry]) -> None:
    entries = planted(report, "one stage")
    assert entries
    assert all(synchronous(e) == "h, dz, no LDGSTS" for e in entries)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_policy_counts_threads_not_warps(itemsize: int) -> None:
    """A device with warps of 64 gets the same tiles and threads as one with warps of 32."""

    def tiles(cols: int, warp_size: int) -> list[object]:
        arch = Architecture(warp_size, processors=132, shared_bytes=232448, registers=65536)
        backward = backward_config(cols, itemsize, arch, 2 * itemsize)
        found = [forward_config(cols, itemsize, arch).tile, backward.tile, backward.sums]
        return [t and dataclasses.replace(t, num_warps=t.num_warps * warp_size) for t in found]

    for cols in (1, 3, 64, 257, 1000, 1024, 4096, 8192, 8193, 12288, 40000, 131072):
        assert tiles(cols, 32) == tiles(cols, 64), cols
