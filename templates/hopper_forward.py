"""The forward kernel for Hopper GPUs, its warps specialised as in FlashAttention-3 (Shah et al., 2024), in Gluon.

One warp, the producer, copies tiles of keys and values by TMA into rings of stages in shared memory. Two warpgroups, the
consumers, have 64 query rows each. In step j a consumer issues the product Q K_j, then P_(j-1) V_(j-1), and computes the
softmax of tile j while the second runs on the matrix units.

Every stage has two barriers. `ready` completes when its bytes have arrived, `free` when both consumers have read them. Tile j
is in stage j % STAGES, and completes the phase j // STAGES of the barriers there; a wait names the parity of a phase. A ring
has two stages at least.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .block_walk import find_row, masked_tile, plain_tile, tile_bounds, tile_counts
from .launch_order import work_of_program
from .names import kernel_name
from .online_softmax import row_statistics, softmax_step
from .scores import attended, log2_factor, modified_scores

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name before Triton 3.9

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # query rows of a consumer: those of one warpgroup instruction
CONSUMER_WARPS = gl.constexpr(4)
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_WARPS = gl.constexpr(1)
PRODUCER_REGISTERS = gl.constexpr(24)


class Ring(NamedTuple):
    """Stages of one operand in shared memory [STAGES, 1, 1, rows, columns], and the two barriers of each."""

    tiles: Any
    ready: Any
    free: Any


class Walk(NamedTuple):
    """Which tiles of keys a program visits, see `block_walk`: two lists of blocks, and how many tiles there are."""

    partial: Any
    full: Any
    partial_tiles: Any
    masked_tiles: Any
    plain_tiles: Any


class Rows(NamedTuple):
    """The query rows of a program: the first, how many exist, and pointers to where results of the first go."""

    start: Any
    count: Any
    out: Any
    out_stride: Any
    lse: Any
    max_scores: Any


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _ring(matrix, STAGES: gl.constexpr):
    """A ring of stages, each for one box of the descriptor `matrix`."""
    tiles = gl.allocate_shared_memory(matrix.dtype, [STAGES] + matrix.block_shape, matrix.layout)
    return Ring(tiles, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))


@gluon.jit
def _masked(walk, i, S, shape):
    return masked_tile(
        walk.partial, walk.full, i, walk.partial_tiles, walk.plain_tiles, S, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED
    )  # fmt: skip


@gluon.jit
def _plain(walk, i, shape):
    return plain_tile(walk.full, i, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED, shape.CONTIGUOUS)


# The producer.


@gluon.jit
def _copy(matrix, ring, j, b, h, start, STAGES: gl.constexpr):
    """Let tile j, the rows from `start` on of one head, be copied as soon as its stage is free. Rows past the end are 0."""
    stage = j % STAGES
    mbarrier.wait(ring.free.index(stage), (j // STAGES + 1) % 2)  # passes for a stage that was never used
    ready = ring.ready.index(stage)
    mbarrier.expect(ready, matrix.block_type.nbytes)
    async_load(matrix, [b, h, start, 0], ready, ring.tiles.index(stage))


@gluon.jit
def _produce(q, k, v, q_tiles, q_ready, k_ring, v_ring, walk, b, h, kv_b, kv_h, start_m, S, shape,
             STAGES: gl.constexpr):  # fmt: skip
    """Copy the queries, then keys and values in the order in which consumers read them: K_0, K_1, V_0, K_2, V_1, ..."""
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(q_ready.index(c), q.block_type.nbytes)
        async_load(q, [b, h, start_m + c * ROWS, 0], q_ready.index(c), q_tiles.index(c))
    previous = start_m * 0
    for j in range(0, walk.masked_tiles):
        start_n, _, _ = _masked(walk, j, S, shape)
        _copy(k, k_ring, j, kv_b, kv_h, start_n, STAGES)
        if j > 0:
            _copy(v, v_ring, j - 1, kv_b, kv_h, previous, STAGES)
        previous = start_n
    n = walk.masked_tiles + walk.plain_tiles
    for j in range(walk.masked_tiles, n):
        start_n = _plain(walk, j - walk.masked_tiles, shape)
        _copy(k, k_ring, j, kv_b, kv_h, start_n, STAGES)
        if j > 0:
            _copy(v, v_ring, j - 1, kv_b, kv_h, previous, STAGES)
        previous = start_n
    if n > 0:
        _copy(v, v_ring, n - 1, kv_b, kv_h, previous, STAGES)


# The consumers.


@gluon.constexpr_function
def _product_layout(columns):
    """How a warpgroup holds a product [64, columns]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def _operand_layout(columns):
    """How it holds the left operand of a product of so many columns."""
    return gl.DotOperandLayout(operand_index=0, parent=_product_layout(columns), k_width=2)


