"""The query, key and value of an attention, with the program that makes them again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sizes import Sizes


class AttentionInputs(NamedTuple):
    """Operands of an attention, of moderate size.

    Attributes:
        query: [B, Hq, L, E].
        key, value: [B, Hkv, S, E] and [B, Hkv, S, Ev]; where they are shared by the batch, of batch 1.
        sizes: B, Hq, Hkv, L, S, E and Ev.
        seed: of the random numbers.
        magnitude: of the values, which are normal; 0.0 makes them zeros.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sizes: Sizes
    seed: int
    magnitude: float

    @classmethod
    def of(
        cls,
        sizes: Sizes,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        magnitude: float = 1.0,
        shared_keys: bool = False,
        requires_grad: bool = False,
        device: torch.device | str = "cpu",
    ) -> AttentionInputs:
        """Operands of the given sizes.

        Args:
            sizes: of the problem; lengths may be 0.
            dtype, device: of all three.
            seed: of torch's generator, on the CPU, so that every device gets the same numbers.
            magnitude: what the normal numbers are multiplied by.
            shared_keys: key and value have batch 1, and serve every batch entry.
            requires_grad: for all three.

        Raises:
            ValueError: for what is no attention problem.

        Example:
            >>> from flexattn.testing import AttentionInputs, Sizes
            >>> inputs = AttentionInputs.of(Sizes(L=5, S=7), seed=3)
            >>> inputs.query.shape, inputs.key.shape
            (torch.Size([2, 4, 5, 32]), torch.Size([2, 2, 7, 32]))
        """
        sizes.check()
        g = torch.Generator().manual_seed(seed)
        made = [
            torch.randn(shape, generator=g).mul(magnitude).to(device, dtype).requires_grad_(requires_grad)
            for shape in _shapes(sizes, shared_keys)
        ]
        return cls(made[0], made[1], made[2], sizes, seed, magnitude)

    def describe(self) -> str:
        """A program that makes the same query, key and value.

        Example:
            >>> from flexattn.testing import AttentionInputs, Sizes
            >>> print(AttentionInputs.of(Sizes(1, 1, 1, 2, 3, 8, 8), dtype=torch.bfloat16).describe())
            import torch
            <BLANKLINE>
            g = torch.Generator().manual_seed(0)
            query = torch.randn((1, 1, 2, 8), generator=g).to(torch.bfloat16)
            key = torch.randn((1, 1, 3, 8), generator=g).to(torch.bfloat16)
            value = torch.randn((1, 1, 3, 8), generator=g).to(torch.bfloat16)
        """
        lines = [f"{name} = {self._made(name)}" for name in ("query", "key", "value")]
        if self.magnitude:
            lines.insert(0, f"g = torch.Generator().manual_seed({self.seed})")
        return "\n".join(["import torch", "", *lines])

    def _made(self, name: str) -> str:
        t: Tensor = getattr(self, name)
        shape = tuple(t.shape)
        text = f"torch.randn({shape}, generator=g)" if self.magnitude else f"torch.zeros({shape})"
        text += f".mul({self.magnitude})" if self.magnitude not in (0.0, 1.0) else ""
        text += f".to({t.dtype})" if t.dtype is not torch.float32 else ""
        text += f'.to("{t.device}")' if t.device.type != "cpu" else ""
        return text + (".requires_grad_()" if t.requires_grad else "")

    def __repr__(self) -> str:
        shared = ", shared keys" if self.key.shape[0] != self.query.shape[0] else ""
        return f"<{self.sizes}, {self.query.dtype}, seed {self.seed}, magnitude {self.magnitude}{shared}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis and IPython print; for other named tuples, all fields."""
        printer.text(repr(self))


def _shapes(sizes: Sizes, shared_keys: bool) -> tuple[tuple[int, ...], ...]:
    B, Hq, Hkv, L, S, E, Ev = sizes
    kv_batch = 1 if shared_keys else B
    return (B, Hq, L, E), (kv_batch, Hkv, S, E), (kv_batch, Hkv, S, Ev)
