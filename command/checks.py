"""The checks of `flexattn check`, as a table: what each says, when it is not run, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexattn.codegen.trace import trace
from flexattn.documents import Documents
from flexattn.masks import noop_mask
from flexattn.testing import (
    Sizes,
    assert_batch_invariant,
    assert_causal,
    assert_matches_reference,
    assert_no_leak,
    gradcheck,
)
from flexattn.testing.laws import LawNotRun, check_laws

from .pairs import Pair

_SMALL = Sizes(2, 64, 64, 20, 24, 8, 8)  # of finite differences, which take a run for each entry that is moved


class Causal(NamedTuple):
    """What a query may see of the future: `within` and `offset` of `assert_causal`."""

    within: Tensor | None
    offset: int


class Case(NamedTuple):
    """What is checked.

    Attributes:
        mods: the score_mod and the mask.
        sizes: of the attention problem.
        dtype, device: of the query.
        backend: as of `flex_attention`.
        documents: ids, [S] or [B, S], or None.
        causal: whether no query may see a later key, and which it may; None to leave that check out.
    """

    mods: Pair
    sizes: Sizes
    dtype: torch.dtype
    device: str
    backend: str
    documents: Tensor | None
    causal: Causal | None


class Outcome(NamedTuple):
    """How a check went.

    Attributes:
        name, sentence: of the check.
        outcome: "passed", "failed" or "not run".
        why: why it was not run.
        seconds: how long it took.
        error: what it raised.
    """

    name: str
    sentence: str
    outcome: str
    why: str = ""
    seconds: float = 0.0
    error: Exception | None = None


class Check(NamedTuple):
    """A check.

    Attributes:
        name: a word.
        sentence: what holds if it passes.
        run: raises where it does not hold; or gives the outcomes of several checks.
        why_not: why it is not run for this case; empty if it is.
    """

    name: str
    sentence: str
    run: Callable[[Case], Iterator[Outcome] | None]
    why_not: Callable[[Case], str] = lambda case: ""

    def outcomes(self, case: Case, before: Sequence[Outcome]) -> Iterator[Outcome]:
        """Run it, after those `before`: nothing is run of mods that cannot be traced."""
        untraced = any(o.name == "trace" and o.outcome == "failed" for o in before)
        why = "the mods cannot be traced" if untraced else self.why_not(case)
        if why:
            yield Outcome(self.name, self.sentence, "not run", why)
            return
        try:
            several = self.run(case)
            if several is not None:
                yield from several
        except Exception as error:
            yield Outcome(self.name, self.sentence, "failed", error=error)
        else:
            if several is None:
                yield Outcome(self.name, self.sentence, "passed")


def _trace(case: Case) -> None:
    score_dtype = torch.float64 if case.dtype is torch.float64 else torch.float32
    trace(case.mods.score_mod, case.mods.mask_mod, score_dtype=score_dtype)


def _laws(case: Case) -> Iterator[Outcome]:
    for name, said, error in check_laws(case.mods.score_mod, case.mods.mask_mod):
        sentence = said[:1].lower() + said[1:].rstrip(".")
        if isinstance(error, LawNotRun):
            yield Outcome(f"law {name}", sentence, "not run", str(error))
        else:
            yield Outcome(f"law {name}", sentence, "passed" if error is None else "failed", error=error)


def _reference(case: Case) -> None:
    mods = case.mods
    assert_matches_reference(
        mods.score_mod,
        mods.mask_mod if mods.block_mask is None else None,
        block_mask=mods.block_mask,
        shape=case.sizes,
        dtype=case.dtype,
        device=case.device,
        backend=case.backend,
    )


def _gradients(case: Case) -> None:
    sizes = Sizes(*(min(size, most) for size, most in zip(case.sizes, _SMALL, strict=True)))
    gradcheck(case.mods.score_mod, case.mods.mask_mod, shape=sizes, device=case.device)


def _mask(case: Case) -> Any:
    """The mask, where one has to be named: none attends everywhere."""
    mods = case.mods
    return mods.block_mask if mods.block_mask is not None else mods.mask_mod or noop_mask


def _leaks(case: Case) -> None:
    assert case.documents is not None
    sizes = case.sizes
    assert_no_leak(
        _mask(case),
        case.documents,
        score_mod=case.mods.score_mod,
        batch=sizes.B if case.documents.dim() == 1 else None,
        heads=sizes.Hq,
        kv_heads=sizes.Hkv,
        head_dim=sizes.E,
        dtype=case.dtype,
        device=case.device,
        backend=case.backend,
    )


def _invariance(case: Case) -> None:
    assert case.documents is not None
    rows = case.documents.expand(1, -1) if case.documents.dim() == 1 else case.documents
    for row, ids in enumerate(rows):
        order = torch.argsort(ids, stable=True)
        order = order[ids[order] >= 0]  # the tokens by document, less padding
        lengths = torch.unique_consecutive(ids[order], return_counts=True)[1].tolist()
        if lengths:
            assert_batch_invariant(
                documents=Documents.from_lengths(lengths),
                mods=_moved(case.mods, row, order.to(torch.int32)),
                shape=case.sizes,
                dtype=case.dtype,
                device=case.device,
                backend=case.backend,
            )


def _moved(pair: Pair, row: int, order: Tensor) -> Callable[[Tensor], tuple[Any, Any]]:
    """The mods of any packing of a row. To them each token stands where it was given: what they read may be for that place."""

    def mods(tokens: Tensor) -> tuple[Any, Any]:
        places = order[tokens.clamp(min=0)]  # where another document is inserted, any place will do
        score_mod, mask_mod = pair.score_mod, pair.mask_mod
        return (
            score_mod and (lambda score, b, h, q, kv: score_mod(score, 0 * b + row, h, places[q], places[kv])),
            mask_mod and (lambda b, h, q, kv: mask_mod(0 * b + row, h, places[q], places[kv])),
        )

    return mods


def _causal(case: Case) -> None:
    assert case.causal is not None
    sizes = case.sizes
    assert_causal(_mask(case), (sizes.B, sizes.Hq, sizes.L, sizes.S), device=case.device, **case.causal._asdict())


def _no_documents(case: Case) -> str:
    return "" if case.documents is not None else "no documents were given: --documents 60,40,60"


CHECKS = (
    Check("trace", "the mods become a program", _trace),
    Check("laws", "the compiler's passes agree about it", _laws),
    Check(
        "reference", "output, lse and gradients agree with the definition in float64, element by element", _reference
    ),
    Check(
        "gradients",
        "the generated derivative agrees with finite differences",
        _gradients,
        lambda case: "" if case.mods.score_mod is not None else "a mask has no derivative",
    ),
    Check(
        "leaks",
        "no document sees another one, in outputs and gradients, bit for bit",
        _leaks,
        _no_documents,
    ),
    Check(
        "invariance",
        "with batch_invariant=documents, each document gets the same bits alone, in any packing and in any batch",
        _invariance,
        _no_documents,
    ),
    Check(
        "causal",
        "no query sees a later key",
        _causal,
        lambda case: "" if case.causal is not None else "not asked for: --causal",
    ),
)
