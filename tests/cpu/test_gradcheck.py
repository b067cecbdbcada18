"""`gradcheck`: finite differences agree with generated derivatives, say where there are none, and find wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from learned_mods import CASES
from strategies import FLOATING, Mod, Shape, environment, mask_mods, score_mods
from torch import Tensor

from flexattn.codegen import derivative, pipeline
from flexattn.codegen.ir import Op
from flexattn.codegen.spec import apply
from flexattn.testing import Sizes, gradcheck

GAIN = torch.tensor([0.9, 0.7, 0.5, 0.3], requires_grad=True)
TABLE = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
ZERO = torch.zeros(4, requires_grad=True)
TINY = Sizes(1, 2, 1, 9, 11, 4, 4)

SMOOTH: dict[str, Callable[..., Any]] = {
    "softcap": lambda s, b, h, q, k: 3 * torch.tanh(s * GAIN[h] / 3),
    "table in bfloat16": lambda s, b, h, q, k: s + TABLE[h, q - k + 30] * TABLE[h, k],
    "quotient": lambda s, b, h, q, k: s / (1 + torch.exp(GAIN[h] - s)),
    "constant": lambda s, b, h, q, k: GAIN[h] * 0.1 * (k - q),
    "powers": lambda s, b, h, q, k: torch.log1p((s * s + GAIN[h]) ** 1.5),
}


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_mods_agree_everywhere(name: str) -> None:
    done = gradcheck(SMOOTH[name], causal, entries=8)
    assert done.left_out == () and done.compared >= 36


def test_every_entry_of_a_small_problem() -> None:
    done = gradcheck(SMOOTH["softcap"], causal, shape=TINY, entries=None, directions=0)
    assert done == (2 * 9 * 4 + 11 * 4 * 2 + 4, ())


@pytest.mark.parametrize("name", CASES)
def test_named_mods_that_read_learned_tensors(name: str) -> None:
    done = gradcheck(*CASES[name].make(Shape(2, 2, 2, 20, 24, 8, 8, (16, 16), False)).mods, entries=4)
    assert done.compared >= 12 and len(done.left_out) <= done.compared


@settings(max_examples=30)
@given(mod=score_mods(), mask=mask_mods())
def test_generated_mods_never_fail(mod: Mod, mask: Mod) -> None:
    env = environment()
    for name in FLOATING:
        env[name].requires_grad_()
    gradcheck(mod.bind(env), mask.bind(env), shape=Sizes(1, 2, 1, 7, 9, 3, 2), entries=3, directions=1)


@pytest.mark.parametrize("op", [Op.TANH, Op.DIV, Op.EXP, Op.POW, Op.LOG1P, Op.MUL])
def test_a_wrong_rule_is_found(op: Op) -> None:
    right = derivative.DERIVATIVES[op]

    def wrong(node: Any, grad: Any) -> Any:
        return tuple(None if p is None else apply(Op.NEG, p) for p in right(node, grad))

    of = {
        Op.TANH: "softcap",
        Op.DIV: "softcap",
        Op.EXP: "quotient",
        Op.POW: "powers",
        Op.LOG1P: "powers",
        Op.MUL: "table in bfloat16",
    }
    pipeline.variant.cache_clear()
    with patch.dict(derivative.DERIVATIVES, {op: wrong}), pytest.raises(AssertionError) as failure:
        gradcheck(SMOOTH[of[op]], causal)
    pipeline.variant.cache_clear()
    text = str(failure.value)
    assert "is not its derivative, by " in text and "generated derivative" in text and "central difference" in text


@pytest.mark.parametrize(
    "kinked",
    [
        lambda s, b, h, q, k: s + ZERO[h].abs() * (k - q),
        lambda s, b, h, q, k: s + ZERO[h].clamp(min=0) * k,
        lambda s, b, h, q, k: s + torch.where(ZERO[h] > 0, ZERO[h], 0.3 * ZERO[h]) * k,
    ],
    ids=["abs", "clamp", "where"],
)
def test_a_kink_is_left_out_by_name(kinked: Callable[..., Any]) -> None:
    done = gradcheck(kinked, causal, entries=4, directions=1)
    assert [place for place in done.left_out if "captured tensor" in place] == list(done.left_out) and len(
        done.left_out
    ) >= 4
    assert "left out, where the differences to either side disagree: by captured tensor c0 (4,)[dim 0=0]" in str(done)


def test_a_normalizer_is_part_of_the_function() -> None:
    done = gradcheck(None, causal, normalizer=lambda out, lse: out * torch.sigmoid(lse - 0.5).unsqueeze(-1), entries=6)
    assert done == (3 * 8, ())


def test_what_is_cut_off_on_purpose_is_refused() -> None:
    with pytest.raises(ValueError, match=r"score_mod .* detaches a value"):
        gradcheck(lambda score, b, h, q_idx, kv_idx: score * score.detach())


def test_results_that_are_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="have no derivative"):
        gradcheck(lambda score, b, h, q_idx, kv_idx: torch.sqrt(score - 100), shape=TINY)


@pytest.mark.parametrize("wrong", [{"entries": -3}, {"directions": -1}])
def test_negative_counts_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give numbers of 0 or more"):
        gradcheck(**wrong)  # type: ignore[arg-type]
