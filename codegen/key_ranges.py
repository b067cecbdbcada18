"""Masks whose keys are one range for each query: causal, windows, prefixes, chunks, documents, spans, and what they make.

A mask is read as a plan of comparisons, `and` and `or`, from its program alone. Comparisons that are linear in the key
give limits as formulas of the query (`symbolic.key_limits`); equal ids, sorted values and flags of keys give limits that
are looked up. Whether each query's keys are one range is then a matter of a few vectors as long as the queries; where
they are, the blocks of each row follow from the first and last key of its queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .evaluate import Inputs, evaluate
from .formula import inline
from .ir import DType, Node, Op, const
from .linear import Limits
from .relabel import lead_of_batch
from .spec import apply
from .tile_lists import Segments

_BATCH = frozenset(("b", "h"))
_QUERY, _KEYED = _BATCH | {"q_idx"}, _BATCH | {"kv_idx"}


class Both(NamedTuple):
    """Keys in the ranges of all parts."""

    parts: tuple[Plan, ...]


class Either(NamedTuple):
    """Keys in the range of some part."""

    parts: tuple[Plan, ...]


class Queries(NamedTuple):
    """All keys for the queries for which `node` is true, none for others."""

    node: Node


class Keys(NamedTuple):
    """The keys for which `node` is true, if they are one run."""

    node: Node


class SameId(NamedTuple):
    """The keys with the query's id, if they are one run."""

    query: Node
    key: Node


class Sorted(NamedTuple):
    """The keys whose value compares to the query's, if values ascend with the key."""

    op: Op
    key: Node
    query: Node
    flipped: bool  # query op key


Plan = Limits | Both | Either | Queries | Keys | SameId | Sorted


@lru_cache(maxsize=1024)
def plan_of(mask: Node) -> Plan | None:
    """The plan of a mask; None for one whose form promises no ranges."""
    return _plan(mask, False)


def _plan(node: Node, negated: bool) -> Plan | None:
    op, args = node.op, node.args
    if op is Op.NOT:
        return _plan(args[0], not negated)
    if node.axes <= _QUERY:
        return Queries(apply(Op.NOT, node) if negated else node)
    if node.axes <= _KEYED and op is not Op.AND and op is not Op.OR:
        found = _comparison(node, negated)
        return found if isinstance(found, Limits) else Keys(apply(Op.NOT, node) if negated else node)
    if op in (Op.AND, Op.OR):
        parts = tuple(_plan(a, negated) for a in args)
        if None in parts:
            return None
        join = Both if (op is Op.AND) is not negated else Either
        return join(tuple(q for p in parts if p is not None for q in (p.parts if isinstance(p, join) else (p,))))
    return _comparison(node, negated)


def _comparison(node: Node, negated: bool) -> Plan | None:
    op, args = node.op, node.args
    if op not in (Op.LT, Op.LE, Op.EQ, Op.NE) or not args[0].dtype.is_int:
        return None
    if negated:
        if op in (Op.EQ, Op.NE):
            node = apply(Op.NE if op is Op.EQ else Op.EQ, *args)
        else:
            node = apply(Op.LE if op is Op.LT else Op.LT, args[1], args[0])
        op, args = node.op, node.args
    if op is Op.NE:
        return None
    from .symbolic import key_limits  # sympy takes a while to import

    found = key_limits(node)
    if found is not None:
        both, limits = found
        return limits[0] if len(limits) == 1 else (Both if both else Either)(limits)
    one, two = args
    flipped = "kv_idx" not in one.axes
    query, key = (one, two) if flipped else (two, one)
    if not (query.axes <= _QUERY and key.axes <= _KEYED):
        return None
    if op is Op.EQ and _same_ids(query, key):
        return SameId(query, key)
    return Sorted(op, key, query, flipped)


def _same_ids(a: Node, b: Node) -> bool:
    loads = a.op is Op.LOAD and b.op is Op.LOAD and len(a.args) > 1
    return loads and a.args[:-1] == b.args[:-1] and lead_of_batch(list(a.args[1:-1]))


class _Ranges(NamedTuple):
    """The first and last key of each query, int64 [B', H', Q], the last before the first for none; `ok` where it is so."""

    lo: Tensor
    hi: Tensor
    ok: Tensor

    @property
    def empty(self) -> Tensor:
        return self.hi < self.lo


class _Queries(NamedTuple):
    """What ranges are computed from: inputs at all queries, [B', H', Q], and at all keys, [B', H', KV]."""

    inputs: Inputs
    keys: Inputs
    lead: tuple[int, int]
    n_queries: int
    n_keys: int


