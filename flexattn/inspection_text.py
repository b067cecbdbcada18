"""An `Inspection` as text for people, and as what JSON can hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .block_mask_cells import EMPTY, MEANINGS
from .element import number

if TYPE_CHECKING:
    from .inspection import Inspection, Operation

_MOST_ROWS, _MOST_COLUMNS = 12, 8
_MOST_OPERATIONS = 40
_HIDDEN, _SKIPPED = "·", ""


def report(found: Inspection) -> str:
    """A table of weights, or for a single element all that is known of it."""
    if isinstance(found.q_idx, int) and isinstance(found.kv_idx, int):
        return _element(found)
    return _table(found)


def strict(value: Any) -> Any:
    """Tensors and tuples as lists, and numbers that JSON does not have as texts."""
    if isinstance(value, Tensor):
        return strict(value.tolist())
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    if isinstance(value, dict):
        return {name: strict(v) for name, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _element(found: Inspection) -> str:
    attended = "attended" if found.mask.item() else "not attended"
    facts = {
        "block": MEANINGS[int(found.block.item())],
        "mask_mod": str(found.mask_mod.item()),
        "mask": f"{found.mask.item()}: {attended}",
        "score": number(found.score.item()),
        "modified": number(found.modified.item()),
        "weight": number(found.weight.item()),
        "lse": f"{number(found.lse.item())} of the row",
    }
    if "mask_mod" not in found.mods:
        del facts["mask_mod"]
    head = f"b={found.b}, h={found.h}, q_idx={found.q_idx}, kv_idx={found.kv_idx}"
    lines = [head, *(f"  {name:<8}  {text}" for name, text in facts.items())]
    for role, mod in found.mods.items():
        operations = [line for line in found.operations if line.role == role]
        lines += [f"{role} {mod}", *(f"  {_operation(line)}" for line in operations[:_MOST_OPERATIONS])]
        if len(operations) > _MOST_OPERATIONS:
            lines.append(f"  and {len(operations) - _MOST_OPERATIONS} more operations")
    return "\n".join(lines)


def _operation(line: Operation) -> str:
    words = [line.name, line.text, line.read if line.read != line.text else "", number(line.value)]
    return " = ".join(filter(None, words))


def _table(found: Inspection) -> str:
    rows, columns = _many(found.q_idx), _many(found.kv_idx)
    shape = (len(rows), len(columns))
    weight, mask, block, lse = (
        t.reshape(s)
        for t, s in zip((found.weight, found.mask, found.block, found.lse), (shape,) * 3 + (shape[:1],), strict=True)
    )
    shown = columns[:_MOST_COLUMNS]
    more = ["…"] if len(columns) > len(shown) else []
    cells = [["q_idx", *(f"kv {j}" for j in shown), *more, "lse"]]
    for r, q in enumerate(rows[:_MOST_ROWS]):
        words = [
            _short(weight[r, c]) if mask[r, c] else _SKIPPED if block[r, c] == EMPTY else _HIDDEN
            for c in range(len(shown))
        ]
        cells.append([str(q), *words, *more, _short(lse[r])])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(word.rjust(n) for word, n in zip(line, widths, strict=True)) for line in cells]
    head = f"weights of b={found.b}, h={found.h}: {shape[0]} of {found.shape[2]} queries, {shape[1]} of {found.shape[3]} keys"
    if len(rows) > _MOST_ROWS:
        lines.append("…".rjust(widths[0]))
    facts = [f"{role} {mod}" for role, mod in found.mods.items()]
    return "\n".join([head, *facts, *lines, f"{_HIDDEN} hidden by the mask; blank: in a block that is skipped"])


def _short(value: Tensor) -> str:
    return f"{value.item():.4g}"


def _many(positions: int | tuple[int, ...]) -> tuple[int, ...]:
    return (positions,) if isinstance(positions, int) else positions
