"""`inspect`: the scores, the mask and the weights of chosen elements of an attention call. In: its operands. Out: numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sharded, validate
from .autocast import autocast
from .block_lists import dense, has_data
from .block_mask import BlockMask
from .block_mask_cells import EMPTY, FULL, PARTIAL
from .codegen.evaluate import Inputs, evaluate
from .codegen.formula import lines
from .codegen.ir import Op
from .codegen.pipeline import variant
from .codegen.trace import describe, trace
from .element import At, Element, Origin
from .inspection_text import report, strict
from .mask_cache import cached_block_mask
from .problem import Problem

MOST = 1 << 24  # elements of a result
MOST_SEEN = 1 << 33  # elements that are computed for it, some minutes of work
_AT_ONCE = 1 << 20  # scores in memory beside it

Selection = int | slice | range | Sequence[int] | Tensor | None


class Operation(NamedTuple):
    """One operation of a mod at one element.

    Attributes:
        role: "score_mod" or "mask_mod".
        name: what later operations call the value, t0, t1, ...; empty for an element of a captured tensor.
        text: the operation, `slopes[h]` or `t0 * t1`.
        read: the element of a captured tensor that was read, `slopes[3]`; else empty.
        value: what it gives.
    """

    role: str
    name: str
    text: str
    read: str
    value: float | int | bool


@dataclass(frozen=True, eq=False)
class Inspection:
    """What `inspect` found. `str()` of it is a table, or for a single element an account of how its score came about.

    Tensors are on the CPU. They have a dimension for q_idx and one for kv_idx, as far as these were not given as an int;
    `lse` has that of q_idx.

    Attributes:
        b, h: the batch entry and the query head.
        q_idx, kv_idx: the positions: an int, or a tuple of ints.
        shape: of the whole attention: (B, Hq, L, S).
        score: float64, scale * <query[q_idx], key[kv_idx]>.
        modified: float64, what score_mod makes of it, also where the mask hides it.
        mask: bool, whether the key is attended: what the block lists and the mask_mod say together.
        mask_mod: bool, what the mask_mod says by itself; True without one.
        block: uint8, the kind of the block it lies in: 0 empty, which is never attended, 1 partial, where the mask_mod
            decides, 2 full, where it is not asked.
        weight: float64, the softmax of the modified scores over all attended keys of the row; 0 where not attended.
        lse: float64, logarithm of the sum of exp of these scores; -inf for a row that attends to nothing.
        operations: for a single element each operation of the mods with its value, in order; otherwise empty.
        mods: names and places of the score_mod and the mask_mod, for the report.
    """

    b: int
    h: int
    q_idx: int | tuple[int, ...]
    kv_idx: int | tuple[int, ...]
    shape: tuple[int, int, int, int]
    score: Tensor
    modified: Tensor
    mask: Tensor
    mask_mod: Tensor
    block: Tensor
    weight: Tensor
    lse: Tensor
    operations: tuple[Operation, ...]
    mods: dict[str, str]

    def __str__(self) -> str:
        return report(self)

    def __repr__(self) -> str:
        return f"<Inspection of b={self.b}, h={self.h}, {list(self.score.shape)} elements; print() it>"

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, texts, lists and dictionaries, for JSON; nan and infinities are "nan", "inf" and "-inf"."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        made: dict[str, Any] = {name: strict(value) for name, value in fields.items()}
        made["operations"] = [strict(line._asdict()) for line in self.operations]
        return made


def inspect(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    *,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    b: int = 0,
    h: int = 0,
    q_idx: Selection = None,
    kv_idx: Selection = None,
) -> Inspection:
    """Scores, mask and softmax weights of chosen elements of `flex_attention(query, key, value, ...)`, in float64.

    Each row's weights are taken over all of its keys, whatever kv_idx is chosen. Work is that of the chosen rows; memory
    that of the chosen elements and of one row.

    Args:
        query, key, value, score_mod, mask_mod, block_mask, scale, enable_gqa: as `flex_attention` takes them; value may be
            left out. The call is not made and no gradient is recorded.
        b, h: batch entry and query head.
        q_idx, kv_idx: which queries and keys: an int, a slice, a range, a list of ints or an integer tensor [N]; None for
            all. Negative ones count from the end, so q_idx=-1 is the last query. (A mod never sees a negative position.)

    Returns:
        An `Inspection`: `score`, `modified`, `mask`, `mask_mod`, `block`, `weight`, `lse`.

    Raises:
        IndexError: for b, h or positions that do not exist.
        ValueError, TypeError, TraceError: as `flex_attention`; and for more than 16,777,216
            elements at once, or rows that would take hours.

    Example:
        >>> import torch, flexattn
        >>> q, k, v = (torch.ones(1, 2, 8, 4) for _ in range(3))
        >>> slopes = torch.tensor([0.5, 0.25])
        >>> def alibi(score, b, h, q_idx, kv_idx):
        ...     return score + slopes[h] * (kv_idx - q_idx)
        >>> found = flexattn.inspect(q, k, v, alibi, flexattn.masks.causal_mask, h=1, q_idx=2, kv_idx=slice(0, 4))
        >>> found.modified.tolist(), found.mask.tolist()
        ([1.5, 1.75, 2.0, 2.25], [True, True, True, False])
        >>> round(found.weight.sum().item(), 12)
        1.0
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("inspect is called inside torch.compile; call it in eager code, with the same operands")
    validate.choices(block_mask, mask_mod, False, None, "auto", scale)
    query, key, value = autocast(query, key, key if value is None else value)
    if sharded.involved(*(t for t in (query, key, value) if isinstance(t, Tensor))):
        raise TypeError("inspect takes plain tensors, not DTensors; give it query.full_tensor(), or query.to_local()")
    validate.tensors(query, key, value, enable_gqa)
    if not all(map(has_data, (query, key))):
        raise TypeError(
            "inspect needs tensors with numbers in them: not on the meta device, nor inside a torch.func transform"
        )
    sizes = (*query.shape[:3], key.shape[2])
    b, h = (_one(name, index, n) for name, index, n in (("b", b, sizes[0]), ("h", h, sizes[1])))
    rows, columns = _positions("q_idx", q_idx, sizes[2]), _positions("kv_idx", kv_idx, sizes[3])
    _check_amount(len(rows), len(columns), sizes[3])
    if mask_mod is not None:
        block_mask = cached_block_mask(mask_mod, query, key)
    if block_mask is not None:
        validate.block_mask(block_mask, query, key)
        mask_mod = block_mask.mask_mod
    with torch.no_grad():
        problem, origin = _problem(query, key, value, score_mod, mask_mod, block_mask, scale)
        found = _Tile.of(problem, b, h, rows, columns)
        single = not _is_many(q_idx) and not _is_many(kv_idx)
        operations = _operations(problem, origin, At(b, h, rows[0], columns[0]), found.score) if single else ()
    keep = [slice(None) if _is_many(i) else 0 for i in (q_idx, kv_idx)]

    def cut(values: Tensor) -> Tensor:
        return values[keep[0], keep[1]]

    mods = {"score_mod": score_mod, "mask_mod": mask_mod}
    return Inspection(
        b,
        h,
        tuple(rows) if _is_many(q_idx) else rows[0],
        tuple(columns) if _is_many(kv_idx) else columns[0],
        sizes,
        score=cut(found.score),
        modified=cut(found.modified),
        mask=cut(found.mask),
        mask_mod=cut(found.mask_mod),
        block=cut(found.block),
        weight=cut(found.weight),
        lse=found.lse[keep[0]],
        operations=operations,
        mods={role: describe(mod) for role, mod in mods.items() if mod is not None},
    )


