"""Inside `torch.compile`: a higher-order operator stands for a call, and Dynamo captures the mods as its sub-graphs.

Dynamo lifts their free variables, wherever the mods were defined. The operator has no kernel of its own: whenever the
Dynamo graph is run or traced again, it replays the sub-graphs into the recorder and calls the same operators as eager
code does.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import sharded
from .codegen.private import HigherOrderOperator, constant_while_compiling, find
from .graph_mod import GraphMod, explaining


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    mask_mod: Callable[..., Tensor] | None,
    block_mask: Sequence[Tensor],
    block_size: tuple[int, int],
    scale: float,
    backend: str,
    options: str,
    score_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`capture.attention` in code that Dynamo traces."""
    ensure_registered()
    # Dynamo makes the arguments of mods like the first operand: the score gets its dtype, and no gradient, so that mods may
    # write to it; and it is plain where the query is a DTensor.
    like = torch.empty((), dtype=score_dtype, device=query.device)
    # `or` would ask whether a function is true, which PyTorch 2.11 cannot trace.
    modify = _identity if score_mod is None else _on_a_copy(score_mod)
    blocks = (query, key, value, *block_mask, _full if mask_mod is None else mask_mod)
    given: dict[str, Any] = {"flexattn": fingerprint(), "sizes": block_size, "backend": backend, "options": options}
    given |= {"score": score_mod is not None, "mask": mask_mod is not None}
    if sharded.involved(query, key, value):
        # Part of the graph, so that no other rank takes what was compiled for this one from a cache.
        given["sharded"] = sharded.coordinates(query, key, value)
    found: tuple[Tensor, Tensor, Tensor] = captured_call(like, like, like, modify, blocks, scale, given)
    return found


def block_lists(
    mask_mod: Callable[..., Tensor],
    shape: Sequence[int],
    block_size: Sequence[int],
    like: Tensor,
    unsaid: Sequence[bool],
    memory: int,
) -> tuple[Tensor, ...]:
    """`capture.block_lists` in code that Dynamo traces."""
    ensure_registered()
    sizes = (*shape, *block_size, *unsaid, memory)
    given: dict[str, Any] = {"flexattn": fingerprint(), "sizes": None}
    found: tuple[Tensor, ...] = captured_call(like, like, like, _identity, (sizes, mask_mod), 1.0, given)
    return found


def _identity(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score


def _on_a_copy(score_mod: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mod on a score of its own: Dynamo lets nobody write to the input of a graph."""

    def modify(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score.clone(), b, h, q_idx, kv_idx)

    return modify


def _full(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return b.new_ones((), dtype=torch.bool)


class _CapturedCall(HigherOrderOperator):  # type: ignore[misc,valid-type]
    """A call inside a Dynamo graph: operands, and the mods as graph modules with the values they captured."""

    def __init__(self) -> None:
        super().__init__("flexattn_call", cacheable=True)
        self.attention: Callable[..., Any]
        self.block_lists: Callable[..., Any]

    def __call__(self, *operands: Any) -> Any:
        # Where a graph breaks in a mod, Dynamo runs this call outside, and would compile what we do with its mods.
        return torch.compiler.disable(self._replay)(*operands)

    def _replay(
        self,
        like: Tensor,
        _key: Tensor,
        _value: Tensor,
        score_graph: Callable[..., Tensor],
        blocks: tuple[Any, ...],
        scale: float,
        options: dict[str, Any],
        score_captured: tuple[Any, ...] = (),
        mask_captured: tuple[Any, ...] = (),
    ) -> Any:
        *given, mask_graph = blocks
        score_mod = GraphMod("score_mod", score_graph, score_captured)
        mask_mod = GraphMod("mask_mod", mask_graph, mask_captured)
        if options["sizes"] is None:
            *shape, q_block, kv_block, b_unsaid, h_unsaid, memory = given[0]
            blocks_of, unsaid = (q_block, kv_block), (b_unsaid, h_unsaid)
            return self.block_lists(mask_mod, shape, blocks_of, like, unsaid, memory, fixed=True)
        query, key, value, *lists = given
        modify, mask = score_mod if options["score"] else None, mask_mod if options["mask"] else None
        chosen = options["backend"], options["options"]
        return self.attention(query, key, value, modify, mask, lists, options["sizes"], scale, *chosen)


captured_call = _CapturedCall()


def replays(attention: Callable[..., Any], block_lists: Callable[..., Any]) -> None:
    """Name the functions that a captured call is replayed with."""
    captured_call.attention, captured_call.block_lists = attention, block_lists


@constant_while_compiling
def fingerprint() -> str:
    """A hash of this library's source. PyTorch keeps on disk what it compiled, and does not know what a call becomes."""
    return _fingerprint()


@cache
def _fingerprint() -> str:
    made = hashlib.sha256()
    for package in (__package__, f"{__package__}.codegen"):
        for folder in sys.modules[package].__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                made.update(path.read_bytes())
    return made.hexdigest()[:16]


@constant_while_compiling
def ensure_registered() -> bool:
    """Tell Dynamo how to capture our operator. Run for real while Dynamo traces; leaves nothing in the graph."""
    dynamo = "torch._dynamo.variables.higher_order_ops"
    table = find(f"{dynamo}._hop_name_to_variable_class")
    if captured_call.__name__ not in table:
        table[captured_call.__name__] = explaining(find(f"{dynamo}.FlexAttentionHigherOrderVariable"))
    return True
