"""A mask_mod made of a graph: what a trace turned into nodes, to be called and traced again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .evaluate import Inputs, evaluate
from .formula import inline
from .ir import INDEX_INPUTS, DType, Kind, Node, Op, walk
from .promotion import cast
from .recorder import Placeholder, Recorder
from .spec import substitute


@dataclass(frozen=True, eq=False, repr=False)
class Replay:
    """A mask function `(b, h, q_idx, kv_idx)` whose values are those of `node`.

    `captured`, `floats` and `ints` are what the graph reads by number.

    Example:
        >>> import flexattn
        >>> from flexattn.codegen.pipeline import variant
        >>> from flexattn.codegen.trace import trace
        >>> traced = trace(None, flexattn.masks.sliding_window(2))
        >>> again = Replay(variant(traced.program).mask, traced.captured)
        >>> flexattn.create_mask(again, None, None, 3, 3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    node: Node
    captured: Sequence[Tensor] = ()
    floats: Sequence[float | Tensor] = ()
    ints: Sequence[Any] = ()

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The value of the graph."""
        arguments = dict(zip(INDEX_INPUTS, (b, h, q_idx, kv_idx), strict=True))
        traced = next((a for a in arguments.values() if isinstance(a, Placeholder)), None)
        if traced is None:
            return evaluate([self.node], Inputs(arguments, self.captured, self.floats, self.ints, q_idx.device))[0]
        (node,) = substitute([self.node], self._renamed(arguments, traced.recorder))
        return traced.recorder.scalar(node)

    def _renamed(self, arguments: dict[str, Tensor], recorder: Recorder) -> dict[Node, Node]:
        """The leaves of the graph and what they are for a recorder."""
        found: dict[Node, Node] = {}
        for node in walk(self.node):
            if node.op is Op.INPUT:
                found[node] = cast(recorder._operand(arguments[str(node.value)], 0).nodes[0], DType.INT32)
            elif node.op is Op.CAPTURED and isinstance(node.value, tuple):
                found[node] = recorder._capture(self.captured[node.value[0]])
            elif node.op is Op.FLOAT and isinstance(node.value, int):
                recorder.floats.append(self.floats[node.value])
                found[node] = Node(Op.FLOAT, (), node.dtype, Kind.WEAK, len(recorder.floats) - 1)
            elif node.op is Op.INT and isinstance(node.value, int):
                found[node] = recorder.number(self.ints[node.value])
        return found

    def __repr__(self) -> str:
        return inline(self.node)

    @property
    def __name__(self) -> str:
        return repr(self)
