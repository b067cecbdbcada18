"""What `bench_gpu.py` measures: problems, passes and contenders, in the order in which they decide something."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple

CASES = (
    "noop",
    "causal",
    "alibi",
    "softcap",
    "sliding_window",
    "document",
    "prefix_lm",
    "relative_bias",
)
IMPLS = ("flexattn", "torch_flex", "sdpa_flash", "sdpa_cudnn", "sdpa_mask")
TUNED = ("flexattn", "torch_flex", "torch_flex_tuned")
ALL_IMPLS = (*IMPLS, "torch_flex_tuned")
WORK = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}  # in units of the forward's products
PARTS = (*WORK, "first_call", "host")
APART, ALL = ("forward", "backward"), tuple(WORK)
LARGEST_MASK = 1 << 30  # elements of a mask tensor


class Cell(NamedTuple):
    """One attention problem: a case of CASES and sizes."""

    case: str
    dtype: str
    B: int
    Hq: int
    Hkv: int
    S: int
    D: int

    @property
    def shape(self) -> str:
        """All sizes but S, as --shapes has them: B1H32/8D128."""
        heads = f"H{self.Hq}" if self.Hq == self.Hkv else f"H{self.Hq}/{self.Hkv}"
        return f"B{self.B}{heads}D{self.D}"

    @classmethod
    def of(cls, record: dict[str, Any]) -> Cell:
        return cls(*(record[name] for name in cls._fields))


class Task(NamedTuple):
    """A cell, the passes to time and the contenders to compare."""

    cell: Cell
    parts: tuple[str, ...]
    impls: tuple[str, ...] = IMPLS


class Shape(NamedTuple):
    B: int
    Hq: int
    Hkv: int
    D: int


TINYLLAMA, TINYLLAMA_8 = Shape(1, 32, 4, 64), Shape(8, 32, 4, 64)
LLAMA, LLAMA_2, LLAMA_4 = Shape(1, 32, 8, 128), Shape(2, 32, 8, 128), Shape(4, 32, 8, 128)
LARGE = Shape(1, 64, 8, 128)  # of which cuDNN's and FlashAttention's authors published times
SMALL = Shape(4, 16, 16, 64)
TINY = Shape(1, 2, 1, 16)

DENSE, SPARSE, MODS = ("noop", "causal"), ("document", "sliding_window"), ("alibi", "softcap")
OTHERS = ("prefix_lm", "relative_bias")
TRAINED = ("causal", *SPARSE)
FIRST_CALL = Cell("causal", "bfloat16", 1, 8, 8, 1024, 64)  # small: nothing of it is the kernels' own time
HOST = Cell("causal", "bfloat16", 1, 4, 4, 256, 64)


def can_solve(impl: str, cell: Cell) -> bool:
    """Whether a contender has a way to compute a cell, within memory."""
    if impl in ("sdpa_flash", "sdpa_cudnn"):  # without a mask tensor
        return cell.case in DENSE
    if impl == "sdpa_mask":  # for what SDPA cannot do without one
        heads = cell.Hq if cell.case in ("alibi", "relative_bias") else 1
        return cell.case not in (*DENSE, "softcap") and heads * cell.S**2 <= LARGEST_MASK
    return True


def tasks(
    cases: Iterable[str], lengths: Iterable[int], shape: Shape, parts: tuple[str, ...] = APART, **more: Any
) -> list[Task]:
    """Lengths first, then cases: those of one problem stand together, so that one run compares them."""
    return [
        Task(Cell(case, "bfloat16", shape.B, shape.Hq, shape.Hkv, S, shape.D), parts, **more)
        for S, case in product(lengths, cases)
    ]


CORE = [
    Task(HOST, ("host",), ("flexattn",)),
    Task(FIRST_CALL, ("first_call",), ("flexattn",)),
    *tasks(DENSE, [8192], LARGE),
    *tasks(DENSE, [8192], SMALL),
    *tasks(["causal"], [2048], TINYLLAMA, ALL),
    *tasks(["causal"], [2048], TINYLLAMA_8, ALL),
    *tasks(["causal", *SPARSE], [8192], LLAMA, ALL),
    *tasks(["noop", *MODS], [8192], LLAMA),
    *tasks([*SPARSE, "alibi"], [8192], SMALL),
    *tasks(DENSE, [16384, 4096], LARGE),
    *tasks(DENSE, [32768], SMALL),
    *tasks(OTHERS, [8192], LLAMA),
    *tasks(["softcap", *OTHERS], [8192], SMALL),
    Task(HOST, ("host",), ("flexattn", "torch_flex", "sdpa_flash")),
    Task(FIRST_CALL, ("first_call",), ("flexattn", "torch_flex")),
]
TRAINING = [
    *tasks(TRAINED, [2048], TINYLLAMA, ALL),
    *tasks(TRAINED, [2048], TINYLLAMA_8, ALL),
    *tasks(TRAINED, [4096], LLAMA_4, ALL),
    *tasks(TRAINED, [8192], LLAMA, ALL),
    *tasks(TRAINED, [8192], LLAMA_2, ALL),
]
LONG = tasks([*TRAINED, "prefix_lm"], [32768, 65536, 131072], LLAMA)
HEADS = [
    *tasks(DENSE, [2048, 32768], LARGE),
    *tasks(CASES, [2048, 8192, 32768], SMALL),
    *tasks(["causal"], [512, 1024], LLAMA_4),
    *tasks(["causal"], [4096, 8192], Shape(1, 32, 32, 128)),
    *tasks(["causal"], [4096, 8192], Shape(1, 32, 8, 64)),
]
DIMS = [
    *tasks(["causal"], [4096, 16384], Shape(1, 16, 16, 256)),
    *(task for D in (80, 96, 192) for task in tasks(["causal"], [4096], Shape(4, 16, 16, D))),
]
AUTOTUNED = [  # minutes of compiling
    *tasks(["causal"], [8192], LARGE, impls=TUNED),
    *tasks(["causal"], [8192], SMALL, impls=TUNED),
    *tasks(["document"], [8192], LLAMA, impls=TUNED),
]
SUITES = {
    "core": CORE,
    "training": TRAINING,
    "heads": HEADS,
    "long": LONG,
    "dims": DIMS,
    "tuned": AUTOTUNED,
}
SMOKE = [  # the second length is judged by some of its rows
    Task(HOST._replace(S=32, D=16), ("host",), ("flexattn",)),
    Task(FIRST_CALL._replace(S=32, D=16), ("first_call",), ("flexattn",)),
    *tasks(CASES, [96], TINY, ALL),
    *tasks(["causal", "document"], [160], TINY, impls=("flexattn", "torch_flex")),
]
SHAPES = tuple(dict.fromkeys(task.cell.shape for suite in SUITES.values() for task in suite))


class Filter(NamedTuple):
    """What of the suites to measure; None is all of it."""

    cases: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    shapes: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    impls: tuple[str, ...] | None = None

    def keep(self, chosen: Iterable[Task], dtype: str = "bfloat16") -> Iterator[Task]:
        """The tasks that are left, each without what was not asked for.

        A pass that was asked for is timed also where the suite leaves it out.
        """
        for task in chosen:
            cell = task.cell._replace(dtype=dtype)
            problem = task.parts[0] in WORK
            sizes = ((cell.case, self.cases), (cell.S, self.lengths), (cell.shape, self.shapes))
            if problem and any(wanted is not None and value not in wanted for value, wanted in sizes):
                continue
            if not problem and self.parts is None and any(wanted is not None for _, wanted in sizes):
                continue  # who asks for a case does not ask for first calls
            own = ALL if problem else task.parts
            parts = task.parts if self.parts is None else tuple(p for p in own if p in self.parts)
            wanted = task.impls if self.impls is None else self.impls
            impls = tuple(i for i in wanted if can_solve(i, cell))
            if parts and impls:
                yield Task(cell, parts, impls)
