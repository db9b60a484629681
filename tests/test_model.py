"""The model of a processor: every limit binds where it should, and a call is all of its kernels.

And the table of what it predicts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from bench import model, table

Entry = dict[str, Any]


def kernel(**changes: Any) -> Entry:
    """Return a persistent backward of 8192 x 2048 in bfloat16, and what the model says of it."""
    entry: Entry = {
        **{"arch": "sm_90", "kernel": "layer_norm_bwd_kernel", "cols": 2048, "cluster": 1},
        **{"registers": 124, "num_warps": 4, "shared": 16440, "shared_limit": 232448},
        **{"reads": 4, "writes": 2, "counted": 4, "instructions": 331.0, "grid": 264},
        **{"elements": 8192 * 2048, "machine": {"LDGSTS": {16: 4}}},
        "constants": {"ROWS": 1, "CHUNKS": 2, "BLOCK_N": 1024, "FORM": "resident", "NUM_STAGES": 3},
    }
    entry |= changes
    return entry | model.occupancy(entry)


def forward(**changes: Any) -> Entry:
    """Return its forward."""
    entry: Entry = {
        **{"registers": 72, "shared": 64, "instructions": 256.0},
        **{"kernel": "layer_norm_fwd_kernel", "counted": 0, "reads": 2, "writes": 2},
        **{"constants": {"ROWS": 1, "CHUNKS": 2, "BLOCK_N": 1024}, "grid": 8192, "machine": {}},
    }
    return kernel(**entry | changes)


def h200(*launches: Entry) -> tuple[float, str]:
    """Return the share of a copy's speed and what holds the call up."""
    return model.predictions([*launches])["H200"]


def test_a_lone_program_waits_for_its_rows() -> None:
    """Two on each processor do not: what the policy gives a small batch."""
    alone, limit = h200(kernel(grid=132))
    assert 0.5 < alone < 0.7
    assert limit == "waiting"
    assert h200(kernel())[0] > 0.95


def test_a_faster_memory_is_waited_for_more() -> None:
    alone = model.predictions([kernel(grid=132)])
    assert alone["H100"][0] > alone["H200"][0]


@pytest.mark.parametrize("arch", model.GPUS)
def test_no_call_is_faster_than_a_copy(arch: str) -> None:
    for entry in (kernel(arch=arch), forward(arch=arch), kernel(arch=arch, instructions=1.0)):
        for share, _ in model.predictions([entry]).values():
            assert 0 < share <= 1


def test_instructions_bind_where_they_outlast_the_bytes() -> None:
    assert h200(forward())[1] == "memory"
    share, limit = h200(forward(instructions=2000.0))
    assert limit == "issue slots"
    assert h200(forward(instructions=4000.0))[0] == pytest.approx(share / 2)


def test_a_partial_wave_takes_as_long_as_a_whole_one() -> None:
    """Of clusters of four an H100 holds 32: a group of 18 processors holds no more than one of 16.

    The 33rd takes the time of 32.
    """
    gpu = model.GPUS["sm_90"]["H100"]
    assert [model.places(gpu, 1, size) for size in (1, 2, 4, 8)] == [132, 66, 32, 16]
    assert model.places(gpu, 2, 8) == 32
    waits = [
        kernel(cluster=4, counted=1, grid=grid, cols=32768, elements=grid * 100 * 2048)
        for grid in (32, 33, 64, 65)
    ]
    seconds = [entry["seconds"]["H100"]["waiting"] for entry in waits]
    assert seconds[1] == pytest.approx(2 * seconds[0])
    assert seconds[2] == seconds[1]
    assert seconds[3] == pytest.approx(3 * seconds[0])


def test_a_call_is_all_of_its_kernels() -> None:
    """The split form reads h and dz twice: ten bytes an element for the six of a copy."""
    sums = kernel(kernel="layer_norm_bwd_sums_kernel", counted=0, writes=0, grid=8192)
    main = kernel()
    together, _ = h200(sums, main)
    alone, _ = h200(main)
    assert together < alone
    slow = max(sums["seconds"]["H200"].values()) / max(main["seconds"]["H200"].values())
    assert together == pytest.approx(alone / (1 + slow))


def test_a_row_that_no_cache_holds_is_fetched_twice() -> None:
    """132 rows of a looped forward: 35 MB in bfloat16, 69 in float32, of 60 of an H200."""
    looped = {"ROWS": 1, "CHUNKS": 1, "BLOCK_N": 8192, "LOOPED": 1}
    shape = {"constants": looped, "cols": 131072, "grid": 256, "elements": 256 * 131072}
    shape |= {"num_warps": 32, "registers": 48}
    narrow, wide = forward(**shape), forward(**shape, reads=4, writes=4)
    seconds = [entry["seconds"]["H200"]["memory"] for entry in (narrow, wide)]
    assert seconds[1] == pytest.approx(3 * seconds[0])  # 12 bytes an element and 4


def test_programs_that_fit() -> None:
    """Registers in units of a warp, shared memory with its reserve, and 64 warps."""
    assert kernel()["programs"] == 4
    assert kernel(registers=32, shared=0)["programs"] == 16
    assert kernel(registers=32, shared=0, num_warps=32)["programs"] == 2
    assert kernel(shared=100_000)["programs"] == 2


def tabulated(launches: list[Entry], dtype: str = "bfloat16") -> list[table.Row]:
    """Return the rows of a call."""
    compiled = {"kind": "backward", "dtype": dtype, "spills": 0}
    rows = [{**launch, **compiled, "machine": {}} for launch in launches]
    rows[-1]["predicted"] = model.predictions(launches)
    return [table.row(row) for row in rows]


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    rows = tabulated([kernel(kernel="layer_norm_bwd_sums_kernel", counted=0, writes=0), kernel()])
    table.save(rows, tmp_path / "table.csv")
    assert table.load(tmp_path / "table.csv") == rows
    assert [row["kernel"] for row in rows] == ["row sums", "backward"]
    assert [row["H200"] != "" for row in rows] == [False, True]


def test_a_table_beside_an_earlier_one() -> None:
    """What changed, what did not, and what only one of them has."""
    before = tabulated([kernel(grid=132)]) + tabulated([kernel()], "float16")
    after = tabulated([kernel(cluster=2)]) + tabulated([kernel()], "float32")
    shown = table.show(after, before).splitlines()
    assert [line.split()[1] for line in shown[2:]] == ["bfloat16", "float32", "float16"]
    changed, new, gone = shown[2:]
    assert "4 -> 4x2" in changed
    assert f"{before[0]['H200']} -> {after[0]['H200']}" in changed
    assert "1x2x1024" in changed
    assert "- -> 1x2x1024" in new
    assert "1x2x1024 -> -" in gone
    assert "->" not in table.show(after, after)


def test_a_kernel_that_does_not_compile_is_no_row() -> None:
    broken = {"error": "OutOfResources", "kind": "backward", "dtype": "float32", "cols": 64}
    with pytest.raises(ValueError, match="backward float32 N=64: OutOfResources"):
        table.row(broken)
