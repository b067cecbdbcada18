"""Generated mods: an expression of the grammar as a function that can be called, pickled, and printed as a program."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .grammar_expressions import Expression, Function, bare, captured_of

G = TypeVar("G", bound="Generated")

_WIDTH = 80  # of the repr


@dataclass(frozen=True, repr=False)
class Generated:
    """A function of the grammar with tensors of its own, which it captures.

    Equal expressions are equal, whatever their tensors have become; a pickled one is given new tensors of the same values.

    Attributes:
        root: its expression; `str(root)` is its source.
        dtype, device: of its floating-point tensors, and of all of them.
        requires_grad: whether the floating-point ones require gradients.
        captured: the tensors by name.
    """

    root: Expression
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    requires_grad: bool = False
    captured: dict[str, Tensor] = field(init=False, compare=False)
    _function: Callable[..., Tensor] = field(init=False, compare=False)

    role: ClassVar[str] = "function"

    def __post_init__(self) -> None:
        made = {name: x.made.value({}) for name, x in captured_of(self.root).items()}
        object.__setattr__(self, "captured", {name: self._placed(t) for name, t in made.items()})
        object.__setattr__(self, "_function", self.root.value(self.captured))

    def _placed(self, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t.to(self.device)
        return t.to(self.device, self.dtype).requires_grad_(self.requires_grad)

    def to(self: G, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> G:
        """The same function with new tensors on another device, floating-point ones of another dtype."""
        return replace(self, device=self.device if device is None else str(device), dtype=dtype or self.dtype)

    def describe(self) -> str:
        """The function as a program that defines it, imports and captured tensors included.

        Example:
            >>> from flexattn.testing.grammar import CAUSAL
            >>> from flexattn.testing.generated import GeneratedMask
            >>> print(GeneratedMask(CAUSAL).describe())
            import flexattn
            <BLANKLINE>
            mask_mod = flexattn.masks.causal_mask
        """
        tensors = []
        for name, x in captured_of(self.root).items():
            moved = self._moved(name)
            tensors.append(f"{name} = {str(x.made) + moved if moved else bare(x.made)}")
        if isinstance(self.root, Function):
            body = f"    return {bare(self.root.body)}"
            definition = f"def {self.role}({', '.join(self.root.parameters)}):\n{body}"
        else:
            definition = f"{self.role} = {self.root}"
        parts = ["\n".join(tensors), definition]
        code = "\n\n".join(part for part in parts if part)
        imports = "\n".join(f"import {name}" for name in ("torch", "flexattn") if f"{name}." in code)
        return f"{imports}\n\n{code}" if imports else code

    def _moved(self, name: str) -> str:
        """What is done to a tensor after it was made."""
        t = self.captured[name]
        to = "" if self.device == "cpu" else f'.to("{self.device}")'
        if not t.is_floating_point():
            return to
        to += "" if self.dtype is torch.float32 else f".to({self.dtype})"
        return to + (".requires_grad_()" if self.requires_grad else "")

    @property
    def described(self) -> str:
        """Name and source, for error messages."""
        return f"`{textwrap.shorten(str(self.root), _WIDTH, placeholder=' ...')}`"

    def __repr__(self) -> str:
        source = bare(self.root.body) if isinstance(self.root, Function) else str(self.root)
        return f"<{self.role}: {textwrap.shorten(source, _WIDTH, placeholder=' ...')}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis and IPython print; for other dataclasses, all fields."""
        printer.text(repr(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self.dtype, self.device, self.requires_grad)


class GeneratedMask(Generated):
    """A generated `mask_mod(b, h, q_idx, kv_idx) -> bool`."""

    role = "mask_mod"

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return self._function(b, h, q_idx, kv_idx)


class GeneratedScore(Generated):
    """A generated `score_mod(score, b, h, q_idx, kv_idx) -> score`."""

    role = "score_mod"

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:  # noqa: D102
        return self._function(score, b, h, q_idx, kv_idx)


class GeneratedNormalizer(Generated):
    """A generated `normalizer(out, lse) -> out`, of the output [B, Hq, L, Ev] and lse [B, Hq, L] of an attention."""

    role = "normalizer"

    def __call__(self, out: Tensor, lse: Tensor) -> Tensor:  # noqa: D102
        return self._function(out, lse)