def segments_by_query(
    mask: Node,
    inputs: Inputs,
    wrapping: frozenset[Node],
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    memory: int,
) -> tuple[Segments, Segments] | None:
    """The partial and the full blocks of a mask, or None where a query's keys, or a row's blocks, are not one range.

    `wrapping`: the nodes that may wrap, of which formulas would be wrong. `memory`: bytes the vectors may take.
    """
    B, H, Q, KV = shape
    if wrapping or B * H * (Q + KV) * 8 * 16 > memory:
        return None
    plan = plan_of(mask)
    if plan is None:
        return None
    q, kv = (torch.arange(n, dtype=torch.int32, device=inputs.device) for n in (Q, KV))
    lead = {"b": q.new_tensor(range(B)).view(B, 1, 1), "h": q.new_tensor(range(H)).view(1, H, 1)}
    work = _Queries(inputs.fork({**lead, "q_idx": q}), inputs.fork({**lead, "kv_idx": kv}), (B, H), Q, KV)
    found = _ranges(plan, work)
    return _segments(_Ranges(*(t.expand(B, H, Q) for t in found)), size, KV)


def _ranges(plan: Plan, work: _Queries) -> _Ranges:
    match plan:
        case Limits(lo, hi):
            zero = const(0, DType.INT64)
            first, last = evaluate([lo or zero, hi or zero], work.inputs)
            return _clipped(first, last if hi is not None else last.new_full((), work.n_keys - 1), work)
        case Queries(node):
            (attends,) = evaluate([node], work.inputs)
            none_or_all = torch.where(attends, work.n_keys - 1, -1)
            return _Ranges(torch.zeros_like(none_or_all), none_or_all, torch.ones_like(attends))
        case Keys(node):
            (flags,) = evaluate([node], work.keys)
            return _run(flags.expand(*work.lead, work.n_keys))
        case SameId(query, key):
            return _same_id(*_evaluated(query, key, work))
        case Sorted():
            return _sorted(plan, work)
        case Both(parts) | Either(parts):
            combine = _both if isinstance(plan, Both) else _either
            found = _ranges(parts[0], work)
            for part in parts[1:]:
                found = combine(found, _ranges(part, work), work.n_keys)
            return found
    raise AssertionError(plan)


def _clipped(lo: Tensor, hi: Tensor, work: _Queries) -> _Ranges:
    lo, hi = lo.clamp_min(0), hi.clamp_max(work.n_keys - 1)
    return _Ranges(lo, hi, torch.ones((), dtype=torch.bool, device=lo.device))


def _run(flags: Tensor) -> _Ranges:
    """The true elements of the last dimension, [.., 1], ok if they are adjacent."""
    n = flags.shape[-1]
    count = flags.sum(-1, keepdim=True)
    first = flags.to(torch.uint8).argmax(-1, keepdim=True)
    last = n - 1 - flags.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    none = count == 0
    return _Ranges(torch.where(none, 0, first), torch.where(none, -1, last), none | (last - first + 1 == count))


def _evaluated(query: Node, key: Node, work: _Queries) -> tuple[Tensor, Tensor]:
    """Values [B', H', Q] and [B', H', KV], int64."""
    (wanted,), (values,) = evaluate([query], work.inputs), evaluate([key], work.keys)
    B, H = work.lead
    return wanted.long().expand(B, H, work.n_queries).contiguous(), values.long().expand(B, H, work.n_keys).contiguous()


def _same_id(wanted: Tensor, ids: Tensor) -> _Ranges:
    """For ids that count from 0: the run of keys with each query's id."""
    n = ids.shape[-1]
    largest = int(torch.maximum(wanted.max(), ids.max())) + 1
    if int(torch.minimum(wanted.min(), ids.min())) < 0 or largest > 4 * (n + wanted.shape[-1]):
        return _Ranges(wanted, wanted, torch.zeros_like(wanted, dtype=torch.bool))  # ids of another making
    place = torch.arange(n, device=ids.device).expand_as(ids)
    made = ids.new_full((*ids.shape[:2], largest), n)
    first = made.scatter_reduce(-1, ids, place, "amin").gather(-1, wanted)
    last = made.fill_(-1).scatter_reduce(-1, ids, place, "amax").gather(-1, wanted)
    count = made.fill_(0).scatter_add(-1, ids, torch.ones_like(ids)).gather(-1, wanted)
    return _Ranges(first, last, (count == 0) | (last - first + 1 == count))


def _sorted(plan: Sorted, work: _Queries) -> _Ranges:
    wanted, values = _evaluated(plan.query, plan.key, work)
    ok = (values[..., 1:] >= values[..., :-1]).all(-1, keepdim=True)
    left: Callable[[], Tensor] = lambda: torch.searchsorted(values, wanted)
    right: Callable[[], Tensor] = lambda: torch.searchsorted(values, wanted, right=True)
    lo, hi = torch.zeros_like(wanted), torch.full_like(wanted, work.n_keys - 1)
    if plan.op is Op.EQ:
        lo, hi = left(), right() - 1
    elif plan.flipped:  # wanted < values, wanted <= values
        lo = right() if plan.op is Op.LT else left()
    else:
        hi = (left() if plan.op is Op.LT else right()) - 1
    return _Ranges(lo, hi, ok.expand_as(lo))


