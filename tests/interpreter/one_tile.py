"""One tile of one head: where a generated function is called, and its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexattn.backends.triton import captured_arguments
from flexattn.codegen.evaluate import Inputs
from flexattn.codegen.pipeline import Variant

B, H, L, S, TILE = 1, 3, 13, 19, 32


def named_inputs(**more: Tensor) -> dict[str, Tensor]:
    index = {"b": torch.tensor(B), "h": torch.tensor(H)}
    index |= {"q_idx": torch.arange(L).view(-1, 1), "kv_idx": torch.arange(S)}
    return {**{k: t.int() for k, t in index.items()}, **more}


def arguments_of(v: Variant, captured: list[Tensor]) -> tuple[Any, ...]:
    n = len(v.captured)
    return captured_arguments(v, captured[:n], captured[n:], [], torch.device("cpu"))


def inputs_of(v: Variant, captured: list[Tensor], **more: Tensor) -> Inputs:
    n = len(v.captured)
    return Inputs(named_inputs(**more), captured[:n], captured[n:])
