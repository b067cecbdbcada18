"""`flexattn explain MODULE:FUNC`: every stage of one variant, from the function to its derivative and its kernels."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict

from .failures import FINE, Mistake, Unavailable, reading
from .options import MASK_HELP, MOD_HELP, Command, add_dtype, notation, one_of
from .output import Output
from .shapes import positive

SECTIONS = (
    "program", "captured", "formula", "blocks", "derivative", "gradients", "functions", "kernels", "backend", "tracing",
)  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    """The mod, and what the kernels are chosen by."""
    parser.add_argument("mod", type=notation, metavar="MODULE:FUNC", help=MOD_HELP)
    parser.add_argument("--mask", type=notation, metavar="MASK", help=f"with a score_mod: {MASK_HELP}")
    add_dtype(parser)
    parser.add_argument("--head-dim", type=positive, default=64, metavar="N", help="of query and value (default: 64)")
    parser.add_argument("--target", metavar="GPU", help="compile for sm_90, gfx942 ..., which need not be here")
    parser.add_argument(
        "--section",
        type=one_of(SECTIONS),
        action="append",
        metavar="NAME",
        help=f"this part alone; may be given several times: {', '.join(SECTIONS)}",
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Print the explanation, or some of its sections."""
    import torch

    from flexattn import explain as explained
    from flexattn.codegen.trace import describe

    from .pairs import pair

    if arguments.target is not None:
        _check_target(arguments.target)
    mods = pair(arguments.mod, arguments.mask)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    output.progress(f"explaining {mods.text}")
    with reading(mods.text):
        report = explained(
            mods.score_mod,
            mods.mask_mod,
            dtype=dtype,
            head_dim=arguments.head_dim,
            target=arguments.target,
            quiet=True,
        )
    sections = {name: text if isinstance(text, str) else "\n".join(text) for name, text in asdict(report).items()}
    wanted = tuple(arguments.section or SECTIONS)
    named = {role: None if mod is None else describe(mod) for role, mod in mods.roles.items()}
    output.document({**named, **{name: asdict(report)[name] for name in wanted}})
    if arguments.section is None:
        for role, name in named.items():
            if name is not None:
                output.line(f"{role} {name}")
        output.line(f"\n{report}")
    elif len(wanted) == 1:
        output.line(sections[wanted[0]] or "nothing")
    else:
        indented = (textwrap.indent(sections[name] or "nothing", "  ") for name in wanted)
        output.line("\n\n".join(f"{name}\n{text}" for name, text in zip(wanted, indented, strict=True)))
    return FINE


def _check_target(name: str) -> None:
    """Raise for a GPU that is not known, and where nothing can be compiled."""
    try:
        from flexattn.backends.target import interpreted, named
    except ImportError as error:
        raise Unavailable(f"--target needs Triton, which is not installed: {error}") from error
    try:
        named(name)
    except ValueError as error:
        raise Mistake(f"--target: {error}") from error
    if interpreted():
        raise Unavailable("--target compiles kernels, and Triton's interpreter is on: unset TRITON_INTERPRET")


COMMAND = Command(
    "explain",
    "what becomes of a mod: program, formula, derivative, kernels",
    "Every stage of one variant. What is named is a score_mod or a mask, told by its number of arguments.",
    "flexattn explain 'softcap(30)' --mask causal_mask --section derivative",
    add,
    run,
)
