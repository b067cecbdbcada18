"""Tensors as the tensor memory accelerator (TMA) of a GPU reads them: descriptors, where a tensor permits one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes, of the first element and of all strides but the last: CUDA driver API, cuTensorMapEncodeTiled
FARTHEST_STRIDE = 2**40  # bytes, likewise
LARGEST_BOX = 256  # elements along an axis, likewise
# The descriptors of each matrix that is read: of the first piece of columns, and of the second.
TMA = {name: (f"{short}_tma", f"{short}_rest") for name, short in (("q", "q"), ("k", "k"), ("v", "v"), ("dout", "do"))}


def describable(t: Tensor) -> bool:
    """Whether a tensor [B, H, rows, columns] can be read through a descriptor."""
    size = t.element_size()
    if t.stride(3) != 1 or t.numel() == 0 or t.data_ptr() % ALIGNMENT:
        return False
    return all(
        n == 1 or (s * size % ALIGNMENT == 0 and (0 < s * size < FARTHEST_STRIDE or (s == 0 and i < 2)))
        for i, (n, s) in enumerate(zip(t.shape[:3], t.stride()[:3], strict=True))
    )


def indescribable(t: Tensor) -> str:
    """Why a tensor with elements is not `describable`, and what would make it so."""
    unit, size = ALIGNMENT // t.element_size(), t.element_size()
    if t.shape[3] % unit:
        return (
            f"has rows of {t.shape[3]} elements of {size} bytes; make that a multiple of {unit}, for example by zeros"
        )
    if t.stride(3) != 1:
        return "has rows whose elements are not adjacent; pass it through .contiguous()"
    if t.data_ptr() % ALIGNMENT:
        return f"begins at an address that is no multiple of {ALIGNMENT} bytes; pass it through .clone()"
    return (
        f"has strides {t.stride()}, which are no positive multiples of {unit} elements; pass it through "
        ".clone(memory_format=torch.contiguous_format)"
    )


def tile_descriptor(t: Tensor, rows: int, columns: int) -> Any:
    """The descriptor of a describable tensor that reads [rows, columns] of one batch entry and head.

    An expanded axis, of stride 0, has one entry.
    """
    unit = ALIGNMENT // t.element_size()
    shape = [1 if s == 0 else n for n, s in zip(t.shape, t.stride(), strict=True)]
    strides = [unit if n == 1 else s for n, s in zip(shape[:3], t.stride()[:3], strict=True)]
    return TensorDescriptor(t, shape, [*strides, 1], [1, 1, rows, columns])


def sum_descriptor(t: Tensor, rows: int, columns: int) -> Any:
    """The descriptor of a contiguous buffer [..., any columns] to which tiles [rows, columns] are added."""
    flat = t.view(-1, t.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, columns])
