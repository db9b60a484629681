"""DTensors, parallel plans, and the wrappers of torch.distributed, on four processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes, processes

from fusednorm import backends

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def started() -> Iterator[list[Processes]]:
    """Yield the processes of this module, started once."""
    with processes(4, "distributed_cases") as first:
        yield [first]


@pytest.fixture
def ranks(started: list[Processes]) -> Processes:
    """Return processes that have not been ended by a case before."""
    if not started[0].alive:
        pytest.fail("a case before this one ended the processes")
    return started[0]


# Rows ---------------------------------------------------------------------------------------------

FUNCTIONS = [
    "layer_norm",
    "rms_norm",
    "add_layer_norm",
    "add_rms_norm",
    "every_term",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "gated_layer_norm",
    "gated_rms_norm",
    "layer_norm2d",
    "rms_norm2d",
]
# The mesh, the batch and the placement of x and residual; 3 samples leave ranks a shorter or no
# part.
BY_ROWS = [("2", (4, 5), "0"), ("4", (3, 5), "0"), ("4", (2, 6), "1"), ("2x2", (3, 4), "0 1")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mesh", "batch", "place"), BY_ROWS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sharded_rows(
    ranks: Processes, name: str, mesh: str, batch: tuple[int, ...], place: str, dtype: torch.dtype
) -> None:
    """Nothing is communicated, and no bit of outputs, dx and dresidual changes."""
    places = {"x": place, "residual": place, "z": place}
    for ran, *torchs in ranks.run("rule", name, mesh, batch, dtype, places):
        # Without kernels a plain norm is torch's own operator, whose rule may gather uneven parts.
        assert ran == ({}, {}) or (ran in torchs and "cpu" not in backends.available())


# An operand that is elsewhere is moved: the function, the places, and where z is.
OTHERWISE: list[tuple[str, dict[str, str]]] = [
    ("add_layer_norm", {"x": "0", "residual": "R", "z": "0"}),
    ("add_layer_norm", {"x": "P", "residual": "1", "z": "1"}),
    ("add_layer_norm", {"x": "P", "residual": "R", "z": "R"}),
    ("add_layer_norm", {"x": "1", "residual": "0", "z": "0"}),
    ("add_layer_norm", {"x": "0", "residual": "0", "weight": "0", "z": "0"}),
    ("add_layer_norm", {"x": "R", "residual": "2", "z": "2"}),
    ("layer_norm", {"x": "0", "weight": "0", "z": "0"}),
    ("rms_norm", {"x": "R", "weight": "0", "z": "R"}),
    ("every_term", {"x": "0", "residual": "0", "scale": "0", "shift": "0", "z": "0"}),
    ("every_term", {"x": "1", "residual": "1", "scale": "0", "number": "0", "z": "1"}),
    ("every_term", {"x": "2", "residual": "2", "z": "2"}),
    ("modulated_layer_norm", {"x": "0", "scale": "2", "z": "0"}),
    ("modulated_rms_norm", {"x": "1", "scale": "0", "z": "1"}),
    ("gated_layer_norm", {"x": "0", "residual": "1", "weight": "0", "z": "0"}),
    ("gated_rms_norm", {"x": "2", "residual": "2", "z": "R"}),
    ("layer_norm2d", {"x": "1", "weight": "0", "z": "1"}),
    ("layer_norm2d", {"x": "2", "z": "2"}),
    ("rms_norm2d", {"x": "P", "z": "R"}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "places"), OTHERWISE)
def test_other_placements(
    ranks: Processes, name: str, places: dict[str, str], dtype: torch.dtype
) -> None:
    """The result is right, and never costs a collective or a byte more than torch's."""
    for ours, *torchs in ranks.run("rule", name, "2", (4, 4), dtype, places):
        if torchs and places["z"] != "2":  # of rows of 6 columns two numbers are many
            assert _count(ours) <= _count(torchs[0])
            assert _bytes(ours) <= _bytes(torchs[0])


Ran = tuple[dict[str, tuple[int, int]], ...]


def _count(ran: Ran) -> int:
    return sum(count for way in ran for count, _ in way.values())


def _bytes(ran: Ran) -> int:
    return sum(size for way in ran for _, size in way.values())


# Rows that are split ------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    # Uneven parts, and a rank without a column.
    ("mesh", "places", "cols"),
    [("2", "2", 512), ("4", "2", 601), ("4", "2", 3), ("2x2", "0 2", 96)],
)
def test_split_rows_against_float64(
    ranks: Processes, mesh: str, places: str, cols: int, dtype: torch.dtype, rms: bool
) -> None:
    """They are as exact as whole rows."""
    ranks.run("split_accuracy", mesh, places, rms, dtype, 0.0, cols)


