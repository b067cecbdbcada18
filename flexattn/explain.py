"""Every stage of one variant, from the callable to the derivative, as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import validate
from .backends.collection import is_deterministic
from .codegen.access import usual_methods
from .codegen.derivative import derivative
from .codegen.emit import functions
from .codegen.formula import formula, gradients, inline
from .codegen.pipeline import Variant, variant
from .codegen.trace import describe, trace
from .codegen.trace_cache import why_uncached
from .explain_gradients import gradient_lines
from .kernel_options import check_kernel_options, options_of
from .names import captured_names

ASSUMED = "for float32, since no dtype was given; pass dtype=torch.bfloat16 or torch.float16 if that is what your model runs in"
UNTIMED = "chosen without AUTOTUNE, which may find others: that times the kernels of a call, and nothing is run here"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is the whole report.

    Attributes:
        program: the canonical program text.
        captured: a line for each captured tensor and run-time number: name, what it is.
        formula: the modified score and the mask as mathematics.
        blocks: how a block mask of the mask is built: the mask simplified, and where the keys of a query lie if they are
            one range.
        derivative: the gradients of the score and of captured tensors; `grad` is that of the modified score.
        gradients: a line for each place where a floating captured tensor is read: which elements share an entry, and how
            their contributions are added up.
        functions: the Triton functions that are generated, as text; compiled into the kernels of `flexattn.templates`.
        kernels: the kernels for the target, and where they could be compiled their configuration, registers, spills and
            shared memory.
        backend: which backend `flex_attention` chooses on a CPU, and how it applies the score.
        tracing: whether eager calls trace the mods once, or why they trace them at every call.
    """

    program: str
    captured: tuple[str, ...]
    formula: str
    blocks: str
    derivative: str
    gradients: str
    functions: str
    kernels: str
    backend: str
    tracing: str

    def __str__(self) -> str:
        sections = {
            "program": self.program,
            "captured": "\n".join(self.captured) or "nothing",
            "formula": self.formula,
            "blocks": self.blocks,
            "derivative": self.derivative,
            "gradients": self.gradients,
            "functions": self.functions,
            "kernels": self.kernels,
            "backend": self.backend,
            "tracing": self.tracing,
        }
        return "\n\n".join(f"{title}\n" + _indent(text) for title, text in sections.items())

    def __repr__(self) -> str:
        return f"<Explanation of {len(self.program.splitlines())} program lines; print() it>"


def explain(
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int = 64,
    target: str | None = None,
    kernel_options: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Explanation:
    """Print what becomes of a score_mod and a mask_mod, and return it.

    Args:
        score_mod: function `(score, b, h, q_idx, kv_idx)`, or None.
        mask_mod: function `(b, h, q_idx, kv_idx)`, or None.
        dtype: dtype of the query; scores are float64 for float64 and float32 for any other. Without it float32, which the
            report says: most models run kernels for 16-bit types.
        head_dim: of query and value, for the choice of the kernels' configuration.
        target: GPU to compile for, such as "sm_90" or "gfx942"; it need not be there. Default: the current one, if any.
        kernel_options: as `flex_attention` takes them; the kernels are those with what is pinned. AUTOTUNE times nothing here.
        quiet: do not print.

    Raises:
        TraceError: for a mod that cannot be traced.
        ValueError: for an unknown dtype, head_dim or target, for options that cannot be followed, or for a target if Triton's
            interpreter is on, which compiles nothing.

    Example:
        >>> import flexattn
        >>> report = flexattn.explain(lambda score, b, h, q_idx, kv_idx: 20 * (score / 20).tanh(), quiet=True)
        >>> print(report.formula)
        score' = tanh(score / 20) * 20
    """
    options = check_kernel_options(kernel_options)
    assumed, dtype = dtype is None, torch.float32 if dtype is None else dtype
    if dtype not in validate.DTYPES:
        raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(map(str, validate.DTYPES))}")
    if not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim is {head_dim!r}; it must be a positive integer")
    if target is not None and not isinstance(target, str):
        raise TypeError(f"target is a {type(target).__name__}; name a GPU, such as target='sm_90' or 'gfx942'")
    score_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    program, captured, ints = trace(score_mod, mask_mod, score_dtype=score_dtype)
    parsed = variant(program)
    n = len(captured) - parsed.n_floats
    names = captured_names((score_mod, mask_mod), captured[:n], captured[n:])
    lines = [
        f"c{i}: {names.get(f'c{i}', 'unnamed')}, {str(t.dtype)[6:]} {list(t.shape)}" for i, t in enumerate(captured[:n])
    ]
    lines += [f"f{i}: {float(t)!r}, a run-time number" for i, t in enumerate(captured[n:])]
    lines += [f"i{i}: {v}, a run-time integer" for i, v in enumerate(ints)]
    roots = {"score'": parsed.score} | ({} if parsed.mask is None else {"keep": parsed.mask})
    report = Explanation(
        program,
        tuple(lines),
        formula(roots, names),
        _blocks(parsed, names),
        _derivative(derivative(parsed.score), names),
        gradient_lines(parsed, captured[:n], names),
        _functions(parsed, captured[:n], options_of(options, forward=False)),
        _kernels(parsed, captured, ints, dtype, head_dim, target, options) + (f"\n{ASSUMED}" if assumed else ""),
        _backend(parsed),
        _tracing(why_uncached(score_mod, mask_mod, score_dtype=score_dtype, device=torch.device("cpu"))),
    )
    if not quiet:
        for role, mod in (("score_mod", score_mod), ("mask_mod", mask_mod)):
            if mod is not None:
                print(f"{role} {describe(mod)}")
        print(f"\n{report}")
    return report


