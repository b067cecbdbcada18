"""What the backward does with each captured tensor, in words: a line for each place where a mod reads one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .codegen.access import Access, Pattern, access
from .codegen.formula import inline
from .codegen.ir import Node, Op
from .codegen.pipeline import Variant

NOTHING = "no captured tensor receives a gradient"
UNLEARNED = " (only if it requires grad: now it does not)"
LONGEST = 40  # characters of an index that is printed

# What an entry is told by, besides heads and batch entries, and how contributions are added up.
WORDS: dict[Pattern, tuple[tuple[str, ...], str]] = {
    Pattern.HEAD: ((), "summed in registers over the keys, then over the queries; no atomics"),
    Pattern.ROW: (("query",), "summed in registers over the keys, one float32 for each query; no atomics"),
    Pattern.COLUMN: (("key",), "summed in registers over the queries, one float32 for each key; no atomics"),
    Pattern.DIAGONAL: (
        ("kv_idx - q_idx",),
        "summed along the diagonals of each tile, then added up in a fixed order; no atomics",
    ),
    Pattern.DENSE: (("query", "key"), "each element stored; no atomics"),
    Pattern.INDIRECT: (
        (),
        "each element added by itself: on a GPU by float32 atomics, whose order varies from run to run; with "
        'kernel_options={"DETERMINISTIC": True} or torch.use_deterministic_algorithms(True) sorted first, and repeatable',
    ),
}


def gradient_lines(parsed: Variant, captured: Sequence[Tensor], names: Mapping[str, str]) -> str:
    """A line for each load of a floating captured tensor; `names` as `formula` takes them."""
    found = sorted((access(load) for load, _ in parsed.derivative.loads), key=lambda to: to.number)
    return "\n".join(dict.fromkeys(_line(to, captured, names) for to in found)) or NOTHING


def _line(found: Access, captured: Sequence[Tensor], names: Mapping[str, str]) -> str:
    place = names.get(f"c{found.number}", f"c{found.number}")
    if found.indices:
        place += f"[{', '.join(_short(i, names) for i in found.indices)}]"
    units, sums = WORDS[found.pattern]
    if found.pattern is Pattern.DENSE:
        sums += _shared(found)
    learned = "" if captured[found.number].requires_grad else UNLEARNED
    return f"{place}: {_entries(found, units)}; {sums}{learned}"


def _short(index: Node, names: Mapping[str, str]) -> str:
    text = inline(index, names)
    return text if len(text) <= LONGEST else "<index>"


def _entries(found: Access, units: tuple[str, ...]) -> str:
    """What tells which entry an element reads."""
    if found.pattern is Pattern.INDIRECT:
        return "any entry"
    heads = [what for axis, what in (("h", "head"), ("b", "batch entry")) if axis in found.axes]
    if not units and not heads:
        return "one entry for all"
    *most, last = *units, *heads
    return "by " + (f"{', '.join(most)} and {last}" if most else last)


def _shared(found: Access) -> str:
    """DENSE: where several elements may read an entry, for want of a dimension of its own."""
    own = {str(i.value) for i in found.indices if i.op is Op.INPUT}
    sharing = [what for axis, what in (("b", "batch entries"), ("h", "heads")) if axis not in own]
    return f", by way of a workspace where several {' or '.join(sharing)} may share it" if sharing else ""
