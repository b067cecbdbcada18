"""The Triton backend: a problem in, kernel calls out, forward and backward.

Nothing of size S x S is allocated: outputs, row statistics, and the transposed block lists are all there is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..codegen.access import Methods
from ..codegen.distances import NEAR
from ..codegen.emit import functions
from ..codegen.jit import Jitted, jitted
from ..codegen.pipeline import Variant
from ..config import BY_KEY, KernelConfig, Pass, Pinned, covered, fitted, pinned
from ..kernel_options import options_of, options_text
from ..layout import empty_like_strides, in_order_of
from ..problem import Problem
from ..templates.arguments import Lists, Matrix, Order, Shape
from ..templates.backward_delta import attention_delta
from ..templates.backward_dkdv import attention_backward_dkdv
from ..templates.backward_dq import attention_backward_dq
from ..templates.forward import attention_forward
from . import autotune, hopper, kernel_lists, pins, work_order
from .collection import Collection, Tiling, is_deterministic
from .descriptors import LARGEST_BOX, TMA, describable, sum_descriptor, tile_descriptor
from .invariant import by_one_form, canonical, canonical_problem, is_invariant
from .launch import Call, launch, run
from .one_pass import ALONE, Backward, Sums, in_one_pass_or_two
from .products import padded, pieces, precision_of, product_of
from .target import interpreted
from .tuning import tuning

tl = triton.language
FARTHEST = 2**31 - 1  # what a 32-bit offset reaches
DELTA = KernelConfig(128, 16, 4, 1)  # of the delta kernel: it has nothing to tune
MARGIN = 512  # no tile has more rows or columns


class Forward(NamedTuple):
    """out [B, Hq, L, Ev] in the query's dtype; lse and max_scores [B, Hq, L], float32."""

    out: Tensor
    lse: Tensor
    max_scores: Tensor


def forward(problem: Problem, options: Mapping[str, Any]) -> Forward:
    """Output, lse and row maxima of the modified scores."""
    given = problem.query
    if is_invariant(options):
        problem = canonical_problem(problem)
    query, value = problem.query, problem.value
    out = empty_like_strides(query, value.shape[-1])
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    result = Forward(out, lse, torch.empty_like(lse))
    if query.numel():
        launch(hopper.chosen(forward_call(problem, result, options), problem, options))
    return result if query is given else result._replace(out=in_order_of(given, out))


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
    said = options_of(options, forward=False)
    apart = is_invariant(said)
    if apart:
        problem, out, dout = canonical_problem(problem), canonical(out), canonical(dout)
    if said.get("USE_TMA") and not describable(dout):
        dout = canonical(dout)
    query, key, value = problem.query, problem.key, problem.value
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=query.device) for t in (query, key, value))
    result = Backward(dq, dk, dv, [])
    collection = Collection(problem, wanted, is_deterministic(said), invariant=apart)
    if not query.numel() or not key.numel():
        result.dq.zero_(), result.dk.zero_(), result.dv.zero_()
        return result._replace(dcaptured=collection.results())
    lse = lse.contiguous()
    delta = torch.empty_like(lse)

    def way(in_one_pass: bool) -> list[autotune.Step]:
        sums = Sums.of(problem, in_one_pass, said)
        steps: list[autotune.Step] = [partial(run, delta_call(problem, out, dout, dlse, delta, sums.dq), DELTA)]
        if not in_one_pass:
            steps.append(dq_call(problem, dout, lse, delta, result, collection, options))
        steps.append(dkdv_call(problem, dout, lse, delta, result, collection, options, sums))
        return [*steps, partial(sums.finish, result, problem.scale)]

    ways = [way(in_one_pass) for in_one_pass in in_one_pass_or_two(problem, collection.methods, options)]
    for step in ways[autotune.fastest(ways)]:
        launch(step) if isinstance(step, Call) else step()
    return result._replace(dcaptured=collection.results())


