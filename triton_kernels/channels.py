"""Kernels of norms over dimension 1 of [B, C, S] and their launchers: no permuted copy is made.

A row is a position of an image, its columns the C channels, S elements apart. A tile is ROWS
adjacent positions of one image and all of its channels, so that memory is read and written along
the positions; what happens in it is what forward.py and backward.py do to rows.

The sums for dweight and dbias run over positions: each program adds those of its tiles up to one
partial row, and the kernel of finalize.py adds the partial rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusednorm.spec import compute_dtype

from . import launch, plans
from .config import (
    RowTile,
    channels_backward_config,
    channels_forward_tile,
    share_out,
    vector_elements,
)
from .finalize import launch_finalize, let_finalize_start
from .gradients import load_column, row_means, through_norm
from .normalise import normalised, row_statistics
from .tile import Tile, cast, constants, corrects_mean, take_chunk


class Image(NamedTuple):
    """A pointer to the first position of an image, and the elements between its channels.

    The type of the latter is that of all offsets within a chunk: each channel that a thread holds
    has one of its own, and 64 bits would take two registers.
    """

    ptr: Any
    stride: Any


class Statistics(NamedTuple):
    """Those of a tile: [ROWS, 1] each, mean None for RMS."""

    mean: Any
    rstd: Any


@triton.jit
def _places(image, tile, chunk, C: tl.constexpr):
    """Return the [ROWS, BLOCK_N] pointers to a chunk of channels; all chunks have one offsets."""
    first = image.ptr + tl.cast(chunk.number * C.BLOCK_N, image.stride.dtype) * image.stride
    channels = tl.arange(0, C.BLOCK_N).to(image.stride.dtype) * image.stride
    return first + (channels[None, :] + tile.rows.to(image.stride.dtype)[:, None])


@triton.jit
def _load(image, tile, chunk, C: tl.constexpr):
    """Return a [ROWS, BLOCK_N] chunk of channels, 0 where the mask ends."""
    return tl.load(_places(image, tile, chunk, C), mask=chunk.mask, other=0.0).to(C.COMPUTE)


@triton.jit
def _store(image, tile, chunk, values, C: tl.constexpr):
    """Store a [ROWS, BLOCK_N] chunk of channels."""
    values = cast(values, image.ptr.dtype.element_ty)
    tl.store(_places(image, tile, chunk, C), values, mask=chunk.mask)


@triton.jit
def _load_channels(ptr, chunk, C: tl.constexpr):
    """Return the [1, BLOCK_N] weight or bias of a chunk."""
    return tl.load(ptr + chunk.cols, mask=chunk.cols < C.N, other=0.0)[None, :].to(C.COMPUTE)


@triton.jit
def _take_rows(number, tiles, ROWS: tl.constexpr):
    """Return the image of a tile, an int64, and its positions: 3.6 returns no tuple with a None."""
    image = (number // tiles).to(tl.int64)
    return image, (number % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)


# No number of images or positions may become part of what is compiled, but for their alignment:
# sizes and strides come in vectors of VECTOR elements.
@triton.jit(do_not_specialize=("positions", "batch_stride", "channel_stride", "tiles"))
def layer_norm2d_fwd_kernel(
    x_ptr,  # [B, N, S], adjacent positions
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    z_ptr,  # [B, N, S], contiguous
    mean_ptr,  # [B, S], or None where nothing needs a gradient, and for RMS
    rstd_ptr,  # [B, S], or None where nothing needs a gradient
    positions: tl.int64,  # S
    batch_stride: tl.int64,
    channel_stride: tl.int64,
    tiles: tl.int32,  # of an image
    eps: tl.float64,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
    RMS: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Normalise one tile."""
    CORRECTED: tl.constexpr = corrects_mean(
        RMS, N, x_ptr.dtype.element_ty, z_ptr.dtype.element_ty, COMPUTE
    )
    C: tl.constexpr = constants(N, ROWS, BLOCK_N, CHUNKS, 1, COMPUTE, None, None, CORRECTED)
    positions = positions.to(tl.int64) * VECTOR
    image, rows = _take_rows(tl.program_id(0), tiles, ROWS)
    tile = Tile(rows, positions, None, 0)
    x = Image(x_ptr + image * batch_stride * VECTOR, channel_stride.to(INDEX) * VECTOR)
    z = Image(z_ptr + image * N * positions, positions.to(INDEX))
    xs = ()
    for i in tl.static_range(CHUNKS):
        xs += (_load(x, tile, take_chunk(tile, i, C), C),)
    centred, mean, correction, rstd = row_statistics(xs, tile, eps, RMS, C)
    for i in tl.static_range(CHUNKS):
        chunk = take_chunk(tile, i, C)
        y = normalised(centred[i], correction, rstd, C)
        if weight_ptr is not None:
            y *= _load_channels(weight_ptr, chunk, C)
        if bias_ptr is not None:
            y += _load_channels(bias_ptr, chunk, C)
        _store(z, tile, chunk, y, C)
    row = image * positions + tile.rows
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=tile.rows < positions)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=tile.rows < positions)


