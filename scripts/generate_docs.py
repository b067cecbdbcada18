"""Print docs/operations.md from the tables of the compiler: python scripts/generate_docs.py > docs/operations.md"""

from __future__ import annotations

import inspect
import textwrap

import torch
from torch import Tensor

from flexattn.codegen.calls import FUNCTIONS, Builder, weak
from flexattn.codegen.derivative import DERIVATIVES, derivative
from flexattn.codegen.errors import TraceError
from flexattn.codegen.evaluate import TORCH_DTYPE
from flexattn.codegen.ir import DType, Node, Op, input_node
from flexattn.codegen.promotion import cast
from flexattn.codegen.spec import SIGNATURES
from flexattn.codegen.spellings import ALIASES, RANDOM
from flexattn.kernel_options import OPTIONS, PREFIXES

CLASSES = {"b": "bool", "i": "integer", "f": "float"}
# Classes of operands and the dtype that stands for each.
SAMPLES = {"float": DType.FLOAT32, "integer": DType.INT32, "bool": DType.BOOL}
OPERATORS = {
    **{"add": "+", "sub": "-", "mul": "*", "div": "/", "floor_divide": "//", "remainder": "%", "pow": "**"},
    **{"neg": "-x", "positive": "+x", "abs": "abs(x)", "round": "round(x)", "bitwise_not": "~x"},
    **{"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^", "bitwise_left_shift": "<<"},
    **{"bitwise_right_shift": ">>", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="},
}


def public(name: str) -> bool:
    """Whether people can write the name; the rest are parts of operators, such as the reflected `rmod`."""
    return any(hasattr(place, name) for place in (torch, Tensor, torch.nn.functional))


def call(builder: Builder, dtype: DType) -> Node:
    """A call with operands of one dtype. Optional operands are left out, but for the bounds of clamp."""
    arguments: list[Node] = []
    options: dict[str, Node | torch.dtype] = {}
    for name, parameter in inspect.signature(builder).parameters.items():
        if name in ("condition", "mask"):
            arguments.append(input_node("q_idx", DType.BOOL))
        elif name in ("min", "max") and parameter.default is not parameter.empty:
            options[name] = weak(1)
        elif name == "target_type":
            options[name] = TORCH_DTYPE[dtype]
        elif name == "arguments" or name == "data":
            arguments.append(weak(1))
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            arguments.append(input_node("score" if name == "input" else "h", dtype))
    return builder(*arguments, **options)


def row(name: str) -> str:
    """One function: its spellings, the operand classes it takes, and whether a gradient passes."""
    spellings = [f"`{OPERATORS[name]}`".replace("|", "\\|")] if name in OPERATORS else []
    spellings += [f"`{a}`" for a in sorted(ALIASES) if ALIASES[a] == name and a not in RANDOM and public(a)]
    accepted, gradient = [], "none"
    for label, dtype in SAMPLES.items():
        try:
            result = call(FUNCTIONS[name], dtype)
        except TraceError:
            continue
        accepted.append(label)
        if dtype.is_float and result.dtype.is_float:
            found = derivative(cast(result, DType.FLOAT32)).score
            gradient = "none" if found is None or found.is_const else "yes"
    return f"| `{name}` | {', '.join(spellings)} | {', '.join(accepted)} | {gradient} |"


def functions() -> str:
    header = ["| function | also written | operands | gradient |", "|---|---|---|---|"]
    return "\n".join([*header, *(row(name) for name in sorted(FUNCTIONS) if public(name))])


def operations() -> str:
    rows = []
    for op in Op:
        if op not in SIGNATURES:
            continue
        signature = SIGNATURES[op]
        dtypes = ", ".join(CLASSES[c] for c in signature.accepts)
        result = "bool" if signature.result == "bool" else "as the operands"
        gradient = "yes" if op in DERIVATIVES else "none"
        rows.append(f"| `{op.value}` | {signature.arity} | {dtypes} | {result} | {gradient} |")
    header = ["| operation | operands | dtypes | result | gradient |", "|---|---|---|---|---|"]
    return "\n".join([*header, *rows])


def options() -> str:
    rows = [f"| `{name}` | {option.kind} | {option.meaning} |" for name, option in OPTIONS.items()]
    return "\n".join(["| option | value | meaning |", "|---|---|---|", *rows])


def names(items: object) -> str:
    return ", ".join(f"`{item}`" for item in items)  # type: ignore[attr-defined]


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    random = paragraph(f"Functions that draw random numbers are refused by name: {names(sorted(RANDOM))}.")
    dtypes = paragraph(
        "The functions above are built from these. The operands of one operation have one dtype, reached by explicit casts "
        f"that follow torch's type promotion, out of {names(d.value for d in DType)}. Beside them stand `load` (an element "
        "of a captured tensor), `cast` and `where`, through which gradients pass."
    )
    prefixes = " or ".join(f"`{p}`" for p in PREFIXES)
    print(
        f"""# Supported operations

`scripts/generate_docs.py` prints this page from the tables that the compiler uses.

## Functions a mod may call

A name stands for the function of `torch` or `torch.nn.functional` and for the tensor method, whichever exist; for the
operator, also reflected (`2 - score`); and for the in-place form (`score += 1`, which rebinds the score). "Gradient: none"
marks a function that is constant piece by piece, whose result is no float, or that cuts the gradient on purpose.

{functions()}

The reductions `sum`, `mean`, `prod`, `amax`, `amin`, `max`, `min`, `any` and `all`, and the products `@`, `dot` and
`inner`, take short rows and matrices of captured tensors. `max(a, b)` and `min(a, b)` of torch are `maximum` and `minimum`.

{random}

## Operations of the program

{dtypes}

{operations()}

## Kernel options

The keys of `kernel_options`, each with an optional prefix {prefixes}. They tune GPU kernels and
never change a result beyond rounding, but for `FAST_TANH`. The kernels follow what is pinned. Where the operands, the block
mask or the GPU do not permit it, the call raises `ValueError`, which says why and what to write instead; candidates of
`AUTOTUNE` are left out. The backends `tiled` and `reference` have nothing to tune: they accept all options, so that code for a
GPU runs on a CPU too.

{options()}"""
    )


if __name__ == "__main__":
    main()
