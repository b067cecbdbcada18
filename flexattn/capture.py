"""Where mods meet the operators: they are traced here, in eager code and whenever a compiled graph is run or traced again.

Inside `torch.compile` Dynamo captures the mods first, see `dynamo`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import dynamo, islands, ops, reference, sharded, transforms, validate
from .autocast import without_autocast
from .backends.invariant import is_invariant
from .checks import check
from .codegen.errors import ReachError
from .codegen.pipeline import Variant, variant
from .codegen.places import place_of
from .codegen.private import transforms_are_active
from .codegen.reach import check_reach
from .codegen.tiles import DEFAULT_MEMORY
from .codegen.trace import describe
from .codegen.trace_cache import cached_trace
from .debug import debugging
from .element import Origin
from .errors import KernelError
from .kernel_options import parsed_options
from .names import captured_names
from .operands import joined, split
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
        return dynamo.attention(
            query, key, value, score_mod, mask_mod, block_mask, block_size, scale, backend, options, score_dtype(query)
        )
    if isinstance(scale, torch.SymFloat):  # operators take no symbolic floats, but programs do
        score_mod, scale = _scaled(score_mod, scale), 1.0
    program, inside, ints = cached_trace(score_mod, mask_mod, score_dtype=score_dtype(query), device=query.device)
    captured, floats = split(inside, program)
    validate.captured(captured, query.device)
    if backend != "reference":
        validate.no_forward_mode((query, key, value, *captured))
    part, own = None, captured
    if sharded.involved(query, key, value, *captured):
        part = sharded.split(sharded.Operands(query, key, value, captured, block_mask, ints, program), block_size)
        query, key, value, captured, block_mask, ints, program = part.operands
    if debugging() or backend == "reference":
        parsed = variant(program)
        operands = joined(captured, floats, parsed), block_mask, ints, block_size, parsed, scale
        problem = Problem(query, key, value, *operands)
        if debugging():
            check(problem, Origin(score_mod, mask_mod, own))
        if backend == "reference":
            with without_autocast(query.device):
                dense = (islands if is_invariant(parsed_options(options)) else reference).solve(problem)
            return dense if part is None else part.join(dense)
    attend = transforms.attention if transforms_are_active() else ops.attention
    try:
        result: tuple[Tensor, Tensor, Tensor] = attend(
            query, key, value, captured, block_mask, ints, floats, block_size, program, scale, backend, options
        )
    except KernelError as error:
        raise _placed(error, score_mod, mask_mod, variant(program)) from error.__cause__
    return result if part is None else part.join(result)


def score_dtype(query: Tensor) -> torch.dtype:
    """The dtype that scores have for a query."""
    return torch.float64 if query.dtype is torch.float64 else torch.float32


def _scaled(score_mod: Callable[..., Tensor] | None, scale: torch.SymFloat) -> Callable[..., Tensor]:
    def modify(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        score = score * scale  # type: ignore[operator]
        return score if score_mod is None else score_mod(score, b, h, q_idx, kv_idx)

    return modify


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
    shape: Sequence[int],
    block_size: Sequence[int],
    like: Tensor,
    unsaid: Sequence[bool] = (False, False),
    memory: int = DEFAULT_MEMORY,
    fixed: bool = False,
) -> tuple[Tensor, ...]:
    """Block lists of a mask of `shape` (B, H, Q_LEN, KV_LEN), on the device of `like`, and a flag: see `ops.block_mask`.

    B and H of the lists are 1 where the mask does not depend on them. `unsaid`: whether the caller left B, and H, to be
    1; the mask may then not depend on them. Lists are trimmed in eager code, where shapes may follow data, unless `fixed`.
    """
    if torch.compiler.is_dynamo_compiling():
        return dynamo.block_lists(mask_mod, shape, block_size, like, unsaid, memory)
    if torch.is_inference_mode_enabled():  # a mask that is first used to validate may be used to train
        with torch.inference_mode(False):
            return block_lists(mask_mod, shape, block_size, like, unsaid, memory, fixed)
    program, inside, ints = cached_trace(None, mask_mod, device=like.device)
    captured, floats = split(inside, program)
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
    whole = sharded.whole(captured)
    trim = not fixed and type(like) is Tensor and not like.is_meta and not transforms_are_active()
    try:
        return ops.block_mask(whole, ints, floats, program, (*kept, *shape[2:]), block_size, like, memory, trim)
    except ReachError as error:
        raise _named(error, mask_mod, captured) from None


def check_mask_reach(mask_mod: Callable[..., Tensor], shape: Sequence[int], device: torch.device) -> None:
    """Raise `ReachError` where a mask of `shape` (B, H, Q_LEN, KV_LEN) reads beyond a tensor."""
    program, captured, ints = cached_trace(None, mask_mod, device=device)
    mask = variant(program).mask
    if mask is None or 0 in shape:
        return
    try:
        check_reach(mask, captured, ints, dict(zip(("b", "h", "q_idx", "kv_idx"), shape, strict=True)))
    except ReachError as error:
        raise _named(error, mask_mod, captured) from None


def _named(error: ReachError, mask_mod: Callable[..., Tensor], captured: Sequence[Tensor]) -> ReachError:
    return error.named(captured_names((mask_mod,), captured).get(error.number))


dynamo.replays(attention, block_lists)
