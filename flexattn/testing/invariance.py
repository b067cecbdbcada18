"""Whether attention is batch invariant: what a document gets, bit for bit, alone, packed in other ways and in other batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api import AuxRequest, flex_attention
from ..documents import Documents
from .handed import advice, handed, returned
from .sizes import Sizes

Mods = tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]
Attention = Callable[[Tensor, Tensor, Tensor, Documents], Tensor | tuple[Tensor, Tensor]]

LENGTHS = (37, 130, 1, 92, 60)  # of documents, in tokens, where the caller names none: below, beyond and across a block
INSERTED = 77  # tokens of a document that is put in front
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Way(NamedTuple):
    """A way to compute documents: in which order they are packed, with what in front, and as which entry of how many."""

    name: str
    order: tuple[int, ...]
    inserted: int = 0
    entry: int = 0
    batch: int = 1


class _Tokens(NamedTuple):
    """The operands of one document and what its gradients are asked with: [1, H, n, ...]."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    dlse: Tensor


def assert_batch_invariant(
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    documents: Documents | None = None,
    *,
    shape: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    kernel_options: Mapping[str, Any] | None = None,
    scale: float | None = None,
    batch_invariant: bool = True,
    attention: Attention | None = None,
    mods: Callable[[Tensor], Mods] | None = None,
    seed: int = 0,
) -> None:
    """Check that each document gets the same bits alone, in packed rows, and in batches: results and gradients.

    Every document of `documents` is computed alone; then all are packed as given, in reversed order, behind another document,
    and as one entry of a batch of three. Operands are random, and the incoming gradients of a token are the same in all. The
    output, lse and the gradients of query, key and value are compared bit for bit.

    Args:
        score_mod, mask_mod: mods that depend on differences of positions, not on where a document stands: a document alone
            begins at position 0. What keeps documents apart is added.
        documents: of one row, in one piece each. Default: lengths from 1 to 130 tokens.
        shape: heads and head dimensions; its B and lengths are not used. Default `Sizes()`, with the heads of `attention` not
            grouped.
        dtype, device, backend, kernel_options, scale: as `flex_attention` is called.
        batch_invariant: False tests `flex_attention` without the option, on `documents.mask(mask_mod)`.
        attention: tested in the place of `flex_attention`: `(query, key, value, documents) -> out` or `-> (out, lse)`, for
            query [B, Hq, S, E] and documents of one row, which are the same for all B entries. Gradients are compared if its
            out requires one.
        mods: for mods that read a tensor for each token: `tokens -> (score_mod, mask_mod)`, called for each packing with the
            position in `documents` of each of its tokens, int64 [S], -1 where it is a token of another document.
        seed: of the random operands.

    Raises:
        AssertionError: that names the document, the element, and both values with their bits.
        ValueError, TypeError: for arguments that do not fit together.

    Example:
        >>> from flexattn.testing import assert_batch_invariant
        >>> assert_batch_invariant(mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    """
    __tracebackhide__ = True
    if shape is None:
        shape = Sizes() if attention is None else Sizes(Hkv=Sizes().Hq)
    shape.check()
    lengths = _lengths(documents)
    if attention is not None and not callable(attention):
        raise TypeError(
            f"attention is a {type(attention).__name__}; pass a function (query, key, value, documents) -> out"
        )
    if (mods is not None) + (attention is not None) + (score_mod is not None or mask_mod is not None) > 1:
        raise ValueError("give mods as score_mod and mask_mod, or as mods=, or inside of attention=: one of the three")
    options = {"backend": backend, "kernel_options": kernel_options, "scale": scale}
    call = attention or _flex(score_mod, mask_mod, mods, batch_invariant, options)
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> _Tokens:
        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(device, dtype)

        Hq, Hkv, E, Ev = shape.Hq, shape.Hkv, shape.E, shape.Ev
        drawn = random(1, Hq, n, E), random(1, Hkv, n, E), random(1, Hkv, n, Ev), random(1, Hq, n, Ev)
        dlse = random(1, Hq, n)
        return _Tokens(*drawn, dlse.to(torch.float64 if dtype is torch.float64 else torch.float32))

    packed = [tokens(n) for n in lengths]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    everything = tuple(range(len(lengths)))
    ways = [
        _Way("packed as given", everything),
        _Way("packed in reversed order", everything[::-1]),
        _Way(f"packed behind another document of {INSERTED} tokens", everything, INSERTED),
        _Way("packed as given, as the second of three batch entries", everything, 0, 1, 3),
    ]
    alone = [_run(_Way("alone", (i,)), packed, starts, tokens, call)[0] for i in everything]
    if attention is not None:
        _check_tested(alone, _run(ways[0], packed, starts, tokens, call), _run(ways[0], packed, starts, tokens, call))
    for way in ways:
        for number, found in zip(way.order, _run(way, packed, starts, tokens, call), strict=True):
            for name, one in alone[number].items():
                _compare(
                    name, one, found[name], (number, lengths[number], way.name), (attention is None, batch_invariant)
                )


