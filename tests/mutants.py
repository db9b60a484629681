"""Break the kernels one at a time and show which test notices: `make mutants`.

Each mutant is a textual edit of one kernel file, applied to a copy of the package. A mutant that
no test catches, or an edit that no longer matches the source, ends the run with exit code 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ACCURACY = "tests/test_accuracy.py"
LAYOUTS = "tests/test_layouts.py"
JUMPS = "tests/test_jumps.py"
DROPOUT = "tests/test_dropout.py"
TERMS = "tests/test_terms.py"
OWN = f"{TERMS}::test_terms_of_every_row"
DETERMINISM = "tests/test_determinism.py"
USES = f"{TERMS}::test_uses"
CUDA = "tests/test_cuda.py"
GATED = "tests/test_gated.py"
MAMBA = f"{GATED}::test_formula_of_mamba"
CHANNELS = "tests/test_channels.py"
CHANNELS_ACCURACY = f"{CHANNELS}::test_error_is_at_most_that_of_torch"
GUARDS = f"{LAYOUTS}::test_nothing_outside_the_tensors_is_read_or_written"


@dataclass(frozen=True)
class Mutant:
    """An edit of `file` that replaces every `old` by `new`, and the tests that must notice.

    `file` is one of triton_kernels/ or, with its folder, of csrc/.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str
    select: str = ""


