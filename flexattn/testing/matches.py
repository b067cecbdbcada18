"""`assert_matches_reference`: an attention is what its score_mod and mask_mod say, forward and backward, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import validate
from ..block_mask import BlockMask
from ..codegen.trace import describe
from .case import Case, Outcome
from .sizes import Sizes, checked_sizes
from .smallest import smallest
from .verdict import Excess


def assert_matches_reference(
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    *,
    shape: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    block_mask: BlockMask | None = None,
    backend: str = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    scale: float | None = None,
    attention: Callable[[Tensor, Tensor, Tensor], Any] | None = None,
    normalizer: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Assert that attention with these mods is as exact as its precision allows, each element and all together.

    Compared are out, lse, max_scores, and the gradients of query, key, value and of captured tensors that require one, for
    random gradients of out and of lse, with dense attention in float64 on the same device. What an element may be off by
    follows from the roundings that its computation cannot avoid, see docs/numerics.md; there is no tolerance to choose.
    Memory is that of dense attention, some sixty tensors [B, Hq, L, S] in float64.

    Args:
        score_mod, mask_mod: the definition.
        shape: sizes of random operands. Default `Sizes()`, with the heads of `attention` not grouped.
        dtype: of random operands.
        block_mask: in place of `mask_mod`: its lists say what is attended, its lengths are those of `shape`.
        backend, kernel_options, scale: as in `flex_attention`.
        attention: an implementation to test instead of `flex_attention`, `(query, key, value) -> out` or `(out, lse)`. The
            gradients of query, key and value are compared if its out requires one, else the forward alone. Gradients of
            captured tensors are not: nothing says which they are.
        normalizer: `(out, lse) -> out`, what is done with the result, as for attention sinks. It gets numbers in float64, too.
            Gradients then go through it. Tensors that it captures itself are not compared. An `attention` that returns out
            alone is one that has done this by itself.
        seed: of the random operands, and of the gradients that arrive.
        query, key, value: operands to use instead of random ones, as of a model; all three.
        device: of random operands; default that of a block mask, or else the CPU.

    Raises:
        AssertionError: names the worst element with its indices, the value found, the exact one and what was allowed, and the
            smallest sizes at which it fails, which are searched by running it. A block mask is cropped to them.
        ValueError: for arguments that do not fit, as captured tensors too short for `shape`.

    Example:
        >>> import torch
        >>> from flexattn.testing import Sizes, assert_matches_reference
        >>> slopes = torch.tensor([0.5, 0.25], requires_grad=True)
        >>> def alibi(score, b, h, q_idx, kv_idx):
        ...     return score + slopes[h] * (kv_idx - q_idx)
        >>> assert_matches_reference(alibi, shape=Sizes(Hq=2, Hkv=2, L=40, S=40))
        >>> def mine(query, key, value):
        ...     return (query @ key.mT).softmax(-1) @ value  # no scale
        >>> assert_matches_reference(attention=mine, shape=Sizes(Hkv=4, L=40, S=40))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        AssertionError: attention `mine` at ...
    """
    __tracebackhide__ = True
    if block_mask is not None and mask_mod is not None:
        raise ValueError(
            "both block_mask and mask_mod are given; a block mask brings its own mask_mod: pass one of the two"
        )
    given = _given(query, key, value)
    if given is not None:
        if shape is not None:
            raise ValueError("both shape and query, key, value are given; leave shape out, the tensors have one")
        (B, Hq, L, E), (Bkv, Hkv, S, _), Ev = given[0].shape, given[1].shape, given[2].shape[-1]
        shape, dtype, device = Sizes(B, Hq, Hkv, L, S, E, Ev), given[0].dtype, given[0].device
        if Bkv != B:
            raise ValueError(f"key has batch {Bkv}, query {B}; expand it: key.expand({B}, -1, -1, -1)")
    elif shape is None:
        shape = Sizes() if attention is None else Sizes(Hkv=Sizes().Hq)
        if block_mask is not None:
            shape = shape._replace(L=block_mask.seq_lengths[0], S=block_mask.seq_lengths[1])
    shape = checked_sizes(shape)
    if dtype not in validate.DTYPES:
        raise ValueError(f"dtype is {dtype}; use one of {', '.join(str(d)[6:] for d in validate.DTYPES)}")
    if attention is not None and (kernel_options is not None or backend != "auto"):
        raise ValueError(
            "backend and kernel_options choose how flex_attention computes; with attention= leave them out"
        )
    if block_mask is not None and device is None:
        device = block_mask.kv_num_blocks.device
    case = Case(
        score_mod, mask_mod, block_mask, dtype, torch.device(device or "cpu"), backend, kernel_options, scale, attention,
        normalizer, seed, given,
    )  # fmt: skip
    if block_mask is not None:
        validate.block_mask(block_mask, *case.operands(shape)[:2])
    case.check_indices(shape)
    outcome = case.outcome(shape)
    if outcome.wrong:
        raise AssertionError(_report(case, shape, outcome))


