"""What a user is told when a mod cannot be compiled: the line, and what to write instead."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from flexattn import create_block_mask, flex_attention, masks
from flexattn.codegen import private
from flexattn.codegen.errors import UnsupportedTorch
from flexattn.graph_mod import HINT
from flexattn.notices import say_once

gate, table = torch.rand(4), torch.rand(4, 70)


def reads_a_value(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score * gate[h].item()


def draws(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + torch.rand(())


def returns_nothing(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return None


def returns_two(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score, score


def forgets_the_index(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + gate


def branches(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score if q_idx > kv_idx else score * 2


def uses_math(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return math.sin(score)


def leaves_a_slice(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + table[h, :][q_idx]


def leaves_an_ellipsis(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + table[h, ...][q_idx]


def compiled(mod: Any, **options: Any) -> Tensor:
    q = torch.randn(1, 4, 70, 8)
    call = torch.compile(lambda q: flex_attention(q, q, q, mod), backend="eager", **options)
    result: Tensor = call(q)
    return result


@pytest.mark.feature("errors name the line and the remedy")
@pytest.mark.parametrize(
    ("mod", "complaint"),
    [
        (
            reads_a_value,
            r"test_errors.py:\d+ reads the value of a traced tensor with `item`: `return score \* gate\[h\].item",
        ),
        (draws, r"test_errors.py:\d+ draws random numbers with `rand`: `return score \+ torch.rand"),
        (returns_nothing, r"returns nothing\s+A score_mod returns one score.*\s+Write instead: return score"),
        (returns_two, r"returns tuple\s+A score_mod returns one score"),
        (forgets_the_index, r"test_errors.py:\d+ uses a captured tensor of shape \(4,\) in `add` without indexing it"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_our_errors_reach_the_user_of_compiled_code(mod: Any, complaint: str) -> None:
    with pytest.raises(Exception, match=complaint):
        compiled(mod, fullgraph=True)


@pytest.mark.feature("errors name the line and the remedy")
@pytest.mark.parametrize("mod", [branches, uses_math, leaves_a_slice, leaves_an_ellipsis], ids=lambda m: m.__name__)
def test_errors_of_dynamo_in_a_mod_say_what_to_write(mod: Any) -> None:
    with pytest.raises(Exception) as caught:
        compiled(mod, fullgraph=True)
    assert HINT in str(caught.value)


@pytest.mark.feature("errors name the line and the remedy")
def test_without_fullgraph_a_branch_has_the_error_of_eager_code() -> None:
    with pytest.raises(Exception, match=r"`if` on a traced value"):
        compiled(branches)


@pytest.mark.feature("a mask rebuilt at every call is said once")
def test_a_mask_rebuilt_at_every_call_is_said_once() -> None:
    def call(q: Tensor) -> Tensor:
        return flex_attention(q, q, q, mask_mod=masks.causal_mask)

    say_once.cache_clear()
    q = torch.randn(1, 2, 70, 8)
    with pytest.warns(UserWarning, match="builds the block mask anew at every call"):
        torch.compile(call, fullgraph=True, backend="eager")(q)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(call, fullgraph=True, backend="eager")(q)


@pytest.mark.feature("a missing private name is an error")
@pytest.mark.parametrize("name", private.USES)
def test_a_private_name_that_is_gone_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = name + "_that_is_gone"
    monkeypatch.setitem(private.USES, gone, private.USES[name]._replace(name=gone))
    with pytest.raises(UnsupportedTorch, match=rf"supports PyTorch 2.11 to 2.15; this is .*has no {gone}.* needed for"):
        private.find(gone)


@pytest.mark.feature("a missing private name is an error")
def test_without_dynamo_s_table_compiling_is_an_error_and_eager_code_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.variables import higher_order_ops

    monkeypatch.delattr(higher_order_ops, "_hop_name_to_variable_class")
    private.find.cache_clear()
    try:
        with pytest.raises(Exception, match=r"has no torch._dynamo.*Call it outside the compiled region"):
            compiled(None, fullgraph=True)
    finally:
        private.find.cache_clear()
    q = torch.randn(1, 4, 70, 8)
    mask = create_block_mask(masks.causal_mask, None, None, 70, 70, "cpu")
    assert flex_attention(q, q, q, block_mask=mask).shape == q.shape