@triton.jit
def _store_partial(ptr, offset, chunk, sums, N: tl.constexpr):
    """Store a chunk of the partial row at `offset`; nothing where `ptr` is None."""
    if ptr is not None:
        let_finalize_start()
        tl.store(ptr + offset + chunk.cols, sums, mask=chunk.cols < N)


@triton.jit(
    do_not_specialize=(
        *("positions", "dz_batch_stride", "dz_channel_stride", "x_batch_stride"),
        *("x_channel_stride", "tiles", "all_tiles", "tiles_per_program"),
    )
)
def layer_norm2d_bwd_kernel(
    dz_ptr,  # [B, N, S], adjacent positions
    x_ptr,  # [B, N, S], adjacent positions
    weight_ptr,  # [N] or None
    mean_ptr,  # [B, S], or None for RMS
    rstd_ptr,  # [B, S]
    dx_ptr,  # [B, N, S], contiguous, or None
    dz_x_hat_ptr,  # [programs, N] partial sums of dz * x_hat, or None
    dz_sum_ptr,  # [programs, N] partial sums of dz, or None
    positions: tl.int64,  # S
    dz_batch_stride: tl.int64,
    dz_channel_stride: tl.int64,
    x_batch_stride: tl.int64,
    x_channel_stride: tl.int64,
    tiles: tl.int64,  # of an image
    all_tiles: tl.int64,
    tiles_per_program: tl.int64,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Write dx of a program's tiles, and the partial sums over their positions."""
    C: tl.constexpr = constants(N, ROWS, BLOCK_N, CHUNKS, 1, COMPUTE)
    positions = positions.to(tl.int64) * VECTOR
    program = tl.program_id(0).to(tl.int64)
    start = program * tiles_per_program
    end = tl.minimum(start + tiles_per_program, all_tiles)
    whole = Tile(tl.arange(0, ROWS), positions, None, 0)
    weights = ()
    dz_x_hats = ()
    dzs = ()
    for i in tl.static_range(CHUNKS):
        if weight_ptr is not None:
            weights += (_load_channels(weight_ptr, take_chunk(whole, i, C), C),)
        dz_x_hats += (tl.zeros((BLOCK_N,), COMPUTE),)
        dzs += (tl.zeros((BLOCK_N,), COMPUTE),)

    for number in tl.range(start, end, num_stages=NUM_STAGES):
        image, rows = _take_rows(tl.cast(number, tl.int64), tiles, ROWS)
        tile = Tile(rows, positions, None, 0)
        dz_stride = dz_channel_stride.to(INDEX) * VECTOR
        x_stride = x_channel_stride.to(INDEX) * VECTOR
        dz = Image(dz_ptr + image * dz_batch_stride * VECTOR, dz_stride)
        x = Image(x_ptr + image * x_batch_stride * VECTOR, x_stride)
        mean = None
        if mean_ptr is not None:
            mean = load_column(mean_ptr + image * positions, tile)
        statistics = Statistics(mean, load_column(rstd_ptr + image * positions, tile))
        x_hats = ()
        gs = ()
        new_dz_x_hats = ()
        new_dzs = ()
        for i in tl.static_range(CHUNKS):
            chunk = take_chunk(tile, i, C)
            centred = _load(x, tile, chunk, C)
            if mean_ptr is not None:
                centred -= statistics.mean
            # Where the mask ends, x_hat is arbitrary: it is only ever multiplied by dz or g, 0.
            x_hat = centred * statistics.rstd
            g = _load(dz, tile, chunk, C)
            if dz_x_hat_ptr is not None:
                new_dz_x_hats += (dz_x_hats[i] + tl.sum(g * x_hat, axis=0),)
            else:
                new_dz_x_hats += (dz_x_hats[i],)
            if dz_sum_ptr is not None:
                new_dzs += (dzs[i] + tl.sum(g, axis=0),)
            else:
                new_dzs += (dzs[i],)
            if weight_ptr is not None:
                g *= weights[i]
            if i == 0:
                g_x_hat = g * x_hat
                g_sum = g
            else:
                g_x_hat += g * x_hat
                g_sum += g
            x_hats += (x_hat,)
            gs += (g,)
        dz_x_hats = new_dz_x_hats
        dzs = new_dzs
        if dx_ptr is not None:
            dx = Image(dx_ptr + image * N * positions, positions.to(INDEX))
            c1, c2 = row_means(statistics, g_x_hat, g_sum, C)
            # With the sums over positions, d and e in the place of x_hat and g would spill.
            for i in tl.static_range(CHUNKS):
                dx_chunk = statistics.rstd * through_norm(statistics, x_hats[i], gs[i], c1, c2)
                _store(dx, tile, take_chunk(tile, i, C), dx_chunk, C)

    for i in tl.static_range(CHUNKS):
        chunk = take_chunk(whole, i, C)
        _store_partial(dz_x_hat_ptr, program * N, chunk, dz_x_hats[i], N)
        _store_partial(dz_sum_ptr, program * N, chunk, dzs[i], N)


class Planes(NamedTuple):
    """A tensor [B, C, S] as the kernels index it, and the elements between images and channels."""

    tensor: torch.Tensor
    batch_stride: int
    channel_stride: int


def _as_planes(x: torch.Tensor) -> Planes:
    """Return [B, C, *spatial] as [B, C, S]: a view if its strides allow one, else a copy."""
    batch, channels, *spatial = x.shape
    x = x.reshape(batch, channels, math.prod(spatial))
    if x.stride(2) != 1 and x.shape[2] != 1:
        x = x.contiguous()
    return Planes(x, *x.stride()[:2])


def _vector(*planes: Planes) -> int:
    """Return how many positions may be loaded at once, and divide all sizes and strides."""
    narrowest = min(plane.tensor.element_size() for plane in planes)
    sizes = [planes[0].tensor.shape[2]]
    for plane in planes:
        sizes += plane[1:]
    return min(vector_elements(size, narrowest) for size in sizes)


def _index(tile: RowTile, *planes: Planes) -> tl.dtype:
    """Return the type that offsets within an image fit in."""
    positions = planes[0].tensor.shape[2]
    channels = tile.chunks * tile.block_n
    most = max(channels * max(positions, plane.channel_stride) for plane in planes) + positions
    return tl.int32 if most + tile.rows < 2**31 else tl.int64


@plans.repeated("triton_channels_forward", tensors=3, device_of=0)
def layer_norm2d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
    save_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Run the forward kernel.

    Args:
        x: [B, C, *spatial], any strides; copied once where the positions of a channel are not
            adjacent. C is at most `config.MOST_CHANNELS`.
        weight: C elements of any float dtype, or None.
        bias: C elements of any float dtype, or None.
        eps: Added to the variance.
        rms: Whether the mean is taken as 0.
        out_dtype: dtype of z.
        save_stats: Whether mean and rstd are wanted.

    Returns:
        z of x's shape, contiguous; mean (None for RMS) and rstd of shape [B * S] in the compute
        dtype, or None.
    """
    compute = compute_dtype(x.dtype)
    z = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    batch, channels, *spatial = x.shape
    positions = math.prod(spatial)
    mean = rstd = None
    if save_stats:
        rstd = torch.empty(batch * positions, dtype=compute, device=x.device)
        mean = None if rms else torch.empty_like(rstd)
    if z.numel() == 0:
        return z, mean, rstd
    planes = _as_planes(x)
    arch = launch.architecture(x.device)
    tile = channels_forward_tile(channels, positions, launch.itemsize(compute, x, z), arch)
    vector = _vector(planes, _as_planes(z))
    tiles = -(-positions // tile.rows)
    with launch.device_guard(x.device):
        plans.start(
            layer_norm2d_fwd_kernel,
            (batch * tiles,),
            planes.tensor,
            launch.vector(weight),
            launch.vector(bias),
            z,
            mean,
            rstd,
            positions // vector,
            planes.batch_stride // vector,
            planes.channel_stride // vector,
            tiles,
            eps,
            N=channels,
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            VECTOR=vector,
            RMS=rms,
            INDEX=_index(tile, planes),
            COMPUTE=launch.TRITON_DTYPE[compute],
            **launch.options(tile.num_warps, arch),
        )
    return z, mean, rstd


@plans.repeated("triton_channels_backward", tensors=6, device_of=1)
def layer_norm2d_bwd(
    dz: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Run the backward kernel, and one that adds up its partial sums.

    Args:
        dz: Gradient of z, of x's shape and any strides; never written to.
        x: What the forward got.
        mean: [B * S] from the forward, or None for RMS.
        rstd: [B * S] from the forward.
        weight: C elements, or None.
        bias: C elements, or None; only its shape and dtype are used.
        output_mask: Which of dx, dweight and dbias are wanted.

    Returns:
        dx of x's shape, dweight and dbias, all contiguous; None where not wanted.
    """
    batch, channels, *spatial = x.shape
    positions = math.prod(spatial)
    make = torch.empty if x.numel() > 0 else torch.zeros
    dx, dweight, dbias = gradients = tuple(
        make(like.shape, dtype=like.dtype, device=x.device) if wanted and like is not None else None
        for like, wanted in zip((x, weight, bias), output_mask, strict=True)
    )
    if x.numel() == 0 or all(gradient is None for gradient in gradients):
        return dx, dweight, dbias
    arch = launch.architecture(x.device)
    planes, dz_planes = _as_planes(x), _as_planes(dz)
    vector = _vector(planes, dz_planes)
    config = channels_backward_config(
        channels,
        positions,
        launch.itemsize(rstd.dtype, dz, x),
        arch,
        stream_bytes=x.element_size() + dz.element_size(),
        vector_bytes=vector * min(x.element_size(), dz.element_size()),
    )
    tile = config.tile
    tiles = -(-positions // tile.rows)
    all_tiles = batch * tiles
    shares = share_out(all_tiles * tile.rows, x.element_size(), 1, config, arch)
    programs = shares.programs
    partials = tuple(
        None if gradient is None else plans.scratch(rstd, programs, channels)
        for gradient in (dweight, dbias)
    )
    with launch.device_guard(x.device):
        plans.start(
            layer_norm2d_bwd_kernel,
            (programs,),
            dz_planes.tensor,
            planes.tensor,
            launch.vector(weight),
            mean,
            rstd,
            dx,
            *partials,
            positions // vector,
            dz_planes.batch_stride // vector,
            dz_planes.channel_stride // vector,
            planes.batch_stride // vector,
            planes.channel_stride // vector,
            tiles,
            all_tiles,
            shares.rows_per_program // tile.rows,
            N=channels,
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            VECTOR=vector,
            INDEX=_index(tile, planes, dz_planes),
            COMPUTE=launch.TRITON_DTYPE[rstd.dtype],
            NUM_STAGES=config.num_stages,
            **launch.options(tile.num_warps, arch, config.programs_per_processor),
        )
        if dweight is not None or dbias is not None:
            sums = None, None, None, dweight, dbias, None, None
            terms = launch.terms(batch * positions, channels, None, None, None)
            launch_finalize(sums, (*partials, None), programs, None, None, terms, channels, arch)
    return dx, dweight, dbias