def forward_call(problem: Problem, result: Forward, options: Mapping[str, Any]) -> Call:
    """The call of the forward kernel that fills `result`."""
    made = _functions(problem, options_of(options, forward=True))
    matrices = {"q": problem.query, "k": problem.key, "v": problem.value, "out": result.out}
    arguments = {"lse": result.lse, "max_scores": result.max_scores}
    arguments |= {"score_mod": made.score_mod, "mask_mod": made.mask_mod}
    call = _call(attention_forward, "forward", problem, matrices, arguments, made, options)
    return call._replace(outputs=lambda: result)


def delta_call(
    problem: Problem, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor, dq_sum: Tensor | None = None
) -> Call:
    """The call that computes rowsum(dout * out) - dlse, and sets `dq_sum` to zero."""
    B, H, L, DV = out.shape
    width = padded(DV)
    rows = max(16, min(128, 8192 // width))
    covered, columns = (L, 1) if dq_sum is None else dq_sum.shape[2:]
    tiles = -(-covered // rows)
    arguments = {
        "out": _matrix(out), "dout": _matrix(dout), "delta": delta, "L": L, "heads": H, "tiles": tiles,
        "dq_sum": dq_sum, "rows": covered, "D": columns, "BLOCK_D": padded(columns),
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
    made = _functions(problem, options_of(options, forward=False), collection.methods)._replace(column_grads=None)
    matrices = {"q": problem.query, "k": problem.key, "v": problem.value, "dout": dout, "dq": result.dq}
    arguments: dict[str, Any] = {"lse": lse, "delta": delta, "row_sums": collection.rows, "ROWS": len(collection.rows)}
    arguments |= {name: f for name, f in made._asdict().items() if name != "column_grads"}
    arguments["methods"] = collection.methods
    call = _call(attention_backward_dq, "dq", problem, matrices, arguments, made, options)

    def parts(programs: int, shaped: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        members = {name: getattr(shaped["shape"], name) for name in ("BLOCK_M", "BLOCK_N", "SPARSE_Q", "SPARSE_KV")}
        sizes = {name: int(getattr(n, "value", n)) for name, n in members.items()}
        lists: Lists | None = shaped["lists"]
        columns = -(-problem.key.shape[2] // sizes["SPARSE_KV"])
        blocks = columns if lists is None else lists.partial_columns + lists.full_columns
        return collection.parts(Tiling(**sizes, tiles=shaped["tiles"], blocks=blocks), programs)

    call = call._replace(parts=parts, outputs=lambda: (result.dq, *collection.of_queries()))
    return call if call.tuning is None else call._replace(prepare=collection.restart)


def dkdv_call(
    problem: Problem, dout: Tensor, lse: Tensor, delta: Tensor, result: Backward, collection: Collection,
    options: Mapping[str, Any], sums: Sums = ALONE,
) -> Call:  # fmt: skip
    """The call of the kernel that fills `result.dk`, `result.dv` or `sums`, and what `collection` has for columns."""
    made = _functions(problem, options_of(options, forward=False), collection.methods)._replace(
        row_grads=None, tile_grads=None
    )
    matrices = {"q": problem.query, "k": problem.key, "v": problem.value, "dout": dout}
    matrices |= {"dk": result.dk if sums.dk is None else sums.dk, "dv": result.dv if sums.dv is None else sums.dv}
    arguments: dict[str, Any] = {"lse": lse, "delta": delta, "splits": sums.splits, "dq_sum": sums.dq}
    arguments["rows"] = 0 if sums.dq is None else sums.dq.shape[2]
    arguments |= {"column_sums": collection.columns, "COLUMNS": len(collection.columns)}
    arguments |= {name: f for name, f in made._asdict().items() if name not in ("row_grads", "tile_grads")}
    arguments["sharing"] = problem.query.shape[0] // problem.key.shape[0]
    which: Pass = "dkdv" if sums.dq is None else "one_pass"
    call = _call(attention_backward_dkdv, which, problem, matrices, arguments, made, options)
    written = (matrices["dk"], matrices["dv"], *collection.columns, *(() if sums.dq is None else (sums.dq,)))
    call = call._replace(outputs=lambda: written)
    return call if sums.dq is None or call.tuning is None else call._replace(prepare=sums.dq.zero_)


def _call(
    kernel: Any, which: Pass, problem: Problem, matrices: dict[str, Tensor], arguments: dict[str, Any], made: Jitted,
    options: Mapping[str, Any],
) -> Call:  # fmt: skip
    """What the three attention kernels have in common."""
    given, options = options, options_of(options, forward=which == "forward")
    query, key = problem.query, problem.key
    B, H, L, D = query.shape
    S, DV = key.shape[2], problem.value.shape[-1]
    block_q, block_kv = problem.block_size
    by_key = which in BY_KEY
    group, sharing, splits = H // key.shape[1], B // key.shape[0], arguments.get("splits", 1)
    # Programs that gather in workspaces are told apart by their numbers, head by head.
    by_head = any(m not in (None, "row", "column") for m in arguments.pop("methods", ()))
    listed = bool(problem.block_mask)
    precision = precision_of(query)
    arguments = arguments | {name: _matrix(t) for name, t in matrices.items()}
    if not by_key and key.shape[0] == 1:  # keys that all batch entries share
        arguments |= {name: arguments[name]._replace(stride_b=0) for name in ("k", "v")}
    arguments["captured"] = captured_arguments(
        problem.variant, problem.tensors, problem.floats, problem.ints, query.device
    )
    arguments |= {"L": L, "S": S, "heads": H, "group_size": group, "scale": problem.scale}
    read = [n for n in ("q", "k", "v", "dout") if n in matrices]
    apart = is_invariant(options)
    by_tma = all(describable(matrices[n]) and (by_one_form(matrices[n]) or not apart) for n in read)
    widths = {n: pieces(n, options.get("PIECES", True)) for n in (D, DV)}
    row_bytes = (widths[D].columns + widths[DV].columns) * query.element_size()
    if by_key:
        batches, outer = key.shape[0] * splits, key.shape[0] * splits * key.shape[1]
        at_once = work_order.together(1, L * row_bytes * -(-group * sharing // splits), outer, query.device)
    else:
        batches, outer = B, B * H
        at_once = work_order.together(group, S * row_bytes, outer, query.device)
    arguments |= {"batches": batches, "heads_at_once": 1 if by_head else at_once}
    constants: dict[str, Any] = {
        "D": D,
        "DV": DV,
        "BLOCK_D": widths[D].width,
        "BLOCK_DV": widths[DV].width,
        "REST_D": widths[D].rest,
        "REST_DV": widths[DV].rest,
        "LISTED": listed,
        "CONTIGUOUS": _is_contiguous(problem, by_key, options),
        "SCALE_IN_FACTOR": made.score_mod is None and problem.scale > 0,
        "PRECISION": precision,
        "OFFSET": _offset_type(*matrices.values()),
    }

    fixed = pinned(which, options)

    def sizes_of(M: int, N: int) -> pins.Tiles:
        if not listed:
            return pins.Tiles(M, N, M, N)
        M, N = fitted(M, block_q), fitted(N, block_kv)
        return pins.Tiles(M, N, covered(block_q, L, M), covered(block_kv, S, N))

    usual = partial(sizes_of, fixed.BLOCK_M or 64, fixed.BLOCK_N or 64)
    pins.check(given, which, problem, {n: matrices[n] for n in read}, usual, made.column_grads is not None)

    def shaped(config: KernelConfig) -> dict[str, Any]:
        sizes = sizes_of(config.BLOCK_M, config.BLOCK_N)
        BLOCK_M, BLOCK_N, SPARSE_Q, SPARSE_KV = sizes
        if by_key:
            tiles = _tiles(S, SPARSE_KV, BLOCK_N)
        else:
            tiles = _tiles(L, SPARSE_Q, BLOCK_M)
        lists: Lists | None = None
        order: Order | None = None
        if listed:
            columns = -(-S // block_kv)
            if by_key:
                lists = kernel_lists.by_key(problem.block_mask, columns)
            else:
                lists = kernel_lists.by_query(problem.block_mask, SPARSE_KV, S)
            if not by_head:
                inner = -(-SPARSE_KV // BLOCK_N) if by_key else -(-SPARSE_Q // BLOCK_M)
                keys = work_order.KeyTiles(columns, group, sharing, splits) if by_key else None
                order = work_order.longest_first(problem.block_mask, tiles, inner, keys)
        tma = config.tma and by_tma and SPARSE_Q % BLOCK_M == 0 and SPARSE_KV % BLOCK_N == 0
        # All tiles or none: what is added one tile late has to read as zero beyond the end.
        tma = tma and max(BLOCK_M, BLOCK_N, widths[D].width, widths[DV].width) <= LARGEST_BOX
        upright = config.upright and made.column_grads is None
        shape = _shape(**constants, **sizes._asdict(), OVERLAP=config.overlap and tma, UPRIGHT=upright)
        found = {"shape": shape, "lists": lists, "order": order, "tiles": tiles, "grid": tiles * outer}
        for name in read:
            rows, parts = (BLOCK_N if name in "kv" else BLOCK_M), widths[matrices[name].shape[-1]]
            for place, width in zip(TMA[name], parts, strict=True):
                found[place] = tile_descriptor(arguments[name].ptr, rows, width) if tma and width else None
        if by_key:
            dq_sum = arguments["dq_sum"]
            by_descriptor = tma and dq_sum is not None and not interpreted()  # where it cannot add
            for place, width in zip(("dq_tma", "dq_rest"), widths[D], strict=True):
                found[place] = sum_descriptor(dq_sum, BLOCK_M, width) if by_descriptor and width else None
        return found

    # Equal generated functions are the same objects, and live as long as the process.
    key_of_choice = (which, *map(id, made), query.dtype, D, DV, problem.block_size if listed else None, precision)
    key_of_choice += (by_tma, splits > 1, apart, *widths.values())
    compiler_options = {} if interpreted() else _amd_options(options)
    facts = {
        "pass": which,
        "precision": precision,
        "contiguous": constants["CONTIGUOUS"],
        "tma": by_tma,
        "splits": splits,
        "pieces": str([tuple(w) for w in widths.values()]),
    }
    facts["compiler"] = options_text(compiler_options)
    return Call(
        kernel=kernel,
        which=which,
        key=key_of_choice,
        product=product_of(query, precision),
        head_dim=max(w.columns for w in widths.values()),
        row_bytes=row_bytes,
        pinned=fixed,
        arguments=arguments,
        ahead=not problem.variant.gathers,
        invariant=apart,
        shaped=shaped,
        device=query.device,
        compiler_options=compiler_options,
        tuning=tuning(problem, made, fixed, facts, autotune.search) if options.get("AUTOTUNE") else None,
    )


def _functions(problem: Problem, options: Mapping[str, Any], methods: Methods = ()) -> Jitted:
    wide = tuple(i for i, t in enumerate(problem.tensors) if max(_reach(t), t.numel()) > FARTHEST)
    far = max(problem.query.shape[2], problem.key.shape[2]) > NEAR
    fast_tanh = bool(options.get("FAST_TANH")) and not interpreted()
    return _functions_of(problem.variant, methods, wide, far, fast_tanh)


@lru_cache(maxsize=4096)
def _shape(**values: Any) -> Any:
    """The same object for the same values, which is how a launch finds its kernel fast."""
    if interpreted():  # where the members of a tuple are taken for run-time values
        return SimpleNamespace(**values)
    return Shape(**{name: tl.constexpr(value) for name, value in values.items()})


@lru_cache(maxsize=1024)
def _functions_of(variant: Variant, methods: Methods, wide: tuple[int, ...], far: bool, fast_tanh: bool) -> Jitted:
    return jitted(functions(variant, methods, wide, far=far, fast_tanh=fast_tanh))


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


def _amd_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("kpack", "matrix_instr_nonkdim", "waves_per_eu") if name in options}


def _is_contiguous(problem: Problem, by_key: bool, options: Mapping[str, Any]) -> bool:
    """Whether adjacent blocks can be walked without reading their numbers: if the caller says so and it is true."""
    if not problem.block_mask or not options.get("BLOCKS_ARE_CONTIGUOUS") or is_invariant(options):
        return False
    return kernel_lists.contiguous(problem.block_mask, -(-problem.key.shape[2] // problem.block_size[1]), by_key)
