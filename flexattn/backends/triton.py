"""The Triton backend: a problem in, kernel calls out, forward and backward.

Nothing of size S x S is allocated: outputs, row statistics, and the transposed block lists are all there is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..codegen.access import Methods
from ..codegen.emit import functions
from ..codegen.jit import Jitted, jitted
from ..codegen.pipeline import Variant
from ..config import KernelConfig, Pass, Pinned, Product, fitted, pinned
from ..kernel_options import options_of
from ..layout import empty_like_strides
from ..problem import Problem
from ..templates.arguments import Lists, Matrix, Shape
from ..templates.backward_delta import attention_delta
from ..templates.backward_dkdv import attention_backward_dkdv
from ..templates.backward_dq import attention_backward_dq
from ..templates.forward import attention_forward
from . import kernel_lists
from .collection import Collection, Tiling, is_deterministic
from .launch import Call, launch, run
from .target import interpreted

tl = triton.language
FARTHEST = 2**31 - 1  # what a 32-bit offset reaches
DELTA = KernelConfig(128, 16, 4, 1)  # of the delta kernel: it has nothing to tune
MARGIN = 512  # no tile has more rows or columns


class Forward(NamedTuple):
    """out [B, Hq, L, Ev] in the query's dtype; lse and max_scores [B, Hq, L], float32."""

    out: Tensor
    lse: Tensor
    max_scores: Tensor


class Backward(NamedTuple):
    """Gradients of query, key, value, and of the captured tensors asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dcaptured: list[Tensor]


def forward(problem: Problem, options: Mapping[str, Any]) -> Forward:
    """Output, lse and row maxima of the modified scores."""
    query, value = problem.query, problem.value
    out = empty_like_strides(query, value.shape[-1])
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    result = Forward(out, lse, torch.empty_like(lse))
    if query.numel():
        launch(forward_call(problem, result, options))
    return result


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    wanted: Sequence[int],
    options: Mapping[str, Any],
) -> Backward:
    """Gradients given the forward's `out` and `lse` and their gradients; `wanted` numbers captured tensors."""
    query, key, value = problem.query, problem.key, problem.value
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=query.device) for t in (query, key, value))
    result = Backward(dq, dk, dv, [])
    collection = Collection(problem, wanted, is_deterministic(options_of(options, forward=False)))
    lse = lse.contiguous()
    if query.numel():
        delta = torch.empty_like(lse)
        run(delta_call(problem, out, dout, dlse, delta), DELTA)
        launch(dq_call(problem, dout, lse, delta, result, collection, options))
    if key.numel():
        if not query.numel():
            result.dk.zero_(), result.dv.zero_()
        else:
            launch(dkdv_call(problem, dout, lse, delta, result, collection, options))
    return result._replace(dcaptured=collection.results())


def forward_call(problem: Problem, result: Forward, options: Mapping[str, Any]) -> Call:
    """The call of the forward kernel that fills `result`."""
    made = _functions(problem)
    matrices = {"q": problem.query, "k": problem.key, "v": problem.value, "out": result.out}
    arguments = {"lse": result.lse, "max_scores": result.max_scores}
    arguments |= {"score_mod": made.score_mod, "mask_mod": made.mask_mod}
    return _call(attention_forward, "forward", problem, matrices, arguments, made, options)


