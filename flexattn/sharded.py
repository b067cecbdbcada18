"""Attention on DTensors: what the operator gets on each rank, and the DTensors that are made of its results.

The batch, the heads and the queries may be sharded over the dimensions of a device mesh; each rank runs the operator on
its part. Mods see global indices: of the program's indices a rank adds where its part begins. A captured tensor that is
read at the plain index, as `slopes[h]`, is sharded along with it instead: what a rank does not read is neither gathered
nor given a gradient there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .codegen.batching import plain_dimensions, shifted
from .codegen.program import parse
from .layout import order_in_memory

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

AXES = ("b", "h", "q_idx")  # of a query's dimensions 0, 1 and 2
NAMES = ("query", "key", "value")


def involved(*tensors: Tensor) -> bool:
    """Whether there is a DTensor among these. Imports nothing."""
    for t in tensors:  # noqa: SIM110  # a generator takes twice as long, and this is asked at every call
        if type(t) is not Tensor and type(t) is not Parameter and _is_dtensor(t):
            return True
    return False


def _is_dtensor(t: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def coordinates(*tensors: Tensor) -> tuple[int, ...]:
    """Where this rank is on the mesh of the first DTensor."""
    t = next(t for t in tensors if _is_dtensor(t))
    return tuple(t.device_mesh.get_coordinate() or ())  # type: ignore[attr-defined]


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, each DTensor gathered."""
    return [t.detach().full_tensor() if involved(t) else t for t in tensors]  # type: ignore[attr-defined]


def is_freed(parameter: Tensor) -> bool:
    """Whether a parameter is one of `fully_shard` outside the forward that it is whole in."""
    return parameter.untyped_storage().nbytes() == 0 and parameter.numel() > 0


class Part(NamedTuple):
    """Which indices of an axis a rank has."""

    start: int
    size: int


class Operands(NamedTuple):
    """Operands of the operator, global or of one rank."""

    query: Tensor
    key: Tensor
    value: Tensor
    captured: list[Tensor]
    block_mask: Sequence[Tensor]
    ints: list[int]
    program: str