def test_rows_are_split_over_one_dimension_of_the_mesh(ranks: Processes) -> None:
    """Over the other one they are replicated."""
    places = {"x": "2 2", "residual": "2 2", "z": "2 R"}
    ranks.run("rule", "every_term", "2x2", (4, 4), torch.float32, places)


@pytest.mark.parametrize("cols", [512, 601])
def test_split_rows_with_a_large_mean(ranks: Processes, cols: int) -> None:
    """A mean of 40000 costs no digit."""
    ranks.run("split_accuracy", "4", "2", False, torch.float32, 40000.0, cols)


@pytest.mark.parametrize("mean", [0.0, 40000.0])
@pytest.mark.parametrize("rms", [False, True])
def test_kernels_normalize_the_parts_of_split_rows(
    ranks: Processes, rms: bool, mean: float
) -> None:
    """A part's own mean is corrected; one without variance takes no part of the others' away."""
    ranks.run("split_parts", "4", rms, mean)


@pytest.mark.parametrize(("mesh", "count"), [("2", 2), ("4", 4)])
def test_collectives_of_split_rows(ranks: Processes, mesh: str, count: int) -> None:
    """Two numbers a row in each direction, one for RMS; torch gathers the rows."""
    rows, cols = 8 * 4, 6 * 40
    for ours, torchs in ranks.run("split_plain", mesh, False, 40000.0):
        assert ours == (
            {"all_gather_into_tensor": (1, count * rows * 2 * 8)},
            {"all_reduce": (1, rows * 2 * 4)},
        )
        assert _bytes(torchs) > rows * cols * 4
        assert _count(ours) <= _count(torchs)
    for (ours,) in ranks.run("split_plain", mesh, True, 0.0):
        assert ours == ({"all_reduce": (1, rows * 4)},) * 2


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    "places",
    [
        {"x": "0", "residual": "0"},
        {"x": "1", "residual": "R", "scale": "0"},
        {"x": "2", "residual": "2"},
        {"x": "2", "residual": "2", "weight": "0", "scale": "2"},
    ],
    ids=str,
)
def test_second_derivatives(ranks: Processes, places: dict[str, str], rms: bool) -> None:
    """Rows and columns differentiate twice."""
    ranks.run("second_derivatives", "2", places, rms)


# Dropout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mesh", "places"), [("2", "0"), ("4", "1"), ("2x2", "0 1"), ("2x2", "1 0"), ("2", "2")]
)
def test_one_mask_however_it_is_sharded(
    ranks: Processes, mesh: str, places: str, dtype: torch.dtype
) -> None:
    """The mask is that of the unsharded call."""
    ranks.run("dropout", mesh, places, dtype)


def test_dropout_without_a_shared_generator(ranks: Processes) -> None:
    """Every rank says so."""
    expected = (
        "ValueError: add_layer_norm: expected dropout_p with one generator on all ranks "
        "(torch.manual_seed), got several, for input with (Shard(dim=0),)"
    )
    assert ranks.run("unshared_dropout") == [expected] * 4


# Bad input and faults -----------------------------------------------------------------------------


def test_bad_inputs(ranks: Processes) -> None:
    """Every rank names the argument and the placement."""
    for got in ranks.run("bad_inputs"):
        assert "layer_norm_fwd.default does not have a sharding strategy" in got["operator"]
        assert got["plain residual"] == (
            "TypeError: add_layer_norm: expected residual to be a DTensor, as another argument "
            "is, with (Shard(dim=0),), got a plain Tensor"
        )
        assert got["plain input"] == (
            "TypeError: layer_norm: expected input to be a DTensor, as another argument is, with "
            "(Replicate(),), got a plain Tensor"
        )
        assert "expected scale to be a DTensor" in got["plain scale"]
        assert "expected residual on one mesh with the other arguments" in got["two meshes"]
        assert got["two meshes"].endswith("with (Shard(dim=0),)")
        assert got["shape"] == (
            "ValueError: add_layer_norm: expected residual of shape (4, 3, 6), got (2, 3, 6)"
        )
        assert "expected scale of shape (6,), (4, 1, 6) or (4, 1, 1), got (2, 1, 6)" in got["scale"]


