"""The exceptions of the compiler: what a user wrote, why it cannot become a kernel, what to write instead."""

from __future__ import annotations


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


class UnsupportedTorch(RuntimeError):
    """This PyTorch lacks something that flexattn needs."""


class ProgramError(ValueError):
    """A program text that does not follow the grammar of `flexattn.codegen.program`, or breaks the rules of `spec`."""
