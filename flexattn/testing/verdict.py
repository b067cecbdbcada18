"""Where a result exceeds its budget: the worst element, and how many there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

AXES: dict[str, tuple[str, ...]] = {
    "out": ("b", "h", "q_idx", "d"),
    "normalized": ("b", "h", "q_idx", "d"),
    "lse": ("b", "h", "q_idx"),
    "max_scores": ("b", "h", "q_idx"),
    "dq": ("b", "h", "q_idx", "d"),
    "dk": ("b", "h_kv", "kv_idx", "d"),
    "dv": ("b", "h_kv", "kv_idx", "d"),
}


class Excess(NamedTuple):
    """The worst element of a result: its error over what is allowed is the largest. `wrong` of `total` elements exceed."""

    name: str
    at: tuple[int, ...]
    found: float
    exact: float
    allowed: float
    wrong: int
    total: int

    @property
    def ratio(self) -> float:
        """The error in units of what is allowed; infinite where one of the two numbers is nan or infinite."""
        error = abs(self.found - self.exact)
        return error / self.allowed if error < float("inf") and self.allowed > 0 else float("inf")

    @property
    def place(self) -> str:
        """The indices by their names."""
        if not self.at:
            return "the only element"
        axes = AXES.get(self.name, tuple(f"dim {i}" for i in range(len(self.at))))
        return ", ".join(f"{axis}={i}" for axis, i in zip(axes, self.at, strict=True))


def ratios(found: Tensor, exact: Tensor, allowed: Tensor) -> Tensor:
    """The error of each element in units of what is allowed; infinite where one has nan or infinity and the other has not.

    An exact number beyond the range of the dtype of `found` may be infinite there. An infinite budget allows anything: it says
    that rounding decides, as where a score_mod compares equal numbers.
    """
    value, exact, allowed = found.detach().double(), exact.detach().double(), allowed.detach()
    stored = exact.to(found.dtype).double()
    same = (value == exact) | (value.isnan() & exact.isnan()) | (stored.isinf() & (value == stored))
    ratio = (value - exact).abs() / allowed
    ratio = ratio.masked_fill(ratio.isnan() | (value.isfinite() != exact.isfinite()), torch.inf)
    return ratio.masked_fill(same | (allowed == torch.inf), 0.0)


def excess(name: str, found: Tensor, exact: Tensor, allowed: Tensor) -> Excess | None:
    """The worst element of `found`, if its error exceeds what is allowed."""
    ratio = ratios(found, exact, allowed)
    if not ratio.numel() or float(ratio.max()) <= 1:
        return None
    at = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    value, true, limit = (float(t[at]) for t in (found.detach(), exact, allowed))
    return Excess(name, at, value, true, limit, wrong=int((ratio > 1).sum()), total=ratio.numel())
