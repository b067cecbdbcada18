"""Where mods meet the operators: in eager code they are traced here, in compiled code Dynamo captures them for us.

Under `torch.compile` a higher-order operator stands for the call; Dynamo traces the mods as its sub-graphs with their
free variables lifted, wherever they were defined. The operator has no kernel of its own: whenever the Dynamo graph is
run or traced again, it replays the sub-graphs into the recorder and calls the same operators as eager code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference, sharded, transforms, validate
from .autocast import without_autocast
from .codegen.pipeline import Variant, variant
from .codegen.places import place_of
from .codegen.private import HigherOrderOperator, find, transforms_are_active
from .codegen.tiles import DEFAULT_MEMORY
from .codegen.trace import describe
from .codegen.trace_cache import cached_trace
from .debug import check_indices, debugging
from .errors import KernelError
from .graph_mod import GraphMod, explaining
from .problem import Problem


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and max_scores of an attention call whose arguments have been validated."""
    if torch.compiler.is_dynamo_compiling():
        ensure_registered()
        # Dynamo makes the score that a mod gets from the first operand: its dtype, and no gradient, so that mods may write.
        like = torch.empty((), dtype=_score_dtype(query), device=query.device)
        blocks = (query, key, value, *block_mask, _full if mask_mod is None else mask_mod)
        given = {"score": score_mod is not None, "mask": mask_mod is not None, "backend": backend, "options": options}
        if sharded.involved(query, key, value):
            # Part of the graph, so that no other rank takes what was compiled for this one from a cache.
            given["sharded"] = sharded.coordinates(query, key, value)
        # `or` would ask whether a function is true, which PyTorch 2.11 cannot trace.
        modify = _identity if score_mod is None else _on_a_copy(score_mod)
        return captured_call(like, like, like, modify, blocks, scale, {**given, "sizes": block_size})
    return _attention(query, key, value, score_mod, mask_mod, block_mask, block_size, scale, backend, options)


def _attention(
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
) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(scale, torch.SymFloat):  # operators take no symbolic floats, but programs do
        score_mod, scale = _scaled(score_mod, scale), 1.0
    program, captured, ints = cached_trace(score_mod, mask_mod, score_dtype=_score_dtype(query), device=query.device)
    validate.captured(captured, query.device)
    if backend != "reference":
        validate.no_forward_mode((query, key, value, *captured))
    split = None
    if sharded.involved(query, key, value, *captured):
        split = sharded.split(sharded.Operands(query, key, value, captured, block_mask, ints, program), block_size)
        query, key, value, captured, block_mask, ints, program = split.operands
    if debugging() or backend == "reference":
        problem = Problem(query, key, value, captured, block_mask, ints, block_size, variant(program), scale)
        if debugging():
            check_indices(problem)
        if backend == "reference":
            with without_autocast(query.device):
                dense = reference.solve(problem)
            return dense if split is None else split.join(dense)
    attend = transforms.attention if transforms_are_active() else ops.attention
    try:
        result: tuple[Tensor, Tensor, Tensor] = attend(
            query, key, value, captured, block_mask, ints, block_size, program, scale, backend, options
        )
    except KernelError as error:
        raise _placed(error, score_mod, mask_mod, variant(program)) from error.__cause__
    return result if split is None else split.join(result)


def _score_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype is torch.float64 else torch.float32


def _placed(
    error: KernelError, score_mod: Callable[..., Tensor] | None, mask_mod: Callable[..., Tensor] | None, parsed: Variant
) -> KernelError:
    """A kernel's error with the user's file and line."""
    mod = mask_mod if error.role == "mask_mod" else score_mod
    if mod is None:
        return error
    place = None if error.node is None else place_of(mod, error.role, parsed.score_dtype, error.node)
    if place is None:
        return error.at(f"{error.role} {describe(mod)}", "")
    return error.at(f"{error.role} at {place.where}", place.source)


