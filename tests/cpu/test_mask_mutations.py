"""Mutants of the ready-made masks: `mask_diff` tells each from its original exactly as brute force does."""

from __future__ import annotations

import pytest
from mask_mutants import LENGTH, ORIGINALS, mutants

from flexattn import create_mask
from flexattn.testing import mask_diff

SHAPES = [(2, 1, LENGTH, LENGTH), (1, 2, 23, LENGTH), (2, 1, 9, 5)]


@pytest.mark.parametrize("name", ORIGINALS)
def test_mutants_are_told_from_their_original_as_brute_force_does(name: str) -> None:
    original = ORIGINALS[name]
    seen = {"equal": 0, "different": 0}
    for number, mutant in enumerate(mutants(original)):
        shape = SHAPES[number % len(SHAPES)]
        try:
            differ = create_mask(original, *shape) ^ create_mask(mutant.mask_mod, *shape)
        except RuntimeError as error:  # a mutant divides by zero
            assert "ZeroDivision" in str(error)
            continue
        diff = mask_diff(original, mutant.mask_mod, shape)
        first = differ.nonzero()[:1].tolist()
        assert diff.count == int(differ.sum()), mutant.change
        assert diff.equal == (not first), mutant.change
        assert [list(diff.counterexample[:4])] == first if diff.counterexample else not first, mutant.change
        if diff.counterexample is not None:
            in_a, in_b = (bool(create_mask(m, *shape)[diff.counterexample[:4]]) for m in (original, mutant.mask_mod))
            assert (diff.counterexample.in_a, diff.counterexample.in_b) == (in_a, in_b)
        seen["equal" if diff.equal else "different"] += 1
    assert seen["different"] >= 3, seen


def test_some_mutants_are_equivalent_and_proved_so() -> None:
    # Of these two bounds one follows from the other.
    doubled = lambda b, h, q, k: (q - k < 9) & (q - k < 5) & (q >= k)
    found = [mask_diff(doubled, m.mask_mod, 20) for m in mutants(doubled)]
    assert sum(diff.proved for diff in found) >= 3


def test_there_are_many_mutants() -> None:
    assert sum(1 for mask in ORIGINALS.values() for _ in mutants(mask)) >= 150
