"""Law 4: blocks are classified as their elements say, by every way there is to find out."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from strategies import Mod, environment, rich_masks

from flexattn import and_masks, masks, not_mask, or_masks
from flexattn.codegen import tiles
from flexattn.codegen.ir import INDEX_INPUTS
from flexattn.codegen.trace import trace
from flexattn.testing import LawNotRun
from flexattn.testing.generated import GeneratedMask
from flexattn.testing.laws import assert_classified
from flexattn.testing.strategies import mask_mods
from flexattn.testing.traced import Traced

CPU = torch.device("cpu")
LENGTH = 300
BLOCKS = [(16, 16), (32, 64), (64, 16), (128, 128), (48, 16), (100, 20), (250, 130)]


def by_walk(*_: Any) -> None:
    """In place of `segments_by_query`: no mask has ranges."""


def classified(mask: Any, shape: tuple[int, int, int, int], block: tuple[int, int], **work: Any) -> None:
    program, captured, ints = trace(None, mask)
    traced = Traced(program, captured, ints, CPU, dict(zip(INDEX_INPUTS, shape, strict=True)))
    with ExitStack() as patches:
        if work.pop("walk", False):
            patches.enter_context(patch.object(tiles, "segments_by_query", by_walk))
        for name in [n for n in work if n.startswith("_")]:
            patches.enter_context(patch.object(tiles, name, work.pop(name)))
        assert_classified(traced, block, **work)


sizes = st.tuples(st.integers(1, 2), st.sampled_from([1, 4]), st.integers(1, LENGTH), st.integers(1, LENGTH))
work = st.fixed_dictionaries(
    {"walk": st.booleans(), "_ROOTS": st.sampled_from([1, 40, 4096]), "_CHUNK": st.sampled_from([3000, 1 << 19])},
    optional={"memory": st.sampled_from([1 << 18, 1 << 22]), "_SMALLEST": st.just(4), "_SAMPLES": st.just(1)},
)


@settings(max_examples=150)
@given(mod=mask_mods(length=LENGTH), shape=sizes, block=st.sampled_from(BLOCKS), work=work)
def test_law_4_masks_of_indices_are_classified_as_by_force(
    mod: GeneratedMask, shape: Any, block: Any, work: Any
) -> None:
    classified(mod, shape, block, **work)


@settings(max_examples=150)
@given(mod=rich_masks(), shape=sizes, block=st.sampled_from(BLOCKS), work=work)
def test_law_4_masks_of_every_operation_are_classified_as_by_force(mod: Mod, shape: Any, block: Any, work: Any) -> None:
    with contextlib.suppress(LawNotRun):  # torch refuses a zero divisor of an integer, and a negative power
        classified(mod.bind(environment(length=LENGTH)), shape, block, **work)


g = torch.Generator().manual_seed(3)
runs = torch.repeat_interleave(torch.arange(12), torch.randint(1, 60, (12,), generator=g))[:LENGTH]
runs = torch.cat([runs, runs.new_full((LENGTH - len(runs),), 12)])
names = torch.randperm(13, generator=g) * 7 - 20
batched = torch.stack([runs, runs.flip(0)])
spans = torch.where(runs % 3 == 1, runs, -1)
lengths = torch.tensor([70, 205])
LEAVES = [
    *(masks.causal_mask, masks.causal(5), masks.causal(-7), masks.causal(lengths), masks.sliding_window(40)),
    *(masks.window(30, 9), masks.prefix_lm(50), masks.prefix_lm(lengths), masks.document_mask(runs)),
    *(masks.document_mask(names[runs]), masks.document_mask(batched), masks.padding(lengths), masks.chunked(37)),
    *(masks.document_mask(spans), masks.transfusion(spans), masks.streaming(3, 33), masks.dilated(6, 5)),
    *(masks.document_mask(runs[torch.randperm(LENGTH, generator=g)]), masks.global_tokens(5)),
    *(lambda b, h, q, k: q + h * 30 >= k, lambda b, h, q, k: (q - k).abs() < 20, lambda b, h, q, k: k >= 100),
    *(lambda b, h, q, k: q > 150, lambda b, h, q, k: runs[k] <= runs[q], lambda b, h, q, k: q // 2 == k // 3),
    *(lambda b, h, q, k: runs[k] > 5, lambda b, h, q, k: 3 * k - 2 * q < 40, lambda b, h, q, k: q % 50 < k % 50),
    *(lambda b, h, q, k: names[runs[q]] == names[runs[k]], lambda b, h, q, k: (k * k) // 100 <= q),
    *(lambda b, h, q, k: q // torch.where(k > 5, k, 1) > 3, lambda b, h, q, k: q % torch.where(k > 5, k, 1) > 3),
    # Holes of one key, and comparisons of sorted values both ways round.
    *(lambda b, h, q, k: (k < 50) | (k > 50), lambda b, h, q, k: (k <= q - 3) | (k >= q - 1)),
    *(
        lambda b, h, q, k: runs[q] < runs[k],
        lambda b, h, q, k: runs[q] <= runs[k],
        lambda b, h, q, k: runs[k] < runs[q],
    ),
    # One key a query, far from those of its neighbours, up, down, and with queries between that have none.
    *(lambda b, h, q, k: k == (q * 37) % 300, lambda b, h, q, k: k == 299 - (q * 37) % 300),
    *(lambda b, h, q, k: k == q * 37, lambda b, h, q, k: k == 299 - q * 37),
    *(lambda b, h, q, k: (q % 2 == 0) & (k == q * 37), lambda b, h, q, k: (q % 3 != 1) & (k == q // 3 * 64)),
    # Sums that wrap: as integers without end they would say something else.
    *(lambda b, h, q, k: k + 2147483600 > q, lambda b, h, q, k: (q - k) * 30_000_000 >= 0),
    # One element, which no sample finds, and all but one.
    *(lambda b, h, q, k: (q == 220) & (k == 111), lambda b, h, q, k: (q != 220) | (k != 111)),
    *(lambda b, h, q, k: k - 200 < torch.abs(q - 150), lambda b, h, q, k: -2 * (k // 5) <= 9 - q),
]


@st.composite
def combined(draw: st.DrawFn) -> Any:
    """Ready-made masks, and their conjunctions, disjunctions and negations."""
    parts = draw(st.lists(st.sampled_from(LEAVES), min_size=1, max_size=3))
    parts = [not_mask(p) if draw(st.integers(0, 4)) == 0 else p for p in parts]
    if len(parts) == 3:
        parts = [draw(st.sampled_from([and_masks, or_masks]))(*parts[:2]), parts[2]]
    return parts[0] if len(parts) == 1 else draw(st.sampled_from([and_masks, or_masks]))(*parts)


@settings(max_examples=250)
@given(mask=combined(), shape=sizes, block=st.sampled_from(BLOCKS), work=work)
def test_law_4_ready_made_masks_are_classified_as_by_force(mask: Any, shape: Any, block: Any, work: Any) -> None:
    classified(mask, shape, block, **work)


@pytest.mark.parametrize("mask", LEAVES, ids=range(len(LEAVES)))
def test_each_ready_made_mask_both_ways(mask: Any) -> None:
    for walk in (False, True):
        classified(mask, (2, 3, LENGTH, LENGTH), (16, 32), walk=walk, _ROOTS=16)
    classified(mask, (2, 3, LENGTH, LENGTH), (250, 130), walk=True, _CHUNK=3000)