def test_a_rank_that_raises(ranks: Processes) -> None:
    """By rows the others have their result; by columns they learn of it by the timeout."""
    by_rows = ranks.run("raising", "0")
    by_columns = ranks.run("raising", "1")
    for got in (by_rows, by_columns):
        assert got.pop(1) == "MemoryError: rank 1 has none left"
    assert by_rows == ["no error"] * 3
    assert all("Timed out" in error or "closed" in error for error in by_columns), by_columns


@pytest.mark.parametrize(("before", "after"), [("0", "R"), ("P", "0")])
def test_what_a_collective_has_not_delivered(ranks: Processes, before: str, after: str) -> None:
    """It is waited for, and runs in the kernels as any tensor."""
    ranks.run("waiting", before, after)


def test_another_backend_on_every_rank(ranks: Processes) -> None:
    """Each computes its own part."""
    ranks.run("backends_of_their_own")


@pytest.mark.parametrize(("places", "dropout_p"), [("0", 0.0), ("1", 0.0), ("0", 0.5)])
def test_a_rank_outside_of_the_mesh(ranks: Processes, places: str, dropout_p: float) -> None:
    """It has nothing."""
    assert ranks.run("outside_of_the_mesh", places, dropout_p) == [
        [12, 12],
        [12, 12],
        [0, 0],
        [0, 0],
    ]


# Modules and wrappers -----------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True])
def test_parallel_plan(ranks: Processes, rms: bool) -> None:
    """A fused stream in a plan computes what the whole does, with no more than torch's norms."""
    for ours, torchs in ranks.run("plan", rms):
        assert _count(ours) <= _count(torchs), (ours, torchs)
        assert _bytes(ours) <= _bytes(torchs), (ours, torchs)


@pytest.mark.parametrize("rms", [False, True])
def test_parallel_plan_within_fsdp(ranks: Processes, rms: bool) -> None:
    """Two dimensions of the mesh share a model."""
    ranks.run("plan_and_fsdp", rms)


@pytest.mark.parametrize("way", ["pipeline", "context"])
def test_plain_parts(ranks: Processes, way: str) -> None:
    """Pipelines and context parallel give a norm plain tensors."""
    ranks.run(way)


def test_adaptive_norm_in_a_plan(ranks: Processes) -> None:
    """So does a norm with a condition."""
    ranks.run("adaptive")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"swap": "after"},
        {"mixed": True},
        {"mixed": True, "swap": "after"},
        {"offload": True},
        {"reshard_after_forward": False},
        {"meta": True},
        {"meta": True, "swap": "after"},
        {"accumulate": 2},
        {"compiled": True},
    ],
    ids=str,
)
def test_fsdp(ranks: Processes, options: dict[str, Any]) -> None:
    """Parameters end where one process takes them."""
    ranks.run("run", "fsdp", {"swap": "before", **options})


@pytest.mark.parametrize(
    "options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str
)
def test_ddp(ranks: Processes, options: dict[str, Any]) -> None:
    """Parameters end where one process takes them."""
    ranks.run("run", "ddp", options)


@pytest.mark.parametrize("ours_first", [False, True])
def test_checkpoints(ranks: Processes, tmp_path: Path, ours_first: bool) -> None:
    """They go from four ranks to two, from torch's norms to ours and back."""
    ranks.run("checkpoint", str(tmp_path), ours_first)


@pytest.mark.parametrize(
    ("name", "places", "dropout_p", "collectives"),
    [
        ("add_layer_norm", {"x": "1", "residual": "1"}, 0.0, ([], [])),
        ("every_term", {"x": "0", "residual": "0"}, 0.0, ([], [])),
        ("add_layer_norm", {"x": "0", "residual": "0"}, 0.3, ([], [])),
        (
            *("add_layer_norm", {"x": "2", "residual": "2"}, 0.0),
            (["all_gather_into_tensor"], ["all_reduce"]),
        ),
    ],
    ids=str,
)
def test_compiled(
    ranks: Processes, name: str, places: dict[str, str], dropout_p: float, collectives: Any
) -> None:
    """One graph each way, with the collectives of eager."""
    *first, _, _ = ranks.run("compiled", name, places, dropout_p)
    assert first == [(*collectives, True)] * 2


@pytest.mark.parametrize("way", ["fsdp", "tp"])
def test_compiled_models(ranks: Processes, way: str) -> None:
    """Whole graphs by inductor, of each block of FSDP2, with the collectives of torch's norms."""
    *ran, _, _ = ranks.run("compiled_model", way)
    for torchs, ours in ran:
        assert sum(ours.values()) > 0
        assert ours == torchs
