"""Which of the options that a test draws a problem permits, by a rule that knows nothing of the kernels' own.

What is left must be followed: a refusal fails the test.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexattn.codegen.access import usual_methods
from flexattn.config import fitted
from flexattn.kernel_options import options_text, parsed_options
from flexattn.problem import Problem


def permitted(options: str, problem: Problem, wanted: Sequence[int]) -> str:
    """The options without those that cannot be followed, and with tiles that divide the blocks of the mask.

    Operands are contiguous; `wanted` are the captured tensors whose gradients are asked for.
    """
    said = dict(parsed_options(options.strip(",")))
    if problem.block_mask:
        for name, tile in said.items():
            if name.startswith("BLOCK_"):
                said[name] = fitted(tile, problem.block_size["MN".index(name[6])])
    rows = [t.shape[-1] * t.element_size() for t in (problem.query, problem.value)]
    blocks = problem.block_size if problem.block_mask else ()
    if any(n % 16 for n in (*rows, *blocks)):
        said.pop("USE_TMA", None), said.pop("OVERLAP", None)
    if "column" in usual_methods(problem.variant.derivative.loads, wanted):
        said.pop("UPRIGHT", None)
    return options_text(said)
