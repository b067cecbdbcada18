"""What debug mode looks for before a call, where the mask attends: indices out of range, and numbers that are not finite.

A walk over the tiles of the problem, as the tiled backend's; no more than a tile of scores is in memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.tiled import Chunk, Part, Walk, merged
from .block_lists import has_data
from .codegen.evaluate import evaluate
from .codegen.formula import inline
from .codegen.ir import Node, Op, walk
from .element import At, Element, Origin, number
from .problem import Problem

_RANK = 5  # of the values of a tile: batch entries, key heads, heads of a group, rows, keys


def check(problem: Problem, origin: Origin) -> None:
    """Raise for the first thing that is wrong at an attended element; warn of indices that wrap here and there.

    Raises:
        IndexError: for an index of a captured tensor that is out of range.
        FloatingPointError: for a query, key or value that is not finite in a visited block, for a modified score that is
            nan or +inf, and, where gradients will be wanted, for a gradient of the score_mod that is not finite.

    Tensors without data, as while a graph is traced, are not looked at.
    """
    tensors = (problem.query, problem.key, problem.value, *problem.tensors, *problem.block_mask)
    if all(map(has_data, tensors)):
        needed = _Checks(problem, origin)
        with torch.no_grad():
            needed.run()


def check_indices(problem: Problem, origin: Origin) -> None:
    """The part of `check` that is about indices of captured tensors: raises `IndexError` for one that is out of range."""
    needed = _Checks(problem, origin)
    needed.scores, needed.suspects, needed.gradients = False, [], []
    with torch.no_grad():
        needed.run()


class _Wrapped(NamedTuple):
    """A negative index: in which mod, and where."""

    role: str
    value: int
    at: At


class _Checks:
    """What there is to check of a problem, and the checks of one chunk."""

    def __init__(self, problem: Problem, origin: Origin) -> None:
        self.problem, self.origin, self.walker = problem, origin, Walk(problem)
        variant = problem.variant
        self.of_mask = _indexed_loads(variant.mask)
        self.of_score = _indexed_loads(variant.score)
        operands = {"query": problem.query, "key": problem.key, "value": problem.value}
        self.suspects = [name for name, t in operands.items() if not bool(t.detach().isfinite().all())]
        self.scores = variant.modifies_score or bool(self.suspects) or not self._bounded()
        self.gradients = self._wanted_gradients() if torch.is_grad_enabled() else []
        self.negative: dict[tuple[Node, int], _Wrapped] = {}  # by load and dimension
        self.other: set[tuple[Node, int]] = set()

    def run(self) -> None:
        """Everything, tile by tile."""
        if not (self.of_mask or self.of_score or self.scores or self.gradients):
            return
        for leg in self.walker.legs():
            for part in self.walker.parts(leg):
                for tile in leg.group.tiles:
                    rows = (tile.start, tile.stop)
                    q = part.rows(self.problem.query, tile).mul(self.problem.scale) if self.scores else None
                    for chunk in self.walker.chunks(part, tile):
                        self._chunk(part, rows, chunk, q)
        for key, found in self.negative.items():
            if key in self.other:
                self._warn(*key, found)

    def _chunk(self, part: Part, rows: tuple[int, int], chunk: Chunk, q: Tensor | None) -> None:
        attended = _attended(chunk)
        if self.of_mask:  # in full blocks, too, which the mask was read for when they were found to be full
            self._indices(self.of_mask, "mask_mod", chunk, torch.ones_like(attended))
        self._indices(self.of_score, "score_mod", chunk, attended)
        for name in self.suspects:
            self._operand(name, part, rows, chunk)
        if q is None:
            return
        raw = self.walker.tile_view(part, torch.bmm(q, chunk.columns(part.k).mT))
        inputs = chunk.inputs.fork({"score": raw})
        (score,) = evaluate([self.problem.variant.unscaled], inputs)
        if not score.amax() < math.inf and bool((wrong := ~(score < math.inf) & attended).any()):
            place = _first(wrong)
            self._wrong_score(_at(place, chunk), _pick(raw, place), _pick(score, place))
        if self.gradients:
            # What arrives may be 0: the weight of a score of -inf is. 0 times what is not finite is nan.
            grad = torch.ones((), dtype=score.dtype, device=score.device)
            for value in evaluate(self.gradients, inputs.fork({"grad": grad})):
                finite = value.isfinite()
                if not finite.all() and bool((wrong := ~finite & attended).any()):
                    place = _first(wrong)
                    self._wrong_gradient(_at(place, chunk), _pick(raw, place), _pick(score, place))

    # ---- indices

    def _indices(self, loads: Sequence[Node], role: str, chunk: Chunk, where: Tensor) -> None:
        score = torch.zeros((), dtype=self.walker.dtype, device=self.walker.device)
        inputs = chunk.inputs.fork({"score": score})
        for load in loads:
            base, *index = load.args
            for dim, value in enumerate(evaluate(index, inputs)):
                size, key = self._tensor(base).shape[dim], (load, dim)
                low, high = map(int, value.aminmax())
                if (low < -size or high >= size) and bool((wrong := ((value < -size) | (value >= size)) & where).any()):
                    place = _first(wrong)
                    self._out_of_range(load, dim, role, int(_pick(value, place)), _at(place, chunk))
                if low < 0 and key not in self.negative and bool((wrapped := (value < 0) & where).any()):
                    place = _first(wrapped)
                    self.negative[key] = _Wrapped(role, int(_pick(value, place)), _at(place, chunk))
                if high >= 0 and key not in self.other and bool(((value >= 0) & where).any()):
                    self.other.add(key)

    def _tensor(self, base: Node) -> Tensor:
        assert isinstance(base.value, tuple)
        return self.problem.tensors[base.value[0]]

    def _out_of_range(self, load: Node, dim: int, role: str, index: int, at: At) -> None:
        names, shape = self.origin.names(self.problem), list(self._tensor(load.args[0]).shape)
        raise IndexError(
            f"index {index} is out of range for dimension {dim} (size {shape[dim]}) of captured tensor "
            f"{inline(load.args[0], names)} of shape {shape}, read as {inline(load, names)} at {at}"
            + self._line(role, load)
        )

    def _warn(self, load: Node, dim: int, found: _Wrapped) -> None:
        names, size = self.origin.names(self.problem), self._tensor(load.args[0]).shape[dim]
        index, tensor = inline(load.args[1 + dim], names), inline(load.args[0], names)
        warnings.warn(
            f"index {found.value} wraps to {found.value + size} in dimension {dim} (size {size}) of captured tensor {tensor}, "
            f"read as {inline(load, names)} at {found.at}; for other elements the index is not negative. If this is meant, "
            f"write ({index}) % {size}" + self._line(found.role, load),
            stacklevel=6,
        )

    # ---- numbers

    def _bounded(self) -> bool:
        """Whether no product of query and key overflows, by the sizes of their elements."""
        q, k = self.problem.query.detach(), self.problem.key.detach()
        if q.numel() == 0 or k.numel() == 0:
            return True
        largest = float(q.abs().amax().double()) * float(k.abs().amax().double()) * q.shape[-1]
        return largest * max(1.0, abs(self.problem.scale)) < torch.finfo(self.walker.dtype).max

    def _wanted_gradients(self) -> list[Node]:
        derivative = self.problem.variant.derivative
        wanted = [grad for load, grad in derivative.loads if load.args and self._tensor(load.args[0]).requires_grad]
        inward = self.problem.query.requires_grad or self.problem.key.requires_grad
        found = [derivative.score, *wanted] if inward and derivative.score is not None else wanted
        # `grad` itself, and what is multiplied by indices and constants alone, is as finite as the gradient that comes.
        return [g for g in found if any(n.op in _CAN_BREAK for n in walk(g))]

    def _operand(self, name: str, part: Part, rows: tuple[int, int], chunk: Chunk) -> None:
        split = part.split
        if name == "query":
            self._not_finite(name, self.problem.query, (split.batches, split.heads, slice(*rows)))
            return
        tensor = self.problem.key if name == "key" else self.problem.value
        for start, stop in merged(chunk.spans):
            self._not_finite(name, tensor, (split.kv_batches, split.kv_heads, slice(start, stop)))

    def _not_finite(self, name: str, tensor: Tensor, where: tuple[slice, ...]) -> None:
        wrong = ~tensor[where].isfinite()
        if not bool(wrong.any()):
            return
        *place, column = wrong.nonzero()[0].tolist()
        index = [(s.start or 0) + i for s, i in zip(where, place, strict=True)] + [column]
        value = number(tensor[tuple(index)].item())
        raise FloatingPointError(
            f"{name}{index} is {value}, in a block that is visited; {name} has shape {list(tensor.shape)}. What a mask hides "
            f"in such a block is computed as well, and 0 times {value} is nan: give padding finite numbers, e.g. "
            f"{name}.nan_to_num(0, 0, 0)"
        )

    def _wrong_score(self, at: At, raw: Tensor, score: Tensor) -> None:
        raw = self._given(raw)
        element = self._element(at, raw)
        culprit = element.culprit()
        if culprit is None:
            cause = "score_mod gives it, by how the score is rounded"
        elif culprit.op is Op.INPUT:
            cause = "the product of query and key overflows; scale them down"
        elif culprit.op is Op.LOAD:
            tensor, shape = element.text(culprit.args[0]), list(self._tensor(culprit.args[0]).shape)
            cause = f"captured tensor {tensor} of shape {shape} has {element.read(culprit)} = {element.shown(culprit)}"
        else:
            cause = f"`{element.text(culprit)}` is {element.shown(culprit)} where {element.operands(culprit)}"
        others = [text for text in element.loads(element.program.score) if text not in cause]
        raise FloatingPointError(
            f"the modified score is {number(score.item())} at {at}, which is attended to; the score was "
            f"{number(raw.item())}: {cause}"
            + (f"\nscore_mod reads {', '.join(others)}" if others else "")
            + ("" if culprit is None else self._line("score_mod", culprit))
        )

    def _wrong_gradient(self, at: At, raw: Tensor, score: Tensor) -> None:
        element = self._element(at, self._given(raw), 1.0)
        step = element.broken_step()
        where = f"at {at}, which is attended to, though the modified score is {number(score.item())}"
        if step is None:
            raise FloatingPointError(f"the gradient of score_mod is not finite {where}: a sum of its parts overflows")
        into = element.text(step.arg)
        advice = "" if element.value(step.grad) else _OF_WHERE
        if score.item() == -math.inf:
            advice = _OF_MASKS
        raise FloatingPointError(
            f"the gradient of score_mod is not finite {where}: `{element.text(step.node)}` has the gradient "
            f"{element.shown(step.partial)} with respect to `{into}`, where {element.operands(step.node)}"
            + advice
            + self._line("score_mod", step.node)
        )

    def _element(self, at: At, score: Tensor, gradient: float | None = None) -> Element:
        return Element.of(self.problem, at, self.origin.names(self.problem), score, gradient)

    def _given(self, raw: Tensor) -> Tensor:
        """The score as the user's mod gets it, from the one that the variant's `unscaled` graph gets."""
        number = self.problem.variant.scale
        factor = 1.0 if number is None else float(self.problem.floats[number])
        return raw / factor if factor else raw

    def _line(self, role: str, node: Node) -> str:
        line = self.origin.line(role, node, self.problem)
        return f"\n{line}" if line else ""


_CAN_BREAK = frozenset(Op) - {
    *(Op.INPUT, Op.CONST, Op.CAST, Op.DETACH, Op.NEG, Op.ADD, Op.SUB, Op.WHERE, Op.SIGN),
    *(Op.LT, Op.LE, Op.EQ, Op.NE, Op.AND, Op.OR, Op.XOR, Op.NOT),
}
_OF_WHERE = (
    "\nA gradient of 0 arrives there, and 0 times infinity is nan: torch.where does not protect the branch that it does not "
    "take. Choose a safe operand first: f(torch.where(condition, x, 1.0))"
)
_OF_MASKS = (
    "\nIts weight is 0, and 0 times what is not finite is nan: hide the element with a mask_mod, which cuts gradients"
)


def _indexed_loads(root: Node | None) -> list[Node]:
    return [] if root is None else [n for n in walk(root) if n.op is Op.LOAD and len(n.args) > 1]


def _attended(chunk: Chunk) -> Tensor:
    """Which elements of a chunk are attended, as a shape that broadcasts."""
    if not chunk.keep:
        return torch.ones((), dtype=torch.bool, device=chunk.inputs.device)
    if len(chunk.keep) == 1 and chunk.keep[0][:2] == (0, chunk.width):
        return chunk.keep[0][2]
    shape = torch.broadcast_shapes(*(keep.shape[:-1] for _, _, keep in chunk.keep))
    attended = torch.ones(*shape, chunk.width, dtype=torch.bool, device=chunk.inputs.device)
    for start, stop, keep in chunk.keep:
        attended[..., start:stop] = keep
    return attended


def _first(wrong: Tensor) -> tuple[int, ...]:
    """The place of the first True in a tile; 0 along what is the same for all."""
    place = wrong.nonzero()[0].tolist()
    return (*[0] * (_RANK - len(place)), *place)


def _pick(x: Tensor, place: Sequence[int]) -> Tensor:
    """An element of something that broadcasts to a tile."""
    x = x.view([1] * (_RANK - x.dim()) + list(x.shape))
    return x[tuple(i if n > 1 else 0 for i, n in zip(place, x.shape, strict=True))]


def _at(place: Sequence[int], chunk: Chunk) -> At:
    return At(*(int(_pick(chunk.inputs.named[axis], place)) for axis in At._fields))