def _lengths(documents: Documents | None) -> list[int]:
    if documents is None:
        return list(LENGTHS)
    if not isinstance(documents, Documents):
        raise TypeError(
            f"documents is a {type(documents).__name__}; pass flexattn.Documents, for example Documents.from_lengths([3, 2])"
        )
    ends: list[int] = documents.cu_seqlens.tolist()
    return [stop - start for start, stop in pairwise(ends) if stop > start]


def _flex(
    score_mod: Callable[..., Tensor] | None,
    mask_mod: Callable[..., Tensor] | None,
    mods: Callable[[Tensor], Mods] | None,
    batch_invariant: bool,
    options: Mapping[str, Any],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`flex_attention` as `attention=` has it, which besides is told the position of each token."""

    def call(query: Tensor, key: Tensor, value: Tensor, documents: Documents, at: Tensor) -> tuple[Tensor, Tensor]:
        modify, mask = (score_mod, mask_mod) if mods is None else mods(at)
        said: dict[str, Any] = {"batch_invariant": documents} if batch_invariant else {}
        if not batch_invariant:
            mask = documents.mask(mask)
        out, aux = flex_attention(
            query,
            key,
            value,
            modify,
            enable_gqa=True,
            mask_mod=mask,
            return_aux=AuxRequest(lse=True),
            **said,
            **options,
        )
        assert aux.lse is not None
        return out, aux.lse

    call.wants_positions = True  # type: ignore[attr-defined]
    return call


def _run(
    way: _Way,
    packed: Sequence[_Tokens],
    starts: Sequence[int],
    tokens: Callable[[int], _Tokens],
    call: Callable[..., Any],
) -> list[dict[str, Tensor]]:
    """What each document gets, in the order of the way."""
    parts = [packed[i] for i in way.order]
    if way.inserted:
        parts.insert(0, tokens(way.inserted))
    row = _Tokens(*(torch.cat(t, 2) for t in zip(*parts, strict=True)))
    lengths = [p.query.shape[2] for p in parts]
    others = [tokens(sum(lengths)) for _ in range(way.batch - 1)]
    entries = [*others[: way.entry], row, *others[way.entry :]]
    query, key, value, dout, dlse = (torch.cat(t) for t in zip(*entries, strict=True))
    operands = [t.requires_grad_() for t in (query, key, value)]
    documents = Documents.from_lengths(lengths).to(query.device)
    own = [torch.arange(packed[i].query.shape[2]) + starts[i] for i in way.order]
    at = torch.cat([torch.full((way.inserted,), -1), *own]).to(query.device)
    with torch.enable_grad():
        made = call(*map(handed, operands), documents, *([at] if getattr(call, "wants_positions", False) else []))
    out, lse = _results(made, dout)
    given = [(t, g) for t, g in ((out, dout), (lse, dlse)) if t is not None and t.requires_grad]
    found = {"out": out, "lse": lse}
    if given:
        grads = torch.autograd.grad([t for t, _ in given], operands, [g for _, g in given], allow_unused=True)
        found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return list(_of_documents(found, way, lengths))


def _results(made: Any, dout: Tensor) -> tuple[Tensor, Tensor | None]:
    """out and lse, or None, of what the function returned."""
    parts = made if isinstance(made, tuple) else (made,)
    wanted = [tuple(dout.shape), tuple(dout.shape[:3])]
    if len(parts) not in (1, 2) or [isinstance(t, Tensor) and tuple(t.shape) for t in parts] != wanted[: len(parts)]:
        raise ValueError(
            f"attention must return out of shape {wanted[0]}, or (out, lse) with lse of shape {wanted[1]}; it returned "
            f"{returned(made)}{advice(made, wanted[1])}"
        )
    return parts[0], parts[1] if len(parts) == 2 else None


def _of_documents(found: Mapping[str, Tensor | None], way: _Way, lengths: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    start = 0
    for place, n in enumerate(lengths):
        if place or not way.inserted:
            yield {k: t.detach()[way.entry, :, start : start + n] for k, t in found.items() if t is not None}
        start += n


def _check_tested(alone: list[dict[str, Tensor]], one: list[dict[str, Tensor]], two: list[dict[str, Tensor]]) -> None:
    """That there is something to compare: the function repeats its own bits, and they are numbers."""
    __tracebackhide__ = True
    if alone and all(bool(found["out"].isnan().all()) for found in alone):
        raise AssertionError("the attention returns nan everywhere, so that nothing was tested")
    for number, (found, again) in enumerate(zip(one, two, strict=True)):
        for name in found:
            if not torch.equal(_bits(found[name]), _bits(again[name])):
                raise AssertionError(
                    f"the attention does not repeat its own bits: document {number} gets another {name} in a second run on the "
                    "same inputs. Turn off what is random in it, such as dropout, and ask for deterministic kernels, or bits "
                    "say nothing"
                )


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(BITS[t.element_size()])


def _compare(name: str, alone: Tensor, other: Tensor, where: tuple[int, int, str], what: tuple[bool, bool]) -> None:
    __tracebackhide__ = True
    one, two = _bits(alone), _bits(other)
    differs = one != two
    if not bool(differs.any()):
        return
    number, length, way = where
    at = tuple(differs.nonzero()[0].tolist())
    width = 2 * alone.element_size()
    shown = [
        f"{float(t[at])!r} (0x{int(b[at]) & (1 << 4 * width) - 1:0{width}x})" for t, b in ((alone, one), (other, two))
    ]
    place = ", ".join(f"{axis}={i}" for axis, i in zip(("h", "token", "element"), at, strict=False))
    apart = float((alone[differs].double() - other[differs].double()).abs().nan_to_num(float("inf")).max())
    raise AssertionError(
        f"document {number}, of {length} tokens, gets another {name} when it is {way} than alone\n"
        f"at {place}: alone {shown[0]}, {way} {shown[1]}\n"
        f"{int(differs.sum())} of {differs.numel()} elements differ, by {apart:.3g} at most\n{_advice(*what)}"
    )


def _advice(is_flex: bool, batch_invariant: bool) -> str:
    if not is_flex:
        return (
            "If the function calls flex_attention, pass batch_invariant=documents there, and look at what else it computes: "
            "a matrix product of torch may round by the number of its rows."
        )
    if not batch_invariant:
        return "flex_attention promises this only where it is asked for: pass batch_invariant=documents."
    return (
        "A mod that reads absolute positions, or a tensor for each token, gives other scores elsewhere: write it for "
        "differences of positions, or give it for each packing by mods=. If the mods do neither, this is a bug of flexattn."
    )
