"""One attention problem, solved by the implementation under test and exactly, and the results that differ.

In: what `assert_matches_reference` was given. Out: for any sizes, the elements whose error exceeds their budget.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, reference, validate
from ..api import AuxRequest, choose_backend, flex_attention
from ..block_mask import BlockMask
from ..capture import score_dtype
from ..checks import check_indices
from ..codegen.ir import Op
from ..codegen.pipeline import variant
from ..codegen.trace_cache import cached_trace
from ..element import Origin
from ..kernel_options import check_kernel_options, options_text
from ..mask_cache import cached_block_mask
from ..operands import split
from ..problem import Problem
from .budget import Bounds, Results, Seeds, budgets
from .handed import advice, handed, returned, written
from .sizes import Sizes
from .solve import Normalizer, gradients, solve
from .systematic import Drift, Judged, drifts
from .verdict import Excess, excess
from .wide import Wide, widened

DRAWS = 6
FAST_TANH = 2.0**-11  # the relative error of the instruction that the option of this name allows


class Operands(NamedTuple):
    """Query, key and value, and the gradients that arrive for out and for lse."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    dlse: Tensor


class Outcome(NamedTuple):
    """The results that differ, and the names of all that were compared.

    `drifts` are systematic errors; they are looked for where no element is wrong by itself. The other names are those of
    results that plain attention has wrong as well, of those that a second run of `attention` on the same inputs gives
    otherwise, and of the inputs that it writes to.
    """

    excesses: list[Excess]
    drifts: list[Drift]
    compared: list[str]
    plain_differs: list[str]
    unrepeated: list[str]
    written: list[str]

    @property
    def wrong(self) -> set[str]:
        """The names of the results that differ."""
        return {e.name for e in self.excesses} | {d.name for d in self.drifts}


class Found(NamedTuple):
    """Results, the numbers of the captured tensors whose gradients are among them, and the inputs that were written to."""

    results: Results
    learned: list[int]
    written: list[str]


