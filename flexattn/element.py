"""One element of an attention problem: every value that its mods compute on the way, and where one stops being finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codegen.derivative import Step, steps
from .codegen.evaluate import Inputs, evaluate, wrap_index
from .codegen.formula import inline
from .codegen.ir import Node, Op, walk
from .codegen.places import exact_place_of
from .codegen.program import Parsed, parse
from .graph_mod import GraphMod
from .names import captured_names
from .problem import Problem


class At(NamedTuple):
    """Which element."""

    b: int
    h: int
    q_idx: int
    kv_idx: int

    def __str__(self) -> str:
        return ", ".join(f"{name}={index}" for name, index in self._asdict().items())


class Origin(NamedTuple):
    """What a problem was traced from: the mods, and the tensors they captured, c0, c1, ..., as they named them."""

    score_mod: Callable[..., Tensor] | None
    mask_mod: Callable[..., Tensor] | None
    tensors: Sequence[Tensor]

    def names(self, problem: Problem) -> dict[str, str]:
        """The user's names of what the problem captured."""
        return captured_names((self.score_mod, self.mask_mod), self.tensors, problem.floats)

    def line(self, role: str, node: Node, problem: Problem) -> str:
        """Where the user wrote an operation of the program, "score_mod at model.py:41: `...`"; empty if that is not known."""
        mod = self.mask_mod if role == "mask_mod" else self.score_mod
        if mod is None:
            return ""
        if isinstance(mod, GraphMod):
            return f"{role} {mod.described}"
        place = exact_place_of(mod, role, problem.variant.score_dtype, node, self.tensors, problem.floats)
        return "" if place is None else f"{role} at {place.where}: `{place.source}`"


@dataclass(frozen=True)
class Element:
    """The values of the mods at one element, operation by operation as they were written.

    Attributes:
        at: which element.
        program: the graphs before they are simplified.
        values: the value of each operation, 0-d.
        names: the user's names of captured tensors.
        captured: those tensors.
    """

    at: At
    program: Parsed
    values: dict[Node, Tensor]
    names: Mapping[str, str]
    captured: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        problem: Problem,
        at: At,
        names: Mapping[str, str],
        score: Tensor,
        gradient: float | None = None,
    ) -> Element:
        """Evaluate the mods, in the dtype of the problem's scores, at a `score` of `given_scale`, 0-d.

        With the `gradient` of the modified score also the way back from there.
        """
        program, device = parse(problem.variant.text), problem.query.device
        named = {name: torch.full((), i, dtype=torch.int32, device=device) for name, i in at._asdict().items()}
        named["score"] = score
        inputs = Inputs(named, problem.tensors, problem.floats, problem.ints, device)
        roots = [program.score] + ([] if program.mask is None else [program.mask])
        if gradient is not None:
            named["grad"] = torch.full((), gradient, dtype=score.dtype, device=device)
            roots += [step.partial for step in steps(program.score)]
        evaluate(roots, inputs)
        return cls(at, program, inputs.memo, names, problem.tensors)

    def text(self, node: Node) -> str:
        """An operation in the user's names."""
        return inline(node, self.names)

    def value(self, node: Node) -> float | int | bool:
        """What an operation gives."""
        return self.values[node].item()

    def shown(self, node: Node) -> str:
        """What an operation gives, as text."""
        return number(self.value(node))

    def read(self, load: Node) -> str:
        """The element of a captured tensor that is read, `slopes[3]`; with the index asked for if there is none such."""
        base, *index = load.args
        assert isinstance(base.value, tuple)
        sizes = self.captured[base.value[0]].shape
        asked = [int(self.value(i)) for i in index]
        found = [int(wrap_index(self.values[i], n)) for i, n in zip(index, sizes, strict=True)]
        name = self.text(base)
        if not index:
            return name
        beyond = any(not -n <= i < n for i, n in zip(asked, sizes, strict=True))
        return f"{name}[{_joined(found)}]" + (f" (for [{_joined(asked)}], out of range)" if beyond else "")

    def culprit(self) -> Node | None:
        """Where a modified score of nan or +inf comes from: an operation whose operands were finite, a captured element,
        or `score`; or one that made nan of infinities. None if the score is neither."""
        node = self.program.score
        if self.value(node) < math.inf:
            return None
        while True:
            args = self._operands(node)
            nan = [a for a in args if self.values[a].isnan()]
            infinite = [a for a in args if self.values[a].isinf()]
            # inf - inf is where nan begins, and where the infinity came from is worth less.
            if not nan and (not infinite or self.values[node].isnan()):
                return node
            node = (nan or infinite)[0]

    def broken_step(self) -> Step | None:
        """The first step of the way back that makes a gradient which is not finite of one that is."""
        for step in steps(self.program.score):
            if self.values[step.grad].isfinite() and not self.values[step.partial].isfinite():
                return step
        return None

    def operands(self, node: Node) -> str:
        """The values of an operation's operands: "score = -1.2, x = 3"."""
        shown = {self.text(a): a for a in self._operands(node) if a.op is not Op.CONST}
        return ", ".join(f"{text} = {self.shown(a)}" for text, a in shown.items())

    def loads(self, node: Node) -> list[str]:
        """The captured elements that an operation depends on, with their values: "slopes[1] = 0.5"."""
        found = [n for n in walk(node) if n.op is Op.LOAD]
        return list(dict.fromkeys(f"{self.read(n)} = {self.shown(n)}" for n in found))

    def _operands(self, node: Node) -> tuple[Node, ...]:
        if node.op is Op.LOAD:
            return ()
        if node.op is Op.WHERE:  # the branch that is taken
            return (node.args[1] if self.value(node.args[0]) else node.args[2],)
        return tuple(a for a in node.args if a.dtype.is_float or a.dtype.is_int)


def number(value: Any) -> str:
    """A value as messages and tables show it: 6 digits."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    return str(value)


def _joined(index: Sequence[int]) -> str:
    return ", ".join(map(str, index))
