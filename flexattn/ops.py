"""The registered torch operators: everything a call needs is an operand, so graphs, archives and caches can hold them.

    flexattn::forward     attention and its row statistics
    flexattn::backward    gradients of query, key, value and of captured tensors
    flexattn::block_mask  block lists of a mask

The autograd kernel is registered by hand: `torch.library.register_autograd` adds Python work to every eager call.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast
from .backends import tiled, tiled_backward
from .backends.invariant import is_invariant
from .codegen.evaluate import TORCH_DTYPE
from .codegen.pipeline import variant
from .codegen.private import AFTER_AUTOGRAD, AutoDispatchBelowAutograd, is_legacy_batched, watched
from .codegen.reach import check_reach
from .codegen.tiles import DEFAULT_MEMORY, classify
from .kernel_options import parsed_options
from .layout import empty_like_strides
from .operands import joined
from .problem import Problem

_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, {}Tensor[] captured, Tensor[] block_mask, SymInt[] ints, float[] floats, "
    "SymInt[] block_size, str program, float scale, str backend, str options"
)
LIBRARY = torch.library.Library("flexattn", "DEF")
LIBRARY.define(f"forward({_OPERANDS.format('')}) -> (Tensor out, Tensor lse, Tensor max_scores)")
LIBRARY.define(
    f"backward({_OPERANDS.format('Tensor out, Tensor lse, Tensor dout, Tensor? dlse, ')}, int[] wanted)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dcaptured)"
)
LIBRARY.define(
    "block_mask(Tensor[] captured, SymInt[] ints, float[] floats, str program, SymInt[] shape, SymInt[] block_size, "
    "int memory, bool trim, Tensor like) -> (Tensor kv_num_blocks, Tensor kv_indices, "
    "Tensor full_kv_num_blocks, Tensor full_kv_indices, Tensor contiguous)",
    tags=(torch.Tag.cudagraph_unsafe,),  # how wide lists are, the device is asked
)


@cache
def triton_backend() -> Any:
    """`backends.triton`, imported when it is first used: Triton exists on Linux only and takes a while to import."""
    return importlib.import_module(f"{__package__}.backends.triton")


@cache
def plans() -> Any:
    """`backends.plans`, the same."""
    return importlib.import_module(f"{__package__}.backends.plans")


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    block_mask: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    block_size: Sequence[int],
    program: str,
    scale: float,
) -> Problem:
    blocks, parsed = (block_size[0], block_size[1]), variant(program)
    inside = joined(captured, floats, parsed)
    return Problem(query, key, value, inside, block_mask, ints, blocks, parsed, scale)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    block_mask: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    block_size: Sequence[int],
    program: str,
    scale: float,
    backend: str,
    options: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # AOTInductor packages give None for an empty list.
    captured, block_mask, ints, floats = captured or (), block_mask or (), ints or (), floats or ()
    if backend == "triton":
        n = len(captured)

        def solve(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            query, key, value, *rest = tensors
            numbers = (ints, floats, block_size, program, scale)
            made: Sequence[Tensor] = triton_backend().forward(
                _problem(query, key, value, rest[:n], rest[n:], *numbers), parsed_options(options)
            )
            return made

        tensors = (query, key, value, *captured, *block_mask)
        out, lse, max_scores = plans().planned(
            tensors, ("forward", n, program, *block_size, options), (scale, *floats, *ints), solve
        )
        return out, lse, max_scores
    problem = _problem(query, key, value, captured, block_mask, ints, floats, block_size, program, scale)
    with without_autocast(query.device):
        return tiled.forward(problem, is_invariant(parsed_options(options)))


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    captured: Sequence[Tensor],
    block_mask: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    block_size: Sequence[int],
    program: str,
    scale: float,
    backend: str,
    options: str,
    wanted: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    # AOTInductor packages give None for an empty list.
    captured, block_mask, ints, floats = captured or (), block_mask or (), ints or (), floats or ()
    if backend == "triton":
        n, given = len(captured), (out, lse, dout) if dlse is None else (out, lse, dout, dlse)

        def solve(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            query, key, value, out, lse, dout, *rest = tensors
            dlse = None if len(given) == 3 else rest.pop(0)
            numbers = (ints, floats, block_size, program, scale)
            problem = _problem(query, key, value, rest[:n], rest[n:], *numbers)
            made = triton_backend().backward(problem, out, lse, dout, dlse, wanted, parsed_options(options))
            return *made[:3], *made.dcaptured

        tensors = (query, key, value, *given, *captured, *block_mask)
        kind = ("backward", n, len(given), *wanted, program, *block_size, options)
        dq, dk, dv, *dcaptured = plans().planned(tensors, kind, (scale, *floats, *ints), solve)
        return dq, dk, dv, dcaptured
    problem = _problem(query, key, value, captured, block_mask, ints, floats, block_size, program, scale)
    with without_autocast(query.device):
        apart = is_invariant(parsed_options(options))
        dq, dk, dv, dcaptured = tiled_backward.backward(problem, out, lse, dout, dlse, wanted, apart)
    return dq, dk, dv, dcaptured


def _block_mask(
    captured: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    program: str,
    shape: Sequence[int],
    block_size: Sequence[int],
    memory: int,
    trim: bool,
    like: Tensor,
) -> tuple[Tensor, ...]:
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a block mask cannot be built inside a CUDA graph; build it before the graph is captured")
    B, H, Q, KV = shape
    parsed, size = variant(program), (block_size[0], block_size[1])
    inside, ints = joined(captured, floats, parsed), ints or ()
    if parsed.mask is not None and B * H * Q * KV:
        check_reach(parsed.mask, inside, ints, {"b": B, "h": H, "q_idx": Q, "kv_idx": KV})
    found = classify(parsed, inside, ints, (B, H, Q, KV), size, like.device, memory, trim)
    lists = (t.expand(B, H, *t.shape[2:]).contiguous() for t in found[:4])
    return *lists, torch.full((), found.contiguous)


for _name, _kernel in (("forward", _forward), ("backward", _backward), ("block_mask", _block_mask)):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("flexattn::forward", lib=LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = TORCH_DTYPE[variant(rest[5]).score_dtype]
    lse = query.new_empty(query.shape[:-1], dtype=dtype)
    return empty_like_strides(query, value.shape[-1]), lse, torch.empty_like(lse)


@torch.library.register_fake("flexattn::backward", lib=LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    captured, wanted = rest[4], rest[-1]

    def dense(t: Tensor) -> Tensor:
        return t.new_empty(t.shape)

    return dense(query), dense(key), dense(value), [dense(captured[i]) for i in wanted]


@torch.library.register_fake("flexattn::block_mask", lib=LIBRARY)
def _(
    captured: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    program: str,
    shape: Sequence[int],
    block_size: Sequence[int],
    memory: int,
    trim: bool,
    like: Tensor,
) -> tuple[Tensor, ...]:
    B, H, Q, KV = shape
    rows, columns = (Q + block_size[0] - 1) // block_size[0], (KV + block_size[1] - 1) // block_size[1]
    # How long the longest row is, data tells.
    widths = [torch.library.get_ctx().new_dynamic_size() if trim else columns for _ in range(2)]
    count = like.new_empty((B, H, rows), dtype=torch.int32)
    index, full_index = (like.new_empty((B, H, rows, width), dtype=torch.int32) for width in widths)
    return count, index, torch.empty_like(count), full_index, torch.empty((), dtype=torch.bool)


FORWARD = torch.ops.flexattn.forward.default
BACKWARD = torch.ops.flexattn.backward.default


def block_mask(
    captured: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    program: str,
    shape: Sequence[int],
    block_size: Sequence[int],
    like: Tensor,
    memory: int = DEFAULT_MEMORY,
    trim: bool = False,
) -> tuple[Tensor, ...]:
    """Lists of the partial and full blocks of a mask of `shape` (B, H, Q_LEN, KV_LEN): counts [B, H, rows] and indices
    [B, H, rows, columns], int32, and whether kernels may count blocks instead of reading the lists: a bool on the CPU.

    The lists are on the device of `like`. In a row the listed blocks come first, in ascending order. `trim` makes the
    indices as narrow as the longest row allows; their width is then known only when the operator has run.
    """
    made: tuple[Tensor, ...] = torch.ops.flexattn.block_mask(
        captured, ints, floats, program, shape, block_size, memory, trim, like
    )
    return made


class _Attention(torch.autograd.Function):
    """Joins `flexattn::forward` to `flexattn::backward`."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, n_captured: int, options: tuple[Any, ...], *tensors: Tensor) -> Any:
        q, k, v, *rest = tensors
        out, lse, max_scores = _below_autograd(keyset, q, k, v, rest[:n_captured], rest[n_captured:], *options)
        ctx.options, ctx.n_captured = options, n_captured
        ctx.mark_non_differentiable(max_scores)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *rest)
        return out, lse, max_scores

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> Any:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        n = ctx.n_captured
        if dout is None:
            dout = torch.zeros_like(out)
        traced = torch.compiler.is_compiling()  # by compiled autograd, which the questions below would stop
        if not traced and (is_legacy_batched(dout) or (dlse is not None and is_legacy_batched(dlse))):
            raise NotImplementedError(
                "flex_attention has no gradients of many outputs at once (is_grads_batched, vectorize=True). Use "
                "torch.func.jacrev, or torch.func.vmap over torch.func.vjp"
            )
        wanted = [i for i in range(n) if ctx.needs_input_grad[6 + i]]
        if torch.is_grad_enabled():  # create_graph=True
            dq, dk, dv, *found = _Gradient.apply(n, ctx.options, wanted, q, k, v, out, lse, dout, dlse, *rest)  # type: ignore[no-untyped-call]
        elif not traced and _unseen(q, k, v, out, lse, dout, *rest) and (dlse is None or type(dlse) is Tensor):
            with AutoDispatchBelowAutograd():
                operands = (q, k, v, out, lse, dout, dlse, rest[:n], rest[n:], *ctx.options, wanted)
                dq, dk, dv, found = _backward(*operands)
        else:
            dq, dk, dv, found = BACKWARD(q, k, v, out, lse, dout, dlse, rest[:n], rest[n:], *ctx.options, wanted)
        captured: list[Tensor | None] = [None] * len(rest)
        for i, grad in zip(wanted, found, strict=True):
            captured[i] = grad
        return None, None, None, dq, dk, dv, *captured