def block_lists(
    mask_mod: Callable[..., Tensor],
    shape: tuple[int, int, int, int],
    block_size: tuple[int, int],
    like: Tensor,
    unsaid: tuple[bool, bool] = (False, False),
    memory: int = DEFAULT_MEMORY,
) -> tuple[Tensor, ...]:
    """Block lists of a mask of `shape` (B, H, Q_LEN, KV_LEN), on the device of `like`, and a flag: see `ops.block_mask`.

    B and H of the lists are 1 where the mask does not depend on them. `unsaid`: whether the caller left B, and H, to be
    1; the mask may then not depend on them. Lists are trimmed in eager code, where shapes may follow data, if there is data.
    """
    if torch.compiler.is_dynamo_compiling():
        ensure_registered()
        given = (*shape, *block_size, *unsaid, memory)
        lists: tuple[Tensor, ...] = captured_call(like, like, like, _identity, (given, mask_mod), 1.0, {"sizes": None})
        return lists
    trim = type(like) is Tensor and not like.is_meta and not transforms_are_active()
    return _block_lists(mask_mod, shape, block_size, like, unsaid, memory, trim)


def _block_lists(
    mask_mod: Callable[..., Tensor],
    shape: Sequence[int],
    block_size: Sequence[int],
    like: Tensor,
    unsaid: Sequence[bool],
    memory: int,
    trim: bool,
) -> tuple[Tensor, ...]:
    program, captured, ints = cached_trace(None, mask_mod, device=like.device)
    validate.captured(captured, like.device)
    mask = variant(program).mask
    axes = frozenset() if mask is None else mask.axes
    for axis, size, left_out in zip("bh", "BH", unsaid, strict=True):
        if left_out and axis in axes:
            raise ValueError(
                f"the mask depends on {axis}, but {size} is None, which means that it is the same for all. "
                f"Pass the number of {'batch entries' if axis == 'b' else 'query heads'} as {size}"
            )
    kept = [n if axis in axes else 1 for axis, n in zip("bh", shape, strict=False)]
    captured = sharded.whole(captured)
    return ops.block_mask(captured, ints, program, (*kept, *shape[2:]), block_size, like, memory, trim)


def _identity(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score


def _on_a_copy(score_mod: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mod on a score of its own: Dynamo lets nobody write to the input of a graph."""

    def modify(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score.clone(), b, h, q_idx, kv_idx)

    return modify


def _scaled(score_mod: Callable[..., Tensor] | None, scale: torch.SymFloat) -> Callable[..., Tensor]:
    def modify(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = score * scale  # type: ignore[operator]
        return score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)

    return modify


def _full(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return b.new_ones((), dtype=torch.bool)


class _CapturedCall(HigherOrderOperator):  # type: ignore[misc,valid-type]
    """A call inside a Dynamo graph: operands, and the mods as graph modules with the values they captured."""

    def __init__(self) -> None:
        super().__init__("flexattn_call", cacheable=True)

    def __call__(
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
            unsaid = b_unsaid, h_unsaid
            return _block_lists(mask_mod, shape, (q_block, kv_block), like, unsaid, memory, trim=False)
        query, key, value, *lists = given
        return _attention(
            query,
            key,
            value,
            score_mod if options["score"] else None,
            mask_mod if options["mask"] else None,
            lists,
            options["sizes"],
            scale,
            options["backend"],
            options["options"],
        )


captured_call = _CapturedCall()


@torch.compiler.assume_constant_result
def ensure_registered() -> bool:
    """Tell Dynamo how to capture our operator. Run for real while Dynamo traces; leaves nothing in the graph."""
    dynamo = "torch._dynamo.variables.higher_order_ops"
    table = find(f"{dynamo}._hop_name_to_variable_class")
    if captured_call.__name__ not in table:
        table[captured_call.__name__] = explaining(find(f"{dynamo}.FlexAttentionHigherOrderVariable"))
    return True