# ---- what was asked for


def _is_many(selection: Any) -> bool:
    return selection.dim() > 0 if isinstance(selection, Tensor) else not hasattr(selection, "__index__")


def _one(name: str, index: Any, size: int) -> int:
    """A position, counted from the start."""
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"{name} is {index!r}; it must be an int")
    found = operator.index(index)
    if not -size <= found < size:
        valid = f"0 to {size - 1}, or -{size} to -1 from the end" if size else "none, there is nothing"
        raise IndexError(f"{name}={found} is out of range; valid: {valid}")
    return found % size


def _check_amount(rows: int, columns: int, S: int) -> None:
    if rows * columns > MOST:
        raise ValueError(
            f"{rows} queries and {columns} keys are {rows * columns} elements; inspect gives at most {MOST} at once; choose "
            "fewer, e.g. q_idx=slice(0, 1024), kv_idx=slice(0, 1024)"
        )
    if rows * S > MOST_SEEN:
        raise ValueError(
            f"the weights of {rows} queries are taken over all {S} keys, {rows * S} elements; inspect looks at no more than "
            f"{MOST_SEEN}; choose fewer queries, e.g. q_idx=slice(0, {MOST_SEEN // S})"
        )


def _positions(name: str, selection: Any, size: int) -> list[int]:
    if selection is None:
        return list(range(size))
    if isinstance(selection, slice):
        return list(range(*selection.indices(size)))
    if isinstance(selection, Tensor) and selection.dim() == 1:
        selection = selection.tolist()
    if isinstance(selection, (range, list, tuple)):
        return [_one(f"an entry of {name}", i, size) for i in selection]
    if isinstance(selection, bool) or not hasattr(selection, "__index__"):
        raise TypeError(
            f"{name} is a {type(selection).__name__}; choose by an int, a slice, a range, a list of ints, or None for all"
        )
    return [_one(name, selection, size)]


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    mask_mod: Callable[..., Tensor] | None,
    block_mask: BlockMask | None,
    scale: float | None,
) -> tuple[Problem, Origin]:
    program, captured, ints = trace(score_mod, mask_mod, score_dtype=torch.float64, device=query.device)
    parsed = variant(program)
    tensors = captured[: len(parsed.captured)]
    validate.captured(tensors, query.device)
    lists = () if block_mask is None else block_mask.kv_lists()
    block_size = (128, 128) if block_mask is None else block_mask.BLOCK_SIZE
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    made = Problem(query, key, value, captured, lists, ints, block_size, parsed, factor)
    return made, Origin(score_mod, mask_mod, tensors)


