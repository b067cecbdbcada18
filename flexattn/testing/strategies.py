"""Hypothesis strategies for attention: mods, operands, document ids and block masks.

Everything generated can be called or passed to `flexattn.flex_attention` as it is, and `describe(value)`, or `.describe()`
of a mod and of operands, is a program that makes it again. Hypothesis prints that program with the example that fails.
Examples shrink to the ordinary: masks to causal, scores to identity, sizes to 1, values to zero, ids to one document.

Needs hypothesis: `pip install "flexattn[testing]"`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import hypothesis.strategies as st
import torch
from hypothesis import currently_in_test_context, note
from torch import Tensor

from ..block_mask import BlockMask
from ..create import create_block_mask
from ..documents import Documents
from .descriptions import describe
from .generated import GeneratedMask, GeneratedNormalizer, GeneratedScore
from .grammar import OFF_BY_ONE, UNCHANGED, Rule, Space, grammar, sinks
from .grammar_expressions import Expression, Literal
from .inputs import AttentionInputs
from .sizes import Sizes

__all__ = [
    "attention_inputs",
    "block_masks",
    "describe",
    "document_ids",
    "documents",
    "mask_mods",
    "normalizers",
    "score_mods",
    "sizes",
]

T = TypeVar("T")
Dtypes = torch.dtype | st.SearchStrategy[torch.dtype]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LENGTHS = (0, 16, 17, 31, 128, 129, 160)  # at and beside the edges of blocks and tiles
_HEADS = ((1, 1), (1, 2), (4, 1), (2, 2), (1, 4), (3, 1))  # of the keys, and queries for each
_BLOCKS = ((16, 16), (32, 16), (16, 64), (7, 5), (128, 128))
_SEEDS = st.integers(0, 1000)
_THIRDS = st.integers(0, 2)
_MOD_SEEDS = st.integers(0, 7)  # few, so that the rules that name their tensors are made once
_MOD_KINDS = "mdo"  # of the grammar: masks and scores
_WIDEST = 64  # window, prefix or chunk


def mask_mods(
    depth: int = 2, *, captured: bool = True, batch: int = 2, heads: int = 4, length: int = 160
) -> st.SearchStrategy[GeneratedMask]:
    """mask_mods of every kind: functions of the indices, the masks of `flexattn.masks`, and their combinations.

    Args:
        depth: how deeply expressions and combinations nest, 0 or more.
        captured: whether they may read captured tensors.
        batch, heads, length: how many batch entries, heads and positions those have; use no larger problem with them.

    Returns:
        A strategy of functions `(b, h, q_idx, kv_idx) -> bool` with `.describe()`, `.captured` and `.to(device)`. They can be
        pickled. They shrink to `flexattn.masks.causal_mask`.

    Example:
        >>> from hypothesis import given, settings
        >>> import flexattn
        >>> from flexattn.testing.strategies import mask_mods
        >>> @settings(max_examples=5, derandomize=True, database=None)
        ... @given(mask=mask_mods())
        ... def test_a_mask_and_its_negation_overlap_nowhere(mask):
        ...     both = flexattn.and_masks(mask, flexattn.not_mask(mask))
        ...     assert not flexattn.create_mask(both, 2, 4, 30, 40, "cpu").any()
        >>> test_a_mask_and_its_negation_overlap_nowhere()
    """
    _check_space(depth, batch, heads, length)
    return _mods("m", depth, Space(captured, batch, heads, length)).map(GeneratedMask).map(_noted)


def score_mods(
    depth: int = 2,
    *,
    captured: bool = True,
    requires_grad: bool = False,
    batch: int = 2,
    heads: int = 4,
    length: int = 160,
) -> st.SearchStrategy[GeneratedScore]:
    """score_mods of every kind: functions of score and indices, some of which mask by -inf, and those of `flexattn.mods`.

    Args:
        depth: how deeply expressions nest, 0 or more.
        captured: whether they may read captured tensors.
        requires_grad: whether the captured floating-point tensors require gradients; `.captured` has them by name.
        batch, heads, length: how many batch entries, heads and positions those have; use no larger problem with them.

    Returns:
        A strategy of functions `(score, b, h, q_idx, kv_idx) -> score` with `.describe()`, `.captured` and
        `.to(device, dtype)`. They can be pickled. They shrink to `flexattn.mods.identity`. Their values grow slowly, so that a
        comparison in float32 is meaningful.

    Example:
        >>> from flexattn.testing.strategies import score_mods
        >>> from hypothesis import find
        >>> print(find(score_mods(), lambda mod: True).describe())
        import flexattn
        <BLANKLINE>
        score_mod = flexattn.mods.identity
    """
    _check_space(depth, batch, heads, length)
    made = _mods("d", depth, Space(captured, batch, heads, length))
    return made.map(lambda root: GeneratedScore(root, requires_grad=requires_grad)).map(_noted)


def normalizers(*, heads: int = 4, requires_grad: bool = False) -> st.SearchStrategy[GeneratedNormalizer]:
    """Functions `(out, lse) -> out` that normalise a softmax attention afterwards: as it is, off by one, or with sinks.

    An entry of weight exp(sink) with a value of zero makes the output `out * sigmoid(lse - sink)`. A sink of 0 is the softmax
    that divides by one more.

    Args:
        heads: query heads, each with a sink of its own.
        requires_grad: whether the sinks require gradients; `.captured["sink"]` holds them.

    Example:
        >>> from flexattn.testing.strategies import normalizers
        >>> from hypothesis import find
        >>> print(find(normalizers(), lambda f: "sink" in f.captured).describe())
        import torch
        <BLANKLINE>
        sink = torch.randn((4,), generator=torch.Generator().manual_seed(0))
        <BLANKLINE>
        def normalizer(out, lse):
            return (out * torch.sigmoid(lse - sink.unsqueeze(-1)).unsqueeze(-1)).to(out.dtype)

    Source: Xiao et al., 2024, "Efficient Streaming Language Models with Attention Sinks"; Miller, 2023, "Attention Is Off By
    One".
    """
    _check_space(0, 1, heads, 1)
    roots = st.one_of(st.just(UNCHANGED), st.just(OFF_BY_ONE), _SEEDS.map(lambda seed: sinks(heads, seed)))
    return roots.map(lambda root: GeneratedNormalizer(root, requires_grad=requires_grad)).map(_noted)


@st.composite
def sizes(draw: st.DrawFn, *, batch: int = 2, heads: int = 4, length: int = 160, empty: bool = True) -> Sizes:
    """Small problems with everything that goes wrong at edges: ragged blocks, empty lengths, groups of query heads.

    Args:
        batch, heads, length: the most that occur; heads are query heads.
        empty: whether lengths may be 0.
    """
    _check_space(0, batch, heads, length)
    edges = st.sampled_from([n for n in _LENGTHS if n <= length and (n or empty)] or [1])
    lengths = st.one_of(st.integers(1, min(length, 100)), edges)
    kv_heads, group = draw(st.sampled_from([pair for pair in _HEADS if pair[0] * pair[1] <= heads]))
    return Sizes(
        draw(st.integers(1, batch)),
        kv_heads * group,
        kv_heads,
        draw(lengths),
        draw(lengths),
        draw(st.sampled_from([1, 4, 8, 24])),
        draw(st.sampled_from([1, 8, 16])),
    )


@st.composite
def attention_inputs(
    draw: st.DrawFn,
    problem: st.SearchStrategy[Sizes] | Sizes | None = None,
    *,
    dtype: Dtypes = st.sampled_from(DTYPES),  # noqa: B008, a strategy is a value
    shared_keys: bool = True,
    requires_grad: bool = False,
    device: torch.device | str = "cpu",
) -> AttentionInputs:
    """Query, key and value of small problems: normal values, zeros among them, of any sizes.

    Args:
        problem: `Sizes`, or a strategy of them; `sizes()` by default.
        dtype: one, or a strategy of several; all floating-point dtypes by default.
        shared_keys: whether key and value may have batch 1 where the query has more.
        requires_grad: for all three.
        device: for all three.

    Example:
        >>> from hypothesis import find
        >>> from flexattn.testing.strategies import attention_inputs
        >>> find(attention_inputs(), lambda inputs: True)
        <Sizes(B=1, Hq=1, Hkv=1, L=1, S=1, E=1, Ev=1), torch.float32, seed 0, magnitude 0.0>
    """
    wanted = sizes() if problem is None else st.just(problem) if isinstance(problem, Sizes) else problem
    chosen = draw(wanted)
    kind = draw(st.just(dtype) if isinstance(dtype, torch.dtype) else dtype)
    magnitude = draw(st.sampled_from((0.0, 1.0, 1.0, 0.25, 3.0)))
    shared = chosen.B > 1 and shared_keys and draw(st.booleans())
    seed = draw(_SEEDS)
    made = AttentionInputs.of(
        chosen,
        dtype=kind,
        seed=seed,
        magnitude=magnitude,
        shared_keys=shared,
        requires_grad=requires_grad,
        device=device,
    )
    return _noted(made)


@st.composite
def document_ids(
    draw: st.DrawFn,
    length: int | st.SearchStrategy[int] = 160,
    *,
    batch: int | None = None,
    padding: bool = True,
    most: int = 8,
) -> Tensor:
    """The document of each position, int32 [S] or [B, S], for documents packed one after another.

    Args:
        length: positions, or a strategy of how many.
        batch: rows, each packed on its own; None for one sequence, [S].
        padding: whether positions at the end may belong to no document, -1.
        most: documents in a row.

    Returns:
        A strategy of tensors that shrinks to one document. `describe(ids)` prints one.

    Example:
        >>> from hypothesis import find
        >>> from flexattn.testing.strategies import document_ids
        >>> find(document_ids(6), lambda ids: ids.max() == 1 and ids.min() == -1)
        tensor([ 0,  1,  1,  1,  1, -1], dtype=torch.int32)
    """
    positions = length if isinstance(length, int) else draw(length)
    if positions < 0 or most < 1 or (batch is not None and batch < 1):
        raise ValueError(
            f"length={positions}, batch={batch}, most={most}; give sizes, and a batch of at least 1 or None"
        )
    rows = [_packed(draw, positions, padding, most) for _ in range(1 if batch is None else batch)]
    return _noted(rows[0] if batch is None else torch.stack(rows))


def documents(
    length: int | st.SearchStrategy[int] = 160, *, batch: int | None = None, padding: bool = True, most: int = 8
) -> st.SearchStrategy[Documents]:
    """`flexattn.Documents` of `document_ids`; the arguments are those."""
    return document_ids(length, batch=batch, padding=padding, most=most).map(Documents.from_document_ids)


@st.composite
def block_masks(
    draw: st.DrawFn,
    mods: st.SearchStrategy[GeneratedMask] | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    length: int = 160,
    lists: bool = True,
) -> BlockMask:
    """Block masks of generated masks, and of lists that any blocks may be in. `describe(block_mask)` prints one.

    Args:
        mods: a strategy of mask_mods; `mask_mods` for these sizes by default.
        batch, heads: those of the mask, or 1 of lists that are the same for all.
        length: the most queries and keys; 1 at least.
        lists: whether some are made by `BlockMask.from_kv_blocks`, of blocks that their mask_mod says nothing about.

    Example:
        >>> from hypothesis import find
        >>> from flexattn.testing.strategies import block_masks, describe
        >>> print(describe(find(block_masks(lists=False), lambda mask: True)))
        import torch
        import flexattn
        <BLANKLINE>
        mask_mod = flexattn.masks.causal_mask
        <BLANKLINE>
        block_mask = flexattn.create_block_mask(mask_mod, 2, 4, 1, 1, "cpu", BLOCK_SIZE=(16, 16))
    """
    _check_space(0, batch, heads, length)
    Q_LEN, KV_LEN = draw(st.integers(1, length)), draw(st.integers(1, length))
    block = draw(st.sampled_from(_BLOCKS))
    usual = _mods("m", 1, Space(True, batch, heads, length)).map(GeneratedMask)
    mod = draw(usual if mods is None else mods)
    if not lists or not draw(st.booleans()):
        return _noted(create_block_mask(mod, batch, heads, Q_LEN, KV_LEN, "cpu", block))
    block = max(block[0], 16), max(block[1], 16)  # so that lists stay short
    rows, columns = -(-Q_LEN // block[0]), -(-KV_LEN // block[1])
    leading = draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads)))
    # A number for each row of blocks: in base 3, its digits are empty, partial and full.
    row = st.integers(0, 3**columns - 1)
    codes = [draw(row) for _ in range(leading[0] * leading[1] * rows)]
    kinds = torch.tensor([[code // 3**i % 3 for i in range(columns)] for code in codes]).view(*leading, rows, columns)
    found: list[Tensor] = []
    for kind in (1, 2):
        listed = (kinds == kind).int()
        found += [listed.sum(-1), torch.argsort(listed, dim=-1, descending=True, stable=True)]
    given = draw(st.sampled_from((None, mod)))
    return _noted(
        BlockMask.from_kv_blocks(
            found[0], found[1], found[2], found[3], BLOCK_SIZE=block, mask_mod=given, seq_lengths=(Q_LEN, KV_LEN)
        )
    )


# ---- how they are drawn


@st.composite
def _mods(draw: st.DrawFn, kind: str, depth: int, space: Space) -> Expression:
    """A mask_mod ("m") or score_mod ("d"). Of its captured tensors all come from one seed, drawn if there are any."""
    if space.captured:
        space = space._replace(seed=draw(_MOD_SEEDS))
    return draw(_grown(_choices(space), kind, depth, depth))


class _Choices(NamedTuple):
    """Strategies of the rules that end an expression and of those that nest, for each kind, and of widths."""

    leaves: dict[str, st.SearchStrategy[Rule]]
    nested: dict[str, st.SearchStrategy[Rule]]
    numbers: dict[str, st.SearchStrategy[int]]


@lru_cache(maxsize=256)
def _choices(space: Space) -> _Choices:
    rules = grammar(space)
    numbers = {"n": st.integers(1, 7), "w": st.integers(1, min(space.length, _WIDEST))}
    leaves = {kind: st.sampled_from(rules[kind].leaves) for kind in rules}
    return _Choices(leaves, {kind: st.sampled_from(rules[kind].nested) for kind in rules}, numbers)


@st.composite  # a strategy at each level, so that an expression shrinks to one that is inside it
def _grown(draw: st.DrawFn, choices: _Choices, kind: str, depth: int, inner: int) -> Expression:
    """An expression of a kind; `inner` is how deep those of functions inside it are."""
    is_mod = kind in _MOD_KINDS
    nests = depth > 0 and draw(_THIRDS) > is_mod  # mods are combined in a third of cases, others nest in two
    rule = draw((choices.nested if nests else choices.leaves)[kind])
    operands: list[Expression] = []
    for hole in rule.holes:
        if hole in choices.numbers:
            operands.append(Literal(draw(choices.numbers[hole])))
        else:
            body = is_mod and hole not in _MOD_KINDS
            operands.append(draw(_grown(choices, hole, inner if body else depth - 1, inner)))
    return rule.build(*operands)


def _packed(draw: st.DrawFn, length: int, padding: bool, most: int) -> Tensor:
    pads = draw(st.integers(0, length // 2)) if padding else 0
    used = length - pads
    starts = st.lists(st.integers(1, max(used - 1, 1)), max_size=most - 1, unique=True) if used > 1 else st.just([])
    ends = torch.tensor([*sorted(draw(starts)), used])
    ids = torch.searchsorted(ends, torch.arange(length), right=True)
    return torch.where(torch.arange(length) < used, ids, -1).to(torch.int32)


def _noted(value: T) -> T:
    """Have hypothesis print the program that makes a value, with the example that fails."""
    if currently_in_test_context():
        note(describe(value))
    return value


def _check_space(depth: int, batch: int, heads: int, length: int) -> None:
    given: dict[str, Any] = {"depth": depth, "batch": batch, "heads": heads, "length": length}
    for name, n in given.items():
        least = 0 if name == "depth" else 1
        if not isinstance(n, int) or isinstance(n, bool) or n < least:
            raise ValueError(f"{name} is {n!r}; it must be an integer, {least} or more")