def delta_call(problem: Problem, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> Call:
    """The call that computes rowsum(dout * out) - dlse."""
    B, H, L, DV = out.shape
    width = _padded(DV)
    rows = max(16, min(128, 8192 // width))
    tiles = -(-L // rows)
    arguments = {
        "out": _matrix(out), "dout": _matrix(dout), "delta": delta, "L": L, "heads": H, "tiles": tiles,
        "dlse": None if dlse is None else dlse.to(torch.float32).contiguous(), "HAS_DLSE": dlse is not None,
        "DV": DV, "BLOCK_DV": width, "BLOCK_M": rows, "OFFSET": _offset_type(out, dout),
    }  # fmt: skip
    grid = {"grid": tiles * B * H}
    return Call(attention_delta, "dq", (), "half", width, 0, Pinned(), arguments, lambda _: dict(grid), out.device)


def dq_call(
    problem: Problem, dout: Tensor, lse: Tensor, delta: Tensor, result: Backward, collection: Collection,
    options: Mapping[str, Any],
) -> Call:  # fmt: skip
    """The call of the kernel that fills `result.dq` and what `collection` has for rows and tiles."""
    made = _functions(problem, collection.methods)._replace(column_grads=None)
    matrices = {"q": problem.query, "k": problem.key, "v": problem.value, "dout": dout, "dq": result.dq}
    arguments: dict[str, Any] = {"lse": lse, "delta": delta, "row_sums": collection.rows, "ROWS": len(collection.rows)}
    arguments |= {name: f for name, f in made._asdict().items() if name != "column_grads"}
    call = _call(attention_backward_dq, "dq", problem, matrices, arguments, made, options)

    def parts(programs: int, shaped: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        members = {name: getattr(shaped["shape"], name) for name in ("BLOCK_M", "BLOCK_N", "SPARSE_Q", "SPARSE_KV")}
        sizes = {name: int(getattr(n, "value", n)) for name, n in members.items()}
        lists: Lists | None = shaped["lists"]
        columns = -(-problem.key.shape[2] // sizes["SPARSE_KV"])
        blocks = columns if lists is None else lists.partial_columns + lists.full_columns
        return collection.parts(Tiling(**sizes, tiles=shaped["tiles"], blocks=blocks), programs)

    return call._replace(parts=parts)


def dkdv_call(
    problem: Problem, dout: Tensor, lse: Tensor, delta: Tensor, result: Backward, collection: Collection,
    options: Mapping[str, Any],
) -> Call:  # fmt: skip
    """The call of the kernel that fills `result.dk`, `result.dv` and what `collection` has for columns."""
    made = _functions(problem, collection.methods)._replace(row_grads=None, tile_grads=None)
    matrices = {"q": problem.query, "k": problem.key, "v": problem.value, "dout": dout}
    matrices |= {"dk": result.dk, "dv": result.dv}
    arguments: dict[str, Any] = {"lse": lse, "delta": delta}
    arguments |= {"column_sums": collection.columns, "COLUMNS": len(collection.columns)}
    arguments |= {name: f for name, f in made._asdict().items() if name not in ("row_grads", "tile_grads")}
    arguments["batches"] = problem.query.shape[0] // problem.key.shape[0]
    return _call(attention_backward_dkdv, "dkdv", problem, matrices, arguments, made, options)


def _call(
    kernel: Any, which: Pass, problem: Problem, matrices: dict[str, Tensor], arguments: dict[str, Any], made: Jitted,
    options: Mapping[str, Any],
) -> Call:  # fmt: skip
    """What the three attention kernels have in common."""
    options = options_of(options, forward=which == "forward")
    query, key = problem.query, problem.key
    B, H, L, D = query.shape
    S, DV = key.shape[2], problem.value.shape[-1]
    block_q, block_kv = problem.block_size
    by_key = which == "dkdv"
    listed = bool(problem.block_mask)
    precision = _precision(query)
    arguments = arguments | {name: _matrix(t) for name, t in matrices.items()}
    if not by_key and key.shape[0] == 1:  # keys that all batch entries share
        arguments |= {name: arguments[name]._replace(stride_b=0) for name in ("k", "v")}
    arguments["captured"] = captured_arguments(
        problem.variant, problem.tensors, problem.floats, problem.ints, query.device
    )
    arguments |= {"L": L, "S": S, "heads": H, "group_size": H // key.shape[1], "scale": problem.scale}
    constants: dict[str, Any] = {
        "D": D,
        "DV": DV,
        "BLOCK_D": _padded(D),
        "BLOCK_DV": _padded(DV),
        "LISTED": listed,
        "CONTIGUOUS": _is_contiguous(problem, by_key, options),
        "SCALE_IN_FACTOR": made.score_mod is None and problem.scale > 0,
        "PRECISION": precision,
        "OFFSET": _offset_type(*matrices.values()),
    }

    def shaped(config: KernelConfig) -> dict[str, Any]:
        if listed:
            BLOCK_M, BLOCK_N = fitted(config.BLOCK_M, block_q), fitted(config.BLOCK_N, block_kv)
            SPARSE_Q, SPARSE_KV = _sparse(block_q, L, BLOCK_M), _sparse(block_kv, S, BLOCK_N)
        else:
            BLOCK_M, BLOCK_N = SPARSE_Q, SPARSE_KV = config.BLOCK_M, config.BLOCK_N
        if by_key:
            tiles, outer = _tiles(S, SPARSE_KV, BLOCK_N), key.shape[0] * key.shape[1]
        else:
            tiles, outer = _tiles(L, SPARSE_Q, BLOCK_M), B * H
        lists: Lists | None = None
        if listed and by_key:
            lists = kernel_lists.by_key(problem.block_mask, -(-S // block_kv))
        elif listed:
            lists = kernel_lists.by_query(problem.block_mask, SPARSE_KV, S)
        sizes = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "SPARSE_Q": SPARSE_Q, "SPARSE_KV": SPARSE_KV}
        return {"shape": _shape(**constants, **sizes), "lists": lists, "tiles": tiles, "grid": tiles * outer}

    # Equal generated functions are the same objects, and live as long as the process.
    key_of_choice = (which, *map(id, made), query.dtype, D, DV, problem.block_size if listed else None, precision)
    widths = (_padded(D), _padded(DV))
    return Call(
        kernel=kernel,
        which=which,
        key=key_of_choice,
        product=_product(query, precision),
        head_dim=max(widths),
        row_bytes=sum(widths) * query.element_size(),
        pinned=pinned(which, options),
        arguments=arguments,
        shaped=shaped,
        device=query.device,
        compiler_options=_amd_options(options) if torch.version.hip else {},
    )


def _functions(problem: Problem, methods: Methods = ()) -> Jitted:
    wide = tuple(i for i, t in enumerate(problem.tensors) if max(_reach(t), t.numel()) > FARTHEST)
    return _functions_of(problem.variant, methods, wide)


@lru_cache(maxsize=4096)
def _shape(**values: Any) -> Any:
    """The same object for the same values, which is how a launch finds its kernel fast."""
    if interpreted():  # where the members of a tuple are taken for run-time values
        return SimpleNamespace(**values)
    return Shape(**{name: tl.constexpr(value) for name, value in values.items()})


@lru_cache(maxsize=1024)
def _functions_of(variant: Variant, methods: Methods, wide: tuple[int, ...]) -> Jitted:
    return jitted(functions(variant, methods, wide))


def captured_arguments(
    variant: Variant, tensors: Sequence[Tensor], floats: Sequence[Any], ints: Sequence[int], device: torch.device
) -> tuple[Any, ...]:
    """The flat tuple that generated functions unpack: see `codegen.emit.captured_positions`."""
    flat: list[Any] = []
    for t in tensors:
        t = _with_elements(t.to(device))  # a 0-d tensor may be anywhere, as in torch
        flat += [t, *t.shape, *t.stride()]
    numbers = (_bits(f) if i in variant.doubles else float(f) for i, f in enumerate(floats))
    return (*flat, *numbers, *ints)


def _bits(number: Any) -> int:
    """A float64 as an integer: Triton would take a Python float as float32."""
    (bits,) = struct.unpack("<q", struct.pack("<d", float(number)))
    return int(bits)


def _with_elements(t: Tensor) -> Tensor:
    """A tensor that can be read from: an empty one reads as zero, as every value that does not exist."""
    return t if t.numel() else t.new_zeros((1,) * t.dim())


def _matrix(t: Tensor) -> Matrix:
    return Matrix(t, *t.stride())


def _padded(columns: int) -> int:
    """The width of a tile: a power of two that the matrix units take."""
    return max(16, 1 << (columns - 1).bit_length())


def _sparse(block: int, length: int, tile: int) -> int:
    """The size of a block, no larger than the whole axis needs if it is a single block."""
    return min(block, max(tile, 1 << (length - 1).bit_length())) if block >= length > 0 else block


def _tiles(length: int, block: int, tile: int) -> int:
    """Tiles of an axis whose blocks are covered one by one, without those that lie beyond its end."""
    whole = (length - 1) // block if length else 0
    return whole * -(-block // tile) + -(-(length - whole * block) // tile)


def _reach(t: Tensor) -> int:
    """The largest offset of an element, in elements."""
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)


def _offset_type(*matrices: Tensor) -> Any:
    """32 or 64 bits, by the offsets inside a tile."""
    reach = max(MARGIN * t.stride(2) + MARGIN * t.stride(3) for t in matrices)
    return tl.int64 if reach > FARTHEST else tl.int32


def _precision(query: Tensor) -> str:
    """How products are computed, as `templates.product` names it. For float32, torch's own setting."""
    if interpreted() and query.dtype is torch.bfloat16:
        return "raised"
    if query.dtype is not torch.float32 or interpreted() or torch.version.hip is not None:
        return "ieee"
    if query.device.type == "cpu" and triton.runtime.driver.active.get_current_target().backend == "hip":
        return "ieee"  # only compiled, for a GPU that is named
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"


def _product(query: Tensor, precision: str) -> Product:
    """The row of the table of configurations."""
    if query.dtype is not torch.float32:
        return "half"
    return "tf32" if precision == "tf32" else "ieee"


def _amd_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("kpack", "matrix_instr_nonkdim", "waves_per_eu") if name in options}


def _is_contiguous(problem: Problem, by_key: bool, options: Mapping[str, Any]) -> bool:
    """Whether adjacent blocks can be walked without reading their numbers: if the caller says so and it is true."""
    if not problem.block_mask or not options.get("BLOCKS_ARE_CONTIGUOUS"):
        return False
    return kernel_lists.contiguous(problem.block_mask, -(-problem.key.shape[2] // problem.block_size[1]), by_key)