@gluon.jit
def _await(ring, j, STAGES: gl.constexpr):
    """Wait until tile j has arrived."""
    mbarrier.wait(ring.ready.index(j % STAGES), j // STAGES % 2)


@gluon.jit
def _tile_of(ring, j, STAGES: gl.constexpr):
    """Tile j [rows, columns], which has arrived."""
    box = ring.tiles.index(j % STAGES)
    return box.reshape([box.shape[2], box.shape[3]])


@gluon.jit
def _release(ring, j, STAGES: gl.constexpr):
    """This consumer has read tile j."""
    mbarrier.arrive(ring.free.index(j % STAGES))


@gluon.jit
def _issue_scores(q_tile, k_ring, j, shape, STAGES: gl.constexpr):
    """Begin Q K_j^T, once K_j has arrived."""
    _await(k_ring, j, STAGES)
    k_tile = _tile_of(k_ring, j, STAGES)
    zero = gl.zeros([ROWS, shape.BLOCK_N], gl.float32, layout=_product_layout(shape.BLOCK_N))
    return warpgroup_mma(q_tile, k_tile.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _issue_values(p, v_ring, j, acc, STAGES: gl.constexpr):
    """Begin acc + P_j V_j. V_j has arrived."""
    return warpgroup_mma(p, _tile_of(v_ring, j, STAGES), acc, is_async=True)


@gluon.jit
def _softmax(qk, m_i, l_i, start_n, stop_n, is_full, offs_m, b, h, scale, factor, captured, dtype: gl.constexpr,
             shape, score_mod: gl.constexpr, mask_mod: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """From the products of a tile: its weights as an operand, the factor of earlier sums, and the new m and l."""
    offs_n = start_n + gl.arange(0, shape.BLOCK_N, layout=gl.SliceLayout(0, _product_layout(shape.BLOCK_N)))
    q_idx, kv_idx = offs_m[:, None], offs_n[None, :]
    if not shape.SCALE_IN_FACTOR:
        qk = qk * scale
    qk = modified_scores(qk, b, h, q_idx, kv_idx, captured, score_mod)
    if MASKED:
        keep = attended(qk, b, h, q_idx, kv_idx, kv_idx, stop_n, is_full, captured, mask_mod)
        qk = gl.where(keep, qk, float("-inf"))
    p, alpha, m_i, l_i = softmax_step(qk, factor, m_i, l_i)
    return gl.convert_layout(p.to(dtype), _operand_layout(shape.BLOCK_DV)), alpha, m_i, l_i


@gluon.jit
def _attend(acc, m_i, l_i, p, q_tile, k_ring, v_ring, j, start_n, stop_n, is_full, offs_m, b, h, scale, factor, captured,
            shape, score_mod: gl.constexpr, mask_mod: gl.constexpr, MASKED: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """Step j: add the values of tile j - 1, whose weights are `p`, and find the weights of tile j meanwhile."""
    qk = _issue_scores(q_tile, k_ring, j, shape, STAGES)
    acc = _issue_values(p, v_ring, j - 1, acc, STAGES)
    qk = warpgroup_mma_wait(1, deps=[qk])
    _release(k_ring, j, STAGES)
    p, alpha, m_i, l_i = _softmax(
        qk, m_i, l_i, start_n, stop_n, is_full, offs_m, b, h, scale, factor, captured, q_tile.dtype, shape, score_mod,
        mask_mod, MASKED,
    )  # fmt: skip
    # Already here, not in the next step: ptxas moves nothing across a loop, such as this wait. Without it, it puts the wait for
    # the product before the exponentials, which then overlap nothing.
    _await(v_ring, j, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _release(v_ring, j - 1, STAGES)
    acc = acc * _column(alpha, shape)
    return acc, m_i, l_i, p


@gluon.jit
def _column(x, shape):
    """A number for each row, [64, 1], to be used beside the output."""
    return gl.convert_layout(x, gl.SliceLayout(1, _product_layout(shape.BLOCK_DV)))[:, None]


@gluon.jit
def _consume(c: gl.constexpr, q_tiles, q_ready, k_ring, v_ring, walk, rows, b, h, captured, S, scale, shape,
             score_mod: gl.constexpr, mask_mod: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The rows of consumer `c`: 64 of those of the program."""
    in_rows: gl.constexpr = gl.SliceLayout(1, _product_layout(shape.BLOCK_N))
    offs_m = rows.start + c * ROWS + gl.arange(0, ROWS, layout=in_rows)
    factor = log2_factor(scale, shape.SCALE_IN_FACTOR)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, layout=in_rows)
    l_i = gl.zeros([ROWS], gl.float32, layout=in_rows)
    acc = gl.zeros([ROWS, shape.BLOCK_DV], gl.float32, layout=_product_layout(shape.BLOCK_DV))

    n = walk.masked_tiles + walk.plain_tiles
    if n > 0:
        mbarrier.wait(q_ready.index(c), 0)
        q_tile = q_tiles.index(c).reshape([ROWS, shape.BLOCK_D])
        # The first tile has no earlier one beside it. It is masked, of whichever phase it is: a full block stays as it is.
        if walk.masked_tiles > 0:
            start_n, stop_n, is_full = _masked(walk, 0, S, shape)
        else:
            start_n, stop_n, is_full = _plain(walk, 0, shape), S, walk.masked_tiles == 0
        qk = warpgroup_mma_wait(0, deps=[_issue_scores(q_tile, k_ring, 0, shape, STAGES)])
        _release(k_ring, 0, STAGES)
        p, _, m_i, l_i = _softmax(
            qk, m_i, l_i, start_n, stop_n, is_full, offs_m, b, h, scale, factor, captured, q_tile.dtype, shape, score_mod,
            mask_mod, True,
        )  # fmt: skip
        _await(v_ring, 0, STAGES)
        for j in range(1, walk.masked_tiles):
            start_n, stop_n, is_full = _masked(walk, j, S, shape)
            acc, m_i, l_i, p = _attend(
                acc, m_i, l_i, p, q_tile, k_ring, v_ring, j, start_n, stop_n, is_full, offs_m, b, h, scale, factor,
                captured, shape, score_mod, mask_mod, True, STAGES,
            )  # fmt: skip
        for j in range(gl.maximum(walk.masked_tiles, 1), n):
            start_n = _plain(walk, j - walk.masked_tiles, shape)
            acc, m_i, l_i, p = _attend(
                acc, m_i, l_i, p, q_tile, k_ring, v_ring, j, start_n, S, True, offs_m, b, h, scale, factor,
                captured, shape, score_mod, mask_mod, False, STAGES,
            )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[_issue_values(p, v_ring, n - 1, acc, STAGES)])

    divisor, lse_i, max_i = row_statistics(m_i, l_i)
    row = c * ROWS + gl.arange(0, ROWS, layout=in_rows)
    gl.store(rows.lse + row, lse_i, mask=row < rows.count)
    gl.store(rows.max_scores + row, max_i, mask=row < rows.count)
    _store(rows, c * ROWS, acc / _column(divisor, shape), shape)


@gluon.jit
def _store(rows, first, tile, shape):
    """Write the output of 64 rows from row `first` on, as far as they exist."""
    layout: gl.constexpr = _product_layout(shape.BLOCK_DV)
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, shape.BLOCK_DV, layout=gl.SliceLayout(0, layout))
    at = rows.out + (row.to(shape.OFFSET)[:, None] * rows.out_stride + column.to(shape.OFFSET)[None, :])
    gl.store(at, tile.to(rows.out.dtype.element_ty), mask=(row < rows.count)[:, None])


@gluon.jit(repr=kernel_name("attention_forward_hopper"))
def attention_forward_hopper(q, k, v, out, lse, max_scores, lists, order, captured, L, S, heads, group_size, heads_at_once,
                             batches, batch_step, tiles, scale, shape, score_mod: gl.constexpr, mask_mod: gl.constexpr,
                             STAGES: gl.constexpr):  # fmt: skip
    """What `attention_forward` computes, for tiles of 128 query rows.

    q, k, v: descriptors of boxes [1, 1, 64, D], [1, 1, BLOCK_N, D] and [1, 1, BLOCK_N, DV] of matrices [B, H, rows, columns],
    of 16-bit floats; the columns of `out` are adjacent. `batch_step` is 0 where all batch entries share their keys, else 1.
    Everything else as there; `num_warps` is a consumer's.
    """
    t, b, h = work_of_program(gl.program_id(0), tiles, heads, batches, heads_at_once, order)
    bh = b * heads + h
    row, start_m, stop_m = tile_bounds(t, L, shape.SPARSE_Q, shape.BLOCK_M)
    partial, n_partial, full, n_full = find_row(lists, b, h, row, shape.LISTED)
    partial_tiles, masked_tiles, plain_tiles = tile_counts(
        full, n_partial, n_full, S, shape.SPARSE_KV, shape.BLOCK_N, shape.LISTED, mask_mod is not None
    )
    walk = Walk(partial, full, partial_tiles, masked_tiles, plain_tiles)
    tile = (
        out.ptr + b.to(gl.int64) * out.stride_b + h.to(gl.int64) * out.stride_h + start_m.to(gl.int64) * out.stride_row
    )
    at = bh.to(gl.int64) * L + start_m
    rows = Rows(start_m, stop_m - start_m, tile, out.stride_row, lse + at, max_scores + at)

    q_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS] + q.block_shape, q.layout)
    q_ready = _barriers(CONSUMERS, 1)
    k_ring = _ring(k, STAGES)
    v_ring = _ring(v, STAGES)
    fence_async_shared()  # copies see the barriers as they are now
    # Tuples without a name: in one that has a name, a constant is none any more.
    gl.warp_specialize(
        [
            (_consume, (0, q_tiles, q_ready, k_ring, v_ring, walk, rows, b, h, captured, S, scale, shape, score_mod, mask_mod,
                        STAGES)),
            (_consume, (1, q_tiles, q_ready, k_ring, v_ring, walk, rows, b, h, captured, S, scale, shape, score_mod, mask_mod,
                        STAGES)),
            (_produce, (q, k, v, q_tiles, q_ready, k_ring, v_ring, walk, b, h, b * batch_step, h // group_size, start_m, S,
                        shape, STAGES)),
        ],
        [CONSUMER_WARPS, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