class Sharding(NamedTuple):
    """How a query lies on its mesh.

    Attributes:
        mesh, placements: the query's.
        axes: for each dimension of the mesh, the axis that is sharded over it, or None.
        parts: this rank's part of each axis that is sharded.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    axes: tuple[str | None, ...]
    parts: dict[str, Part]

    def ways(self, axis: str) -> list[int]:
        """Over how many ranks each dimension of the mesh splits an axis."""
        return [self.mesh.size(m) for m, a in enumerate(self.axes) if a == axis]

    def along(self, dimensions: dict[str, int]) -> tuple[Placement, ...]:
        """Placements of a tensor that has these dimensions for some axes, and is needed whole but for them."""
        from torch.distributed.tensor import Replicate, Shard

        return tuple(Shard(dimensions[a]) if a is not None and a in dimensions else Replicate() for a in self.axes)

    def local(self, t: Tensor, dimensions: dict[str, int]) -> Tensor:
        """A rank's part of a tensor along these dimensions. Gradients of the parts are put together or added up."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if not isinstance(t, DTensor):
            if not (t.requires_grad and torch.is_grad_enabled()):
                for axis, dim in dimensions.items():
                    if axis in self.parts:
                        t = t.narrow(dim, *self.parts[axis])
                return t
            t = DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        wanted = self.along(dimensions)
        # Where the query is sharded and this is not, each rank has the gradient of its own queries only.
        of_gradient = [
            Partial() if axis is not None and p.is_replicate() else p for axis, p in zip(self.axes, wanted, strict=True)
        ]
        made: Tensor = t.redistribute(placements=wanted).to_local(grad_placements=of_gradient)
        return made

    def joined(self, t: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
        """The DTensor of a result [b, h, q_idx, ...], of which this is the rank's part, of a shape and order in memory."""
        from torch.distributed.tensor import DTensor

        stride, step = [0] * len(shape), 1
        for d in reversed(order):
            stride[d], step = step, step * max(shape[d], 1)
        # Both are given, since from the parts they could not be told where those are uneven.
        return DTensor.from_local(
            t, self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )


class Split(NamedTuple):
    """A call on DTensors as this rank runs it."""

    operands: Operands
    sharding: Sharding
    query: Tensor  # the DTensor

    def join(self, results: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Output, lse and max_scores as DTensors with the query's placements."""
        out, *statistics = results
        sizes = self.query.shape[:-1]
        made = self.sharding.joined(out, (*sizes, out.shape[-1]), order_in_memory(self.query))
        lse, max_scores = (self.sharding.joined(t, sizes, range(3)) for t in statistics)
        return made, lse, max_scores


def split(whole_call: Operands, block_size: Sequence[int]) -> Split:
    """This rank's part of a call whose query, key or value, or a captured tensor, is a DTensor.

    Raises `TypeError` and `ValueError`, on every rank alike, for placements that it cannot compute with.
    """
    query, key, value, captured, block_mask, ints, program = whole_call
    sharding = _sharding(query, key, value, captured)
    _check_heads(query, key, sharding)
    sizes = query.shape[0], query.shape[1], query.shape[2]
    kept: list[dict[str, int]] = [{} for _ in captured]
    ints = list(ints)
    for axis, part in sharding.parts.items():
        n, ways = sizes[AXES.index(axis)], sharding.ways(axis)
        most = _part(n, ways, [0] * len(ways)).size  # the same on all ranks, so that all raise
        dimensions = {}
        for number, dim in _plain_dimensions(whole_call.program, axis).items():
            have = captured[number].shape[dim]
            if have == n:
                dimensions[number] = kept[number][axis] = dim
            elif have == most and not involved(captured[number]):
                raise ValueError(_local_captured(axis, n, tuple(captured[number].shape)))
        program, is_shifted = _shifted(program, axis, tuple(dimensions.items()))
        if is_shifted:
            ints.append(part.start)
    shared_batch = {} if key.shape[0] == 1 else {"b": 0}
    shared_head = {} if key.shape[1] == 1 else {"h": 1}
    local = Operands(
        sharding.local(query, {"b": 0, "h": 1, "q_idx": 2}),
        sharding.local(key, {**shared_batch, **shared_head}),
        sharding.local(value, {**shared_batch, **shared_head}),
        [sharding.local(t, dims) for t, dims in zip(captured, kept, strict=True)],
        _lists(block_mask, sharding, sizes[2], block_size[0]),
        ints,
        program,
    )
    return Split(local, sharding, query)


# ---- the query's sharding


def _sharding(query: Tensor, key: Tensor, value: Tensor, captured: Sequence[Tensor]) -> Sharding:
    from torch.distributed.tensor import DTensor

    kinds = ["a DTensor" if isinstance(t, DTensor) else "a plain tensor" for t in (query, key, value)]
    if len(set(kinds)) > 1:
        said = ", ".join(f"{name} is {kind}" for name, kind in zip(NAMES, kinds, strict=True))
        raise TypeError(
            f"{said}; all three must be of one kind. Make a DTensor of a plain tensor that every rank has whole with "
            "DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim), or pass the local parts of all three: t.to_local()"
        )
    if not isinstance(query, DTensor):
        shape = next(tuple(t.shape) for t in captured if isinstance(t, DTensor))
        raise TypeError(
            f"a mod captures a DTensor of shape {shape}, but query is a plain tensor. Capture t.full_tensor(), or "
            "make DTensors of query, key and value. (A parameter of a module under fully_shard is whole while the forward "
            "of that module runs: let the mod read it there, as self.name)"
        )
    mesh = query.device_mesh
    if mesh.get_coordinate() is None:
        raise ValueError(f"this rank is not part of query's mesh, {mesh}; call flex_attention on the ranks of the mesh")
    for name, t in [*zip(NAMES[1:], (key, value), strict=True), *(("a captured tensor", t) for t in captured)]:
        if isinstance(t, DTensor) and t.device_mesh != mesh:
            raise ValueError(
                f"{name} of shape {tuple(t.shape)} is on another mesh, {t.device_mesh}, than query, {mesh}. Bring it there: "
                "DTensor.from_local(t.full_tensor(), query.device_mesh, [Replicate()] * query.device_mesh.ndim)"
            )
    axes = tuple(_axis(query, m) for m in range(mesh.ndim))
    parts = {}
    for axis in dict.fromkeys(a for a in axes if a is not None):
        over = [m for m, a in enumerate(axes) if a == axis]
        own = [mesh.get_local_rank(m) for m in over]
        parts[axis] = _part(query.shape[AXES.index(axis)], [mesh.size(m) for m in over], own)
    return Sharding(mesh, tuple(query.placements), axes, parts)


def _axis(query: DTensor, m: int) -> str | None:
    """The axis that a dimension of the mesh splits. Raises `ValueError` for what a rank cannot compute by itself."""
    from torch.distributed.tensor import Replicate, Shard

    placement = query.placements[m]
    if placement.is_replicate():
        return None
    if type(placement) is Shard and placement.dim < len(AXES):
        return AXES[placement.dim]
    name = f"{m}" if query.device_mesh.mesh_dim_names is None else f"{m} ({query.device_mesh.mesh_dim_names[m]!r})"
    if placement.is_partial():
        what, why = "is a sum whose terms are on different ranks", "Softmax needs the sum"
    elif type(placement) is Shard:
        what, why = "is sharded along head_dim", "A dot product needs all of it"
    else:
        what, why = f"is placed as {placement}", "Its ranks do not hold adjacent parts in order"
    fixed = [Replicate() if p is placement else p for p in query.placements]
    raise ValueError(
        f"query {what} on dimension {name} of the mesh. {why}: query = query.redistribute(placements={fixed}). Batch, heads "
        "and queries may be sharded, by Shard(0), Shard(1) and Shard(2)"
    )


def _part(n: int, ways: Sequence[int], ranks: Sequence[int]) -> Part:
    """The part of n indices of one rank: split by each dimension of the mesh in turn, in pieces of ceil(n / ways)."""
    start = 0
    for way, rank in zip(ways, ranks, strict=True):
        piece = -(-n // way)
        first = min(n, rank * piece)
        start, n = start + first, min(piece, n - first)
    return Part(start, n)


def _check_heads(query: Tensor, key: Tensor, sharding: Sharding) -> None:
    """Raise `ValueError` unless each rank's key heads are those of its query heads."""
    ways, heads, kv_heads = sharding.ways("h"), query.shape[1], key.shape[1]
    n = torch.Size(ways).numel()
    if ways and kv_heads != 1 and kv_heads != heads and kv_heads % n:  # not `in`, see validate.block_mask
        fixed = [
            "Replicate()" if axis == "h" else str(p) for p, axis in zip(sharding.placements, sharding.axes, strict=True)
        ]
        raise ValueError(
            f"query's {heads} heads are sharded over {n} ranks, and {kv_heads} key and value heads cannot be divided among "
            f"them. Give each query head its own: key = key.repeat_interleave({heads // kv_heads}, 1), value likewise; or "
            f"do not shard the heads: query = query.redistribute(placements=[{', '.join(fixed)}])"
        )


# ---- the program and the lists


_plain_dimensions = lru_cache(maxsize=1024)(plain_dimensions)


@lru_cache(maxsize=1024)
def _shifted(program: str, axis: str, kept: tuple[tuple[int, int], ...]) -> tuple[str, bool]:
    """The shifted program, and whether it has a new integer."""
    made = shifted(program, axis, dict(kept))
    return made, parse(made).n_ints > parse(program).n_ints


def _local_captured(axis: str, n: int, shape: tuple[int, ...]) -> str:
    return (
        f"a mod reads a plain tensor of shape {shape} at {axis}, which goes up to {n - 1}: {axis} is the index of the whole "
        "query. Capture the whole tensor, or the DTensor that the parts of all ranks form: "
        "DTensor.from_local(t, mesh, placements); with [Replicate()] * mesh.ndim if it is the whole tensor"
    )


def _lists(lists: Sequence[Tensor], sharding: Sharding, length: int, block: int) -> list[Tensor]:
    """A rank's part of block lists; a batch or head size of 1 stands for all."""
    made = []
    if lists:
        _check_rows(sharding.ways("q_idx"), length, block)
    for t in lists:
        t = sharding.local(t, {axis: dim for dim, axis in enumerate(AXES[:2]) if t.shape[dim] > 1})
        if "q_idx" in sharding.parts:
            start, size = sharding.parts["q_idx"]
            t = t.narrow(2, min(start // block, t.shape[2]), -(-size // block))
        made.append(t)
    return made


def _check_rows(ways: Sequence[int], length: int, block: int) -> None:
    """Raise `ValueError` unless every rank's queries begin with a block, or lie in one."""
    parts = [_part(length, ways, ranks) for ranks in itertools.product(*map(range, ways))]
    wrong = next((p.start for p in parts if p.size and p.start % block and p.start % block + p.size > block), None)
    if wrong is not None:
        raise ValueError(
            f"query's {length} positions are sharded, and a rank's begin at {wrong}, inside a block of {block} queries. Build "
            f"the block mask with blocks that divide {wrong}: create_block_mask(..., BLOCK_SIZE=...)"
        )