MUTANTS = (
    # Statistics of the forward.
    Mutant(
        "variance counts masked lanes",
        "normalise.py",
        "tl.where(exists, hs[i] - start[:, None], 0.0)",
        "hs[i] - start[:, None]",
        ACCURACY,
        "[769-torch.float32",
    ),
    Mutant(
        "variance from E[x^2]",
        "normalise.py",
        "squares += centred[i] * centred[i]",
        "squares += hs[i] * hs[i] - start[:, None] * start[:, None]",
        ACCURACY,
        "[1025-torch.float32",
    ),
    Mutant(
        "mean left uncorrected",
        "normalise.py",
        "correction = residue_sum / C.N",
        "correction = residue_sum * 0",
        f"{ACCURACY}::test_large_mean_costs_no_digits",
    ),
    Mutant(
        "mean of float32 left uncorrected",
        "tile.py",
        "return not RMS and max(h, z) + (N - 1).bit_length() > compute",
        "return False",
        f"{ACCURACY}::test_large_mean_costs_no_digits",
    ),
    Mutant(
        "mean corrected by the digits of h alone",
        "tile.py",
        "max(h, z) + (N - 1)",
        "h + (N - 1)",
        f"{ACCURACY}::test_large_mean_of_16_bits_costs_no_digits_of_a_wider_result",
    ),
    Mutant(
        "mean of equal numbers not exact",
        "normalise.py",
        "mean = tl.fma(remainder, inverse, mean)",
        "mean += remainder * 0.0",
        f"{ACCURACY}::test_equal_numbers_are_their_own_mean",
    ),
    Mutant(
        "cluster: rows end with the columns of one program",
        "config.py",
        "replace(tile, block_n=tile.block_n * cluster, cluster=cluster)",
        "replace(tile, cluster=cluster)",
        f"{ACCURACY}::test_error_of_rows_that_a_cluster_shares",
    ),
    Mutant(
        "eps dropped",
        "normalise.py",
        "tl.rsqrt(var + tl.full((C.ROWS,), eps, C.COMPUTE))",
        "tl.rsqrt(var)",
        LAYOUTS,
        "test_eps",
    ),
    Mutant(
        "looped row: lanes not merged",
        "normalise.py",
        "offset * offset * lane_count + lane_m2",
        "lane_m2",
        ACCURACY,
        "[65536-torch.float32-0",
    ),
    Mutant(
        "looped row: masked lanes counted",
        "normalise.py",
        "lane_count += chunk.mask.to(C.COMPUTE)",
        "lane_count += 1.0",
        ACCURACY,
        "[40000-torch.float32",
    ),
    Mutant(
        "looped row: sums not centred",
        "normalise.py",
        "start = tl.sum(first, axis=1) / C.BLOCK_N",
        "start = tl.sum(first, axis=1) * 0",
        f"{ACCURACY}::test_large_mean_costs_no_digits",
    ),
    Mutant(
        "bias not added",
        "normalise.py",
        "z = z + widen(load_parameter(norm.bias, chunk, C), C)",
        "z = z",
        ACCURACY,
        "[33-torch.float32",
    ),
    Mutant(
        "statistics of absent rows stored",
        "forward.py",
        "mask=rows < M)",
        "mask=rows < M + 1)",
        GUARDS,
    ),
    # Channels first.
    Mutant(
        "channels: positions of the next image",
        "channels.py",
        "image * batch_stride * VECTOR",
        "image * batch_stride",
        CHANNELS_ACCURACY,
        "triton",
    ),
    Mutant(
        "channels: offsets in 32 bits",
        "channels.py",
        "tl.int32 if most + tile.rows < 2**31 else tl.int64",
        "tl.int32",
        f"{CHANNELS}::test_offsets_beyond_int32",
    ),
    Mutant(
        "channels: vectors wider than the strides allow",
        "channels.py",
        "sizes += plane[1:]",
        "sizes += plane[1:2]",
        f"{CHANNELS}::test_layouts",
    ),
    Mutant(
        "channels: dweight of the last tile only",
        "channels.py",
        "(dz_x_hats[i] + tl.sum(g * x_hat, axis=0),)",
        "(tl.sum(g * x_hat, axis=0),)",
        CHANNELS_ACCURACY,
        "triton",
    ),
    Mutant(
        "channels: a program's last tile left out",
        "channels.py",
        "tl.minimum(start + tiles_per_program, all_tiles)",
        "tl.minimum(start + tiles_per_program, all_tiles - 1)",
        CHANNELS_ACCURACY,
        "triton",
    ),
    Mutant(
        "channels: statistics of absent positions stored",
        "channels.py",
        "tl.store(rstd_ptr + row, rstd, mask=tile.rows < positions)",
        "tl.store(rstd_ptr + row, rstd)",
        CHANNELS,
        "nothing_outside",
    ),
    # Masks and addressing, shared by both.
    Mutant(
        "one column too many",
        "tile.py",
        "mask = cols[None, :] < C.N\n",
        "mask = cols[None, :] < C.N + 1\n",
        GUARDS,
    ),
    Mutant(
        "rows past the end not masked",
        "tile.py",
        "mask = mask & (tile.rows[:, None] < tile.end)",
        "mask = mask & (tile.rows[:, None] >= 0)",
        GUARDS,
    ),
    Mutant(
        "row stride ignored",
        "tile.py",
        "offsets = rows * stride\n",
        "offsets = rows * (stride // 2)\n",
        f"{LAYOUTS}::test_layouts_of_x_and_dy",
    ),
    Mutant(
        "row offsets in 32 bits",
        "tile.py",
        "return tl.multiple_of(offsets, VECTOR)[:, None]",
        "return tl.multiple_of(offsets, VECTOR)[:, None].to(tl.int32)",
        f"{LAYOUTS}::test_rows_beyond_int32",
    ),
    Mutant(
        "jumps at the wrong rows",
        "tile.py",
        "tl.umulhi(2 * rows, jumps[i])",
        "tl.umulhi(2 * rows + 2, jumps[i])",
        JUMPS,
    ),
    # Backward.
    Mutant(
        "dx without c1",
        "gradients.py",
        "e - (d * c1 + c2)",
        "e - c2",
        ACCURACY,
        "[33-torch.float32",
    ),
    Mutant(
        "dx without c2",
        "gradients.py",
        "e - (d * c1 + c2)",
        "e - d * c1",
        ACCURACY,
        "[33-torch.float32",
    ),
    Mutant(
        "dx without rstd",
        "gradients.py",
        "e = dz * streams.rstd",
        "e = dz",
        ACCURACY,
        "[33-torch.float32",
    ),
    # Terms that each row has of its own.
    Mutant(
        "own scale's gradient without the bias",
        "differentiate.py",
        "dscale += dz * widen(",
        "dscale += 0.0 * widen(",
        OWN,
        "own and 64",
    ),
    Mutant(
        "own scale missing from dweight",
        "differentiate.py",
        "dz_x_hat *= one_and_scale",
        "dz_x_hat *= 1.0",
        OWN,
        "own and 64",
    ),
    Mutant(
        "own gate missing from dx",
        "differentiate.py",
        "dh *= load_rows(streams.own.gate, chunk, C)",
        "dh *= 1.0",
        OWN,
        "own and 64",
    ),
    Mutant(
        "own scale multiplied in another order",
        "differentiate.py",
        "e *= _weighted(one_and_scale, factors, i, C)",
        "e = _weighted(e * one_and_scale, factors, i, C)",
        f"{DETERMINISM}::test_row_with_its_own_terms",
        "64",
    ),
    Mutant(
        "own terms without room in shared memory",
        "config.py",
        "(stream_bytes + own_bytes)",
        "stream_bytes",
        "tests/test_config.py::test_pipeline_fits_in_shared_memory",
    ),
    Mutant(
        "x_hat not centred",
        "differentiate.py",
        "        d -= streams.mean\n",
        "        d -= 0.0\n",
        ACCURACY,
        "[33-torch.float32-1000",
    ),
    Mutant(
        "dweight from e",
        "differentiate.py",
        "sums.dz_x_hat[i] + dz_x_hat",
        "sums.dz_x_hat[i] + e * d",
        ACCURACY,
        "[33-torch.float32",
    ),
    Mutant(
        "dbias from e",
        "differentiate.py",
        "sums.dz[i] + dz,",
        "sums.dz[i] + e,",
        ACCURACY,
        "[33-torch.float32",
    ),
    Mutant(
        "last row of a program dropped",
        "backward.py",
        "end = tl.minimum(start + rows_per_program, M)",
        "end = tl.minimum(start + rows_per_program, M) - 1",
        ACCURACY,
        "[33-torch.float32",
    ),
    Mutant(
        "rows after the last one added",
        "backward.py",
        "end = tl.minimum(start + rows_per_program, M)",
        "end = start + rows_per_program",
        GUARDS,
    ),
    Mutant(
        "all programs write one partial row",
        "backward.py",
        "partial = program * N",
        "partial = program * 0",
        ACCURACY,
        "[769-torch.float32",
    ),
    Mutant(
        "last partial row not added",
        "finalize.py",
        "(places[:, None] < count)",
        "(places[:, None] < count - 1)",
        ACCURACY,
        "[769-torch.float32",
    ),
    Mutant(
        "finalize writes dbias to dweight",
        "finalize.py",
        "Output(dweight_ptr, None, 1, dz_x_hat_ptr,",
        "Output(dweight_ptr, None, 1, dz_sum_ptr,",
        f"{ACCURACY}::test_error_is_at_most_that_of_torch",
        "[769-torch.float32",
    ),
    Mutant(
        "second reading takes the first chunk",
        "differentiate.py",
        "load_chunk(streams, terms.factors, i, tile, True, C)",
        "load_chunk(streams, terms.factors, 0, tile, True, C)",
        ACCURACY,
        "[12288-torch.bfloat16",
    ),
    Mutant(
        "split row: c1 not divided by N",
        "backward.py",
        "tl.store(c1_ptr + row[:, None], c1)",
        "tl.store(c1_ptr + row[:, None], c1 * N)",
        ACCURACY,
        "[12288-torch.float32",
    ),
    Mutant(
        "split row: every program takes the first columns",
        "backward.py",
        "first_chunk = tl.program_id(0) % BLOCKS",
        "first_chunk = tl.program_id(0) * 0",
        ACCURACY,
        "[12288-torch.float32",
    ),
    # The gated norm.
    Mutant("SiLU without its factor", "tile.py", "gate * tl.sigmoid", "tl.sigmoid", MAMBA),
    Mutant(
        "gate always last",
        "gated.py",
        "stream = Stream(x, absent, no_term, Dropout(None, None, None), gate if GATE_FIRST",
        "stream = Stream(x, absent, no_term, Dropout(None, None, None), absent if GATE_FIRST",
        MAMBA,
    ),
    Mutant("first group of x for all", "gated.py", "Rows(x_ptr + group * N", "Rows(x_ptr", MAMBA),
    Mutant(
        "first group's weight for all",
        "gated.py",
        "weight = weight_ptr + group * N",
        "weight = weight_ptr",
        MAMBA,
    ),
    Mutant(
        "first group's weight for all, backward",
        "gated.py",
        "weights += (load_parameter(weight_ptr + group * N,",
        "weights += (load_parameter(weight_ptr,",
        MAMBA,
    ),
    Mutant(
        "first group's statistics for all",
        "gated.py",
        "tile = Tile(rows * GROUPS + group, end * GROUPS, None, first_chunk)",
        "tile = Tile(rows * GROUPS, end * GROUPS, None, first_chunk)",
        MAMBA,
    ),
    Mutant(
        "partial sums of all groups in one place",
        "gated.py",
        "partial = (program * GROUPS + group) * N",
        "partial = program * GROUPS * N",
        MAMBA,
    ),
    Mutant(
        "derivative of the SiLU without its second part",
        "gated.py",
        "dsilu = sigmoid + silu * (1.0 - sigmoid)",
        "dsilu = sigmoid",
        MAMBA,
    ),
    Mutant("gate first: dx is du", "gated.py", "            du *= first\n", "", MAMBA),
    Mutant(
        "gate first: dgate from the product",
        "gated.py",
        "return d, e, dy, dy_x_hat, silu, x * dsilu",
        "return d, e, dy, dy_x_hat, silu, x * silu * dsilu",
        MAMBA,
    ),
    Mutant(
        "gate last: dgate without the bias",
        "gated.py",
        "y += widen(parameters.biases[i], C)",
        "y += 0.0",
        MAMBA,
    ),
    Mutant(
        "gated: dweight of x_hat as it was before it was rounded",
        "gradients.py",
        "return e, dz * rounded(d * streams.rstd, C.X_HAT_DTYPE)",
        "return e, e * d",
        f"{GATED}::test_rounded_x_hat",
    ),
    Mutant(
        "gated: last row of a program dropped",
        "gated.py",
        "end = tl.minimum(start + rows_per_program, M)",
        "end = tl.minimum(start + rows_per_program, M) - 1",
        MAMBA,
    ),
    Mutant(
        "gated: rows after the last one written",
        "gated.py",
        "tile = Tile(rows * GROUPS + group, M * GROUPS, None, 0)",
        "tile = Tile(rows * GROUPS + group, (M + 1) * GROUPS, None, 0)",
        f"{GATED}::test_nothing_outside_the_tensors_is_read_or_written",
    ),
    Mutant(
        "gated: split group: c1 not divided by N",
        "gated.py",
        "tl.store(c1_ptr + places[:, None], c1)",
        "tl.store(c1_ptr + places[:, None], c1 * N)",
        f"{GATED}::test_nothing_outside_the_tensors_is_read_or_written",
    ),
    Mutant(
        "gated: second reading takes the first chunk's weight",
        "gated.py",
        "_load_chunk(streams, parameters, i, chunk, GATE_FIRST, C)\n            du =",
        "_load_chunk(streams, parameters, 0, chunk, GATE_FIRST, C)\n            du =",
        f"{GATED}::test_nothing_outside_the_tensors_is_read_or_written",
    ),
    # The other terms, forward.
    Mutant(
        "residual subtracted",
        "normalise.py",
        "h += load_rows(stream.residual",
        "h -= load_rows(stream.residual",
        USES,
        "LayerScale-64-torch.float32",
    ),
    Mutant(
        "all samples take the terms of the first",
        "forward.py",
        "samples = tl.minimum(rows, M - 1) // rows_per_sample",
        "samples = rows * 0",
        USES,
        "AdaLN-64-torch.float32",
    ),
    Mutant(
        "scale without its one",
        "normalise.py",
        "z = z * (1.0 + widen(scale, C))",
        "z = z * widen(scale, C)",
        USES,
        "AdaLN-64-torch.float32",
    ),
    Mutant(
        "dropout does not scale what it keeps",
        "tile.py",
        "values * tl.full((C.ROWS, 1), dropout.inverse_keep, C.COMPUTE)",
        "values",
        DROPOUT,
        "published",
    ),
    Mutant(
        "all rows drop the same columns",
        "tile.py",
        "(row & 0xFFFFFFFF)",
        "(row & 0)",
        DROPOUT,
        "published",
    ),
    Mutant(
        "words of a quad in another order",
        "tile.py",
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r1), tl.join(r2, r3))",
        DROPOUT,
        "published",
    ),
    Mutant(
        "stream normalised before it is rounded",
        "normalise.py",
        "return rounded(h, C.H_DTYPE)",
        "return h",
        TERMS,
        "test_output_is_the_norm_of_the_stream",
    ),
    Mutant(
        "RMS norm divides by the deviation",
        "normalise.py",
        "    centred = hs\n    if not RMS:",
        "    centred = hs\n    if True:",
        USES,
        "RMSNorm-64-torch.float32",
    ),
    # The other terms, backward.
    Mutant(
        "gradient of the stream lost",
        "differentiate.py",
        "dh += load_rows(streams.dh",
        "dh += 0 * load_rows(streams.dh",
        USES,
        "LayerScale-64-torch.float32",
    ),
    Mutant(
        "dx without gate",
        "differentiate.py",
        "dh *= widen(terms.gates[i], C)",
        "dh *= 1",
        USES,
        "LayerScale-64-torch.float32",
    ),
    Mutant(
        "g without scale",
        "gradients.py",
        "factor = 1.0 + widen(",
        "factor = 1.0 + 0 * widen(",
        USES,
        "AdaLN-64-torch.float32",
    ),
    Mutant(
        "programs run into the next sample",
        "backward.py",
        "end = tl.minimum(start + rows_per_program, (sample + 1) * rows_per_sample)",
        "end = tl.minimum(start + rows_per_program, M)",
        USES,
        "AdaLN-64-torch.float32",
    ),
    Mutant(
        "backward drops other elements",
        "differentiate.py",
        "dropped_out(terms.dropout, tile,",
        "dropped_out(terms.dropout, Tile(tile.rows + 1, tile.end, tile.samples, 0),",
        DROPOUT,
        "published",
    ),
    Mutant(
        "dgate of the dropped elements",
        "differentiate.py",
        "share = dh * load_rows(streams.x",
        "share = load_rows(streams.x",
        USES,
        "LayerScale-64-torch.float32",
    ),
    Mutant(
        "dweight without 1 + scale",
        "finalize.py",
        "partial *= 1.0 + factor.to(DTYPE)",
        "partial *= 1.0",
        USES,
        "everything-64-torch.float32",
    ),
    Mutant(
        "dscale without bias",
        "finalize.py",
        "total += addend * factor.to(total.dtype)",
        "total += 0 * addend",
        USES,
        "everything-64-torch.float32",
    ),
    Mutant(
        "every sample gets the gradient of the first",
        "finalize.py",
        "first = sample * count",
        "first = sample * 0",
        USES,
        "AdaLN-64-torch.float32",
    ),
    Mutant(
        "gradient of a number from its first columns",
        "finalize.py",
        "for i in tl.range(0, tl.cdiv(C.N, C.BLOCK_N))",
        "for i in tl.range(0, 1)",
        USES,
        "scalars-64-torch.float32",
    ),
    # The CUDA kernels, on the host that stands in for a GPU.
    Mutant(
        "cuda: variance counts columns beyond the row",
        "csrc/cuda/forward.cu",
        "!VECTORS || group.left(k) > 0 ? start[r] : 0.0f",
        "start[r]",
        f"{CUDA}::test_error_is_at_most_that_of_torch",
        "[1000-torch.float32",
    ),
    Mutant(
        "cuda: mean left uncorrected",
        "csrc/cuda/forward.cu",
        "moments.mean = residue * inverse",
        "moments.mean = 0.0f",
        f"{CUDA}::test_large_mean_costs_no_digits",
    ),
    Mutant(
        "cuda: means of the blocks of a cluster not merged",
        "csrc/cuda/forward.cu",
        "float(span.end - span.begin) * distance, distance, peer_load(slots + 2, rank)",
        "0.0f, distance, peer_load(slots + 2, rank)",
        f"{CUDA}::test_error_is_at_most_that_of_torch",
        "[65536-torch.float32-0",
    ),
    Mutant(
        "cuda: a block ends while its peers read it",
        "csrc/cuda/forward.cu",
        "if constexpr (split) sync_cluster();",
        "",
        f"{CUDA}::test_error_is_at_most_that_of_torch",
        "[65536-torch.float32-0",
    ),
    Mutant(
        "cuda: no barrier before the sums of the warps are read",
        "csrc/cuda/rows.h",
        "sync_block();",
        "",
        f"{CUDA}::test_error_is_at_most_that_of_torch",
        "[3000-torch.float32-0",
    ),
    Mutant(
        "cuda: sums of successive rows in one place",
        "csrc/cuda/rows.h",
        "phase ^= 1;",
        "",
        f"{CUDA}::test_error_is_at_most_that_of_torch",
        "[3000-torch.float32-0",
    ),
    Mutant(
        "cuda: rows read before their copies arrive",
        "csrc/cuda/backward.cu",
        "wait_for_stage(p.stages);",
        "",
        f"{CUDA}::test_error_is_at_most_that_of_torch",
        "[1000-torch.float32-0",
    ),
    Mutant(
        "cuda: column sums of the peers not added",
        "csrc/cuda/backward.cu",
        "rank < sharers",
        "rank < 1",
        f"{CUDA}::test_error_is_at_most_that_of_torch",
        "[127-torch.float32-0",
    ),
    Mutant(
        "cuda: half of the partial rows added up",
        "csrc/cuda/backward.cu",
        "row += finalize_warps",
        "row += 2 * finalize_warps",
        f"{CUDA}::test_more_partial_rows_than_warps",
    ),
    Mutant(
        "cuda: finalize does not wait for the backward",
        "csrc/cuda/backward.cu",
        "  wait_for_previous_kernel();",
        "",
        f"{CUDA}::test_error_is_at_most_that_of_torch",
        "[127-torch.float32-0",
    ),
    Mutant(
        "cuda: split rows end with their sums unread",
        "csrc/cuda/backward.cu",
        "  else if constexpr (split)\n    sync_cluster();",
        "",
        f"{CUDA}::test_frozen_inputs",
        "weight and bias-60000",
    ),
    Mutant(
        "cuda: more clusters than run at a time",
        "csrc/cuda/backward.cu",
        "std::min<int64_t>(wanted, resident)",
        "std::min<int64_t>(wanted, int64_t(device.count) * blocks / found.cluster)",
        f"{CUDA}::test_no_wave_of_clusters_is_partial",
    ),
    Mutant(
        "cuda: variance counts columns beyond an unaligned row",
        "csrc/cuda/forward.cu",
        "VECTORS || i < group.left(k) ?",
        "true ?",
        f"{CUDA}::test_error_is_at_most_that_of_torch",
        "[769-torch.float32",
    ),
    Mutant(
        "cuda: mean of a block of 16 bits not divided to the last bit",
        "csrc/cuda/rows.h",
        "return multiply_add(multiply_add(-quotient, count, total), inverse, quotient);",
        "return quotient;",
        f"{CUDA}::test_constant_rows",
    ),
    Mutant(
        "cuda: dropout repeats every quad",
        "csrc/cuda/rows.h",
        "col / 4 + quad",
        "col / 4",
        f"{CUDA}::test_mask_is_the_published_one",
        "[0.5-64",
    ),
)


