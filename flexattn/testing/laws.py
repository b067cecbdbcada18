"""The compiler's laws, for one given mod: that what is derived from its trace means what the function means.

In: a score_mod, a mask_mod, or both. Out: nothing, or an `AssertionError` that names an element and its values.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codegen.bounds import Bounds
from ..codegen.derivative import derivative
from ..codegen.evaluate import TORCH_DTYPE, Inputs, evaluate
from ..codegen.intervals import Context, bounds
from ..codegen.ir import INDEX_INPUTS, DType, Node, Op, walk
from ..codegen.tiles import Tiles, classify
from ..codegen.trace import describe
from .traced import LawNotRun, Mod, Traced

Law = Callable[[Mod | None, Mod | None], None]

ELEMENTS = 256  # at which law 1 calls the function itself, one at a time
BOXES = 12  # of which law 3 takes the bounds
BLOCKS = ((16, 16), (32, 8), (7, 5))  # sizes that law 4 classifies for
TILE = 32  # rows and columns of the tile of law 6


class Checked(NamedTuple):
    """What came of one law: `error` is None where it holds, `LawNotRun` where it was not examined, else what is wrong."""

    name: str
    sentence: str
    error: AssertionError | LawNotRun | None


def check_laws(score_mod: Mod | None = None, mask_mod: Mod | None = None) -> Iterator[Checked]:
    """Examine a mod by every law of the compiler, one after the other, in a few seconds.

    Indices run from 0 on, over small ranges that no captured tensor falls short of. Nothing is compiled; the emitted
    Triton functions are examined only where Triton's interpreter is on.

    Args:
        score_mod: function `(score, b, h, q_idx, kv_idx) -> score`.
        mask_mod: function `(b, h, q_idx, kv_idx) -> bool`.

    Yields:
        `Checked(name, sentence, error)` for each law of `LAWS`. `error` is None, an `AssertionError`, or `LawNotRun` with
        the reason.

    Raises:
        TraceError: at once, for a mod that cannot be traced.
        ValueError: if neither is given.

    Example:
        >>> import flexattn
        >>> from flexattn.testing import check_laws
        >>> window = flexattn.masks.sliding_window(8)
        >>> [law.name for law in check_laws(mask_mod=window) if isinstance(law.error, AssertionError)]
        []
    """
    if score_mod is None and mask_mod is None:
        raise ValueError("check_laws needs something to check: give a score_mod, a mask_mod, or both")
    with contextlib.suppress(LawNotRun):  # what cannot be traced is the caller's to know before anything else
        Traced.of(score_mod, mask_mod)
    return _checked(score_mod, mask_mod)


def _checked(score_mod: Mod | None, mask_mod: Mod | None) -> Iterator[Checked]:
    for name, law in LAWS.items():
        error: AssertionError | LawNotRun | None = None
        try:
            law(score_mod, mask_mod)
        except (AssertionError, LawNotRun) as found:
            error = found
        yield Checked(name, sentence(law), error)


def sentence(law: Law) -> str:
    """What a law says, in one line."""
    return (inspect.getdoc(law) or "").partition("\n")[0]


# ---- 1: the trace


def trace_means_the_function(score_mod: Mod | None, mask_mod: Mod | None) -> None:
    """The traced program computes what the function computes, called with one element at a time."""
    traced = Traced.of(score_mod, mask_mod)
    score = traced.score()
    inputs = traced.inputs(score=score)
    for role, mod, root in (("score_mod", score_mod, traced.parsed.score), ("mask_mod", mask_mod, traced.parsed.mask)):
        if mod is None or root is None:
            continue
        (value,) = evaluated([root], inputs)
        expected, places = torch.full(traced.shape, torch.nan, dtype=torch.float64), list(_sample(traced.shape))
        for at in places:
            index = [torch.tensor(i, dtype=torch.int32, device=traced.device) for i in at]
            with torch.no_grad():
                result = mod(*((score[at], *index) if role == "score_mod" else index))
            expected[at] = torch.as_tensor(result).to("cpu", TORCH_DTYPE[root.dtype]).double()
        seen = torch.zeros(traced.shape, dtype=torch.bool)
        seen[tuple(torch.tensor(places).T)] = True
        allowed = 0.0 if role == "mask_mod" else 8 * _rounding(root, inputs, traced)
        what = f"the trace of {role} {describe(mod)}"
        _assert_equal(what, _cpu(value, traced).where(seen, torch.nan), expected, allowed, traced, "the function")


# ---- 2: simplification


def simplification_changes_no_value(score_mod: Mod | None, mask_mod: Mod | None) -> None:
    """The simplified graphs have the same values as the traced ones, bit by bit, and are no longer."""
    traced = Traced.of(score_mod, mask_mod)
    parsed, simple = traced.parsed, traced.variant
    inputs = traced.inputs(score=traced.score())
    for role, before, after in (("score_mod", parsed.score, simple.score), ("mask_mod", parsed.mask, simple.mask)):
        if before is None:
            continue
        (old,) = evaluated([before], inputs)
        new = torch.ones((), dtype=torch.bool) if after is None else evaluated([after], inputs)[0]
        _assert_equal(f"the simplified {role}", _cpu(new, traced), _cpu(old, traced), 0.0, traced, "as traced")
        nodes = [len(list(walk(root))) for root in (before, after) if root is not None]
        assert nodes[-1] <= nodes[0], f"the simplified {role} has {nodes[-1]} operations, the traced one {nodes[0]}"


# ---- 3: intervals


def values_lie_in_their_bounds(score_mod: Mod | None, mask_mod: Mod | None) -> None:
    """Every value of the mask lies in the bounds that interval arithmetic gives for a box of indices."""
    if mask_mod is None:
        raise LawNotRun("bounds are taken of masks, and there is no mask_mod")
    traced = Traced.of(None, mask_mod, (2, 4, 37, 45))
    root = traced.variant.mask
    if root is not None:
        corners = [{n: (0, 0 if n in "bh" else size - 1) for n, size in traced.sizes.items()}]
        assert_bounds_hold([root], traced, [*corners, *_corners(traced, BOXES)])


Corner = dict[str, tuple[int, int]]


def assert_bounds_hold(roots: list[Node], traced: Traced, corners: list[Corner]) -> None:
    """Every node below `roots` lies in its bounds over each box, given by first and last index; b and h are points."""
    whole = {
        name: Bounds(*(torch.tensor([i], device=traced.device) for i in (0, n - 1))) for name, n in traced.sizes.items()
    }
    inputs = traced.inputs()
    nodes = [n for n in walk(*roots) if n.op is not Op.CAPTURED]
    values = evaluated(nodes, inputs)
    context = Context.of(roots, inputs.fork({}), whole, 1 << 26)
    box = {}
    for name in INDEX_INPUTS:
        lo, hi = (torch.tensor([c[name][i] for c in corners], device=traced.device) for i in (0, 1))
        box[name] = Bounds(lo, lo if name in "bh" else hi)
    for found, value, node in zip(bounds(nodes, box, context), values, nodes, strict=True):
        value = value.expand(traced.shape)
        for i, corner in enumerate(corners):
            part = value[tuple(slice(corner[name][0], corner[name][1] + 1) for name in INDEX_INPUTS)]
            lo, hi = (t.expand(len(corners))[i] for t in found[:2])
            where = f"of {node} over {corner}\n{traced.program}"
            if node.dtype.is_float and bool(part.isnan().any()):
                assert found.nan is not None and bool(found.nan.expand(len(corners))[i]), (
                    f"a nan is not foreseen, {where}"
                )
                part = part[~part.isnan()]
            if part.numel():
                least, most = part.amin(), part.amax()
                assert bool(least >= lo) and bool(most <= hi), (
                    f"values from {least.item()} to {most.item()} lie outside their bounds {lo.item()} to {hi.item()}, {where}"
                )


def _corners(traced: Traced, count: int) -> Iterator[Corner]:
    chosen = random.Random(0)
    for _ in range(count):
        corner = {}
        for name, size in traced.sizes.items():
            lo = chosen.randrange(size)
            corner[name] = (lo, lo if name in "bh" else min(lo + chosen.randrange(20), size - 1))
        yield corner


# ---- 4: blocks


def blocks_are_classified_as_by_force(score_mod: Mod | None, mask_mod: Mod | None) -> None:
    """Blocks are empty, partial or full as their elements say."""
    if mask_mod is None:
        raise LawNotRun("blocks are those of masks, and there is no mask_mod")
    traced = Traced.of(None, mask_mod, (2, 4, 96, 75))
    for block in BLOCKS:
        assert_classified(traced, block)


def assert_classified(traced: Traced, block: tuple[int, int], **work: Any) -> Tiles:
    """The block lists of a mask are those that its elements give; `work` goes to `codegen.tiles.classify`."""
    root = traced.variant.mask
    one = torch.ones((), dtype=torch.bool)
    keep = _cpu(one if root is None else evaluated([root], traced.inputs())[0], traced)
    B, H, L, S = traced.shape
    found = classify(traced.variant, traced.captured, traced.ints, (B, H, L, S), block, traced.device, **work)
    expected = by_force(keep, block)
    got = listed_classes(found, expected.shape[-1]).expand_as(expected)
    if not torch.equal(got, expected):
        b, h, row, column = (got != expected).nonzero()[0].tolist()
        names = ("empty", "partial", "full")
        raise AssertionError(
            f"block ({row}, {column}) of {block[0]} x {block[1]} elements, at b={b}, h={h}, is listed as "
            f"{names[got[b, h, row, column]]}, and its elements make it {names[expected[b, h, row, column]]}; "
            f"lengths {L} and {S}\n{traced.program}"
        )
    axes = frozenset() if root is None else root.axes
    once = tuple(n if name in axes else 1 for name, n in zip("bh", (B, H), strict=True))
    assert found.partial_count.shape[:2] == once, f"lists for {tuple(found.partial_count.shape[:2])} instead of {once}"
    return found


def by_force(keep: Tensor, block: tuple[int, int]) -> Tensor:
    """Of every element of a mask [B, H, L, S], the class of each block: 0 empty, 1 partial, 2 full."""
    rows = []
    for part in keep.split(block[0], 2):
        pieces = [p.flatten(2) for p in part.split(block[1], 3)]
        rows.append(torch.stack([p.any(-1).int() + p.all(-1).int() for p in pieces], -1))
    return torch.stack(rows, 2)


def listed_classes(found: Tiles, columns: int) -> Tensor:
    """The classes that lists stand for. They list every block once, in ascending order."""
    result = torch.zeros(*found.partial_count.shape, columns, dtype=torch.int32)
    lists = ((found.partial_count, found.partial_index), (found.full_count, found.full_index))
    for kind, (count, index) in enumerate(((c.cpu(), i.cpu()) for c, i in lists), start=1):
        used = torch.arange(index.shape[-1]) < count.unsqueeze(-1)
        assert bool(((index[..., 1:] > index[..., :-1]) | ~used[..., 1:]).all()), "a list of blocks does not ascend"
        listed = torch.zeros(*count.shape, columns + 1, dtype=torch.int32)
        listed.scatter_(-1, torch.where(used, index, columns).long(), kind)
        assert not bool((result.bool() & listed[..., :-1].bool()).any()), "a block is listed as partial and as full"
        result += listed[..., :-1]
    return result


# ---- 5: the derivative


def the_derivative_is_that_of_autograd(score_mod: Mod | None, mask_mod: Mod | None) -> None:
    """The generated derivative is autograd's, of the score and of every value that is read, in float64."""
    if score_mod is None:
        raise LawNotRun("a mask has no derivative, and there is no score_mod")
    traced = Traced.of(score_mod, None, score_dtype=torch.float64)
    (node,) = _widened([traced.variant.score])
    found = derivative(node)
    score = traced.score(torch.float64).requires_grad_()
    inputs = traced.inputs(score=score)
    inputs = Inputs(inputs.named, [_double(t) for t in inputs.captured], inputs.floats, inputs.ints, inputs.device)
    # Each value that is read becomes a leaf of full size, so that autograd gives the gradient of each single read.
    inputs.on_load = lambda t: t.expand(traced.shape).detach().requires_grad_() if t.is_floating_point() else t
    loads = [n for n in walk(node) if n.op is Op.LOAD and n.dtype.is_float]
    with torch.enable_grad():
        (value, *read) = evaluate([node, *loads], inputs)
        value = value.expand(traced.shape)
        leaves, grad = [score, *read], traced.score(torch.float64, seed=1)
        wanted: tuple[Any, ...] = (None,) * len(leaves)
        if value.requires_grad:
            wanted = torch.autograd.grad(value, leaves, grad, allow_unused=True)
    inputs.memo.clear()
    inputs.on_load = None
    generated = dict(found.loads)
    plain = inputs.fork({**inputs.named, "score": score.detach(), "grad": grad})
    for load, want in zip([None, *loads], wanted, strict=True):
        root = found.score if load is None else generated.get(load)
        got = torch.zeros(()) if root is None else evaluated([root], plain)[0]
        want = torch.zeros(()) if want is None else want
        expected = _cpu(want.double(), traced)
        what = f"the derivative of score_mod {describe(score_mod)} by {'the score' if load is None else load}"
        allowed = 1e-9 * (1 + expected.nan_to_num(0.0, 0.0, 0.0).abs())
        _assert_equal(what, _cpu(got.double(), traced), expected, allowed, traced, "autograd")


