"""Runs a warp-specialised Gluon kernel for Hopper on the CPU, at the worst moments that its barriers allow.

The kernel's own Python functions run, with stand-ins for `gl`, `tl`, `mbarrier`, `async_load`, `warpgroup_mma` and
`warpgroup_mma_wait`; tensors are torch's and layouts mean nothing. The partitions of `warp_specialize` are threads of which one
runs at a time. Who is next is drawn from a seed, at every operation that another partition could see.

What is asynchronous on the device is as unkind as it may be:

- a copy destroys its destination when it is issued, and brings its data later, when the draw says so or nothing else can run;
- a product reads its shared operands when it is waited for, and they must still be what they were when it was issued;
- a barrier has the hardware's phases: arrivals, expected bytes, and a wait for the parity of a phase.

Not modelled: memory proxies and their fences, registers, several programs on one multiprocessor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from gluon_machine import CURRENT, Barrier, Hazard, Product, Schedule, Shared
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class Pointer:
    """Offsets into the storage of a tensor, from its first element on."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return self + -offset

    def elements(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The storage, the offsets, and which of them are meant."""
        room = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - self.tensor.storage_offset()
        offset = torch.as_tensor(self.offset).long()
        offset, meant = torch.broadcast_tensors(offset, torch.as_tensor(True if mask is None else mask))
        if bool(((offset < 0) | (offset >= room))[meant].any()):
            raise Hazard("memory outside a tensor is accessed")
        return self.tensor.as_strided((room,), (1,)), offset, meant


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    storage, offset, meant = pointer.elements(mask)
    return torch.where(meant, storage[torch.where(meant, offset, 0)], torch.as_tensor(other, dtype=storage.dtype))


def store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    storage, offset, meant = pointer.elements(mask)
    storage[offset[meant]] = value.expand(offset.shape)[meant]


@dataclass
class Descriptor:
    """A TMA descriptor: boxes of a tensor, 0 where they reach beyond it."""

    tensor: Tensor
    block_shape: list[int]
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(nbytes=math.prod(self.block_shape) * self.tensor.element_size())

    def box(self, at: Sequence[Any]) -> Tensor:
        result = torch.zeros(self.block_shape, dtype=self.dtype)
        starts = [int(i) for i in at]
        sizes = [max(0, min(n, s - i)) for n, s, i in zip(self.block_shape, self.tensor.shape, starts, strict=True)]
        inside = tuple(slice(i, i + n) for i, n in zip(starts, sizes, strict=True))
        result[tuple(slice(0, n) for n in sizes)] = self.tensor[inside]
        return result


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.waiting = count


def _expect(barrier: Barrier, size: int) -> None:
    CURRENT.get().step()
    barrier.arrived(1, size)


def _arrive(barrier: Barrier) -> None:
    CURRENT.get().step()
    barrier.arrived(1)


def _wait(barrier: Barrier, parity: Any) -> None:
    CURRENT.get().step(lambda: barrier.phase % 2 != int(parity))


def async_load(descriptor: Descriptor, at: Sequence[Any], barrier: Barrier, result: Shared) -> None:
    schedule = CURRENT.get()
    schedule.step()
    if result.shape != descriptor.block_shape:
        raise Hazard("a copy and its destination differ in shape")
    result.data.fill_(math.nan)

    def land() -> None:
        result.data.copy_(descriptor.box(at))
        barrier.arrived(0, -descriptor.block_type.nbytes)

    schedule.copies.append(land)


def warpgroup_mma(a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Any:
    schedule = CURRENT.get()
    schedule.step()
    product = Product(a, b, acc, use_acc)
    if not is_async:
        product.retire()
        return product.value
    assert schedule.running is not None
    schedule.running.products.append(product)
    return product


def warpgroup_mma_wait(outstanding: int, deps: Sequence[Any]) -> Any:
    schedule = CURRENT.get()
    schedule.step()
    assert schedule.running is not None
    under_way = schedule.running.products
    while len(under_way) > outstanding:
        under_way.pop(0).retire()
    results = [d.value if isinstance(d, Product) else d for d in deps]
    if any(r is None for r in results):
        raise Hazard("the result of a product is read before it is there")
    return results[0] if len(results) == 1 else tuple(results)


def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[Any], layout: Any) -> Any:
    if isinstance(layout, mbarrier.MBarrierLayout):
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: barriers[int(i)])
    return Shared(torch.full([int(n) for n in shape], math.nan, dtype=dtype))


def warp_specialize(functions: Sequence[tuple[Any, Any]], warps: Sequence[int], registers: Sequence[int]) -> None:
    assert len(warps) == len(registers) == len(functions) - 1
    CURRENT.get().run(functions)


def _number(x: Any) -> Tensor:
    return torch.as_tensor(x)


def _extremum(exact: Callable[..., Tensor], over_nan: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, y, propagate_nan=None: (over_nan if propagate_nan is None else exact)(_number(x), _number(y))


def _where(condition: Any, x: Any, y: Any) -> Tensor:
    return torch.where(_number(condition), x, y)


OPERATIONS: dict[str, Any] = {
    "load": load,
    "store": store,
    "where": _where,
    "broadcast_to": lambda x, shape: _number(x).broadcast_to(tuple(shape)),
    "maximum": _extremum(torch.maximum, torch.fmax),
    "minimum": _extremum(torch.minimum, torch.fmin),
    "max": lambda x, axis: torch.where(x.isnan(), -math.inf, x).amax(axis),  # the hardware's passes over nan
    "sum": lambda x, axis: x.sum(axis),
    "full": lambda shape, value, dtype, layout=None: torch.full(tuple(shape), value, dtype=dtype),
    "zeros": lambda shape, dtype, layout=None: torch.zeros(tuple(int(n) for n in shape), dtype=dtype),
    "arange": lambda start, end, layout=None: torch.arange(int(start), int(end), dtype=torch.int32),
    "program_id": lambda axis: torch.tensor(CURRENT.get().program, dtype=torch.int32),
    "static_range": range,
    "range": lambda start, end: range(int(start), int(end)),
    "convert_layout": lambda x, layout: x,
    "allocate_shared_memory": allocate_shared_memory,
    "warp_specialize": warp_specialize,
    "int1": torch.bool,
}
STAND_INS: dict[str, Any] = {
    "async_load": async_load,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": lambda: None,
    "mbarrier": SimpleNamespace(
        init=_init, expect=_expect, arrive=_arrive, wait=_wait, MBarrierLayout=mbarrier.MBarrierLayout
    ),
}


class _Language:
    """`tl` and `gl`: the operations above, those of torch that have the same name, and Gluon's layouts."""

    def __getattr__(self, name: str) -> Any:
        if name in OPERATIONS:
            return OPERATIONS[name]
        return next(getattr(module, name) for module in (torch, gl, tl) if hasattr(module, name))


class _Module:
    """A module of device functions."""

    def __init__(self, module: ModuleType, space: dict[int, Any]) -> None:
        self._module, self._space = module, space

    def __getattr__(self, name: str) -> Any:
        return _stand_in(name, getattr(self._module, name), self._space)


def _stand_in(name: str, thing: Any, space: dict[int, Any]) -> Any:
    """What takes the place of a global of device code."""
    if name in STAND_INS:
        return STAND_INS[name]
    if name in ("tl", "gl"):
        return _Language()
    if isinstance(thing, ModuleType):
        return _Module(thing, space)
    if isinstance(thing, tl.constexpr):
        return thing.value
    if isinstance(thing, triton.runtime.JITFunction) or type(thing).__name__ == "InterpretedFunction":
        return _plain(thing, space)
    return thing


def _plain(function: Any, space: dict[int, Any]) -> Any:
    """The Python function of a device function, over stand-ins."""
    plain = function.fn
    if id(plain) not in space:
        stand_ins = dict(plain.__globals__)
        space[id(plain)] = FunctionType(plain.__code__, stand_ins, plain.__name__, plain.__defaults__)
        for name in plain.__code__.co_names:
            if name in stand_ins:
                stand_ins[name] = _stand_in(name, stand_ins[name], space)
    return space[id(plain)]


def _argument(value: Any, space: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value)
    if isinstance(value, TensorDescriptor):
        return Descriptor(value.base.as_strided(value.shape, value.strides), list(value.block_shape), value.layout)
    if isinstance(value, tuple):
        parts = [_argument(v, space) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{name: _argument(v, space) for name, v in vars(value).items()})
    if isinstance(value, tl.dtype):
        return getattr(
            _Language(), {"fp": "float", "bf": "bfloat"}.get(value.name[:2], "int") + value.name.strip("bfpint")
        )
    return _stand_in("", value, space)


def emulate(kernel: Any, programs: int, arguments: dict[str, Any], seed: int) -> None:
    """Run the programs of a grid one after the other. Raises `Hazard` for what the hardware gives no meaning."""
    space: dict[int, Any] = {}
    function = _plain(kernel, space)
    given = {name: _argument(value, space) for name, value in arguments.items()}
    for program in range(programs):
        token = CURRENT.set(Schedule(program, seed))
        try:
            function(**given)
        finally:
            CURRENT.reset(token)