class _Gradient(torch.autograd.Function):
    """The gradient as a function of its own that refuses to be differentiated: without it the result would be wrong."""

    @staticmethod
    def forward(ctx: Any, n_captured: int, options: tuple[Any, ...], wanted: list[int], *tensors: Any) -> Any:
        *operands, dlse = tensors[:7]
        rest = tensors[7:]
        dq, dk, dv, found = BACKWARD(*operands, dlse, rest[:n_captured], rest[n_captured:], *options, wanted)
        return dq, dk, dv, *found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(NO_SECOND_DERIVATIVE)


NO_SECOND_DERIVATIVE = (
    "flex_attention has no second derivative. Call backward or grad without create_graph=True, or detach the first "
    "gradient (of torch.func.grad: its arguments); or use backend='reference', which is dense and has every derivative"
)


def _below_autograd(keyset: Any, *operands: Any) -> Any:
    """The forward without its gradient. No `keyset`: the kernel itself."""
    if keyset is None and operands[10] == "triton":  # which has few torch operations that autograd could be kept from
        return _forward(*operands)
    with AutoDispatchBelowAutograd():
        if keyset is None:
            return _forward(*operands)
        return FORWARD.redispatch(keyset & AFTER_AUTOGRAD, *operands)


def _autograd(
    keyset: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    block_mask: Sequence[Tensor],
    *options: Any,
) -> Any:
    captured, block_mask = captured or (), block_mask or ()  # None for an empty list, from an AOTInductor package
    options = options[0] or (), options[1] or (), *options[2:]
    if keyset is not None and _unseen(query, key, value, *captured, *block_mask):
        keyset = None
    if torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, (query, key, value, *captured))):
        return _Attention.apply(keyset, len(captured), options, query, key, value, *captured, *block_mask)  # type: ignore[no-untyped-call]
    return _below_autograd(keyset, query, key, value, captured, block_mask, *options)


def _unseen(*tensors: Tensor) -> bool:
    """Whether a call can go to its kernel without the dispatcher: plain tensors, which nobody watches."""
    return _PLAIN.issuperset(map(type, tensors)) and not tensors[0].is_meta and not watched()


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_REQUIRES_GRAD = attrgetter("requires_grad")

LIBRARY.impl("forward", _autograd, "Autograd", with_keyset=True)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    block_mask: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    block_size: Sequence[int],
    program: str,
    scale: float,
    backend: str,
    options: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flexattn::forward`, in eager code at a third of the dispatcher's cost."""
    made: tuple[Tensor, Tensor, Tensor]
    rest = (ints, floats, block_size, program, scale, backend, options)
    if not _unseen(query, key, value, *captured, *block_mask):
        made = FORWARD(query, key, value, list(captured), list(block_mask), list(ints), *rest[1:])
    elif torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, (query, key, value, *captured))):
        made = _Attention.apply(None, len(captured), rest, query, key, value, *captured, *block_mask)  # type: ignore[no-untyped-call]
    else:
        made = _below_autograd(None, query, key, value, captured, block_mask, *rest)
    return made
