"""Arguments of a kernel without the numbers that Triton compiles a kernel of its own for: choices may not depend on these.

Those are numbers that are 1, that 16 divides, or that need 64 bits. The kernels compute the same, but need more registers or
fewer, by which configurations are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..templates.arguments import Lists, Matrix, Order


def unspecialised(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with other numbers where they follow from lengths and batches."""
    return {name: _FORMS.get(name, _BY_TYPE.get(type(value), _same))(value) for name, value in arguments.items()}


def _same(value: Any) -> Any:
    return value


def _odd(value: Any) -> Any:
    """A number that is not special in the place of each."""
    return 3 if type(value) is int else value


def _odd_members(values: tuple[Any, ...]) -> tuple[Any, ...]:
    made = map(_odd, values)
    return type(values)(*made) if hasattr(values, "_fields") else tuple(made)


_FORMS: dict[str, Callable[[Any], Any]] = {"captured": _odd_members, "dcaptured": _odd_members, "sharing": _odd}
_BY_TYPE: dict[type, Callable[[Any], Any]] = {
    # 16 divides the strides of heads and batch entries in the aligned layout; those of rows are head dimensions.
    Matrix: lambda matrix: matrix._replace(stride_b=16, stride_h=16),
    Lists: _odd_members,
    Order: _odd_members,
}