def _both(a: _Ranges, b: _Ranges, n: int) -> _Ranges:
    # An empty range makes the other not matter: nothing lies before its end and after its beginning.
    ok = (a.ok & b.ok) | (a.ok & a.empty) | (b.ok & b.empty)
    return _Ranges(torch.maximum(a.lo, b.lo), torch.minimum(a.hi, b.hi), ok)


def _either(a: _Ranges, b: _Ranges, n: int) -> _Ranges:
    touch = (a.lo <= b.hi + 1) & (b.lo <= a.hi + 1)
    whole = [r.ok & (r.lo == 0) & (r.hi == n - 1) for r in (a, b)]
    ok = (a.ok & b.ok & (touch | a.empty | b.empty)) | whole[0] | whole[1]
    only_a, only_b = b.empty & b.ok, a.empty & a.ok
    lo = torch.where(only_a, a.lo, torch.where(only_b, b.lo, torch.minimum(a.lo, b.lo)))
    hi = torch.where(only_a, a.hi, torch.where(only_b, b.hi, torch.maximum(a.hi, b.hi)))
    # A garbled part does not matter beside a whole one.
    for r, is_whole in zip((a, b), whole, strict=True):
        lo, hi = torch.where(is_whole, r.lo, lo), torch.where(is_whole, r.hi, hi)
    return _Ranges(lo, hi, ok)


def _segments(ranges: _Ranges, size: tuple[int, int], n_keys: int) -> tuple[Segments, Segments] | None:
    """The blocks that contain keys of the ranges: partial segments and full ones; None if a row's are not adjacent."""
    lo, hi, ok = (t.flatten(0, 1) for t in ranges)
    pairs, Q = lo.shape
    rows, columns = -(-Q // size[0]), -(-n_keys // size[1])
    # Beyond the last query stands the last query again.
    at = torch.arange(rows * size[0], device=lo.device).clamp_max(Q - 1)
    lo, hi = (t[:, at].view(pairs * rows, size[0]) for t in (lo, hi))
    some = lo <= hi
    first, last = torch.div(lo, size[1], rounding_mode="floor"), torch.div(hi, size[1], rounding_mode="floor")
    gap = (first[:, 1:] > last[:, :-1] + 1) | (first[:, :-1] > last[:, 1:] + 1)
    beginnings = some[:, :1].long().sum(1) + (some[:, 1:] & ~some[:, :-1]).sum(1)
    if not bool(ok.all() & ~((gap & some[:, 1:] & some[:, :-1]).any() | (beginnings > 1).any())):
        return None
    start = first.where(some, columns).amin(1)
    stop = last.where(some, -1).amax(1) + 1
    stop = torch.maximum(start, stop)
    full_start = -torch.div(-lo.amax(1), size[1], rounding_mode="floor")
    end = hi.amin(1) + 1
    full_stop = torch.where(end == n_keys, columns, torch.div(end, size[1], rounding_mode="floor"))
    none = (full_stop <= full_start) | ~some.all(1)
    full_start, full_stop = torch.where(none, stop, full_start), torch.where(none, stop, full_stop)
    row = torch.arange(pairs * rows, device=lo.device)
    before, after = Segments(row, start, full_start).nonempty(), Segments(row, full_stop, stop).nonempty()
    partial = Segments(*(torch.cat(t) for t in zip(before, after, strict=True)))
    return partial, Segments(row, full_start, full_stop).nonempty()


def described(plan: Plan, names: Mapping[str, str] | None = None) -> str:
    """Where the keys of a query lie, for people to read. `names` renames captured tensors."""

    def text(node: Node) -> str:
        return inline(node, names)

    def sides(lo: Node | None, hi: Node | None) -> list[str]:
        return [f"kv_idx {sign} {text(end)}" for sign, end in ((">=", lo), ("<=", hi)) if end is not None]

    match plan:
        case Limits(lo, hi):
            return " and ".join(sides(lo, hi))
        case Queries(node):
            return f"any where {text(node)}"
        case Keys(node):
            return f"the run where {text(node)}"
        case SameId(query, key):
            return f"the run where {text(key)} == {text(query)}"
        case Sorted(op, key, query, flipped):
            sign = {Op.EQ: "==", Op.LT: ">" if flipped else "<", Op.LE: ">=" if flipped else "<="}[op]
            return f"those of ascending values where {text(key)} {sign} {text(query)}"
        case Both(parts) | Either(parts):
            said: list[str] = []
            for p in parts:
                if isinstance(plan, Both) and isinstance(p, Limits):
                    said += sides(p.lo, p.hi)
                else:
                    said.append(f"({described(p, names)})" if isinstance(p, (Both, Either)) else described(p, names))
            return (" and " if isinstance(plan, Both) else " or ").join(dict.fromkeys(said))
    raise AssertionError(plan)
