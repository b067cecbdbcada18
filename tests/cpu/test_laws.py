"""The laws of the compiler and its backends, on mods and shapes that hypothesis chooses."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import strategies
import torch
from hypothesis import given, settings
from laws import assert_backend_equals_reference
from strategies import Mod, Shape, shapes

from flexattn.backends import schedule
from flexattn.codegen.program import parse, print_program
from flexattn.codegen.trace import trace
from flexattn.testing import LAWS, LawNotRun
from flexattn.testing.generated import GeneratedMask, GeneratedScore
from flexattn.testing.strategies import mask_mods, score_mods

SCORES, MASKS = score_mods(3), mask_mods()


@given(mod=SCORES, mask=MASKS)
def test_law_1_the_trace_computes_what_the_function_does(mod: GeneratedScore, mask: GeneratedMask) -> None:
    LAWS["trace"](mod, mask)


@given(mod=SCORES, mask=MASKS)
def test_law_2_simplification_changes_no_value(mod: GeneratedScore, mask: GeneratedMask) -> None:
    LAWS["simplify"](mod, mask)


@given(mod=SCORES, mask=MASKS)
def test_a_program_is_its_own_canonical_form(mod: GeneratedScore, mask: GeneratedMask) -> None:
    program = trace(mod, mask).program
    parsed = parse(program)
    assert print_program(parsed.score, parsed.mask, parsed.score_dtype).text == program


@given(mask=MASKS)
def test_law_3_values_lie_in_their_bounds(mask: GeneratedMask) -> None:
    LAWS["intervals"](None, mask)


@given(mask=MASKS)
def test_law_4_blocks_are_classified_as_by_force(mask: GeneratedMask) -> None:
    LAWS["blocks"](None, mask)


@given(mod=SCORES)
def test_law_5_the_derivative_is_that_of_autograd(mod: GeneratedScore) -> None:
    LAWS["derivative"](mod.to(dtype=torch.float64), None)


@settings(max_examples=30)
@given(mod=SCORES, mask=MASKS)
def test_law_6_emitted_functions_compute_their_graphs(mod: GeneratedScore, mask: GeneratedMask) -> None:
    try:
        LAWS["emitted"](mod, mask)
    except LawNotRun as reason:
        pytest.skip(str(reason))


@given(mod=strategies.score_mods(), mask=strategies.mask_mods())
def test_the_laws_hold_for_mods_with_numbers_everywhere(mod: Mod, mask: Mod) -> None:
    """Of the tests' own grammar, in which numbers and 0-d tensors stand where an index may."""
    env = strategies.environment()
    f, m = mod.bind(env), mask.bind(env)
    for name in ("trace", "simplify"):
        LAWS[name](f, m)
    env = strategies.environment(torch.float64)
    LAWS["derivative"](mod.bind(env), None)


@settings(max_examples=120)
@given(
    mod=st.one_of(st.none(), strategies.score_mods()),
    mask=st.one_of(st.none(), strategies.mask_mods()),
    shape=shapes(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    narrow=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_law_7_the_tiled_backend_equals_the_reference(
    mod: Mod | None, mask: Mod | None, shape: Shape, dtype: torch.dtype, narrow: bool, seed: int
) -> None:
    # Narrow chunks take these short sequences through the online softmax of long ones.
    sizes_of_work = {"TILE_ELEMENTS": 1 << 9, "MIN_WIDTH": 16} if narrow else {}
    schedule.everything.cache_clear()  # made for other sizes
    with patch.multiple(schedule, **sizes_of_work) if narrow else nullcontext():
        assert_backend_equals_reference("tiled", mod, mask, shape, dtype, seed)
