"""Errors of kernels. Those of tracing are in `flexattn.codegen.errors`."""

from __future__ import annotations

from .codegen.ir import Node


class KernelError(RuntimeError):
    """Triton refused code that was generated from a mod.

    Attributes:
        role: "score_mod", "mask_mod", or the derivative that the code belongs to.
        node: the operation, or None.
        code: the line of generated code.
        reason: what Triton says.
        place, source: where the user wrote it, and the line; empty until it is known.
    """

    def __init__(self, role: str, node: Node | None, code: str, reason: str, place: str = "", source: str = "") -> None:
        self.role, self.node, self.code, self.reason, self.place, self.source = role, node, code, reason, place, source
        head = f"{place or role} could not be compiled" + (f": `{source}`" if source else "")
        kind = f" ({node.op.value} of {node.dtype.value})" if node is not None else ""
        super().__init__(
            f"{head}\nTriton refuses the generated line `{code}`{kind}: {reason}\n"
            "Use backend='tiled' for this mod, or compute the value before the call and capture it"
        )

    def at(self, place: str, source: str) -> KernelError:
        """The same error with its place in the user's code."""
        return KernelError(self.role, self.node, self.code, self.reason, place, source)