def _given(query: Tensor | None, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Query, key and value, if there are all three."""
    if query is None and key is None and value is None:
        return None
    if query is None or key is None or value is None:
        raise ValueError("query, key and value are given all three or not at all")
    validate.tensors(query, key, value, enable_gqa=True)
    return query, key, value


@dataclass
class _Smallest:
    """The last failing outcome of a search."""

    case: Case
    outcome: Outcome

    def fails(self, sizes: Sizes) -> bool:
        try:
            outcome = self.case.outcome(sizes)
        except Exception:  # a size that the implementation does not take is no counterexample
            return False
        if outcome.wrong:
            self.outcome = outcome
        return bool(outcome.wrong)


def _report(case: Case, shape: Sizes, outcome: Outcome) -> str:
    search = _Smallest(case, outcome)
    # What does not repeat itself fails here and there: a smaller size says nothing.
    sizes = shape if outcome.unrepeated else smallest(shape, search.fails, _least(case, shape))
    least = search.outcome
    lines = [f"{_subject(case)} is not what {_definition(case)} defines."]
    lines += [
        "",
        f"At {sizes}, the smallest that fails:"
        if sizes != shape
        else f"At {sizes}:"
        if outcome.unrepeated
        else f"At {sizes}; no smaller size was found to fail:",
    ]
    # What is wrong in the forward is wrong in the gradients, too.
    forward = [e for e in least.excesses if not e.name.startswith("d")]
    worst = max(forward or least.excesses, key=lambda e: e.ratio, default=None)
    lines += [] if worst is None else _described(worst)
    lines += [_in_short(e) for e in least.excesses if e is not worst] + [d.text for d in least.drifts]
    right = [n for n in least.compared if n not in least.wrong]
    if right:
        lines.append(f"  right: {', '.join(right)}")
    if sizes != shape:
        lines += ["", f"At {shape}:", *map(_in_short, outcome.excesses), *(d.text for d in outcome.drifts)]
    hints = _own_faults(outcome)
    if not outcome.unrepeated:
        hints += _hints(least._replace(excesses=_with_gradients_of(outcome, least)))
    if case.normalizer is not None and "out" not in least.compared:
        hints.append("attention returned out alone, which is taken for normalized; return (out, lse) if it is not.")
    if hints:
        lines += ["", *hints]
    return "\n".join([*lines, "", "To repeat it:", f"  {_call(case, sizes)}"])


def _least(case: Case, shape: Sizes) -> Sizes:
    """How far sizes may be reduced: a block mask made for several heads or batch entries has these."""
    if case.block_mask is None:
        return Sizes(1, 1, 1, 1, 1, 1, 1)
    B, H = (n if n > 1 else 1 for n in case.block_mask.sizes)
    return Sizes(B, H, shape.Hkv if H > 1 else 1, 1, 1, 1, 1)


def _subject(case: Case) -> str:
    if case.attention is not None:
        return f"attention {describe(case.attention)}, {_dtype(case)},"
    return f"flex_attention, {_dtype(case)}, backend {case.backend!r},"


def _dtype(case: Case) -> str:
    return f"{str(case.dtype)[6:]} on {case.device}"


def _definition(case: Case) -> str:
    parts = [] if case.score_mod is None else [f"score_mod {describe(case.score_mod)}"]
    mask = case.mask_mod if case.block_mask is None else case.block_mask.mask_mod
    parts += [] if mask is None else [f"{'mask_mod' if case.block_mask is None else 'block_mask of'} {describe(mask)}"]
    return " with ".join(parts) or "softmax(scale * query @ key^T) @ value"


def _described(e: Excess) -> list[str]:
    error = abs(e.found - e.exact)
    over = "" if math.isinf(e.ratio) else f", {e.ratio:.3g} times as much"
    return [
        f"  {e.name} is wrong in {e.wrong} of {e.total} elements, most at {e.place}:",
        f"    found   {e.found:.9g}",
        f"    exact   {e.exact:.9g}",
        f"    allowed error {e.allowed:.3g}, error {error:.3g}{over}",
    ]


def _in_short(e: Excess) -> str:
    return f"  {e.name} is wrong in {e.wrong} of {e.total}: found {e.found:.6g}, exact {e.exact:.6g} at {e.place}"


def _with_gradients_of(outcome: Outcome, least: Outcome) -> list[Excess]:
    """What is wrong at the smallest sizes, and the gradients that are at the sizes asked for: where S is 1 some are zero."""
    known = {e.name for e in least.excesses}
    return least.excesses + [e for e in outcome.excesses if e.name.startswith("d") and e.name not in known]


def _own_faults(outcome: Outcome) -> list[str]:
    """What is wrong with the function by itself, whatever it should compute."""
    hints = []
    if outcome.unrepeated:
        hints.append(
            f"A second run on the same inputs gives another {', '.join(outcome.unrepeated)}: turn off what is random in it, "
            "such as dropout, by eval() or dropout_p=0.0."
        )
    if outcome.written:
        hints.append(
            f"It writes to its {', '.join(outcome.written)}: what it computes after that, and the backward, see other numbers. "
            "Have it work on a copy."
        )
    return hints


def _hints(outcome: Outcome) -> list[str]:
    """What to look at, told from which results differ and how."""
    found = outcome.wrong
    forward, gradients = (
        {"out", "lse", "max_scores", "normalized"} & found,
        {n for n in found if n.startswith("d")},
    )
    lse = {e.name: e for e in outcome.excesses}.get("lse")
    hints = []
    if outcome.drifts and not outcome.excesses:
        hints.append(
            "Every element is within its own rounding, but the errors have a direction in common, which roundings have not: "
            "look for a factor that is slightly off, or a small term that is missing."
        )
    if any(d.of == "delta" for d in outcome.drifts):
        hints.append(
            "Delta is what the backward subtracts in each row: the sum of dO times out, less the gradient of lse."
        )
    if outcome.plain_differs:
        hints.append(
            f"Plain attention in this precision has that in {', '.join(outcome.plain_differs)}, too: the mod exceeds it."
        )
    elif any(not math.isfinite(e.found) for e in outcome.excesses):
        hints.append(
            "nan or infinity where the exact result has none: look for exp of scores from which no maximum is taken."
        )
    if lse is not None and lse.exact and abs(lse.found / lse.exact - 1 / math.log(2)) < 1e-3:
        hints.append("lse is log2(e) times the exact one: it is in base 2; multiply it by log(2).")
    if gradients and not forward and not any(n not in found for n in outcome.compared if n.startswith("d")):
        hints.append(
            "The forward is right and every gradient is wrong: look at what the backward shares, delta and lse."
        )
    elif gradients and not forward:
        hints.append(f"The forward is right: look at the backward of {', '.join(sorted(gradients))}.")
    return hints


def _call(case: Case, sizes: Sizes) -> str:
    """A line of code that repeats the failure."""
    arguments = [
        name
        for name in ("score_mod", "mask_mod")
        if getattr(case, name) is not None and not (name == "mask_mod" and case.block_mask)
    ]
    arguments = [f"{name}={name}" for name in arguments]
    if case.given is None:
        arguments += [f"shape={sizes}", f"dtype={case.dtype}"]
    else:
        B, Hq, Hkv, L, S, E, Ev = sizes
        arguments += [f"query=query[:{B}, :{Hq}, :{L}, :{E}]", f"key=key[:{B}, :{Hkv}, :{S}, :{E}]"]
        arguments += [f"value=value[:{B}, :{Hkv}, :{S}, :{Ev}]"]
    if case.block_mask is not None:
        cropped = case.block_mask.seq_lengths != (sizes.L, sizes.S)
        arguments.append("block_mask=block_mask" + (f"._adjust({sizes.L}, {sizes.S})" if cropped else ""))
    arguments += [f"{name}={name}" for name in ("attention", "normalizer") if getattr(case, name) is not None]
    if case.backend != "auto":
        arguments.append(f"backend={case.backend!r}")
    if case.kernel_options:
        arguments.append(f"kernel_options={dict(case.kernel_options)!r}")
    if case.scale is not None:
        arguments.append(f"scale={case.scale!r}")
    if case.device.type != "cpu" and case.given is None:
        arguments.append(f"device={str(case.device)!r}")
    return f"assert_matches_reference({', '.join([*arguments, f'seed={case.seed}'])})"
