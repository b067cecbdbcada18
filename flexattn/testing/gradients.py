"""`gradcheck`: the generated derivative of a score_mod against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..codegen.ir import Node, Op, walk
from ..codegen.trace import describe
from ..mask_cache import cached_block_mask
from ..operands import split
from .case import Case
from .sizes import Sizes, checked_sizes
from .verdict import AXES
from .wide import widened

STEP = 2.0**-14  # the largest of three, each half of the one before
CLOSER = 2.0**-6  # what seems wrong is looked at again at so much smaller steps
SHARP = 1e-2  # differences that depend on the step by more than this decide nothing
SMALL = Sizes(2, 4, 2, 20, 24, 8, 8)
NAMES = ("query", "key", "value")


class Gradcheck(NamedTuple):
    """How many derivatives were compared, and which were left out because the function is not differentiable there."""

    compared: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        told = f"{self.compared} derivatives agree with finite differences"
        if not self.left_out:
            return told
        places = ", ".join(self.left_out[:8]) + (", ..." if len(self.left_out) > 8 else "")
        return f"{told}; {len(self.left_out)} left out, where the differences to either side disagree: {places}"


def gradcheck(
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    *,
    shape: Sizes | None = None,
    scale: float | None = None,
    normalizer: Callable[[Tensor, Tensor], Tensor] | None = None,
    entries: int | None = 24,
    directions: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Gradcheck:
    """Compare the gradients that flexattn generates for a mod with central differences, in float64.

    The function is a random combination of out and lse, or of `normalizer(out, lse)`. Its variables are query, key, value and
    the captured tensors that require a gradient, all in float64: one of lower precision is replaced in the traced program, so
    that it can be moved by a step of any size. Nothing but the forward of the tiled backend is believed.

    Where the function has a kink or a jump near the point (`abs`, `clamp`, `where` on the score) a difference is no derivative:
    such entries are left out, and the result names them.

    Args:
        score_mod, mask_mod: the definition.
        shape: sizes of the random query, key and value. Default small ones.
        scale: as in `flex_attention`.
        normalizer: `(out, lse) -> out`, as of attention sinks.
        entries: how many entries of each tensor are moved, chosen by the seed; None for all of them.
        directions: along how many random directions each tensor is moved as a whole.
        seed: of the operands, the entries and the directions.
        device: of the operands.

    Returns:
        How many derivatives were compared, and which were left out.

    Raises:
        AssertionError: names the tensor, the entry, the derivative and the difference.
        ValueError: for a mod that detaches a value, whose gradient is not that of the function, for results that are nan, and
            for negative numbers of entries or directions.

    Example:
        >>> import torch
        >>> from flexattn.testing import gradcheck
        >>> cap = torch.tensor(2.0, requires_grad=True)
        >>> def softcap(score, b, h, q_idx, kv_idx):
        ...     return cap * torch.tanh(score / cap)
        >>> print(gradcheck(softcap, entries=4))
        21 derivatives agree with finite differences
    """
    __tracebackhide__ = True
    if directions < 0 or (entries is not None and entries < 0):
        raise ValueError(
            f"entries={entries}, directions={directions}; give numbers of 0 or more, or entries=None for all"
        )
    sizes = checked_sizes(SMALL if shape is None else shape)
    sizes.check()
    where = torch.device(device)
    case = Case(score_mod, mask_mod, None, torch.float64, where, "tiled", None, scale, None, normalizer, seed, None)
    case.check_indices(sizes)
    function = _Function.of(case, sizes)
    if any(n.op is Op.DETACH for n in walk(function.score)):
        raise ValueError(
            f"score_mod {describe(score_mod)} detaches a value: its gradient is not that of the function, which is what "
            "finite differences see. Check it without detach()"
        )
    return function.check(entries, directions, seed)


@dataclass
class _Difference:
    """A central difference at the smallest of three steps: its value, its error, and whether both sides agree."""

    value: float
    spread: float  # what the step changes
    noise: float  # what rounding may
    smooth: bool

    @property
    def error(self) -> float:
        return 4 * self.spread + self.noise


@dataclass
class _Function:
    """A number as a function of tensors, and its gradients by the generated derivative."""

    subject: str
    leaves: dict[str, Tensor]
    loss: Callable[[], tuple[float, float]]
    gradients: dict[str, Tensor]
    score: Node

    @classmethod
    def of(cls, case: Case, sizes: Sizes) -> _Function:
        operands = case.operands(sizes)
        wide = widened(case.problem(operands, None))
        problem = wide.problem
        q, k, v = problem.query, problem.key, problem.value
        learned = {f"captured tensor c{i} {tuple(t.shape)}": t for i, t in wide.leaves.items() if t.requires_grad}
        leaves = dict(zip(NAMES, (q, k, v), strict=True)) | learned
        blocks = None if case.mask_mod is None else cached_block_mask(case.mask_mod, q, k)
        lists, size = ([], (128, 128)) if blocks is None else (list(blocks.kv_lists()), blocks.BLOCK_SIZE)
        tensors, floats = split(problem.captured, problem.variant.text)
        rest = tensors, lists, problem.ints, floats, size, problem.variant.text, problem.given_scale, "tiled", ""

        def terms() -> Tensor:
            out, lse, _ = ops.FORWARD(q, k, v, *rest)
            nothing = lse == -torch.inf
            if case.normalizer is not None:
                made = case.normalizer(out, lse)
                return made * operands.dout
            return torch.cat(
                [(out * operands.dout).flatten(), (lse.masked_fill(nothing, 0.0) * operands.dlse).flatten()]
            )

        def loss() -> tuple[float, float]:
            with torch.no_grad():
                values = terms()
            return float(values.sum()), float(values.abs().sum())

        total = terms().sum()
        if not bool(total.isfinite()):
            raise ValueError(
                "the results have nan or infinity, which have no derivative; look for it with flexattn.debug_mode()"
            )
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        gradients = {
            n: torch.zeros_like(t) if g is None else g for g, (n, t) in zip(found, leaves.items(), strict=True)
        }
        mods = [describe(m) for m in (case.score_mod, case.mask_mod) if m is not None]
        return cls(" with ".join(mods) or "softmax attention", leaves, loss, gradients, problem.variant.score)

    def check(self, entries: int | None, directions: int, seed: int) -> Gradcheck:
        __tracebackhide__ = True
        compared, left_out = 0, []
        for name, leaf in self.leaves.items():
            generated = self.gradients[name]
            for place, move in _moves(name, leaf, entries, directions, seed):
                derivative = float((generated * move).sum())
                found = self.difference(leaf, move, STEP)
                if abs(found.value - derivative) > found.error or not found.smooth:
                    found = self.difference(leaf, move, STEP * CLOSER)
                size = max(abs(derivative), abs(found.value))
                if not found.smooth or 4 * found.spread > max(SHARP * size, found.noise):
                    left_out.append(place)
                elif abs(found.value - derivative) > found.error:
                    raise AssertionError(self.report(place, derivative, found))
                else:
                    compared += 1
        return Gradcheck(compared, tuple(left_out))

    def difference(self, leaf: Tensor, move: Tensor, step: float) -> _Difference:
        """Along `move`. Where the function is smooth the differences converge, and to the same number on both sides."""
        start = leaf.detach().clone()
        middle, size = self.loss()
        eps = torch.finfo(torch.float64).eps
        central, jump, noise = [], [], 0.0
        try:
            for h in (step, step / 2, step / 4):
                ends = []
                for sign in (1, -1):
                    with torch.no_grad():
                        leaf.copy_(start + sign * h * move)
                    ends.append(self.loss()[0])
                central.append((ends[0] - ends[1]) / (2 * h))
                jump.append((ends[0] + ends[1] - 2 * middle) / h)
                noise = 8 * eps * size / h
        finally:
            with torch.no_grad():
                leaf.copy_(start)
        spread = max(abs(central[0] - central[1]), abs(central[1] - central[2]))
        # At a kink the sides differ by the same amount however small the step; elsewhere by half of it at half the step.
        smooth = abs(jump[2]) <= 0.75 * abs(jump[1]) + noise and spread < float("inf")
        return _Difference(central[2], spread, noise, smooth)

    def report(self, place: str, derivative: float, found: _Difference) -> str:
        return (
            f"the gradient of {self.subject} is not its derivative, {place}:\n"
            f"    generated derivative  {derivative!r}\n"
            f"    central difference    {found.value!r}, known to {found.error:.2g}\n"
            "Everything is float64 here, so rounding is not the cause. If the mod is made of plain torch operations, this is a "
            "fault of flexattn's derivative: please report it with the mod"
        )


def _moves(name: str, leaf: Tensor, entries: int | None, directions: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Single entries, then random directions: what they are called, and the change of the tensor."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(leaf.numel(), generator=g)[:entries].sort().values.tolist()
    for number in chosen:
        move = torch.zeros(leaf.numel(), dtype=torch.float64, device=leaf.device)
        move[number] = 1.0
        index = [int(i) for i in torch.unravel_index(torch.tensor(number), leaf.shape)]
        axes = AXES[f"d{name[0]}"] if name in NAMES else tuple(f"dim {i}" for i in range(leaf.dim()))
        at = ", ".join(f"{axis}={i}" for axis, i in zip(axes, index, strict=True))
        yield f"by {name}[{at}]" if at else f"by {name}", move.view(leaf.shape)
    for number in range(directions if leaf.numel() else 0):
        signs = torch.randint(0, 2, leaf.shape, generator=g).double().mul(2).sub(1).to(leaf.device)
        yield f"by {name} along random direction {number}", signs / leaf.numel() ** 0.5