def _widened(roots: Iterable[Node]) -> list[Node]:
    """The graphs with every float in float64, so that what differs is the formula and not a rounding."""
    roots = list(roots)
    done: dict[Node, Node] = {}
    for n in walk(*roots):
        dtype = DType.FLOAT64 if n.dtype.is_float else n.dtype
        done[n] = Node(n.op, tuple(done[a] for a in n.args), dtype, n.kind, n.value)
    return [done[r] for r in roots]


def _double(t: Tensor) -> Tensor:
    t = t.detach()
    return t.double() if t.is_floating_point() else t


# ---- 6: the emitted functions


def emitted_functions_compute_the_graphs(score_mod: Mod | None, mask_mod: Mod | None) -> None:
    """The emitted Triton functions compute what the graphs mean, run on one tile by Triton's interpreter."""
    from .emitted import run  # Triton is needed from here on

    traced = Traced.of(score_mod, mask_mod)
    roots = [root for root in (traced.variant.score, traced.variant.mask) if root is not None]
    evaluated(roots, traced.inputs(score=traced.score()))  # a division by zero is refused here and not warned of below
    for result in run(traced, TILE):
        inputs = traced.inputs(score=result.score, grad=result.grad)
        (want,) = evaluated([result.root], inputs)
        b, h = result.at
        want = _cpu(want, traced)[b : b + 1, h : h + 1]
        allowed: Any = 0.0
        if result.root.dtype.is_float:
            allowed = result.ulps * _rounding(result.root, inputs, traced)[b : b + 1, h : h + 1]
        what = f"the emitted {result.role} at b={b}, h={h}"
        _assert_equal(what, result.value.double(), want.double(), allowed, traced, "its graph")