@dataclass(frozen=True)
class Case:
    """The arguments of `assert_matches_reference`; `given` are query, key and value, or empty for random ones."""

    score_mod: Callable[..., Tensor] | None
    mask_mod: Callable[..., Tensor] | None
    block_mask: BlockMask | None
    dtype: torch.dtype
    device: torch.device
    backend: str
    kernel_options: Mapping[str, Any] | None
    scale: float | None
    attention: Callable[..., Any] | None
    normalizer: Normalizer | None
    seed: int
    given: tuple[Tensor, Tensor, Tensor] | None

    def operands(self, sizes: Sizes) -> Operands:
        """Normal numbers from the seed, or the first heads, rows and columns of the tensors given."""
        g = torch.Generator().manual_seed(self.seed)
        B, Hq, Hkv, L, S, E, Ev = sizes

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(self.device)

        if self.given is None:
            q, k, v = (normal(*s).to(self.dtype) for s in ((B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev)))
        else:
            query, key, value = (t.detach() for t in self.given)
            q, k, v = query[:B, :Hq, :L, :E], key[:B, :Hkv, :S, :E], value[:B, :Hkv, :S, :Ev]
        return Operands(q, k, v, normal(B, Hq, L, Ev).to(self.dtype), normal(B, Hq, L))

    def masked(self, sizes: Sizes) -> BlockMask | None:
        """The block mask, cropped to shorter lengths."""
        whole = self.block_mask
        return whole if whole is None or whole.seq_lengths == (sizes.L, sizes.S) else whole._adjust(sizes.L, sizes.S)

    def mask(self, blocks: BlockMask | None) -> Callable[..., Tensor] | None:
        """The mask_mod that counts."""
        return self.mask_mod if blocks is None else blocks.mask_mod

    def problem(self, operands: Operands, blocks: BlockMask | None) -> Problem:
        """What is computed, by the definition: without block lists, unless a block mask says which blocks there are."""
        q, k, v = operands[:3]
        traced = cached_trace(self.score_mod, self.mask(blocks), score_dtype=score_dtype(q), device=q.device)
        parsed = variant(traced.program)
        n = len(parsed.captured)
        validate.captured(traced.captured[:n], q.device)
        lists, size = ((), (128, 128)) if blocks is None else (blocks.kv_lists(), blocks.BLOCK_SIZE)
        scale = 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale
        return Problem(q, k, v, traced.captured, lists, traced.ints, size, parsed, scale)

    def check_indices(self, sizes: Sizes) -> None:
        """Raise `ValueError` where an attended element reads beyond a captured tensor: the kernel would read its border."""
        problem = self.problem(self.operands(sizes), self.masked(sizes))
        origin = Origin(self.score_mod, self.mask_mod, problem.tensors)
        try:
            with warnings.catch_warnings():  # an index that wraps is legal here as it is in torch
                warnings.simplefilter("ignore", UserWarning)
                check_indices(problem, origin)
        except IndexError as error:
            names = origin.names(problem)
            shapes = ", ".join(f"{names.get(f'c{i}', f'c{i}')} {tuple(t.shape)}" for i, t in enumerate(problem.tensors))
            raise ValueError(
                f"{error}. The captured tensors have shapes {shapes}, the problem is {sizes}. Pass shape=Sizes(...) that they "
                "are made for, or larger tensors"
            ) from None

    def outcome(self, sizes: Sizes) -> Outcome:
        """What is wrong at these sizes."""
        operands, blocks = self.operands(sizes), self.masked(sizes)
        problem = self.problem(operands, blocks)
        found, wanted, changed = self.found(operands, problem, blocks)
        problem = with_leaves(problem)
        wide = widened(problem)
        exact, seeds, plain = self._truth(operands, problem, wide, wanted, "lse" in found)
        roundings = {Op.TANH: FAST_TANH / 2**-23} if (self.kernel_options or {}).get("FAST_TANH") else {}
        own = self.attention is not None
        budget = budgets(problem, wide, exact, plain, seeds, wanted, roundings, scores=own)
        allowed = budget.allowed
        if self.normalizer is not None:
            exact["normalized"], allowed["normalized"] = self._normalized(
                exact, Bounds(*(allowed[n] for n in Bounds._fields))
            )
        compared = [name for name in found if name in exact]
        judged = [excess(name, found[name], exact[name], allowed[name]) for name in compared]
        excesses = [e for e in judged if e is not None]
        differs = [
            e.name
            for e in excesses
            if e.name in plain and excess(e.name, plain[e.name], exact[e.name], allowed[e.name])
        ]
        systematic = []
        if not excesses:  # else it is wrong without
            truncates = own or self._truncates(problem)
            systematic = drifts(found, Judged(problem, wide, seeds, exact, plain, budget, own, truncates))
        unrepeated = []
        if own and (excesses or systematic):
            again = self.found(operands, problem, blocks).results
            unrepeated = [
                n for n in compared if excess(n, again[n], found[n].detach().double(), allowed[n]) is not None
            ]
        return Outcome(excesses, systematic, compared, differs, unrepeated, changed)

    def _truncates(self, problem: Problem) -> bool:
        """Whether results come from Triton's interpreter, which truncates where it stores bfloat16."""
        if choose_backend(self.backend, problem.query, problem.value) != "triton":
            return False
        from ..backends.target import interpreted

        return interpreted()

    def found(self, operands: Operands, problem: Problem, blocks: BlockMask | None) -> Found:
        """Results of the implementation under test."""
        q, k, v = leaves = [t.detach().requires_grad_() for t in operands[:3]]
        learned: list[tuple[int, Tensor]] = []
        changed: list[str] = []
        if self.attention is not None:
            given = [handed(t) for t in leaves]
            made = self.attention(*given)
            found = _outputs(made, operands)
            _check_shapes(made, found, operands)
            changed = written(Operands._fields[:3], given, leaves)
        else:
            public = self._captures_leaves(problem, blocks)
            problem = problem if public else with_leaves(problem)
            solve = self._by_the_public_function if public else self._by_the_operator
            out, lse, top = solve(q, k, v, problem, blocks)
            found = {"out": out, "lse": lse, "max_scores": top}
            learned = [(i, t) for i, t in enumerate(problem.tensors) if t.is_floating_point() and t.requires_grad]
        outputs, seeds = [found["out"]], [operands.dout]
        if self.normalizer is not None and "lse" not in found:  # an attention that normalises by itself
            found = {"normalized": found["out"]}
        elif self.normalizer is not None:
            outputs = [_new_output(self.normalizer(found["out"], found["lse"]), operands)]
            found["normalized"] = outputs[0]
        elif "lse" in found:
            outputs, seeds = [found["out"], found["lse"]], [operands.dout, operands.dlse]
        if outputs[0].requires_grad:
            found |= gradients(outputs, seeds, leaves, learned)
        return Found(found, [i for i, _ in learned], changed)

    def _captures_leaves(self, problem: Problem, blocks: BlockMask | None) -> bool:
        """Whether all tensors that may have a gradient are leaves, and the same at every trace.

        What a mod computes of captured tensors alone is neither: it is captured when the mod is traced.
        """
        again = cached_trace(
            self.score_mod, self.mask(blocks), score_dtype=score_dtype(problem.query), device=self.device
        )
        pairs = zip(problem.tensors, again.captured, strict=False)
        return all(a is b and a.is_leaf for a, b in pairs if a.requires_grad)

    def _by_the_public_function(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, blocks: BlockMask | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, aux = flex_attention(
            q, k, v, self.score_mod, blocks, self.scale, True, kernel_options=self.kernel_options,
            return_aux=AuxRequest(lse=True, max_scores=True), mask_mod=self.mask_mod, backend=self.backend,
        )  # fmt: skip
        assert aux.lse is not None and aux.max_scores is not None
        return out, aux.lse, aux.max_scores

    def _by_the_operator(
        self, q: Tensor, k: Tensor, v: Tensor, problem: Problem, blocks: BlockMask | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With the captured tensors of `problem`, where those of another trace would be others."""
        blocks = blocks if self.mask_mod is None else cached_block_mask(self.mask_mod, q, k)
        lists, size = ((), (128, 128)) if blocks is None else (blocks.kv_lists(), blocks.BLOCK_SIZE)
        tensors, floats = split(problem.captured, problem.variant.text)
        if self.backend == "reference":
            return reference.solve(problem._replace(query=q, key=k, value=v))
        options = options_text(check_kernel_options(self.kernel_options))
        rest = tensors, lists, problem.ints, floats, size, problem.variant.text, problem.given_scale
        return ops.attention(q, k, v, *rest, choose_backend(self.backend, q, v), options)

    def _truth(
        self, operands: Operands, problem: Problem, wide: Wide, wanted: Sequence[int], with_lse: bool
    ) -> tuple[Results, Seeds, Results]:
        """Exact results, the gradients that arrive, and the results of plain attention."""
        dout, dlse = operands.dout.double(), operands.dlse
        zero = torch.zeros_like(dout), torch.zeros_like(dlse)
        own = self.attention is not None
        exact = solve(wide.problem, [], dout, dlse)
        seeds = Seeds(dout, torch.where(exact["lse"].isfinite(), dlse, 0) if with_lse else zero[1], *zero)
        if self.normalizer is not None:
            bounds = budgets(problem, wide, exact, None, Seeds(*zero, *zero), scores=own).allowed
            seeds = self._seeds(exact, Bounds(*(bounds[n] for n in Bounds._fields)), dout)
        leaves = [(i, wide.leaves[i]) for i in wanted]
        exact = solve(wide.problem, leaves, seeds.dout, seeds.dlse)
        learned = [(i, problem.captured[i]) for i in wanted]
        plain = solve(problem, learned, seeds.dout, seeds.dlse, plain=True, scores=own)
        return exact, seeds, plain

    def _seeds(self, exact: Results, bounds: Bounds, dfinal: Tensor) -> Seeds:
        """The gradients of out and lse through the normalizer, and how far the errors of out and lse put them off."""

        def pulled(out: Tensor, lse: Tensor) -> list[Tensor]:
            leaves = [out.detach().requires_grad_(), lse.detach().requires_grad_()]
            assert self.normalizer is not None
            final = self.normalizer(*leaves)
            if not final.requires_grad:
                return [torch.zeros_like(t) for t in leaves]
            found = torch.autograd.grad(final, leaves, dfinal.to(final.dtype), allow_unused=True)
            return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]

        values = pulled(exact["out"], exact["lse"])
        errors = [2 * torch.finfo(self.dtype).eps * values[0].abs(), 2 * torch.finfo(self.dtype).eps * values[1].abs()]
        for out, lse in _perturbed(exact, bounds):
            errors = [
                torch.maximum(e, 2 * (a - b).abs()) for e, a, b in zip(errors, pulled(out, lse), values, strict=True)
            ]
        return Seeds(values[0], values[1], errors[0].nan_to_num(torch.inf), errors[1].nan_to_num(torch.inf))

    def _normalized(self, exact: Results, bounds: Bounds) -> tuple[Tensor, Tensor]:
        """The exact result of the normalizer, and what its roundings and the errors of out and lse make of it."""
        assert self.normalizer is not None
        with torch.no_grad():
            value = self.normalizer(exact["out"], exact["lse"]).double()
            error = 4 * torch.finfo(self.dtype).eps * value.abs() + torch.finfo(self.dtype).tiny
            for out, lse in _perturbed(exact, bounds):
                error = torch.maximum(error, 2 * (self.normalizer(out, lse).double() - value).abs())
        return value, error.nan_to_num(torch.inf)


def with_leaves(problem: Problem) -> Problem:
    """`problem` with captured tensors that are leaves: one may have been computed of another."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in problem.tensors]
    return problem._replace(captured=[*leaves, *problem.floats])


def _perturbed(exact: Results, bounds: Bounds) -> list[tuple[Tensor, Tensor]]:
    """out and lse off by their bounds, up or down at random."""
    g = torch.Generator(exact["out"].device).manual_seed(0)

    def off(t: Tensor, bound: Tensor) -> Tensor:
        signs = torch.empty_like(t).bernoulli_(0.5, generator=g) * 2 - 1
        return torch.where(t.isfinite(), t + signs * bound, t)

    return [(off(exact["out"], bounds.out), off(exact["lse"], bounds.lse)) for _ in range(DRAWS)]


def _outputs(made: Any, operands: Operands) -> Results:
    """What `attention` returned."""
    if isinstance(made, Tensor):
        return {"out": made}
    if isinstance(made, tuple) and len(made) == 2 and all(isinstance(t, Tensor) for t in made):
        return {"out": made[0], "lse": made[1]}
    raise TypeError(
        f"attention must return out, or (out, lse); it returned {returned(made)}{advice(made, tuple(operands.dout.shape[:3]))}"
    )


def _new_output(made: Any, operands: Operands) -> Tensor:
    """What `normalizer` returned, if it is an output."""
    if not isinstance(made, Tensor):
        raise TypeError(
            f"normalizer returned a {type(made).__name__}; it must return a new out, of out [B, Hq, L, Ev] and lse"
        )
    wanted = tuple(operands.dout.shape)
    if tuple(made.shape) != wanted:
        raise ValueError(
            f"normalizer returned a tensor of shape {tuple(made.shape)}; out has {wanted}, lse {wanted[:3]}, so what is "
            "computed of lse is multiplied as x[..., None]"
        )
    return made


def _check_shapes(made: Any, found: Results, operands: Operands) -> None:
    shape = tuple(operands.dout.shape)
    for name, wanted in (("out", shape), ("lse", shape[:3])):
        if name in found and found[name].shape != wanted:
            raise ValueError(
                f"attention returned {name} of shape {tuple(found[name].shape)}; it must be {wanted}{advice(made, shape[:3])}"
            )
