"""Which program does which tile: a grid of one dimension, in the order in which the device starts programs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def work_of_program(program, tiles, heads, batches, heads_at_once, order):
    """The tile, batch entry and head of a program.

    As many heads as share the cache, `heads_at_once`, take turns: first the first tile of each. What is first is said by
    `order`, if given: the tiles of every row of block lists, those with the most work first, so that the device does not
    end with a few long ones.
    """
    turn = tiles * heads_at_once
    first = program // turn * heads_at_once
    together = tl.minimum(heads_at_once, heads * batches - first)
    rank = program % turn // together
    bh = first + program % turn % together
    b, h = bh // heads, bh % heads
    if order is None:
        return rank, b, h
    else:
        return tl.load(order.ptr + b * order.stride_b + h * order.stride_h + rank), b, h