def explain_mask(mask_mod: Callable[..., Tensor]) -> tuple[str, str]:
    """The parts `formula` and `blocks` of the explanation of a mask alone: no kernel is looked at, so it is quick.

    Raises `TraceError` for a mask that cannot be traced.

    Example:
        >>> import flexattn
        >>> explain_mask(flexattn.masks.sliding_window(64))[1]
        'keys of a query: kv_idx >= q_idx - 63 and kv_idx <= q_idx'
    """
    program, captured, _ = trace(None, mask_mod)
    parsed = variant(program)
    n = len(captured) - parsed.n_floats
    names = captured_names((None, mask_mod), captured[:n], captured[n:])
    return "" if parsed.mask is None else formula({"keep": parsed.mask}, names), _blocks(parsed, names)


def _blocks(parsed: Variant, names: Mapping[str, str]) -> str:
    if parsed.mask is None:
        return "no mask: every block is full"
    # sympy, for this alone
    from .codegen.key_ranges import described, plan_of
    from .codegen.symbolic import simplified

    plan, short = plan_of(parsed.mask), simplified(parsed.mask)
    lines = [] if short is parsed.mask else [f"simplified: {inline(short, names)}"]
    if plan is None:
        lines.append("keys of a query: not one range by form; boxes are split where the mask's boundary runs")
    else:
        lines.append(f"keys of a query: {described(plan, names)}")
    return "\n".join(lines)


def _derivative(derivative: Any, names: Mapping[str, str]) -> str:
    text = gradients(derivative.score, derivative.loads, names)
    return text or "nothing depends on the score or on a captured tensor"


def _functions(parsed: Variant, captured: Sequence[Tensor], options: Mapping[str, Any]) -> str:
    wanted = [i for i, t in enumerate(captured) if t.requires_grad]
    methods = usual_methods(parsed.derivative.loads, wanted, is_deterministic(options))
    made = [f for f in functions(parsed, methods, fast_tanh=bool(options.get("FAST_TANH"))) if f is not None]
    return "\n".join(f.source for f in made).rstrip() or "none: the templates compute unmodified scores by themselves"


def _kernels(
    parsed: Variant,
    captured: Sequence[Tensor],
    ints: Sequence[Any],
    dtype: torch.dtype,
    head_dim: int,
    target: str | None,
    options: Mapping[str, Any],
) -> str:
    if target is None and not torch.cuda.is_available():
        return (
            "attention_forward, attention_backward_dq, attention_backward_dkdv: no GPU here; name one, target='sm_90'"
        )
    if dtype is torch.float64 or head_dim > validate.MAX_HEAD_DIM:
        what = "float64" if dtype is torch.float64 else f"a head dimension over {validate.MAX_HEAD_DIM}"
        return f"none: {what} is computed by torch operators"
    from .backends.survey import survey
    from .backends.target import interpreted, named

    if interpreted():
        if target is None:
            return "run by Triton's interpreter, which compiles nothing"
        raise ValueError("Triton's interpreter is on, which compiles nothing: unset TRITON_INTERPRET to use target=")
    found = survey(parsed, captured, ints, dtype, head_dim, None if target is None else named(target), options=options)
    timed = any(said and name.endswith("AUTOTUNE") for name, said in options.items())
    return "\n".join([*map(str, found), *([UNTIMED] if timed else [])])


def _backend(parsed: Any) -> str:
    from .backends.tiled import additive_bias

    if not parsed.modifies_score:
        how = "scores are used as they are"
    elif additive_bias(parsed) is not None:
        how = "the mod adds a bias: one fused multiply-add into the scores"
    else:
        how = "the mod is evaluated on each tile of scores"
    mask = "no mask" if parsed.mask is None else "partial blocks are masked element by element, full blocks are not"
    return f"on a CPU: tiled (torch operators, online softmax in base 2); {how}; {mask}"


def _tracing(reason: str) -> str:
    return f"at every call, because {reason}" if reason else "once, until something that the mods reach changes"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