LAWS: dict[str, Law] = {
    "trace": trace_means_the_function,
    "simplify": simplification_changes_no_value,
    "intervals": values_lie_in_their_bounds,
    "blocks": blocks_are_classified_as_by_force,
    "derivative": the_derivative_is_that_of_autograd,
    "emitted": emitted_functions_compute_the_graphs,
}


# ---- what the laws share


def evaluated(roots: list[Node], inputs: Inputs) -> list[Tensor]:
    """The values of graphs, without gradients. Raises `LawNotRun` for a division by zero, which only torch refuses."""
    try:
        with torch.no_grad():
            return evaluate(roots, inputs)
    except RuntimeError as error:
        if "ZeroDivision" in str(error) or "negative" in str(error):
            raise LawNotRun(f"torch refuses what it computes: {error}") from None
        raise


def _cpu(value: Tensor, traced: Traced) -> Tensor:
    return value.detach().cpu().expand(traced.shape)


def _sample(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All elements, or the first, the last, and so many others."""
    every = list(itertools.product(*map(range, shape)))
    return iter(
        every if len(every) <= ELEMENTS else [every[0], every[-1], *random.Random(0).sample(every, ELEMENTS - 2)]
    )


def _rounding(root: Node, inputs: Inputs, traced: Traced) -> Tensor:
    """One rounding of the largest value on the way to each element, in the coarsest float type on the way."""
    floats = [n for n in walk(root) if n.dtype.is_float and n.op is not Op.CAPTURED]
    epsilon = max(torch.finfo(TORCH_DTYPE[n.dtype]).eps for n in floats)
    largest = torch.ones(traced.shape, dtype=torch.float64)
    for value in evaluated(floats, inputs):
        largest = torch.maximum(largest, _cpu(value.double().abs().nan_to_num(0.0, 0.0, 0.0), traced))
    return epsilon * largest


def _assert_equal(what: str, found: Tensor, expected: Tensor, allowed: Any, traced: Traced, other: str) -> None:
    """Raise for the element where they differ most; `allowed` is a number, or one for each element."""
    found, expected = found.double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan()) | ((found - expected).abs() <= allowed)
    if bool(same.all()):
        return
    difference = (found - expected).abs().nan_to_num(torch.inf).masked_fill(same, -1.0)
    at = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    where = ", ".join(f"{name}={i}" for name, i in zip(INDEX_INPUTS, at, strict=True))
    raise AssertionError(
        f"{what} is {found[tuple(at)].item()} at {where}, where {other} gives {expected[tuple(at)].item()}\n{traced.program}"
    )
