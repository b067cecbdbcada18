"""The exceptions of the compiler: what a user wrote, why it cannot become a kernel, what to write instead."""

from __future__ import annotations

from torch import Tensor

from .formula import inline
from .ir import Node, Op


class TraceError(Exception):
    """A `score_mod` or `mask_mod` that cannot be traced.

    Raised with the bare fact where it is found; `trace` adds the user's file and line once, at the boundary. Not a
    `TypeError` on purpose: Python turns a `TypeError` raised inside a comparison method into `NotImplemented` and the
    message would be lost.

    Args:
        what: the fact, as a sentence without its subject: "uses `if` on a traced value".
        why: one sentence on what makes it impossible.
        instead: code, or an instruction, that does what was meant.
        place: subject of the sentence, "score_mod at model.py:41"; empty until it is known.
        source: the user's line of code, where it could be read.
    """

    def __init__(self, what: str, why: str, instead: str, place: str = "", source: str = "") -> None:
        self.what, self.why, self.instead, self.place, self.source = what, why, instead, place, source
        head = f"{place} {what}" if place else what
        if source:
            head += f": `{source}`"
        super().__init__(f"{head}\n{why}\nWrite instead: {instead}")

    def __repr__(self) -> str:  # what others quote in errors of their own
        return f"TraceError: {self}"

    def at(self, place: str, source: str) -> TraceError:
        """The same error with its place in the user's code."""
        return TraceError(self.what, self.why, self.instead, place, source)


class ReachError(IndexError):
    """A mask that reads beyond a captured tensor.

    Raised in an operator, which knows captured tensors by number; who called it with a mask adds the user's name.

    Args:
        load: the graph of the element that is read.
        tensor: what it is read from.
        dim: the dimension whose index goes too far.
        end: how far it goes.
        name: what the user calls the tensor.
    """

    def __init__(self, load: Node, tensor: Tensor, dim: int, end: int, name: str = "") -> None:
        self.load, self.tensor, self.dim, self.end = load, tensor, dim, end
        base, index = load.args[0], load.args[1 + dim]
        place, n = inline(index), tensor.shape[dim]
        bounded = place if index.op is Op.INPUT else f"({place})"
        what = f"a captured tensor of shape {list(tensor.shape)}"
        super().__init__(
            f"the mask reads {f'{name}, {what},' if name else what} at {inline(load, {inline(base): name} if name else None)}, "
            f"where {place} goes to {end}, beyond dimension {dim} of size {n}. Give the tensor an entry for every position, or "
            f"keep the index within it, e.g. {bounded}.clamp(0, {max(n - 1, 0)})"
        )

    @property
    def number(self) -> str:
        """The tensor in the program: c0, c1, ..."""
        return inline(self.load.args[0])

    def named(self, name: str | None) -> ReachError:
        """The same error with the user's name of the tensor; itself without one."""
        return ReachError(self.load, self.tensor, self.dim, self.end, name) if name else self


class UnsupportedTorch(RuntimeError):
    """This PyTorch lacks something that flexattn needs."""


class ProgramError(ValueError):
    """A program text that does not follow the grammar of `flexattn.codegen.program`, or breaks the rules of `spec`."""
