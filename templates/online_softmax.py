"""The online softmax of FlashAttention-2 (Dao, 2023, algorithm 1), in base 2."""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LN2


@triton.jit
def softmax_step(qk, factor, m_i, l_i):
    """One tile of scores [M, N]: weights p, the factor alpha of earlier sums, and the new maximum and sum of each row.

    m = max(m_i, factor * max(qk)),  p = 2^(factor * qk - m),  alpha = 2^(m_i - m),  l = alpha * l_i + sum(p)
    """
    m_ij = tl.maximum(m_i, tl.max(qk, 1) * factor)
    # A row that is masked so far: -inf - 0, where -inf - -inf would be nan.
    finite = tl.where(m_ij == float("-inf"), 0.0, m_ij)
    p = tl.exp2(qk * factor - finite[:, None])
    alpha = tl.exp2(m_i - finite)
    return p, alpha, m_ij, l_i * alpha + tl.sum(p, 1)


@triton.jit
def row_statistics(m_i, l_i):
    """Divisor of the sum, lse and largest score of each row, the last two in natural units.

    A row that attends to nothing: divisor 1, both -inf.
    """
    nothing = l_i == 0.0
    divisor = tl.where(nothing, 1.0, l_i)
    lse = tl.where(nothing, float("-inf"), (m_i + tl.log2(divisor)) * LN2)
    # The hardware's maximum passes over nan; the sum does not.
    undefined = (l_i != l_i) & (m_i != float("inf"))
    return divisor, lse, tl.where(undefined, l_i, m_i * LN2)