# ---- what is found


class _Tile(NamedTuple):
    """Values [rows, columns] and the lse [rows], on the CPU."""

    score: Tensor
    modified: Tensor
    mask: Tensor
    mask_mod: Tensor
    block: Tensor
    weight: Tensor
    lse: Tensor

    @classmethod
    def of(cls, problem: Problem, b: int, h: int, rows: Sequence[int], columns: Sequence[int]) -> _Tile:
        """As many rows at a time as memory allows, with all of their keys."""
        device, S = problem.query.device, problem.key.shape[2]
        group = problem.query.shape[1] // max(1, problem.key.shape[1])
        k = problem.key[b if problem.key.shape[0] > 1 else 0, h // group].detach().double()
        at = torch.tensor(columns, dtype=torch.int64, device=device)
        step, pieces = max(1, _AT_ONCE // max(1, S)), []
        for start in range(0, max(1, len(rows)), step):  # once where there are no rows
            chosen = torch.tensor(rows[start : start + step], dtype=torch.int64, device=device)
            score = problem.query[b, h, chosen].detach().double() @ k.mT * problem.given_scale
            made = _solved(problem, b, h, chosen, score)
            pieces.append([*(t[:, at].cpu() for t in made[:-1]), made.lse.cpu()])
        return cls._make(torch.cat(parts) for parts in zip(*pieces, strict=True))


def _solved(problem: Problem, b: int, h: int, rows: Tensor, score: Tensor) -> _Tile:
    """Some rows [R] with all their keys, by the formulas of the dense reference."""
    parsed, device = problem.variant, score.device
    named = {
        "b": torch.full((), b, dtype=torch.int32, device=device),
        "h": torch.full((), h, dtype=torch.int32, device=device),
        "q_idx": rows.int().view(-1, 1),
        "kv_idx": torch.arange(score.shape[1], dtype=torch.int32, device=device),
        "score": score,
    }
    inputs = Inputs(named, problem.tensors, problem.floats, problem.ints, device)
    (modified,) = (t.expand(score.shape) for t in evaluate([parsed.score], inputs))
    said = torch.ones_like(score, dtype=torch.bool)
    if parsed.mask is not None:
        (said,) = (t.expand(score.shape) for t in evaluate([parsed.mask], inputs))
    block = _kinds(problem, b, h, rows, score.shape[1])
    mask = (block == FULL) | ((block == PARTIAL) & said)
    hidden = torch.where(mask, modified, -math.inf)
    largest = hidden.amax(-1, keepdim=True) if score.shape[1] else score.new_full((len(rows), 1), -math.inf)
    offset = largest.masked_fill(largest == -math.inf, 0.0)
    weight = torch.exp(hidden - offset)
    total = weight.sum(-1, keepdim=True)
    nothing = total == 0
    lse = torch.where(nothing, -math.inf, offset + torch.log(total))
    weight = weight / total.masked_fill(nothing, 1.0)
    return _Tile(score, modified, mask, said, block, weight, lse.squeeze(-1))


def _kinds(problem: Problem, b: int, h: int, rows: Tensor, S: int) -> Tensor:
    """[R, S] uint8: the kind of the block of each element; without lists what the mask makes of one block of all."""
    if not problem.block_mask:
        kind = FULL if problem.variant.mask is None else PARTIAL
        return torch.full((len(rows), S), kind, dtype=torch.uint8, device=rows.device)
    size = problem.block_size
    wanted, inverse = torch.unique(rows // size[0], return_inverse=True)
    columns, keys = -(-S // size[1]), torch.arange(S, device=rows.device) // size[1]
    kinds = torch.full((len(wanted), columns), EMPTY, dtype=torch.uint8, device=rows.device)
    lists = [t[min(b, t.shape[0] - 1), min(h, t.shape[1] - 1)][None, None, wanted] for t in problem.block_mask]
    for kind, count, index in zip((PARTIAL, FULL), lists[0::2], lists[1::2], strict=False):
        kinds[dense(count, index, columns)[0, 0]] = kind
    return kinds[inverse][:, keys]


def _operations(problem: Problem, origin: Origin, at: At, score: Tensor) -> tuple[Operation, ...]:
    element = Element.of(problem, at, origin.names(problem), score[0, 0].to(problem.query.device))
    of_mask = [] if element.program.mask is None else [element.program.mask]
    in_score = {line.node for line in lines([element.program.score])}
    found = []
    for line in lines([element.program.score, *of_mask], element.names):
        role = "score_mod" if line.node in in_score else "mask_mod"
        read = element.read(line.node) if line.node.op is Op.LOAD else ""
        found.append(Operation(role, line.name, line.text, read, element.value(line.node)))
    return tuple(found)