def path_of(mutant: Mutant, root: Path, triton_kernels: Path) -> Path:
    """Return the file that a mutant edits."""
    return (root if "/" in mutant.file else triton_kernels) / mutant.file


def apply(mutant: Mutant, copy: Path) -> None:
    """Edit the copied kernel file, or stop where the source has moved on."""
    path = path_of(mutant, copy, copy / "fusednorm" / "triton_kernels")
    source = path.read_text()
    if mutant.old not in source:
        sys.exit(f"{mutant.what}: {mutant.file} no longer holds {mutant.old!r}")
    path.write_text(source.replace(mutant.old, mutant.new))


def run_tests(
    edit: Callable[[Path], None], arguments: list[str], seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run pytest on a copy of package and tests that `edit` has changed, up to the first failure.

    Raises:
        subprocess.TimeoutExpired: It took more than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "fusednorm", copy / "fusednorm")
        shutil.copytree(ROOT / "triton_kernels", copy / "fusednorm" / "triton_kernels")
        for name in ("tests", "csrc"):
            shutil.copytree(ROOT / name, copy / name)
        for name in ("pyproject.toml", "setup.py", "toolchain.py"):
            shutil.copy(ROOT / name, copy)
        edit(copy)
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=seconds,
        )


def failed_test(done: subprocess.CompletedProcess[str]) -> str | None:
    """Return the test that ended a run, or None where none failed."""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else None


def caught_by(mutant: Mutant) -> str | None:
    """Return the first test that fails for a mutant, or None where all pass."""
    # `-k` takes no brackets; the parameters are matched on what stands between them.
    select = ["-k", mutant.select.strip("[")] if mutant.select else []
    done = run_tests(lambda copy: apply(mutant, copy), mutant.tests.split() + select)
    if done.returncode < 0:
        return f"{mutant.tests} (signal {-done.returncode})"
    failed = failed_test(done)
    if failed is None and done.returncode not in (0, 1):
        sys.exit(f"{mutant.what}: the tests did not run\n{done.stdout}{done.stderr}")
    return failed


def main() -> int:
    """Print one line per mutant; return 1 if any survives."""
    wanted = sys.argv[1:]  # parts of descriptions; none means all
    survivors = 0
    for mutant in MUTANTS:
        if wanted and not any(word in mutant.what for word in wanted):
            continue
        test = caught_by(mutant)
        survivors += test is None
        print(f"{mutant.what:48} {test or 'SURVIVED'}", flush=True)
    print(f"{survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
