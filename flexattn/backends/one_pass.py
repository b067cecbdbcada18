"""A backward whose programs share their results: dQ of one pass, and the keys of a group that is divided."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codegen.access import Methods
from ..config import prefers_one_pass
from ..kernel_options import options_of, unfollowed
from ..problem import Problem
from . import work_order
from .collection import is_deterministic
from .invariant import is_invariant
from .products import pieces, precision_of, product_of
from .target import Target, current, interpreted

ROWS = 128  # of dQ's buffer are a multiple of this, and so of every tile


class Backward(NamedTuple):
    """Gradients of query, key, value, and of the captured tensors asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dcaptured: list[Tensor]


class Sums(NamedTuple):
    """What programs of the dK/dV kernel share, in float32.

    dq: [B, Hq, rows, width], to which a backward in one pass adds, without the scale; else None. `rows` is a multiple of
    every tile. dk, dv: [B * splits, Hkv, S, .], where the heads of a group are divided among `splits` programs; else None.
    """

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    splits: int

    @staticmethod
    def of(problem: Problem, in_one_pass: bool, options: Mapping[str, Any]) -> Sums:
        """The buffers for a problem. That of dQ is set to zero by the delta kernel."""
        query, key, value = problem.query, problem.key, problem.value
        new = partial(torch.empty, dtype=torch.float32, device=query.device)
        Bkv, Hkv, S, D = key.shape
        group = query.shape[0] // Bkv * (query.shape[1] // Hkv)
        parts = 1 if is_invariant(options) else work_order.splits(S, Bkv * Hkv, group, query.device)
        dq = dk = dv = None
        if in_one_pass:
            step = max(ROWS, options.get("BLOCK_M1", 0))
            dq = new(
                *query.shape[:2], -(-query.shape[2] // step) * step, pieces(D, options.get("PIECES", True)).columns
            )
        if parts > 1:
            dk, dv = new(Bkv * parts, Hkv, S, D), new(Bkv * parts, Hkv, S, value.shape[-1])
        return Sums(dq, dk, dv, parts)

    def finish(self, result: Backward, scale: float) -> None:
        """Gradients in their own dtypes."""
        if self.dq is not None:
            L, D = result.dq.shape[2:]
            torch.mul(self.dq[:, :, :L, :D], scale, out=result.dq)
        if self.dk is not None and self.dv is not None:
            for parts, total in ((self.dk, result.dk), (self.dv, result.dv)):
                total.copy_(parts.unflatten(0, (-1, self.splits)).sum(1))


ALONE = Sums(None, None, None, 1)  # two passes, and one program for all that share keys


def can_be_one_pass(problem: Problem, methods: Methods) -> bool:
    """Whether the programs of keys can do all: nothing is collected by queries, and tiles end where blocks do."""
    return not _obstacle(problem, methods)


def _obstacle(problem: Problem, methods: Methods) -> str:
    if not set(methods) <= {None, "column"}:
        return "the gradient of a captured tensor that is read by head, row or element is summed by tiles of queries"
    if problem.block_mask and problem.block_size[0] % 16:
        blocks = problem.block_size[0]
        return f"blocks of {blocks} queries have no tiles that end where they do; make the block mask with a multiple of 16"
    return ""


def in_one_pass_or_two(
    problem: Problem, methods: Methods, options: Mapping[str, Any], target: Target | None = None
) -> list[bool]:
    """Whether dQ is computed with dK and dV, given how gradients of captured tensors are collected: what is expected to be
    faster on a target, by default the operands' device, and then the other, if it is to be found out by timing both.

    Raises `ValueError` where the caller insists on what cannot be.
    """
    said = options_of(options, forward=False)
    wanted, found = said.get("ONE_PASS"), _obstacle(problem, methods)
    if not found and is_deterministic(said):
        found = (
            "it adds gradients by atomics, in an order that differs from run to run, which DETERMINISTIC and "
            "torch.use_deterministic_algorithms(True) forbid"
        )
    if wanted and found:
        raise unfollowed(options, False, "ONE_PASS", found)
    if found:
        return [False]
    if wanted is not None:
        return [bool(wanted)]
    if said.get("BLOCK_M2") or said.get("BLOCK_N2"):  # tiles of the dQ pass
        return [False]
    preferred = one_pass_is_faster(problem, said.get("PIECES", True), target)
    return [preferred, not preferred] if said.get("AUTOTUNE") else [preferred]


def one_pass_is_faster(problem: Problem, in_pieces: bool = True, target: Target | None = None) -> bool:
    """What the table of configurations says for a target, by default the device of the operands."""
    if target is None and (interpreted() or problem.query.device.type != "cuda"):
        return False
    target = target or _target(problem.query.device)
    query, precision = problem.query, precision_of(problem.query)
    width = max(pieces(n, in_pieces).columns for n in (query.shape[-1], problem.value.shape[-1]))
    return prefers_one_pass(target.backend, target.arch, product_of(query, precision), width)


@lru_cache
def _target(device: torch.device) -> Target:
    with torch.cuda.device(device):
        return current()
