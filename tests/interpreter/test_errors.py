"""Errors of generated code name the user's mod, its line, and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from triton.runtime.errors import InterpreterError

from flexattn import KernelError, flex_attention
from flexattn.codegen import emit, jit
from flexattn.codegen.ir import Op
from flexattn.templates import forward as templates_forward

HERE = Path(__file__).name


def test_an_error_in_generated_code_names_the_users_line() -> None:
    q = torch.randn(1, 1, 16, 16)

    def wavy(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        shifted = score + q_idx
        return torch.atan(shifted)  # this line

    broken = {**emit.SPELLING, Op.ATAN: lambda node, args, tl: f"device.no_such_function({args[0]})"}
    with patch.object(emit, "SPELLING", broken), pytest.raises(KernelError) as caught:
        flex_attention(q, q, q, score_mod=wavy, backend="triton")
    message = str(caught.value)
    line = wavy.__code__.co_firstlineno + 2
    assert re.match(rf"score_mod at .*{HERE}:{line} could not be compiled: `return torch.atan\(shifted\)", message)
    assert "device.no_such_function(t1)" in message and "(atan of float32)" in message
    assert "Use backend='tiled'" in message


def test_an_error_in_a_mask_names_the_mask() -> None:
    q = torch.randn(1, 1, 16, 16)
    broken = {**emit.SPELLING, Op.XOR: lambda node, args, tl: f"device.no_such_function({args[0]})"}
    with patch.object(emit, "SPELLING", broken), pytest.raises(KernelError, match=f"^mask_mod at .*{HERE}"):
        flex_attention(q, q, q, mask_mod=lambda b, h, q_idx, kv_idx: (q_idx > 3) ^ (kv_idx > 9), backend="triton")


def test_an_error_of_the_kernel_itself_is_not_blamed_on_the_mod() -> None:
    q = torch.randn(1, 1, 16, 16)
    with patch.object(templates_forward, "load_tile", None), pytest.raises(InterpreterError) as caught:
        flex_attention(q, q, q, backend="triton")
    assert not isinstance(caught.value, KernelError)


def test_a_generated_function_is_found_by_its_file() -> None:
    made = emit.Function("score_mod", "score_mod_test", "def score_mod_test(score):\n    return score\n", 1, {})
    jit.jitted(emit.Functions(made, None, None, None, None, None))
    assert jit.function_of_file("<flexattn score_mod_test>") is made
    assert jit.function_of_source("def score_mod_test(score):\n    return score") is made
    assert jit.function_of_file("model.py") is None


def test_the_interpreter_without_numpy_is_refused_by_name() -> None:
    q = torch.randn(1, 1, 16, 16)
    with patch("importlib.util.find_spec", return_value=None), pytest.raises(ValueError, match="pip install numpy"):
        flex_attention(q, q, q, backend="triton")
