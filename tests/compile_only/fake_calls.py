"""Attention calls on a fake device, and what they launch: through Triton's real launcher, on a fake libcuda."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
import triton
from launches import FakeDevice
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher
from triton.tools.tensor_descriptor import TensorDescriptor

import flexattn
from flexattn import validate
from flexattn.backends import kernel_lists, launch, plans
from flexattn.block_mask import BlockMask
from flexattn.config import KernelConfig, Pass, chain

POINTER = 1 << 32  # what is larger is an address


class Watched(CudaLauncher):  # type: ignore[misc]
    """Triton's launcher, which says what it was given."""

    seen: ClassVar[list[tuple[int, int, list[Any]]]] = []

    def __call__(self, *given: Any) -> None:
        grid, arguments = given[0], given[9:]
        Watched.seen.append((id(self), grid, list(flat(arguments))))
        super().__call__(*given)


class Device(FakeDevice):
    launcher_cls = Watched


def flat(value: Any) -> Iterator[Any]:
    """The leaves of arguments; tensors as addresses."""
    if isinstance(value, tuple):
        for item in value:
            yield from flat(item)
    elif isinstance(value, TensorDescriptor):
        yield from (value.base.data_ptr(), *value.shape, *value.strides, *value.block_shape)
    else:
        yield value.data_ptr() if isinstance(value, Tensor) else getattr(value, "value", value)


def use_fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are launched on as if they were on a GPU, and there are no plans."""
    triton.runtime.driver.set_active(Device())
    monkeypatch.setattr(validate, "triton_refusal", lambda query, value: "")
    monkeypatch.setattr(launch, "chain", small_tiles)
    plans.clear()


def small_tiles(which: Pass, *place: Any) -> tuple[KernelConfig, ...]:
    """In place of the tables' configurations: what is launched does not depend on tiles, the time to compile it does."""
    return tuple(c._replace(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1) for c in chain(which, *place)[:1])


def launches(call: Callable[[], list[Tensor]], known: dict[str, Tensor], enabled: bool) -> list[Any]:
    """What a call launches: kernels, grids, and arguments with names in the place of addresses."""
    Watched.seen.clear()
    with nullcontext() if enabled else plans.whole_way():
        results = call()
    names = {t.data_ptr(): name for name, t in known.items()}
    names |= {t.data_ptr(): f"result {number}" for number, t in enumerate(results) if t.numel()}

    def named(leaf: Any) -> Any:
        return names.get(leaf, "temporary") if isinstance(leaf, int) and leaf >= POINTER else (type(leaf), repr(leaf))

    return [(kernel, grid, list(map(named, arguments))) for kernel, grid, arguments in Watched.seen]


class Case:
    """An attention call, forward and backward, whose parts can be changed between calls."""

    def __init__(self, L: int = 256, heads: int = 4, mask: Any = None, mod: Any = None, **options: Any) -> None:
        self.q, self.k, self.v = (torch.randn(2, heads, L, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        self.mask, self.mod, self.options = mask, mod, options
        self.more: dict[str, Tensor] = {}
        self.lse = False

    def call(self) -> list[Tensor]:
        given = [self.q, self.k, self.v]
        aux = flexattn.AuxRequest(lse=True, max_scores=True)
        out, rows = flexattn.flex_attention(
            *given, self.mod, self.mask, backend="triton", return_aux=aux, **self.options
        )
        assert rows.lse is not None and rows.max_scores is not None
        found = [out, rows.lse, rows.max_scores]
        distinct = list({id(t): t for t in [*given, *self.more.values()] if t.requires_grad}.values())
        if distinct:
            through = [out, rows.lse] if self.lse else [out]
            grads = torch.autograd.grad(through, distinct, [torch.ones_like(t) for t in through])
            found += [g for g in grads if g.numel()]
        return found

    def known(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, **self.more}
        if self.mask is not None:
            lists = self.mask.kv_lists()
            columns = -(-self.k.shape[2] // self.mask.BLOCK_SIZE[1])
            named |= {f"list {number}": t for number, t in enumerate(lists)}
            by_key = kernel_lists.transposed(lists, columns)
            named |= {f"list by key {number}": t for number, t in enumerate(by_key)}
            if len(lists) > 2:
                named["sorted"] = kernel_lists._sorted(lists)[0]
        return named

    def assert_same(self, hits: int | None = None) -> None:
        """A call has the launches of the whole way; `hits`: how many of forward and backward are done by plans."""
        before = plans.plan_info().hits
        known = self.known()
        found = launches(self.call, known, enabled=True)
        by_plan = plans.plan_info().hits - before
        assert found == launches(self.call, known, enabled=False)
        assert found
        assert hits is None or by_plan == hits

    def warm(self) -> None:
        """Three calls, after which forward and backward have plans."""
        for hits in (0, 0, 2):
            self.assert_same(hits)


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def causal_mask(L: int = 256, **options: Any) -> BlockMask:
    return flexattn.create_block_mask(causal, None, None, L, L, "cpu", **options)
