"""Names of compiled kernels, as profilers show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_FUNCTIONS = ("score_mod", "mask_mod", "score_mod_grad", "row_grads", "column_grads", "tile_grads")


def kernel_name(kernel: str) -> Callable[[Any], str]:
    """Names a specialization: the kernel's name, then those of the functions compiled into it, which tell variants apart."""

    def name(specialization: Any) -> str:
        constants = {k[0] if isinstance(k, tuple) else k: v for k, v in specialization.constants.items()}
        functions = [constants.get(f) for f in _FUNCTIONS]
        return "_".join([kernel, *(f.fn.__name__ for f in functions if f is not None)])

    return name


# Numbers of `work_of_program`, which change with lengths and batches: a kernel for those that are 1, and those that 16
# divides, would be compiled anew without being faster.
COUNTS = ("heads_at_once", "batches", "tiles")
